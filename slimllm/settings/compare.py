"""Settings of ``slimllm compare``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..cli import check_choice, check_range, drop_repeats, flag
from ..errors import UserError
from .methods import METHODS, RECIPES
from .tasks import DATA_DIR_HELP, TASKS, tasks_with_files
from .trials import TrialsConfig

QUANTIZATIONS = ("q8_0", "q4_0")  # fewer bits that models are shown in
OURS = tuple(name for name, recipe in RECIPES.items() if recipe.settings)


@dataclass
class CompareConfig(TrialsConfig):
    """Settings of a comparison. Raises UserError where a value makes no sense."""

    target_sparsity: tuple[float, ...] = flag(
        "sparsity", "shares of the decoder's parameters to remove, 0 to 1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    )
    methods: tuple[str, ...] | None = flag("methods", "what is compared: methods by the names of hf_prune.py's --method, or none [all]")
    recipes: tuple[str, ...] = flag("methods", "recipes of ours beside them, or none", OURS, nargs="+")
    also: tuple[str, ...] = flag(
        "methods",
        "NAME=FOLDER: checkpoints to show beside them, post-trained or of fewer tokens; a line for those of one name",
        (),
        nargs="+",
    )
    speed: bool = flag(
        "methods",
        "tokens per second that llama.cpp generates with the dense model and with those of --also (pruned with --runtime gguf), each in 16 "
        "bits, q8_0 and q4_0",
        False,
    )
    tasks: tuple[str, ...] = flag("tasks", "zero-shot tasks, or none", tuple(TASKS), nargs="+")
    data_dir: str | None = flag("tasks", DATA_DIR_HELP)
    limit: int | None = flag("tasks", "only the first N questions of each task; the figures are marked as limited [all]")

    PROGRAM = "compare"

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "limit", 1)
        if self.methods is None:
            self.methods = tuple(METHODS)
        for name, allowed in (("methods", METHODS), ("recipes", OURS), ("tasks", TASKS)):
            setattr(self, name, tuple(value for value in getattr(self, name) if value != "none"))
            drop_repeats(self, name)
            for value in getattr(self, name):
                check_choice(name, value, allowed)
        self.tasks = tasks_with_files(self.tasks, self.data_dir)
        for entry in self.also:
            name, _, folder = entry.partition("=")
            if not name or not os.path.isdir(folder):
                raise UserError(f"--also {entry}: must be NAME=FOLDER, with a folder that is there")
            if name in METHODS or name == "dense":
                raise UserError(f"--also {entry}: {name} is the name of another row of the table; choose another")
            if name.rpartition(", ")[2] in QUANTIZATIONS:
                raise UserError(f"--also {entry}: what stands behind the comma says how many bits a row has; choose another name")
