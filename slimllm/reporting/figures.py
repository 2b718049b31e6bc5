"""Pictures from the records of runs."""

from __future__ import annotations

import math
from pathlib import Path

from ..models.parts import KINDS
from ..settings.methods import METHODS, RECIPES, RECOVERIES, looks
from .record import PruningRecord, TrainingRecord
from .tables import TEXT_HEADINGS


def _pyplot():
    """matplotlib's pyplot, drawing to files only; imported where a picture is drawn, since it is slow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    return path


PART_COLOURS = ("#3b6fb6", "#e08a2e", "#2f8f6b", "#7b5ea7")


def layer_figure(run: PruningRecord, folder: Path) -> Path:
    """Draws one run: what each part kept, layer importance, error before and after recovery, per layer."""
    plt = _pyplot()
    layers, dense = run.layers, run.model.shape["layers"]
    index = [layer["index"] for layer in layers]
    sorts = {kind: next(iter(units)) for layer in dense for kind, units in layer.items()}
    colours = dict(zip(sorts, PART_COLOURS))
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    width = 0.8 / len(sorts)
    for number, (kind, sort) in enumerate(sorts.items()):
        there = [(i, len(layer["kept"][kind][sort]), units[kind][sort]) for i, layer, units in zip(index, layers, dense) if kind in units]
        place = [i + (number - (len(sorts) - 1) / 2) * width for i, *_ in there]
        counts = sorted({total for *_, total in there})
        label = f"{sort} (of {counts[-1] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'})"
        axes[0].bar(place, [kept / total for _, kept, total in there], width, label=label, color=colours[kind])
    axes[0].set(
        ylabel="share kept",
        ylim=(0, 1.2),
        title=f"{run.model.name}: {run.parameters.decoder_removed:.1%} of the decoder removed",
    )
    axes[0].legend(loc="upper center", ncols=2)
    axes[1].plot(index, [math.nan if layer["cosine"] is None else layer["cosine"] for layer in layers], "o-", color="#444444", markersize=4)
    axes[1].set(ylabel="cosine of input and output\n(high: matters less)")
    if layers[0].get("sensitivity") is not None:
        cost = axes[1].twinx()
        cost.plot(index, [layer["sensitivity"] for layer in layers], "s--", color="#a33c3c", markersize=4)
        cost.set_yscale("log")
        cost.set_ylabel("divergence when half of\nthis layer alone goes (nats)", color="#a33c3c")
    for kind in sorts:
        points = [(layer["index"], *layer["errors"][kind]) for layer in layers if kind in layer["errors"]]
        if points:
            x, before, after = zip(*points)
            label, style = KINDS[kind].title, dict(color=colours[kind], markersize=4)
            axes[2].plot(x, before, "o--", alpha=0.5, label=f"{label}, before recovery", **style)
            axes[2].plot(x, after, "o-", label=f"{label}, after ({run.config['recovery']})", **style)
    axes[2].set(xlabel="layer", ylabel="output variance missed", yscale="log")
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend(ncols=2, fontsize=8)
    return _saved(figure, folder / "layers.png")


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


def comparison(rows: list[dict], folder: Path) -> Path:
    """Draws perplexity against size, one line per method, one panel per text. Takes the rows of a comparison.

    Solid: as published; dashed: with least squares. The lower axis has bytes, the upper one the share of the decoder kept.
    """
    plt = _pyplot()
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))[:2]
    figure, axes = plt.subplots(1, len(texts), figsize=(6.4 * len(texts), 5.2), layout="constrained", squeeze=False)
    dense = next(row for row in rows if row["name"] == "dense")
    decoder = next((2 * (dense["parameters"] - r["parameters"]) / r["removed"] / 1e6 for r in rows if r["removed"]), None)
    whole = dense["bytes"] / 1e6
    for axis, text in zip(axes[0], texts):

        def points(chosen, text=text):
            return sorted((r["bytes"] / 1e6, f["pruned"]) for r in chosen for f in r["perplexity"] if f["data"] == text)

        [(_, least)] = points([dense])
        for name, (label, colour) in looks(METHODS, (r["name"] for r in rows if r["share"])).items():
            for variant, style, width in (("as published", "o-", 1.6), ("with least squares", "o--", 1.0)):
                line = points([dense, *(r for r in rows if (r["name"], r["variant"]) == (name, variant))])
                if len(line) > 1:
                    alone = variant == "as published"
                    axis.plot(*zip(*line), style, color=colour, linewidth=width, markersize=3.5, label=label if alone else None)
        for recipe, (label, colour) in looks(RECIPES).items():
            line = points([dense, *(r for r in rows if r["variant"] == f"recipe {recipe}")])
            if len(line) > 1:
                axis.plot(*zip(*line), "s-", color=colour, linewidth=2.4, markersize=5, label=label)
        axis.plot(*zip(*points([dense])), "*", color="black", markersize=12, label="dense")
        others = [r for r in rows if not r["share"] and r is not dense]
        for r in others:
            for x, y in points([r]):
                axis.plot(x, y, "D", color="black", markersize=5)
                axis.annotate(r["name"], (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
        axis.set(xlabel="MB of weights (16-bit where not said otherwise)", ylabel="perplexity", yscale="log")
        axis.set_title(f"{TEXT_HEADINGS.get(text, text)}; dashed: least squares in place of the method's own recovery", fontsize=9)
        axis.set_ylim(0.85 * least, WORST * least)
        axis.grid(alpha=0.3)
        if decoder:
            kept = axis.secondary_xaxis(
                "top", functions=(lambda x: 100 * (1 - (whole - x) / decoder), lambda k: whole - (1 - k / 100) * decoder)
            )
            kept.set_xlabel("decoder parameters kept, %")
            kept.set_ticks(range(0, 101, 20))  # fewer bits may take fewer bytes than the embeddings alone
    axes[0][0].legend(fontsize=8)
    return _saved(figure, folder / "compare.png")


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
        axis.set(xlabel="decoder parameters removed, %", ylabel="perplexity", yscale="log", title=TEXT_HEADINGS.get(text, text))
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    return _saved(figure, folder / "recovery.png")
