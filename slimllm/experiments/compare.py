"""SlimLLM beside other ways to a smaller model, at equal parameters: ``python -m slimllm compare --base_model M``.

Every method as its authors' code does it, and with least squares in place of its own recovery; our two recipes; the dense model in
fewer bits; and any checkpoints that are named.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ..cli import check_choice, check_range, flag
from ..deploy.export_gguf import quantized_bytes
from ..errors import UserError
from ..evaluation import zero_shot
from ..models import loading
from ..reporting.figures import comparison
from ..reporting.trial_tables import comparison_table
from ..settings.methods import METHODS
from ..utils.files import write_text
from .trials import Bench, Trial, TrialsConfig, measure

log = logging.getLogger("slimllm")

PUBLISHED, ON_TOP = "as published", "with least squares"
RECIPES = ("best", "distilled")  # ours
QUANTIZATIONS = ("q8_0", "q4_0")  # of the dense model
BYTES = 2  # of a number in a checkpoint that is not quantized further: bfloat16 or float16


@dataclass
class CompareConfig(TrialsConfig):
    """Settings of a comparison. Raises UserError where a value makes no sense."""

    target_sparsity: tuple[float, ...] = flag(
        "sparsity", "shares of the decoder's parameters to remove, 0 to 1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    )
    methods: tuple[str, ...] | None = flag("methods", f"what is compared: any of {' '.join(METHODS)}, or none [all]")
    recipes: tuple[str, ...] = flag("methods", "recipes of ours beside them, or none", RECIPES, nargs="+")
    also: tuple[str, ...] = flag("methods", "NAME=FOLDER: checkpoints to show beside them, post-trained ones for example", (), nargs="+")
    tasks: tuple[str, ...] = flag("tasks", "zero-shot tasks, or none", tuple(zero_shot.TASKS), nargs="+")
    data_dir: str | None = flag("tasks", "folder of TASK.jsonl files in the hub's schema, in place of the hub")
    limit: int | None = flag("tasks", "only the first N questions of each task; the figures are marked as limited [all]")

    PROGRAM = "compare"

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "limit", 1)
        if self.methods is None:
            self.methods = tuple(METHODS)
        for name, allowed in (("methods", METHODS), ("recipes", RECIPES), ("tasks", zero_shot.TASKS)):
            setattr(self, name, tuple(value for value in getattr(self, name) if value != "none"))
            for value in getattr(self, name):
                check_choice(name, value, allowed)
        if self.data_dir is not None:
            self.tasks = tuple(name for name in self.tasks if os.path.isfile(os.path.join(self.data_dir, f"{name}.jsonl")))
            if not self.tasks:
                raise UserError(f"--data_dir {self.data_dir}: it has a file of none of the tasks")
        for entry in self.also:
            name, _, folder = entry.partition("=")
            if not name or not os.path.isdir(folder):
                raise UserError(f"--also {entry}: must be NAME=FOLDER, with a folder that is there")


def cases(config: CompareConfig) -> list[Trial]:
    """Every pruning, the quick ones first."""
    found = [Trial(method, PUBLISHED, share, {"method": method}) for share in config.target_sparsity for method in config.methods]
    found += [
        Trial(method, ON_TOP, share, {"method": method, "recovery": "least_squares"})
        for share in config.target_sparsity
        for method in config.methods
    ]
    return found + [
        Trial("slimllm", f"recipe {recipe}", share, {"recipe": recipe}) for share in config.target_sparsity for recipe in config.recipes
    ]


def run(config: CompareConfig) -> None:
    """Measures, then writes and prints table and picture of all that the results hold, by other methods and shares too."""
    others = ["dense", *(f"dense, {kind}" for kind in QUANTIZATIONS), *(entry.partition("=")[0] for entry in config.also)]
    trials = [Trial(name, "", 0.0, {}) for name in others] + cases(config)
    folders = dict(entry.split("=", 1) for entry in config.also)

    def unpruned(bench: Bench, trial: Trial):
        return _unpruned(bench, trial, folders)

    def score(bench: Bench, model, row: dict) -> None:
        row.setdefault("bytes", BYTES * row["parameters"])
        row["tasks"] = bench.scores(model, config.data_dir, config.tasks, config.limit)

    rows = measure(config, trials, score, unpruned, {"tasks": config.tasks, "limit": config.limit})["rows"]
    folder = Path(config.output)
    lines = comparison_table(rows)
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    comparison(rows, folder)
    log.info("\n%s\n\neverything lies in %s/", "\n".join(lines), folder)


def _unpruned(bench: Bench, trial: Trial, folders: dict[str, str]):
    """(model, its entry) of a trial that prunes nothing: the dense model, in fewer bits or not, or a checkpoint that is there."""
    entry = {"name": trial.name, "variant": "", "share": 0.0, "settings": {}, "seconds": 0.0, "removed": 0.0}
    if trial.name in folders:
        model = loading.load_model(folders[trial.name], bench.model.dtype, "--also")
        return model, entry | {"parameters": model.num_parameters(), "removed": bench.removed(model)}
    model, kind = copy.deepcopy(bench.model), trial.name.partition(", ")[2]
    entry["parameters"] = model.num_parameters()
    return model, entry | ({"bytes": quantized_bytes(model, kind)} if kind else {})
