"""Each ingredient of the method off or changed in turn, at equal kept parameters: ``python -m slimllm ablation --base_model M``.

The model is read once; every row prunes a fresh copy. One JSON file holds the rows, so a stopped run goes on.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from ..cli import check_choices, check_range, flag
from ..data import calibration
from ..data.texts import blocks_of, load_texts
from ..errors import UserError
from ..evaluation.perplexity import perplexity
from ..models import loading
from ..models.adapter import LayerAdapter
from ..models.shape import shape_of
from ..pruning import pipeline
from ..pruning.config import PruneConfig
from ..pruning.recovery import RECOVERIES
from ..reporting import record
from ..reporting.figures import recovery_curves
from ..reporting.tables import ablation_table
from ..utils.device import DTYPES, device_of, name_of, pruning_dtype
from ..utils.files import write_text

log = logging.getLogger("slimllm")

# (ingredient, variant, the settings that make it). The first row is the paper's method, what each other row changes.
ROWS = (
    ("the paper's method", "", {}),
    ("head choice", "no greedy search", {"head_choice": "leave_one_out"}),
    ("head unit", "whole KV groups", {"head_unit": "group"}),
    ("channel score", "no eigenvalue weights", {"channel_score": "unweighted"}),
    ("channel score", "Wanda", {"channel_score": "wanda"}),
    ("channel score", "magnitude", {"channel_score": "magnitude"}),
    ("channel score", "random", {"channel_score": "random"}),
    ("channel score", "keep_lowest 0", {"keep_lowest": 0.0}),
    ("recovery", "none", {"recovery": "none"}),
    ("recovery", "bias", {"recovery": "bias"}),
    ("recovery", "least_squares", {"recovery": "least_squares"}),
    ("layer ratio", "alpha 5", {"alpha": 5.0}),
    ("layer ratio", "alpha 20", {"alpha": 20.0}),
    ("layer ratio", "uniform", {"layer_ratio": "uniform"}),
    ("layer ratio", "auto", {"layer_ratio": "auto"}),
    ("samples", "8", {"num_examples": 8}),
    ("samples", "128", {"num_examples": 128}),
    ("recovery and layer ratio", "least_squares, auto", {"recovery": "least_squares", "layer_ratio": "auto"}),
)
SEQ_LEN = 128  # tokens per sample and per block of text
CURVE = (0.2, 0.35, 0.5)  # shares removed at which every recovery is measured for the picture


@dataclass
class AblationConfig:
    """Settings that all rows share. Raises UserError where a value makes no sense."""

    base_model: str | None = flag("model", "local folder, hub name or .gguf file (required)")
    dtype: str = flag("model", "dtype of weights and compute: float32 on a CPU, the checkpoint's own on a GPU", "auto", choices=DTYPES)
    device: str = flag("model", "where layers and perplexity are computed; auto takes a GPU if there is one", "auto")
    target_sparsity: tuple[float, ...] = flag("sparsity", "shares of the decoder's parameters to remove, 0 to 1", (0.2, 0.5))
    calibration: str | None = flag(
        "calibration", "as for hf_prune.py: a name, file or folder [bookcorpus; self where the hub is out of reach]"
    )
    seed: int = flag("calibration", "seed of the calibration samples", 42)
    eval_data: tuple[str, ...] | None = flag(
        "evaluation",
        "any of wikitext2, ptb, python_manual, NAME=FILE, FILE [wikitext2 ptb; python_manual where the hub is out of reach]",
    )
    eval_limit: int | None = flag("evaluation", "only the first N blocks of 128 tokens; the figures are marked as limited [all]")
    output: str | None = flag("output", "folder for results.json, table.md and recovery.png [eval_log/ablation_NAME]")
    overwrite: bool = flag("output", "start anew", False)

    def __post_init__(self):
        if not self.base_model:
            raise UserError("--base_model is required: a local folder, hub name or .gguf file")
        check_choices(self)
        check_range(self, "eval_limit", 1)
        for share in self.target_sparsity:
            if not 0 < share < 1:
                raise UserError(f"--target_sparsity {share}: must be above 0 and below 1")
        if self.output is None:
            self.output = f"eval_log/ablation_{Path(self.base_model).name}"


def cases(shares: tuple) -> list[tuple[str, str, float, dict]]:
    """(ingredient, variant, share, settings) of every pruning: the rows at each share, and the recoveries along CURVE."""
    found = [(ingredient, variant, share, change) for share in shares for ingredient, variant, change in ROWS]
    for share in CURVE:
        for name in RECOVERIES:
            same = name == PruneConfig(base_model="x").recovery
            if share not in shares:
                found.append(("the paper's method" if same else "recovery", "" if same else name, share, {"recovery": name}))
    return found


def run(config: AblationConfig) -> None:
    """Measures, then writes and prints table and picture."""
    rows = measure(config)["rows"]
    folder = Path(config.output)
    lines = ablation_table(rows, config.target_sparsity)
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    recovery_curves(rows, folder)
    log.info("\n%s\n\neverything lies in %s/", "\n".join(lines), folder)


def measure(config: AblationConfig) -> dict:
    """All cases that the results file does not hold yet; it is written anew after each. Returns the results."""
    device = device_of("device", config.device)
    model_config = loading.load_config(config.base_model)
    dtype = pruning_dtype(config.dtype, device, loading.own_dtype(config.base_model, model_config))
    fingerprint = {"model": Path(config.base_model).name, "dtype": name_of(dtype), "calibration": config.calibration}
    fingerprint |= {"seed": config.seed, "eval_data": config.eval_data, "eval_limit": config.eval_limit}
    file = Path(config.output) / "results.json"
    results = record.continued(file, fingerprint, config.overwrite)
    results.setdefault("rows", [])
    done = {(row["ingredient"], row["variant"], row["share"]) for row in results["rows"]}
    missing = [case for case in cases(config.target_sparsity) if case[:3] not in done]
    log.info("%s: %d prunings to do, %d at hand", file, len(missing), len(done))
    if missing:
        calibration.check_source(config.calibration)
        tokenizer = loading.load_tokenizer(config.base_model)
        texts = load_texts(config.eval_data)
        blocks = [blocks_of(text, tokenizer, SEQ_LEN, config.eval_limit) for text in texts]
        model = loading.load_model(config.base_model, dtype)
        adapter, shape = LayerAdapter(model.config), shape_of(model.config)
        samples, probe_ids = {}, None
    for ingredient, variant, share, change in missing:
        shared = {"base_model": config.base_model, "calibration": config.calibration, "seed": config.seed, "seq_len": SEQ_LEN}
        settings = PruneConfig(**{**shared, "target_sparsity": share, **change})
        settings.resolve(shape)
        if settings.num_examples not in samples or (settings.needs_probe_ids and probe_ids is None):
            with loading.placed_for_evaluation(model, device):
                if settings.num_examples not in samples:
                    samples[settings.num_examples] = calibration.load(settings.calibration, model, tokenizer, settings.samples)
                if settings.needs_probe_ids:
                    probe_ids = calibration.probe_samples(model, tokenizer, settings.samples)
        ids = samples[settings.num_examples].ids
        pruned = copy.deepcopy(model)
        started = time.perf_counter()
        pipeline.prune(pruned, ids, settings, device, probe_ids=probe_ids)
        seconds = time.perf_counter() - started
        with loading.placed_for_evaluation(pruned, device):
            values = [perplexity(pruned, part, text.name) for text, part in zip(texts, blocks)]
        row = {"ingredient": ingredient, "variant": variant, "share": share, "settings": change, "seconds": round(seconds, 1)}
        row["removed"] = 1 - sum(p.numel() for p in adapter.layers(pruned).parameters()) / shape.decoder_parameters
        row["calibration"] = samples[settings.num_examples].to_dict()
        row["perplexity"] = [text.figure(part, config.eval_limit, pruned=value) for text, part, value in zip(texts, blocks, values)]
        results["rows"].append(row)
        shown = ", ".join(f"{text.name} {value:.1f}" for text, value in zip(texts, values))
        log.info("%.0f %%, %s %s: %s (%.0f s)", 100 * share, ingredient, variant, shown, seconds)
        del pruned
        record.save_results(results, file)
    return results
