"""Tables and lines of text from the records of runs."""

from __future__ import annotations

from ..models.parts import Units, count_of
from ..models.shape import ModelShape
from ..plan import LayerReport, is_gone, removed_parameters
from ..pruning.allocation.inputs import Allocation
from ..run import Run
from ..streaming.sizes import Footprint
from ..utils.device import name_of
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
        figures = {f["data"]: f"{_values(f, r.vocabulary is not None)}{'*' if f['limited'] else ''}" for f in r.evaluation}
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


def _values(figure: dict, other_tokens: bool) -> str:
    """Perplexities, dense and pruned; where these are of different tokens, nats per byte."""
    if not other_tokens:
        return f"{figure['dense']:.2f} / {figure['pruned']:.2f}"
    nats = figure["nats_per_byte"]
    return f"{nats['dense']:.3f} / {nats['pruned']:.3f} nats per byte"


def odd_widths(layers: list[dict]) -> str | None:
    """A line on channels that a GPU computes slowly, where some of the ``layers`` (LayerReports) keep such numbers of them."""
    odd = sum(count_of(kept.get("channels", [])) % GPU_MULTIPLE > 0 for layer in layers for kept in layer["kept"].values())
    if not odd:
        return None
    left = sum(not is_gone(layer["kept"]) for layer in layers)
    return (
        f"{odd} of {left} layers keep a number of channels that is no multiple of {GPU_MULTIPLE}: "
        "NVIDIA GPUs compute these slowly; for a model that is faster there, prune with --round_to 64"
    )


def uneven_experts(layers: list[dict]) -> str | None:
    """A line on where a mixture runs whose ``layers`` (LayerReports) do not all keep as many experts of one width."""
    sizes = {tuple(map(count_of, layer["kept"]["experts"].values())) for layer in layers if layer["kept"].get("experts")}
    if len(sizes) < 2:
        return None
    return (
        "its layers keep different numbers of experts, or widths of them, which llama.cpp and vLLM do not read; for these prune with "
        "--runtime gguf or vllm"
    )


def limits_line(figures: list[dict]) -> list[str]:
    """What ``*`` means below a table with these perplexities; nothing where none is limited."""
    limited = sorted({(f["blocks"], f["seq_len"]) for f in figures if f["limited"]})
    return [f"* limited: perplexity on the first {blocks} blocks of {length} tokens only" for blocks, length in limited]


def layer_line(layer: LayerReport, shape: ModelShape) -> str:
    """What happened to one layer, in one line of at most a hundred columns. ``shape`` is the dense model's."""
    line = f"layer {layer.index:3d}"
    missing = "".join(f"  without {kind}" for kind in shape.layers[layer.index].missing)
    if not layer.errors:
        return line + (missing or "  whole")
    for part in shape.layers[layer.index].parts:
        left = layer.units[part.kind]
        for sort in part.sorts:
            if sort == part.sorts[0] or (part.kind == "experts" and left[sort] < part.units[sort]):
                line += f"  {left[sort]:{len(str(part.units[sort]))}d}/{part.units[sort]} {sort}"
    missed = ", ".join(f"{kind} {_percent(before)} -> {_percent(after)}" for kind, (before, after) in layer.errors.items())
    least = "as many experts stay as a token is routed to" if "experts" in layer.errors else "at least one of each stays"
    line += missing
    clipped = f"  ({least})" if layer.clipped else ""
    starved = f"  (too few tokens to refit {layer.starved} of its experts)" if layer.starved else ""
    return f"{line}  missed: {missed}{clipped}{starved}  {layer.seconds:.1f} s"


