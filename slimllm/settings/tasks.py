"""The zero-shot tasks of the paper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task of the paper: its heading in the paper's tables, the metric reported there, the hub's evaluation split.

    ``definition`` is lm-eval's file below its folder of tasks.
    """

    heading: str
    reported: str
    split: str
    definition: str


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
