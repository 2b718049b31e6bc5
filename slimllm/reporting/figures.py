"""Pictures from the records of runs."""

from __future__ import annotations

import html
import io
import logging
import math
import re
import warnings
from pathlib import Path

from ..models.parts import KINDS, count_of
from ..settings.evidence import LORA, LORA_TITLE
from ..settings.methods import COLOURS, METHODS, RECIPES, RECOVERIES, looks
from .record import PruningRecord, TrainingRecord
from .tables import TEXT_HEADINGS
from .trial_tables import split_name, tokens_differ


def _pyplot():
    """matplotlib's pyplot, drawing to files only; imported where a picture is drawn, since it is slow."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in scripts that the font lacks
    from matplotlib import pyplot

    return pyplot


def _logarithmic(axis) -> None:
    """A logarithmic vertical axis, numbered as people write numbers: 20, 50, 100; over many decades the powers of ten alone."""

    def between(value: float, _) -> str:
        low, high = axis.get_ylim()
        return f"{value:g}" if f"{value:e}"[0] in "25" and high < 300 * low else ""

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(between)
    axis.tick_params(axis="y", which="minor", labelsize=8)


def _mark_what_leaves(axis, line: list[tuple[float, float]], top: float, colour: str) -> None:
    """Marks where a line leaves the frame at its ``top``."""
    for (x, y), (further_x, further_y) in zip(line, line[1:]):
        if (y > top) != (further_y > top):
            share = (math.log(top) - math.log(y)) / (math.log(further_y) - math.log(y))
            axis.plot(x + share * (further_x - x), top, "^", color=colour, markersize=7, clip_on=False, zorder=5)


def _saved(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    return path


PART_COLOURS = ("#3b6fb6", "#e08a2e", "#2f8f6b", "#7b5ea7")


def layer_figure(run: PruningRecord, folder: Path) -> Path:
    """Draws one run: what each part kept, layer importance, error before and after recovery, per layer."""
    return _saved(_layers(run), folder / "layers.png")


def layer_svg(run: PruningRecord) -> str:
    """The same as an SVG element, whose bars and marks say what they show when they are pointed at."""
    tips: dict[str, str] = {}
    svg = _svg(_layers(run, tips))
    return re.sub(r'<g id="(tip\d+)">', lambda found: f"{found[0]}<title>{html.escape(tips[found[1]])}</title>", svg)


def _svg(figure) -> str:
    """A figure as an SVG element."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    svg = target.getvalue()
    return svg[svg.index("<svg") :]


