"""``slimllm latency DIR --baseline DENSE``: how fast and how large a model is, beside the dense one it came from."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path

import torch

from ..errors import UserError
from ..evaluation.latency import macs, measure, milliseconds, size_of
from ..models import loading
from ..reporting import record
from ..reporting.tables import aligned
from ..settings.common import short_name
from ..settings.latency import LatencyConfig
from ..utils.device import device_of, evaluation_dtype, name_of

log = logging.getLogger("slimllm")


def tables_of(sizes: dict, entries: list[dict], baseline: str | None) -> list[str]:
    """Markdown: one table of sizes and one of times; speed-ups are of medians, against ``baseline``."""
    rows = [["model", "parameters", "weights", "KV cache per token", "MACs of a 128-token prompt"]]
    for name, size in sizes.items():
        cells = [f"{size['parameters'] / 1e6:.1f} M", f"{size['weight_bytes'] / 1e6:.1f} MB", f"{size['kv_bytes_per_token']} bytes"]
        rows.append([name, *cells, f"{macs(size, 128) / 1e9:.2f} G"])
    lines = [*aligned(rows), ""]
    kinds = list(dict.fromkeys(kind for entry in entries for kind in entry["prefill_parts"]))
    rows = [
        [
            "batch",
            "length",
            "model",
            "prefill",
            "tokens/s",
            "decode per step",
            "tokens/s",
            "of prefill: " + " / ".join(kinds),
            "peak memory",
        ]
    ]
    if baseline:
        rows[0][5:5] = ["faster"]
        rows[0][8:8] = ["faster"]
    of = {(e["model"], e["batch_size"], e["length"]): e for e in entries}
    for e in entries:
        first, step = (statistics.median(e[kind]) for kind in ("prefill", "decode"))
        cells = [
            str(e["batch_size"]),
            str(e["length"]),
            e["model"],
            milliseconds(e["prefill"]),
            f"{e['batch_size'] * e['length'] / first:.0f}",
        ]
        later = [milliseconds(e["decode"]), f"{e['batch_size'] / step:.0f}"]
        if baseline:
            base = of[baseline, e["batch_size"], e["length"]]
            cells.append(f"{statistics.median(base['prefill']) / first:.2f} x")
            later.append(f"{statistics.median(base['decode']) / step:.2f} x")
        parts = " / ".join(f"{1000 * e['prefill_parts'].get(kind, 0.0):.0f}" for kind in kinds) + " ms"
        rows.append([*cells, *later, parts, f"{e['peak_bytes'] / 1e9:.2f} GB"])
    return [*lines, *aligned(rows)]


def run(config: LatencyConfig) -> None:
    with record.results_at(config.json, True, "name another --json"):
        compare(config)


def models_of(config: LatencyConfig) -> dict[str, tuple[str, str]]:
    """(flag, source) of each model by what tables call it, the baseline first, as ``dense``, whatever the other one is called."""
    name = short_name(config.model)
    if not config.baseline:
        return {name: ("MODEL", config.model)}
    return {"dense": ("--baseline", config.baseline), "MODEL" if name == "dense" else name: ("MODEL", config.model)}


def compare(config: LatencyConfig) -> dict:
    """Measures, prints both tables, and returns what ``--json`` writes."""
    device = device_of("device", config.device)
    if config.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else evaluation_dtype(torch.float32, device)
    else:
        dtype = getattr(torch, config.dtype)
    models, sizes = {}, {}
    for name, (what, source) in models_of(config).items():
        loading.load_config(source, what)
        models[name] = loading.load_model(source, dtype, what, device)
        sizes[name] = size_of(models[name])
    limit = min(model.config.max_position_embeddings for model in models.values())
    if max(config.length) + config.new_tokens > limit:
        raise UserError(f"--length {max(config.length)} with --new_tokens {config.new_tokens}: the model's context is {limit} tokens")
    entries = measure(models, config.batch_size, config.length, config.new_tokens, config.repeats, device)
    log.info("\n%s", "\n".join(tables_of(sizes, entries, "dense" if config.baseline else None)))
    result = {"format": record.FORMAT, "dtype": name_of(dtype), "sizes": sizes, "measurements": entries}
    if config.json:
        record.save_results(result, Path(config.json))
    return result
