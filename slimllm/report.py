"""Tables and figures from the records of runs: ``python -m slimllm.report prune_log/A prune_log/B``."""

from __future__ import annotations

import sys
from pathlib import Path

from . import record
from .allocation import removed_parameters
from .pipeline import MIN_ACTIVATION_BYTES
from .recovery import NEEDS_INPUT_COVARIANCE

BASE_BYTES = 600_000_000  # the interpreter with torch and transformers, and evaluation's logits


def table(records: list[tuple[str, dict]]) -> str:
    """One row a run: parameters, what was removed, perplexity dense and pruned, time, memory. Takes (name, record) pairs."""
    texts = list(dict.fromkeys(figure["data"] for _, r in records for figure in r["evaluation"]))
    header = ["run", "parameters", "decoder removed", "all removed", *(f"{t} dense / pruned" for t in texts), "pruning", "peak memory"]
    rows = [header]
    for name, r in records:
        size = r["parameters"]
        figures = {f["data"]: f"{f['dense']:.2f} / {f['pruned']:.2f}{'*' if f['limited'] else ''}" for f in r["evaluation"]}
        memory = " + ".join(f"{value / 1e9:.2f} GB {kind[:3].upper()}" for kind, value in r["peak_memory"].items())
        rows.append(
            [
                name,
                f"{size['dense'] / 1e6:.1f} M -> {size['pruned'] / 1e6:.1f} M",
                f"{size['decoder_removed']:.2%}",
                f"{size['removed']:.2%}",
                *(figures.get(t, "-") for t in texts),
                f"{r['seconds']['pruning']:.1f} s",
                memory,
            ]
        )
    lines = aligned(rows)
    limited = {(f["blocks"], f["seq_len"]) for _, r in records for f in r["evaluation"] if f["limited"]}
    for blocks, seq_len in sorted(limited):
        lines.append(f"* limited: perplexity on the first {blocks} blocks of {seq_len} tokens only")
    return "\n".join(lines)


def layer_line(layer, shape) -> str:
    """What happened to one layer, in one line. Takes its LayerReport and the dense ModelShape."""
    line = f"layer {layer.index:3d}  cosine {layer.cosine:6.4f}"
    if not layer.attention_error and not layer.mlp_error:
        return f"{line}  whole"
    line += f"  ratio {layer.ratio:.3f}  heads {len(layer.heads):3d}/{shape.heads}  channels {len(layer.channels):5d}/{shape.channels}"
    for name, error in (("attention", layer.attention_error), ("mlp", layer.mlp_error)):
        if error:
            line += f"  {name} error {error[0]:.4f} -> {error[1]:.4f}"
    if layer.clipped:
        line += "  clipped: at least one head group and one channel stay"
    return f"{line}  {layer.seconds:.2f} s  {record.peak_memory()['cpu_bytes'] / 1e9:.2f} GB"


