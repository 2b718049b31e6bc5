"""Each ingredient of the method off or changed in turn, at equal kept parameters: ``python -m slimllm.ablation --base_model M``.

The model is read once; every row prunes a fresh copy. One JSON file holds the rows, so a stopped run goes on.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import calibration, cli, evaluation, families, pipeline, record, report
from .cli import UserError, check_choices, check_range, flag
from .config import DTYPES, PruneConfig
from .recovery import RECOVERIES

log = cli.log

# (ingredient, variant, the settings that make it). The first row is the paper's method, what each other row changes.
ROWS = (
    ("the paper's method", "", {}),
    ("head choice", "no greedy search", {"no_greedy": True}),
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
SEQ_LEN = 128  # tokens a sample and a block of text
CURVE = (0.2, 0.35, 0.5)  # shares removed at which every recovery is measured for the picture


@dataclass
class AblationConfig:
    """Settings that all rows share. Raises UserError where a value makes no sense."""

    base_model: str = flag("model", "local folder, hub name or .gguf file (required)")
    dtype: str = flag("model", "dtype of weights and compute: float32 on a CPU, the checkpoint's own on a GPU", "auto", choices=DTYPES)
    device: str = flag("model", "where layers and perplexity are computed; auto takes a GPU if there is one", "auto")
    target_sparsity: tuple = flag("budget", "shares of the decoder's parameters to remove, 0 to 1", (0.2, 0.5), nargs="+", type=float)
    calibration: str = flag("calibration", "as for hf_prune.py: a name, file or folder [bookcorpus; self where the hub is out of reach]")
    seed: int = flag("calibration", "seed of the calibration samples", 42, type=int)
    eval_data: tuple = flag(
        "evaluation",
        "any of wikitext2, ptb, python_manual, NAME=FILE, FILE [wikitext2 ptb; python_manual where the hub is out of reach]",
        nargs="+",
    )
    eval_limit: int = flag("evaluation", "only the first N blocks of 128 tokens; the figures are marked as limited [all]", type=int)
    output: str = flag("output", "folder for results.json, table.md and recovery.png [eval_log/ablation_NAME]")
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


def run(config: AblationConfig) -> dict:
    """All cases that the results file does not hold yet; it is written anew after each. Returns the results."""
    device = cli.device_of("device", config.device)
    model_config = families.load_config(config.base_model)
    dtype = families.pruning_dtype(config.dtype, device, model_config)
    of = {"model": Path(config.base_model).name, "dtype": record.name_of(dtype), "calibration": config.calibration}
    of |= {"seed": config.seed, "eval_data": config.eval_data, "eval_limit": config.eval_limit}
    file = Path(config.output) / "results.json"
    results = record.continued(file, of, config.overwrite)
    results.setdefault("rows", [])
    done = {(row["ingredient"], row["variant"], row["share"]) for row in results["rows"]}
    missing = [case for case in cases(config.target_sparsity) if case[:3] not in done]
    log.info("%s: %d prunings to do, %d at hand", file, len(missing), len(done))
    if missing:
        calibration.check_source(config.calibration)
        tokenizer = families.load_tokenizer(config.base_model)
        texts = evaluation.load_texts(config.eval_data)
        blocks = [evaluation.blocks_of(text, tokenizer, SEQ_LEN, config.eval_limit) for text in texts]
        model = families.load_model(config.base_model, dtype)
        shape = families.shape_of(model.config, families.family_of(model.config))
        samples, held_back = {}, None
    for ingredient, variant, share, change in missing:
        shared = {"base_model": config.base_model, "calibration": config.calibration, "seed": config.seed, "seq_len": SEQ_LEN}
        settings = PruneConfig(**{**shared, "target_sparsity": share, **change})
        settings.resolve(shape)
        if settings.num_examples not in samples:
            samples[settings.num_examples] = calibration.load(settings, model, tokenizer)
        ids = samples[settings.num_examples].ids
        if settings.layer_ratio == "auto" and held_back is None:
            with evaluation.evaluating(model, device):
                held_back = calibration.held_back(model, tokenizer, settings)
        pruned = copy.deepcopy(model)
        started = time.perf_counter()
        pipeline.prune(pruned, ids, settings, device, held_back=held_back)
        seconds = time.perf_counter() - started
        with evaluation.evaluating(pruned, device):
            values = [evaluation.perplexity(pruned, part, text.name) for text, part in zip(texts, blocks)]
        row = {"ingredient": ingredient, "variant": variant, "share": share, "settings": change, "seconds": round(seconds, 1)}
        row["removed"] = 1 - sum(p.numel() for p in pruned.model.layers.parameters()) / shape.decoder_parameters
        row["calibration"] = samples[settings.num_examples].to_dict()
        row["perplexity"] = [text.figure(part, config.eval_limit, pruned=value) for text, part, value in zip(texts, blocks, values)]
        results["rows"].append(row)
        shown = ", ".join(f"{text.name} {value:.1f}" for text, value in zip(texts, values))
        log.info("%.0f %%, %s %s: %s (%.0f s)", 100 * share, ingredient, variant, shown, seconds)
        del pruned
        record.keep(results, file)
    return results


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""

    def ablate(config):
        results = run(config)
        folder = Path(config.output)
        lines = report.ablation_table(results["rows"], config.target_sparsity)
        record.write(folder / "table.md", "\n".join(lines) + "\n")
        report.recovery_curves(results["rows"], folder)
        log.info("\n%s\n\neverything lies in %s/", "\n".join(lines), folder)

    return cli.program(
        AblationConfig,
        "slimllm.ablation",
        "--base_model MODEL [flags]",
        "Perplexity with each ingredient of the method off or changed in turn, at equal kept parameters.",
        ablate,
        argv,
        "what is finished is kept; the same command goes on with the rest",
        "use --device cpu or --dtype bfloat16",
    )


if __name__ == "__main__":
    sys.exit(main())