LAYERS_HEADING = "what stays of each layer, and how much of its outputs' variance is missed, before -> after recovery"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def dry_run(run: Run, likely: Allocation, how: str, takes: Footprint, before: int, seconds: dict[str, float]) -> str:
    """The likely plans in words: widths, parameters, bytes, KV cache per token, what the run ``takes``. ``how``: where they are from.

    ``before``: bytes of the dense model's files. ``seconds``: of each stage, about.
    """
    plans = likely.plans
    shape, size = run.shape, run.dtype.itemsize
    dense, of_layers = shape.dense_parameters, removed_parameters(shape, plans, run.config) + shape.layer_parameters_gone
    removed, decoder = of_layers + shape.token_parameters_gone, shape.decoder_parameters + shape.layer_parameters_gone
    pruned = [plan.units for plan in plans]
    given = shape.with_layers([*range(len(shape.given_layers))])
    kv = [given.cache_numbers() * size, shape.cache_numbers(pruned) * size]
    unchanged = "" if shape.is_mixture or shape.heads_fixed or kv[0] != kv[1] else " (no KV head goes; --head_unit group lets some go)"
    active = [shape.active_parameters() + shape.parameters_gone, shape.active_parameters(pruned)]
    rows = [
        ["", "dense", "pruned"],
        ["parameters", f"{dense / 1e6:.2f} M", f"{(dense - removed) / 1e6:.2f} M ({removed / dense:.2%} less)"],
        *([["parameters that a token is computed with", *(f"{count / 1e6:.2f} M" for count in active)]] if shape.is_mixture else []),
        [
            "decoder parameters",
            f"{decoder / 1e6:.2f} M",
            f"{(decoder - of_layers) / 1e6:.2f} M ({of_layers / decoder:.2%} less)",
        ],
        *([["layers", str(len(shape.given_layers)), str(len(shape.layers))]] if shape.layers_gone else []),
        *(
            [
                [
                    "whole parts",
                    str(sum(len(layer.parts) for layer in shape.given_layers)),
                    str(sum(len(layer.parts) for layer in shape.layers)),
                ]
            ]
            if shape.parts_gone
            else []
        ),
        *([["tokens of the vocabulary", str(shape.vocab + shape.tokens_gone), f"{shape.vocab}"]] if shape.tokens_gone else []),
        [f"weights in {name_of(run.dtype)}", f"{dense * size / 1e9:.3f} GB", f"{(dense - removed) * size / 1e9:.3f} GB"],
        *([[f"KV cache per token in {name_of(run.dtype)}", f"{kv[0]} bytes", f"{kv[1]} bytes{unchanged}"]] if kv[0] else []),
        [
            " / ".join(sort.replace("kv_", "KV ") for units in max(given.units, key=len).values() for sort in units),
            _widths(_with_missing(given, given.units)),
            _widths([own for own, layer, plan in zip(_with_missing(shape, pruned), shape.layers, plans) if plan.ratio or layer.missing]),
        ],
        *([["predicted loss, nats per token", "", f"{likely.predicted_loss:.3f}"]] if likely.predicted_loss is not None else []),
        ["time here, at the speed that it has now, about", "", _time(seconds)],
        ["peak memory of a run, about", "", f"{takes.host / 1e9:.2f} GB"],
        *([["peak memory of the GPU, about", "", f"{takes.device / 1e9:.2f} GB"]] if takes.device else []),
        ["activations in the temporary folder", "", f"{takes.temporary / 1e9:.2f} GB"],
        ["weights on disk", f"{before / 1e6:.1f} MB", f"{takes.result / 1e6:.1f} MB"],
        *([["beside them until the end, for --resume", "", f"{takes.beside / 1e9:.2f} GB"]] if takes.beside else []),
    ]
    from_ = f"over {sum(plan.ratio > 0 for plan in plans)} of {len(plans)} layers"
    return f"dry run, {how} {from_}; no weights read\n" + "\n".join(aligned(rows))


def _time(seconds: dict[str, float]) -> str:
    """``4 min (own text 1, pruning 3)``, the longest stages by name."""
    total = sum(seconds.values())
    unit, divisor = ("s", 1) if total < 120 else ("min", 60) if total < 7200 else ("h", 3600)
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {value / divisor:.{1 if divisor > 1 else 0}f}" for name, value in longest)
    return f"{total / divisor:.{1 if divisor == 3600 else 0}f} {unit} ({shown})"


def _with_missing(shape: ModelShape, units: list[dict[str, Units]]) -> list[dict[str, Units]]:
    """``units`` of the layers, with none of each sort of a part that a layer lacks, in the order in which the widest layer has them."""
    most = max((layer.units for layer in shape.given_layers), key=len)
    found = []
    for layer, own in zip(shape.layers, units):
        none = {kind: dict.fromkeys(most[kind], 0) for kind in layer.missing if kind in most}
        found.append({kind: (none | own)[kind] for kind in most} if none else own)
    return found


def _widths(layers: list[dict[str, Units]]) -> str:
    """What layers have, each width once: ``9 / 3 / 1536, 6 / 3 / 1152``."""
    widths = {tuple(count for units in layer.values() for count in units.values()) for layer in layers}
    return ", ".join(" / ".join(map(str, width)) for width in sorted(widths, reverse=True))


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return lines


def speed_table(what: str, speeds: list[dict]) -> list[str]:
    """Speeds as lines of Markdown, with the ratio to the first. ``speeds``: name, bytes, and tokens/s of prompt and generation."""
    rows = [[what, "size", "prompt, tokens/s", "generation, tokens/s"]]
    for f in speeds:
        cells = [f"{f[kind]:.1f} ({f[kind] / speeds[0][kind]:.2f} x)" for kind in ("prompt", "generation")]
        rows.append([f["name"], f"{f['bytes'] / 1e6:.1f} MB", *cells])
    return aligned(rows)


TEXT_HEADINGS = {"wikitext2": "WikiText2", "ptb": "PTB", "c4": "C4", "python_manual": "Python manual"}