def _layers(run: PruningRecord, tips: dict[str, str] | None = None):
    """The figure of one run; ``tips``: gets what each bar and mark shows, by the name that it has in an SVG."""
    plt = _pyplot()

    def says(artist, text: str) -> None:
        if tips is not None:
            name = f"tip{len(tips)}"
            tips[name] = text
            artist.set_gid(name)

    layers, dense = run.layers, run.model.shape["layers"]
    index = [layer["index"] for layer in layers]
    sorts = {kind: next(iter(units)) for layer in dense for kind, units in layer.items()}
    colours = dict(zip(sorts, PART_COLOURS))
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    width = 0.8 / len(sorts)
    for number, (kind, sort) in enumerate(sorts.items()):
        there = [
            (i, count_of(layer["kept"][kind][sort]), units[kind][sort]) for i, layer, units in zip(index, layers, dense) if kind in units
        ]
        place = [i + (number - (len(sorts) - 1) / 2) * width for i, *_ in there]
        counts = sorted({total for *_, total in there})
        label = f"{sort} (of {counts[-1] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'})"
        bars = axes[0].bar(place, [kept / total for _, kept, total in there], width, label=label, color=colours[kind])
        for bar, (layer, kept, total) in zip(bars, there):
            says(bar, f"layer {layer}: {kept} of {total} {sort} stay")
    axes[0].set(
        ylabel="share kept",
        ylim=(0, 1.2),
        title=f"{run.model.name}: {run.parameters.decoder_removed:.1%} of the decoder removed",
    )
    axes[0].legend(loc="upper center", ncols=2)
    turned = [math.nan if layer["cosine"] is None else max(1 - layer["cosine"], 1e-6) for layer in layers]
    axes[1].plot(index, turned, "o-", color="#444444", markersize=4)
    axes[1].set(ylabel="1 - cosine of input and output\n(low: matters less)")
    _logarithmic(axes[1])
    if all(map(math.isnan, turned)):  # the plan went by something else
        axes[1].set(ylabel="", yticks=[], yticklabels=[])
        axes[1].minorticks_off()
    if layers[0].get("sensitivity") is not None:
        cost = axes[1].twinx()
        cost.plot(index, [layer["sensitivity"] for layer in layers], "s--", color="#a33c3c", markersize=4)
        _logarithmic(cost)
        cost.set_ylabel("divergence when half of\nthis layer alone goes (nats)", color="#a33c3c")
    for kind in sorts:
        points = [(layer["index"], *layer["errors"].get(kind, (math.nan, math.nan))) for layer in layers]
        if any(kind in layer["errors"] for layer in layers):
            x, before, after = zip(*points)
            label, style = KINDS[kind].title, dict(color=colours[kind], markersize=4)
            axes[2].plot(x, before, "o--", alpha=0.5, label=f"{label}, before recovery", **style)
            axes[2].plot(x, after, "o-", label=f"{label}, after ({run.config['recovery']})", **style)
            for layer, missed, left in [point for point in points if not math.isnan(point[2])] if tips is not None else ():
                (mark,) = axes[2].plot(layer, left, "o", **style)
                says(mark, f"layer {layer}, {label}: {missed:.2%} of the output's variance missed before recovery, {left:.2%} after")
    axes[2].set(xlabel="layer", ylabel="output variance missed")
    _logarithmic(axes[2])
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend(ncols=2, fontsize=8)
    return figure


