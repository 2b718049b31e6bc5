"""Settings of ``slimllm evaluate``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..cli import check_choices, check_range, drop_repeats, flag
from ..errors import UserError
from .common import DTYPES, short_name
from .tasks import DATA_DIR_HELP, TASKS, TASKS_HELP, tasks_named, tasks_with_files

UNSAFE = ("humaneval", "mbpp")  # what the names of lm-eval's tasks that run generated code begin with


def check_generation(settings) -> None:
    """Raises UserError for generation tasks that cannot be run as they are asked for; ``none`` among them is dropped."""
    settings.generation = tuple(name for item in settings.generation for name in item.split(",") if name not in ("", "none"))
    drop_repeats(settings, "generation")
    for name in settings.generation:
        if name.startswith(UNSAFE) and not settings.confirm_run_unsafe_code:
            raise UserError(
                f"--generation {name}: lm-eval runs the code that the model writes, on this machine and with your rights; "
                "say --confirm_run_unsafe_code where that is meant, best in a container"
            )
    if settings.include_path is not None and not os.path.isdir(settings.include_path):
        raise UserError(f"--include_path {settings.include_path}: no such folder")


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

    tasks: tuple[str, ...] = flag("tasks", TASKS_HELP, tuple(TASKS), nargs="*")
    data_dir: str | None = flag("tasks", DATA_DIR_HELP)
    limit: int | None = flag("tasks", "only the first N questions of each task; the results are marked as limited [all]")
    generation: tuple[str, ...] = flag("tasks", "tasks of lm-eval in which the model writes, such as gsm8k ifeval humaneval [none]", ())
    include_path: str | None = flag("tasks", "folder of more task definitions for lm-eval, for --generation")
    apply_chat_template: bool = flag("tasks", "put --generation to the model through its chat template", False)
    confirm_run_unsafe_code: bool = flag(
        "tasks", "let lm-eval run the code that the model writes, on this machine, as humaneval and mbpp need", False
    )

    eval_data: tuple[str, ...] | None = flag(
        "perplexity",
        "any of wikitext2, ptb, c4, python_manual, NAME=FILE, FILE, or none [wikitext2 ptb; python_manual where the hub is out of reach]",
    )
    max_seq_len: int = flag("perplexity", "tokens per block of text", 128)
    eval_limit: int | None = flag("perplexity", "only the first N blocks; the figures are marked as limited [all]")

    output: str | None = flag("output", "file for the results; one that holds some of them is completed [eval_log/NAME.json]")
    overwrite: bool = flag("output", "start the file anew", False)

    def __post_init__(self):
        if not self.model:
            raise UserError("name a model: slimllm evaluate prune_log/NAME")
        self.tasks = tasks_named(self.tasks)
        check_choices(self)
        check_generation(self)
        for name in ("limit", "eval_limit"):
            check_range(self, name, 1)
        check_range(self, "max_seq_len", 2)
        self.tasks = tasks_with_files(self.tasks, self.data_dir)
        if self.adapter is not None and not os.path.isfile(os.path.join(self.adapter, "adapter_config.json")):
            raise UserError(f"--adapter {self.adapter}: no adapter_config.json there; give the adapter folder that post_training.py wrote")
        if self.output is None:
            name = short_name(self.model)
            self.output = f"eval_log/{name}{'_tuned' if self.adapter else ''}.json"
