"""SlimLLM beside other ways to a smaller model, at equal parameters: ``slimllm compare --base_model M``.

Every method as its authors' code does it, and with least squares in place of its own recovery; our two recipes; the dense model in
fewer bits; and any checkpoints that are named.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path

import torch

from ..deploy import checkpoint
from ..deploy.export_gguf import check, export, quantized_bytes
from ..deploy.llama_cpp import speeds
from ..errors import UserError
from ..models import loading
from ..reporting.figures import comparison
from ..reporting.trial_tables import comparison_table, split_name
from ..settings.compare import QUANTIZATIONS, CompareConfig
from ..settings.methods import METHODS
from ..utils.files import write_text
from .trials import Bench, Trial, measure

log = logging.getLogger("slimllm")

PUBLISHED, ON_TOP = "as published", "with least squares"
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 64, 5  # of a speed
BYTES = 2  # of a number in a checkpoint that is not quantized further: bfloat16 or float16


def cases(config: CompareConfig) -> list[Trial]:
    """Every pruning, the quick ones first."""
    found = [Trial(method, PUBLISHED, share, {"method": method}) for share in config.target_sparsity for method in config.methods]
    found += [
        Trial(method, ON_TOP, share, {"method": method, "recovery": "least_squares"})
        for share in config.target_sparsity
        for method in config.methods
        if METHODS[method].recovery != "least_squares"
    ]
    return found + [
        Trial("slimllm", f"recipe {recipe}", share, {"recipe": recipe}) for share in config.target_sparsity for recipe in config.recipes
    ]


def unpruned(config: CompareConfig) -> list[Trial]:
    """The dense model and the checkpoints of ``--also``, each in fewer bits too: the dense one, and all where speeds are measured."""
    named = [("dense", ""), *(entry.split("=", 1) for entry in config.also)]
    return [
        Trial(f"{name}, {kind}" if kind else name, folder, 0.0, {})
        for name, folder in named
        for kind in ("", *(QUANTIZATIONS if config.speed or name == "dense" else ()))
    ]


def run(config: CompareConfig) -> None:
    """Measures, then writes and prints table and picture of all that the results hold, by other methods and shares too."""
    trials = unpruned(config) + cases(config)
    for entry in config.also if config.speed else ():
        try:
            check(entry.partition("=")[2])
        except UserError as error:
            raise UserError(f"--speed --also {entry}: {error}") from None

    def score(bench: Bench, model, tokenizer, row: dict) -> None:
        row.setdefault("bytes", BYTES * row["parameters"])
        row["chat"] = bench.chat_quality(model, tokenizer)
        row["tasks"] = bench.scores(model, tokenizer, config.data_dir, config.tasks, config.limit)

    identity = {"tasks": config.tasks, "limit": config.limit}
    rows = measure(config, trials, score, _unpruned, identity, _add_speeds)["rows"]
    folder = Path(config.output)
    lines = comparison_table(rows)
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    comparison(rows, folder)
    log.info("\n%s\n\neverything lies in %s/", "\n".join(lines), folder)


def _unpruned(bench: Bench, trial: Trial):
    """(model, its entry) of a trial that prunes nothing: the dense model, in fewer bits or not, or the checkpoint in ``trial.variant``."""
    entry = {"name": trial.name, "variant": trial.variant, "share": 0.0, "settings": {}, "seconds": 0.0, "removed": 0.0}
    kind = split_name(trial.name)[1]
    if folder := trial.variant:
        model = loading.load_model(folder, bench.model.dtype, "--also")
        entry |= {"folder": folder, "seconds": None, "removed": bench.removed(model)}
    else:
        model = copy.deepcopy(bench.model)
    entry["parameters"] = model.num_parameters()
    return model, entry | ({"bytes": quantized_bytes(model, kind)} if kind else {})


def _add_speeds(config: CompareConfig, rows: list[dict]) -> bool:
    """Where they are asked for: tokens per second in llama.cpp, of every row that was not pruned here and has none yet, all in turns.

    Returns whether there were such rows.
    """
    chosen = [row for row in rows if config.speed and not row["share"] and "tokens_per_second" not in row]
    if not chosen:
        return False
    with tempfile.TemporaryDirectory(prefix="slimllm-", dir=config.output) as scratch:
        files = []
        for number, row in enumerate(chosen):
            source = row.get("folder") or _dense_folder(Path(scratch) / "dense", config.base_model)
            files.append(export(source, Path(scratch) / f"{number}.gguf", split_name(row["name"])[1] or "f16"))
        for row, speed in zip(chosen, speeds(files, PROMPT_TOKENS, NEW_TOKENS, REPEATS)):
            row["tokens_per_second"] = {kind: speed[kind] for kind in ("prompt", "generation")}
    return True


def _dense_folder(folder: Path, base_model: str) -> Path:
    """A checkpoint of the dense model, which may come from a .gguf file; made once."""
    if not folder.exists():
        folder.mkdir()
        model, tokenizer = loading.load_model(base_model, "auto"), loading.load_tokenizer(base_model)
        checkpoint.save(model, tokenizer, folder, torch.arange(8)[None], base_model)
    return folder
