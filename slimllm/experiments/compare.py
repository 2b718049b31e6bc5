"""SlimLLM beside other ways to a smaller model, at equal parameters: ``python -m slimllm compare --base_model M``.

Every method as its authors' code does it, and with least squares in place of its own recovery; our two recipes; the dense model in
fewer bits; and any checkpoints that are named.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from ..deploy.export_gguf import quantized_bytes
from ..models import loading
from ..reporting.figures import comparison
from ..reporting.trial_tables import comparison_table
from ..settings.compare import CompareConfig
from ..utils.files import write_text
from .trials import Bench, Trial, measure

log = logging.getLogger("slimllm")

PUBLISHED, ON_TOP = "as published", "with least squares"
QUANTIZATIONS = ("q8_0", "q4_0")  # of the dense model
BYTES = 2  # of a number in a checkpoint that is not quantized further: bfloat16 or float16


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