def loss_curve(run: TrainingRecord, folder: Path) -> Path:
    """Draws the training and validation loss of a post-training record over the optimizer steps."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training rows", "-"), ("eval_loss", "held-out rows", "o-")):
        points = [(entry["step"], entry[key]) for entry in run.history if key in entry]
        if points:
            axes.plot(*zip(*points), style, label=label, color="#9db8d9" if key == "loss" else "#e08a2e", markersize=5)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=f"post-training of {Path(run.config['prune_model']).name}")
    axes.legend()
    return _saved(figure, folder / "loss.png")


WORST = 30  # times the dense model's perplexity: what is worse is not shown
MOST = 1.6  # times its nats per byte


def comparison(rows: list[dict], folder: Path) -> Path:
    """Draws perplexity, or nats per byte where tokens differ, against size, one line per method, one panel per text.

    Takes the rows of a comparison. Solid: as published; dashed: with least squares. The lower axis has bytes, the upper one the share of
    the decoder kept or, where tokens differ, of the whole model. Where speeds were measured they take the second text's panel.
    """
    plt = _pyplot()
    timed = [r for r in rows if "tokens_per_second" in r]
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))[: 1 if timed else 2]
    panels = len(texts) + bool(timed)
    figure, axes = plt.subplots(1, panels, figsize=(6.4 * panels, 5.2), layout="constrained", squeeze=False)
    dense = next(row for row in rows if row["name"] == "dense")
    decoder = next((2 * (dense["parameters"] - r["parameters"]) / r["removed"] / 1e6 for r in rows if r["removed"]), None)
    whole, per_byte = dense["bytes"] / 1e6, tokens_differ(rows)
    figure_name, what = ("nats_per_byte", "nats per byte") if per_byte else ("pruned", "perplexity")
    part, of = (whole, "parameters of the whole model kept, %") if per_byte else (decoder, "decoder parameters kept, %")
    for axis, text in zip(axes[0], texts):

        def points(chosen, text=text):
            return sorted((r["bytes"] / 1e6, f[figure_name]) for r in chosen for f in r["perplexity"] if f["data"] == text)

        [(_, least)] = points([dense])
        top = (MOST if per_byte else WORST) * least
        for name, (label, colour) in looks(METHODS, (r["name"] for r in rows if r["share"])).items():
            for variant, style, width in (("as published", "o-", 1.6), ("with least squares", "o--", 1.0)):
                line = points([dense, *(r for r in rows if (r["name"], r["variant"]) == (name, variant))])
                if len(line) > 1:
                    alone = variant == "as published"
                    named = f"{label}, as published" if alone else None
                    axis.plot(*zip(*line), style, color=colour, linewidth=width, markersize=3.5, label=named)
                    _mark_what_leaves(axis, line, top, colour)
        for recipe, (label, colour) in looks(RECIPES).items():
            line = points([dense, *(r for r in rows if r["variant"] == f"recipe {recipe}")])
            if len(line) > 1:
                axis.plot(*zip(*line), "s-", color=colour, linewidth=2.4, markersize=5, label=label)
        axis.plot(*zip(*points([dense])), "*", color="black", markersize=12, label="dense")
        for name, colour, family in _families([r for r in rows if not r["share"]]):
            line = points(family)
            if len(line) > 1:
                bits = ", in fewer bits" if any(r["name"] != name for r in family) else ""
                axis.plot(*zip(*line), "D-", color=colour, markersize=5, linewidth=1.2, label=name + bits)
            elif family[0] is not dense:
                axis.plot(*line[0], "D", color="black", markersize=5)
                axis.annotate(name, line[0], textcoords="offset points", xytext=(6, 4), fontsize=8)
        axis.set(xlabel="MB of weights (16-bit where not said otherwise)", ylabel=what)
        if not per_byte:
            _logarithmic(axis)
        dashed = "; dashed: least squares in place of the method's own recovery"
        with_dashes = any(r["variant"] == "with least squares" for r in rows)
        axis.set_title(TEXT_HEADINGS.get(text, text) + (dashed if with_dashes else ""), fontsize=9)
        axis.set_ylim((0.95 if per_byte else 0.85) * least, top)
        axis.grid(alpha=0.3)
        if part:
            kept = axis.secondary_xaxis("top", functions=(lambda x: 100 * (1 - (whole - x) / part), lambda k: whole - (1 - k / 100) * part))
            kept.set_xlabel(of)
            kept.set_ticks(range(0, 101, 20))  # fewer bits may take fewer bytes than the embeddings alone
    axes[0][0].legend(fontsize=8)
    if timed:
        _against_speed(axes[0][-1], timed, dense, texts[0])
    return _saved(figure, folder / "compare.png")


def _families(rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """(name, colour, rows) of each model, which may be there in several numbers of bits: ``dense, q8_0`` belongs to ``dense``."""
    found = {}
    for row in rows:
        found.setdefault(split_name(row["name"])[0], []).append(row)
    colours = ("black" if name == "dense" else COLOURS[(2 + number) % len(COLOURS)] for number, name in enumerate(found))
    return list(zip(found, colours, found.values()))


def _against_speed(axis, rows: list[dict], dense: dict, text: str) -> None:
    """One line per model through what it is in fewer bits: how much worse than dense, against how fast llama.cpp generates with it."""
    least = next(f["pruned"] for f in dense["perplexity"] if f["data"] == text)
    for name, colour, family in _families(rows):
        losses = [next(math.log(f["pruned"] / least) for f in row["perplexity"] if f["data"] == text) for row in family]
        points = [(row["tokens_per_second"]["generation"], loss) for row, loss in zip(family, losses)]
        axis.plot(*zip(*points), "D-", color=colour, markersize=5, label=name)
        for row, point in zip(family, points):
            kind = split_name(row["name"])[1] or "16-bit"
            axis.annotate(kind, point, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axis.margins(x=0.1, y=0.1)  # so that what stands beside a point stays inside
    axis.set(xlabel="tokens per second that llama.cpp generates", ylabel=f"nats per token lost, {TEXT_HEADINGS.get(text, text)}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def loss_against_size(points: list[dict], name: str, gentle: float, folder: Path) -> Path:
    """Draws the predicted loss against the share removed, and what was measured. ``points``: ``share``, ``loss`` and maybe ``measured`` and
    ``loss_with_tokens``; ``gentle``: the loss in nats up to which the ground is shaded.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axis.axhspan(0, gentle, color="#2f8f6b", alpha=0.15, label=f"at most {gentle:g} nats")
    line = sorted({100 * point["share"]: point["loss"] for point in points}.items())
    axis.plot(*zip(*line), "o-", color="#3b6fb6", markersize=4, label="predicted from the price list")
    if fewer := sorted({100 * point["share"]: point["loss_with_tokens"] for point in points if "tokens" in point}.items()):
        axis.plot(*zip(*fewer), "o--", color="#e08a2e", markersize=4, label="the same size with fewer tokens, predicted")
    texts = list(dict.fromkeys(text for point in points for text in point.get("measured", ())))
    for text, colour, mark in zip(texts, PART_COLOURS[1:], "sD^v"):
        found = [(100 * point["share"], point["measured"][text]) for point in points if text in point.get("measured", ())]
        axis.plot(*zip(*found), mark, color=colour, markersize=7, label=f"measured, {TEXT_HEADINGS.get(text, text)}")
    axis.set(xlabel="decoder parameters removed, %", ylabel="loss, nats per token", title=f"{name}: what pruning costs", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return _saved(figure, folder / "explore.png")


def nats_lost(lines: dict[str, dict[str, list[tuple[float, float]]]], name: str, folder: Path) -> str:
    """Draws the nats per token lost against the share of the decoder removed: a panel per protocol, a line per recipe.

    ``lines``: by protocol and recipe, points (share, nats). Writes nats_lost.png and returns the same as an SVG element.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(lines), figsize=(5.4 * len(lines), 4.4), layout="constrained", squeeze=False, sharey=True)
    recipes = looks(RECIPES, dict.fromkeys(recipe for of in lines.values() for recipe in of))
    for axis, (protocol, of) in zip(axes[0], lines.items()):
        for recipe, points in of.items():
            label, colour = recipes[recipe]
            label = LORA_TITLE if recipe == LORA else label
            line = [(0.0, 0.0), *((100 * share, nats) for share, nats in sorted(points))]
            axis.plot(*zip(*line), "o-", color=colour, markersize=5, label=label)
        axis.set(xlabel="decoder parameters removed, %", title=protocol)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("nats per token lost, mean of the texts")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(name)
    figure.savefig(folder / "nats_lost.png", dpi=130)
    return _svg(figure)


def recovery_curves(rows: list[dict], folder: Path) -> Path:
    """Draws perplexity against the share of the decoder removed, one line per recovery, one panel per text. Takes ablation rows."""
    plt = _pyplot()
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))
    figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4.2), layout="constrained", squeeze=False)
    alone = [(r["settings"].get("recovery", METHODS["slimllm"].recovery), r) for r in rows if set(r["settings"]) <= {"recovery"}]
    for axis, text in zip(axes[0], texts):
        for name, (label, colour) in looks(RECOVERIES, (recovery for recovery, _ in alone)).items():
            chosen = [r for recovery, r in alone if recovery == name]
            points = sorted((100 * r["removed"], f["pruned"]) for r in chosen for f in r["perplexity"] if f["data"] == text)
            if points:
                axis.plot(*zip(*points), "o-", color=colour, label=label, markersize=5)
        axis.set(xlabel="decoder parameters removed, %", ylabel="perplexity", title=TEXT_HEADINGS.get(text, text))
        _logarithmic(axis)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    return _saved(figure, folder / "recovery.png")
