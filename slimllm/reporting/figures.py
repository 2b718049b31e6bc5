"""Pictures from the records of runs."""

from __future__ import annotations

from pathlib import Path

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


def layer_figure(run: PruningRecord, folder: Path) -> Path:
    """Draws one run: kept heads and channels, layer importance, error before and after recovery, per layer."""
    plt = _pyplot()
    layers, dense = run.layers, run.model.shape
    index = [layer["index"] for layer in layers]
    colours = {"heads": "#3b6fb6", "channels": "#e08a2e"}
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for offset, what, total in ((-0.2, "heads", dense["heads"]), (0.2, "channels", dense["channels"])):
        kept = [len(layer[what]) / total for layer in layers]
        axes[0].bar([i + offset for i in index], kept, 0.4, label=f"{what} (of {total})", color=colours[what])
    axes[0].set(
        ylabel="share kept",
        ylim=(0, 1.2),
        title=f"{run.model.name}: {run.parameters.decoder_removed:.1%} of the decoder removed",
    )
    axes[0].legend(loc="upper center", ncols=2)
    axes[1].plot(index, [layer["cosine"] for layer in layers], "o-", color="#444444", markersize=4)
    axes[1].set(ylabel="cosine of input and output\n(high: matters less)")
    if layers[0].get("sensitivity") is not None:
        cost = axes[1].twinx()
        cost.plot(index, [layer["sensitivity"] for layer in layers], "s--", color="#a33c3c", markersize=4)
        cost.set_yscale("log")
        cost.set_ylabel("divergence when half of\nthis layer alone goes (nats)", color="#a33c3c")
    for what, part in (("heads", "attention_error"), ("channels", "mlp_error")):
        points = [(layer["index"], *layer[part]) for layer in layers if layer[part]]
        if points:
            x, before, after = zip(*points)
            label = "attention" if what == "heads" else "feed-forward"
            axes[2].plot(x, before, "o--", color=colours[what], alpha=0.5, markersize=4, label=f"{label}, before recovery")
            axes[2].plot(x, after, "o-", color=colours[what], markersize=4, label=f"{label}, after ({run.config['recovery']})")
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


def recovery_curves(rows: list[dict], folder: Path) -> Path:
    """Draws perplexity against the share of the decoder removed, one line per recovery, one panel per text. Takes ablation rows."""
    plt = _pyplot()
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))
    figure, axes = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4.2), layout="constrained", squeeze=False)
    colours = {"none": "#999999", "bias": "#7b5ea7", "linear": "#3b6fb6", "least_squares": "#e08a2e"}
    for axis, text in zip(axes[0], texts):
        for name, colour in colours.items():
            chosen = [r for r in rows if (r["settings"].get("recovery", "linear") == name and set(r["settings"]) <= {"recovery"})]
            points = sorted((100 * r["removed"], f["pruned"]) for r in chosen for f in r["perplexity"] if f["data"] == text)
            if points:
                label = {"linear": "linear (the paper)", "least_squares": "least squares"}.get(name, name)
                axis.plot(*zip(*points), "o-", color=colour, label=label, markersize=5)
        axis.set(xlabel="decoder parameters removed, %", ylabel="perplexity", yscale="log", title=TEXT_HEADINGS.get(text, text))
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    return _saved(figure, folder / "recovery.png")
