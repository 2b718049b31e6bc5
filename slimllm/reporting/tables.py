"""Tables and lines of text from the records of runs."""

from __future__ import annotations

import torch

from ..models.shape import ModelShape
from ..pruning.allocation.plan import LayerPlan, removed_parameters
from ..pruning.footprint import Footprint
from ..pruning.layer import LayerReport
from ..settings.pruning import PruneConfig
from ..utils.device import name_of
from ..utils.memory import peak_memory
from .record import PruningRecord

GPU_MULTIPLE = 8  # of 16-bit numbers, whose rows are then aligned as the fast matrix products of NVIDIA GPUs want them


def table(records: list[tuple[str, PruningRecord]]) -> str:
    """One row per run: parameters, what was removed, bytes, perplexity dense and pruned, time, memory. Takes (name, record) pairs."""
    texts = list(dict.fromkeys(figure["data"] for _, r in records for figure in r.evaluation))
    header = [
        "run",
        "parameters",
        "decoder removed",
        "all removed",
        "on disk",
        *(f"{t} dense / pruned" for t in texts),
        "pruning",
        "peak memory",
    ]
    rows = [header]
    for name, r in records:
        size = r.parameters
        figures = {f["data"]: f"{f['dense']:.2f} / {f['pruned']:.2f}{'*' if f['limited'] else ''}" for f in r.evaluation}
        memory = " + ".join(f"{value / 1e9:.2f} GB {kind[:3].upper()}" for kind, value in r.peak_memory.items())
        rows.append(
            [
                name,
                f"{size.dense / 1e6:.1f} M -> {size.pruned / 1e6:.1f} M",
                f"{size.decoder_removed:.2%}",
                f"{size.removed:.2%}",
                f"{r.bytes['dense'] / 1e6:.1f} MB -> {r.bytes['pruned'] / 1e6:.1f} MB" if r.bytes else "-",
                *(figures.get(t, "-") for t in texts),
                f"{r.seconds['pruning']:.1f} s",
                memory,
            ]
        )
    return "\n".join([*aligned(rows), *limits_line([f for _, r in records for f in r.evaluation])])


def odd_widths(layers: list[dict]) -> str | None:
    """A line on channels that a GPU computes slowly, where some of the ``layers`` (LayerReports) keep such numbers of them."""
    odd = sum(len(layer["channels"]) % GPU_MULTIPLE > 0 for layer in layers)
    if not odd:
        return None
    return (
        f"{odd} of {len(layers)} layers keep a number of channels that is no multiple of {GPU_MULTIPLE}: "
        "NVIDIA GPUs compute these slowly; for a model that is faster there, prune with --round_to 64"
    )


def limits_line(figures: list[dict]) -> list[str]:
    """What ``*`` means below a table with these perplexities; nothing where none is limited."""
    limited = sorted({(f["blocks"], f["seq_len"]) for f in figures if f["limited"]})
    return [f"* limited: perplexity on the first {blocks} blocks of {length} tokens only" for blocks, length in limited]


def layer_line(layer: LayerReport, shape: ModelShape) -> str:
    """What happened to one layer, in one line. ``shape`` is the dense model's."""
    line = f"layer {layer.index:3d}"
    if layer.cosine is not None:
        line += f"  cosine {layer.cosine:6.4f}"
    if layer.sensitivity is not None:
        line += f"  cost {layer.sensitivity:.4f}"
    if not layer.attention_error and not layer.mlp_error:
        return f"{line}  whole"
    line += f"  ratio {layer.ratio:.3f}  heads {len(layer.heads):3d}/{shape.heads}  channels {len(layer.channels):5d}/{shape.channels}"
    for name, error in (("attention", layer.attention_error), ("mlp", layer.mlp_error)):
        if error:
            line += f"  {name} error {error[0]:.4f} -> {error[1]:.4f}"
    if layer.clipped:
        line += "  clipped: at least one head group and one channel stay"
    return f"{line}  {layer.seconds:.2f} s  {peak_memory()['cpu_bytes'] / 1e9:.2f} GB"


def dry_run(
    shape: ModelShape, plans: list[LayerPlan], config: PruneConfig, dtype: torch.dtype, how: str, takes: Footprint, before: int
) -> str:
    """The plans in words: widths, parameters, bytes, KV cache per token, what the run ``takes``. ``how``: where the plans are from.

    ``before``: bytes of the dense model's files.
    """
    dense, removed = shape.decoder_parameters + shape.other_parameters, removed_parameters(shape, plans, config)
    widths = {(p.heads, p.kv_heads, p.channels) for p in plans if p.ratio}
    kv = [
        sum(2 * p * shape.head_dim * dtype.itemsize for p in kept)
        for kept in ([shape.kv_heads] * shape.layers, [p.kv_heads for p in plans])
    ]
    rows = [
        ["", "dense", "pruned"],
        ["parameters", f"{dense / 1e6:.2f} M", f"{(dense - removed) / 1e6:.2f} M ({removed / dense:.2%} less)"],
        [
            "decoder parameters",
            f"{shape.decoder_parameters / 1e6:.2f} M",
            f"{(shape.decoder_parameters - removed) / 1e6:.2f} M ({removed / shape.decoder_parameters:.2%} less)",
        ],
        [
            f"weights in {name_of(dtype)}",
            f"{dense * dtype.itemsize / 1e9:.3f} GB",
            f"{(dense - removed) * dtype.itemsize / 1e9:.3f} GB",
        ],
        ["KV cache per token", f"{kv[0]} bytes", f"{kv[1]} bytes"],
        [
            "heads / KV heads / channels",
            f"{shape.heads} / {shape.kv_heads} / {shape.channels}",
            ", ".join("%d / %d / %d" % w for w in sorted(widths, reverse=True)),
        ],
        ["peak memory of a run, about", "", f"{takes.host / 1e9:.2f} GB"],
        *([["peak memory of the GPU, about", "", f"{takes.device / 1e9:.2f} GB"]] if takes.device else []),
        ["activations in the temporary folder", "", f"{takes.temporary / 1e9:.2f} GB"],
        ["weights on disk", f"{before / 1e6:.1f} MB", f"{takes.result / 1e6:.1f} MB"],
        *([["beside them until the end, for --resume", "", f"{takes.beside / 1e9:.2f} GB"]] if takes.beside else []),
    ]
    return f"dry run, {how} over {sum(p.ratio > 0 for p in plans)} of {shape.layers} layers; no weights read\n" + "\n".join(aligned(rows))


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return lines


def speed_table(what: str, found: list[dict]) -> list[str]:
    """Speeds as lines of Markdown, with the ratio to the first. ``found``: name, bytes, and tokens/s of prompt and generation."""
    rows = [[what, "size", "prompt, tokens/s", "generation, tokens/s"]]
    for f in found:
        cells = [f"{f[kind]:.1f} ({f[kind] / found[0][kind]:.2f} x)" for kind in ("prompt", "generation")]
        rows.append([f["name"], f"{f['bytes'] / 1e6:.1f} MB", *cells])
    return aligned(rows)


TEXT_HEADINGS = {"wikitext2": "WikiText2", "ptb": "PTB", "python_manual": "Python manual"}