def dry_run(shape, plans, config, dtype) -> str:
    """The plan in words: widths at uniform ratios, parameters, bytes, KV cache a token, memory of a run (estimated)."""
    dense, removed = shape.decoder_parameters + shape.other_parameters, removed_parameters(shape, plans, config.recovery != "none")
    widths = {(p.heads, p.kv_heads, p.channels) for p in plans if p.ratio}
    kv = [
        sum(2 * p * shape.head_dim * dtype.itemsize for p in kept)
        for kept in ([shape.kv_heads] * shape.layers, [p.kv_heads for p in plans])
    ]
    widest = max([shape.heads * shape.head_dim, shape.channels if config.recovery in NEEDS_INPUT_COVARIANCE else 0])
    layer_bytes = shape.layer_parameters(shape.heads, shape.kv_heads, shape.channels) * dtype.itemsize
    working = 4 * 4 * widest**2 + 8 * shape.heads**2 * shape.hidden + 2 * max(layer_bytes, MIN_ACTIVATION_BYTES)
    rows = [
        ["", "dense", "pruned"],
        ["parameters", f"{dense / 1e6:.2f} M", f"{(dense - removed) / 1e6:.2f} M ({removed / dense:.2%} less)"],
        [
            "decoder parameters",
            f"{shape.decoder_parameters / 1e6:.2f} M",
            f"{(shape.decoder_parameters - removed) / 1e6:.2f} M ({removed / shape.decoder_parameters:.2%} less)",
        ],
        [
            f"weights in {record.name_of(dtype)}",
            f"{dense * dtype.itemsize / 1e9:.3f} GB",
            f"{(dense - removed) * dtype.itemsize / 1e9:.3f} GB",
        ],
        ["KV cache a token", f"{kv[0]} bytes", f"{kv[1]} bytes"],
        [
            "heads / KV heads / channels",
            f"{shape.heads} / {shape.kv_heads} / {shape.channels}",
            ", ".join("%d / %d / %d" % w for w in sorted(widths, reverse=True)),
        ],
        ["peak memory of a run, about", "", f"{(dense * dtype.itemsize + working + BASE_BYTES) / 1e9:.2f} GB"],
    ]
    return f"dry run, uniform ratios over {sum(p.ratio > 0 for p in plans)} of {shape.layers} layers; no weights read\n" + "\n".join(
        aligned(rows)
    )


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return lines


def figures(run: dict, folder: Path) -> list[Path]:
    """Draws one run: kept heads and channels, layer importance, error before and after recovery, per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers, dense = run["layers"], run["model"]["shape"]
    index = [layer["index"] for layer in layers]
    colours = {"heads": "#3b6fb6", "channels": "#e08a2e"}
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for offset, what, total in ((-0.2, "heads", dense["heads"]), (0.2, "channels", dense["channels"])):
        kept = [len(layer[what]) / total for layer in layers]
        axes[0].bar([i + offset for i in index], kept, 0.4, label=f"{what} (of {total})", color=colours[what])
    axes[0].set(
        ylabel="share kept",
        ylim=(0, 1.2),
        title=f"{run['model']['name']}: {run['parameters']['decoder_removed']:.1%} of the decoder removed",
    )
    axes[0].legend(loc="upper center", ncols=2)
    axes[1].plot(index, [layer["cosine"] for layer in layers], "o-", color="#444444", markersize=4)
    axes[1].set(ylabel="cosine of input and output\n(high: matters less)")
    for what, part in (("heads", "attention_error"), ("channels", "mlp_error")):
        points = [(layer["index"], *layer[part]) for layer in layers if layer[part]]
        if points:
            x, before, after = zip(*points)
            label = "attention" if what == "heads" else "feed-forward"
            axes[2].plot(x, before, "o--", color=colours[what], alpha=0.5, markersize=4, label=f"{label}, before recovery")
            axes[2].plot(x, after, "o-", color=colours[what], markersize=4, label=f"{label}, after ({run['config']['recovery']})")
    axes[2].set(xlabel="layer", ylabel="output variance missed", yscale="log")
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend(ncols=2, fontsize=8)
    folder.mkdir(exist_ok=True)
    path = folder / "layers.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return [path]


def loss_curve(run: dict, folder: Path) -> Path:
    """Draws the training and validation loss of a post-training record over the optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training rows", "-"), ("eval_loss", "held-out rows", "o-")):
        points = [(entry["step"], entry[key]) for entry in run["history"] if key in entry]
        if points:
            axes.plot(*zip(*points), style, label=label, color="#9db8d9" if key == "loss" else "#e08a2e", markersize=5)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=f"post-training of {Path(run['config']['prune_model']).name}")
    axes.legend()
    folder.mkdir(exist_ok=True)
    path = folder / "loss.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main(argv=None) -> int:
    folders = argv if argv is not None else sys.argv[1:]
    if not folders or folders[0].startswith("-"):
        print("usage: python -m slimllm.report prune_log/NAME ...   prints one table of these runs")
        return 0 if folders and folders[0] in ("-h", "--help") else 2
    try:
        print(table([(Path(folder).name, record.read(folder)) for folder in folders]))
    except (OSError, ValueError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
