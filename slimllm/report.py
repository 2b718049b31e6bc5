"""Tables and figures from the records of runs: ``python -m slimllm.report prune_log/A prune_log/B``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from . import record, zero_shot
from .allocation import removed_parameters
from .recovery import NEEDS_INPUT_COVARIANCE
from .runner import MIN_ACTIVATION_BYTES

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
    return f"{line}  {layer.seconds:.2f} s  {record.peak_memory()['cpu_bytes'] / 1e9:.2f} GB"


def dry_run(shape, plans, config, dtype) -> str:
    """The plan in words: widths at uniform ratios, parameters, bytes, KV cache a token, memory of a run (estimated)."""
    dense, removed = shape.decoder_parameters + shape.other_parameters, removed_parameters(shape, plans, config)
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


def figures(run: dict, folder: Path) -> list[Path]:
    """Draws one run: kept heads and channels, layer importance, error before and after recovery, per layer."""
    plt = _pyplot()
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
            axes[2].plot(x, after, "o-", color=colours[what], markersize=4, label=f"{label}, after ({run['config']['recovery']})")
    axes[2].set(xlabel="layer", ylabel="output variance missed", yscale="log")
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend(ncols=2, fontsize=8)
    return [_saved(figure, folder / "layers.png")]


def loss_curve(run: dict, folder: Path) -> Path:
    """Draws the training and validation loss of a post-training record over the optimizer steps."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training rows", "-"), ("eval_loss", "held-out rows", "o-")):
        points = [(entry["step"], entry[key]) for entry in run["history"] if key in entry]
        if points:
            axes.plot(*zip(*points), style, label=label, color="#9db8d9" if key == "loss" else "#e08a2e", markersize=5)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=f"post-training of {Path(run['config']['prune_model']).name}")
    axes.legend()
    return _saved(figure, folder / "loss.png")


# Guo et al., table 1: LLaMA-7B. WikiText2 and PTB perplexity, then the accuracies in the order of zero_shot.TASKS, in per cent.
PAPER_ROWS = (
    ("0 %", "LLaMA-7B (paper)", 12.62, 22.14, 73.18, 78.35, 72.99, 67.01, 67.45, 41.38, 42.4),
    ("20 % w/o tune", "SlimLLM (paper)", 15.95, 26.09, 72.72, 75.95, 69.82, 66.06, 64.48, 39.33, 40.2),
    ("20 % w/ tune", "SlimLLM (paper)", 15.55, 26.66, 74.71, 76.61, 71.23, 66.54, 66.96, 40.61, 40.2),
    ("50 % w/o tune", "SlimLLM (paper)", 37.89, 67.68, 63.33, 65.40, 49.94, 58.80, 45.83, 30.38, 37.00),
    ("50 % w/ tune", "SlimLLM (paper)", 26.71, 42.19, 62.78, 68.99, 54.73, 61.01, 54.55, 33.28, 36.80),
)
TEXT_HEADINGS = {"wikitext2": "WikiText2", "ptb": "PTB", "python_manual": "Python manual"}


