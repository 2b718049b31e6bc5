"""Settings of ``python -m slimllm evaluate``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..cli import check_choice, check_choices, check_range, flag
from ..errors import UserError
from .common import DTYPES
from .tasks import TASKS


@dataclass
class EvalConfig:
    """Settings of an evaluation. Raises UserError where a value makes no sense."""

    model: str | None = flag("model", "checkpoint folder, dense or pruned, hub name or .gguf file", positional=True, nargs="?")
    adapter: str | None = flag("model", "LoRA adapter to apply: OUTPUT_DIR/adapter of post_training.py")
    dtype: str = flag(
        "model",
        "dtype of the weights; auto: the checkpoint's own on a GPU; on a CPU bfloat16 where that is fast, else float32",
        "auto",
        choices=DTYPES,
    )
    device: str = flag("model", "where to evaluate; auto takes a GPU if there is one", "auto")

    tmp_dir: str | None = flag("model", "folder for activations that do not fit in memory [TMPDIR, or the system's]")

    tasks: tuple[str, ...] = flag("tasks", "zero-shot tasks, or none", tuple(TASKS), nargs="*")
    data_dir: str | None = flag(
        "tasks", "folder of TASK.jsonl files in the hub's schema, in place of the hub; a task without a file is left out"
    )
    limit: int | None = flag("tasks", "only the first N questions of each task; the results are marked as limited [all]")

    eval_data: tuple[str, ...] | None = flag(
        "perplexity",
        "any of wikitext2, ptb, python_manual, NAME=FILE, FILE, or none [wikitext2 ptb; python_manual where the hub is out of reach]",
    )
    max_seq_len: int = flag("perplexity", "tokens per block of text", 128)
    eval_limit: int | None = flag("perplexity", "only the first N blocks; the figures are marked as limited [all]")

    output: str | None = flag("output", "file for the results; one that holds some of them is completed [eval_log/NAME.json]")
    overwrite: bool = flag("output", "start the file anew", False)

    def __post_init__(self):
        if not self.model:
            raise UserError("name a model: python -m slimllm evaluate prune_log/NAME")
        self.tasks = tuple(name for item in self.tasks for name in item.split(",") if name not in ("", "none"))
        for name in self.tasks:
            check_choice("tasks", name, TASKS)
        check_choices(self)
        for name in ("limit", "eval_limit"):
            check_range(self, name, 1)
        check_range(self, "max_seq_len", 2)
        if self.data_dir is not None:
            if not os.path.isdir(self.data_dir):
                raise UserError(f"--data_dir {self.data_dir}: no such folder")
            there = tuple(name for name in self.tasks if os.path.isfile(os.path.join(self.data_dir, f"{name}.jsonl")))
            if self.tasks and not there:
                raise UserError(f"--data_dir {self.data_dir}: it has none of {', '.join(f'{name}.jsonl' for name in self.tasks)}")
            self.tasks = there
        if self.adapter is not None and not os.path.isfile(os.path.join(self.adapter, "adapter_config.json")):
            raise UserError(f"--adapter {self.adapter}: no adapter_config.json there; give the adapter folder that post_training.py wrote")
        if self.output is None:
            name = Path(self.model).name
            self.output = f"eval_log/{name}{'_tuned' if self.adapter else ''}.json"
