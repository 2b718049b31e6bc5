"""The zero-shot tasks of the paper, and those that the LowRankArena leaderboard has besides."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..cli import check_choice
from ..errors import UserError


@dataclass(frozen=True)
class Task:
    """A multiple-choice task: its heading in tables, the metric reported there, the hub's evaluation split.

    ``definition`` is lm-eval's file below its folder of tasks. ``shots``: solved examples, of the split "dev", before each question.
    """

    heading: str
    reported: str
    split: str
    definition: str
    shots: int = 0


# The paper does not say which metric it reports; these are what LLaMA-7B's published figures agree with.
TASKS = {
    "boolq": Task("BoolQ", "acc", "validation", "super_glue/boolq/default.yaml"),
    "piqa": Task("PIQA", "acc", "validation", "piqa/piqa.yaml"),
    "hellaswag": Task("HellaSwag", "acc_norm", "validation", "hellaswag/hellaswag.yaml"),
    "winogrande": Task("WinoGrande", "acc", "validation", "winogrande/default.yaml"),
    "arc_easy": Task("ARC-e", "acc", "test", "arc/arc_easy.yaml"),
    "arc_challenge": Task("ARC-c", "acc_norm", "test", "arc/arc_challenge.yaml"),
    "openbookqa": Task("OBQA", "acc_norm", "test", "openbookqa/openbookqa.yaml"),
}

# What LowRankArena calls MMLU-Math is these five parts of MMLU, each question counting the same.
MMLU_MATH = tuple(
    f"mmlu_{subject}"
    for subject in (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
    )
)
MATH = {
    "mathqa": Task("MathQA", "acc_norm", "test", "mathqa/mathqa.yaml"),
    **{name: Task(name, "acc", "test", f"mmlu/default/{name}.yaml", shots=5) for name in MMLU_MATH},
}
ARENA = "lowrankarena"  # stands for all tasks of that leaderboard
TASKS_HELP = "multiple-choice tasks, or none; lowrankarena: these seven, MathQA and the mathematics of MMLU, as that leaderboard has them"
DATA_DIR_HELP = "folder of TASK.jsonl files in the hub's schema, in place of the hub; a task without a file is left out"


def tasks_named(words: Iterable[str]) -> tuple[str, ...]:
    """The tasks that --tasks names: by name, with commas or blanks between them, ARENA or none. Raises UserError for another word."""
    names = [name for word in words for name in word.split(",") if name not in ("", "none")]
    for name in names:
        check_choice("tasks", name, (*TASKS, *MATH, ARENA))
    return tuple(dict.fromkeys(task for name in names for task in ((*TASKS, *MATH) if name == ARENA else (name,))))


def tasks_with_files(tasks: tuple[str, ...], data_dir: str | None) -> tuple[str, ...]:
    """Those of the tasks that ``--data_dir`` has a file of; all where it is None. Raises UserError where it is no folder, or has none."""
    if data_dir is None:
        return tasks
    if not os.path.isdir(data_dir):
        raise UserError(f"--data_dir {data_dir}: no such folder")
    there = tuple(name for name in tasks if os.path.isfile(os.path.join(data_dir, f"{name}.jsonl")))
    if tasks and not there:
        raise UserError(f"--data_dir {data_dir}: it has none of {', '.join(f'{name}.jsonl' for name in tasks)}")
    return there