def paper_cells(results: list[dict]) -> list[list[str]]:
    """The paper's main table: header, then a row for each result of ``slimllm.evaluation``, dense first, as strings.

    Perplexity, then the accuracy that the paper reports of each task in per cent, then their average. ``*`` marks a
    figure of a limited run, ``-`` one that is not there; an average over fewer than all tasks says over how many.
    The paper's own rows follow where the model is LLaMA-7B.
    """
    texts = list(dict.fromkeys(f["data"] for r in results for f in r["perplexity"]))
    paper = any(re.search(r"(?i)\bllama-?7b", r["of"]["model"]) for r in results)
    if paper:
        texts = ["wikitext2", "ptb", *(text for text in texts if text not in ("wikitext2", "ptb"))]
    header = ["Ratio", "Method", *(TEXT_HEADINGS.get(t, t) for t in texts), *(task.heading for task in zero_shot.TASKS.values()), "Average"]
    rows = []
    for r in results:
        pruning = r["of"]["pruning"]
        if pruning is None:
            ratio, method, order = "0 %", r["of"]["model"], (0.0, False)
        else:
            tuned, removed = r["of"]["adapter"] is not None or pruning.get("tuned", False), pruning["removed"]
            ratio = f"{removed:.0%}".replace("%", " %") + (" w/ tune" if tuned else " w/o tune")
            method = f"SlimLLM, {pruning['recipe']}: {pruning['recovery']}, {pruning['layer_ratio']}"
            order = (removed, tuned)
        found = {f["data"]: f"{f['perplexity']:.2f}{'*' if f['limited'] else ''}" for f in r["perplexity"]}
        scores = {name: 100 * task["metrics"][task["reported"]] for name, task in r["tasks"].items()}
        limited = any(task["limited"] for task in r["tasks"].values())
        cells = [f"{scores[name]:.2f}{'*' if limited else ''}" if name in scores else "-" for name in zero_shot.TASKS]
        rows.append((order, [ratio, method, *(found.get(text, "-") for text in texts), *cells, _average(list(scores.values()), limited)]))
    table = [header] + [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    if paper:
        for ratio, method, wikitext2, ptb, *scores in PAPER_ROWS:
            blanks = ["-"] * (len(texts) - 2)
            cells = [f"{score:.2f}" for score in scores]
            table.append([ratio, method, f"{wikitext2:.2f}", f"{ptb:.2f}", *blanks, *cells, _average(scores, False)])
    return table


def _average(scores: list[float], limited: bool) -> str:
    if not scores:
        return "-"
    of = "" if len(scores) == len(zero_shot.TASKS) else f" ({len(scores)} tasks)"
    return f"{sum(scores) / len(scores):.2f}{'*' if limited else ''}{of}"


def paper_table(results: list[dict]) -> list[str]:
    """:func:`paper_cells` as lines of Markdown, with a line that says what ``*`` means where it occurs."""
    cells = paper_cells(results)
    limited = any("*" in cell for row in cells for cell in row)
    return [*aligned(cells), *(["* limited: on the first blocks or questions only"] if limited else [])]


def latex(cells: list[list[str]]) -> str:
    """A booktabs table of the rows in ``cells``, the first of which is the header."""

    def line(row):
        return " & ".join(cell.replace("%", "\\%").replace("_", "\\_") for cell in row) + r" \\"

    columns = "ll" + "r" * (len(cells[0]) - 2)
    body = [line(cells[0]), r"\midrule", *map(line, cells[1:])]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write_paper_table(results: list[dict], folder: Path) -> None:
    """table.md, table.tex and table.json in ``folder``."""
    cells = paper_cells(results)
    record.write(folder / "table.md", "\n".join(paper_table(results)) + "\n")
    record.write(folder / "table.tex", latex(cells))
    rows = [dict(zip(cells[0], row)) for row in cells[1:]]
    record.write(folder / "table.json", record.dumps({"format": record.FORMAT, "rows": rows}))


def ablation_table(rows: list[dict], shares) -> list[str]:
    """Markdown: a row for each variant, a column for each share removed and text, perplexities inside. Takes ablation rows."""
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))
    found = {(r["ingredient"], r["variant"], r["share"]): {f["data"]: f for f in r["perplexity"]} for r in rows}
    names = [key[:2] for key in found if key[2] in shares]
    header = ["Ingredient", "Variant", *(f"{share:.0%}: {TEXT_HEADINGS.get(t, t)}".replace("%", " %") for share in shares for t in texts)]
    cells = [header]
    for name in dict.fromkeys(names):
        figures = [found.get((*name, share), {}).get(text) for share in shares for text in texts]
        cells.append([*name, *(f"{f['pruned']:.1f}{'*' if f['limited'] else ''}" if f else "-" for f in figures)])
    limited = {(f["blocks"], f["seq_len"]) for r in rows for f in r["perplexity"] if f["limited"]}
    return [*aligned(cells), *(f"* limited: perplexity on the first {n} blocks of {length} tokens only" for n, length in sorted(limited))]


def recovery_curves(rows: list[dict], folder: Path) -> Path:
    """Draws perplexity against the share of the decoder removed, one line a recovery, one panel a text. Takes ablation rows."""
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


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m slimllm.report", description="Tables from the records of runs.")
    parser.add_argument("records", nargs="+", help="folders of pruning runs (prune_log/NAME): one row each; or results (eval_log/*.json)")
    parser.add_argument("--output", help="of results: a folder for table.md, table.tex and table.json")
    args = parser.parse_args(argv)
    try:
        if all(path.endswith(".json") for path in args.records):
            results = [record.read_json(path) for path in args.records]
            print("\n".join(paper_table(results)))
            if args.output:
                write_paper_table(results, Path(args.output))
        else:
            print(table([(Path(folder).name, record.read(folder)) for folder in args.records]))
    except (OSError, ValueError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
