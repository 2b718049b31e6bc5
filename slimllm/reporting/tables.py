"""Tables and lines of text from the records of runs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from ..evaluation import zero_shot
from ..models.shape import ModelShape
from ..pruning.allocation.plan import LayerPlan, removed_parameters
from ..pruning.config import PruneConfig
from ..pruning.footprint import Footprint
from ..pruning.layer import LayerReport
from ..utils.device import name_of
from ..utils.files import write_text
from ..utils.memory import peak_memory
from . import record
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
    return "\n".join([*aligned(rows), *_limits([f for _, r in records for f in r.evaluation])])


def odd_widths(layers: list[dict]) -> str | None:
    """A line on channels that a GPU computes slowly, where some of the ``layers`` (LayerReports) keep such numbers of them."""
    odd = sum(len(layer["channels"]) % GPU_MULTIPLE > 0 for layer in layers)
    if not odd:
        return None
    return (
        f"{odd} of {len(layers)} layers keep a number of channels that is no multiple of {GPU_MULTIPLE}: "
        "NVIDIA GPUs compute these slowly; for a model that is faster there, prune with --round_to 64"
    )


def _limits(figures: list[dict]) -> list[str]:
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


# Guo et al., table 1: LLaMA-7B. WikiText2 and PTB perplexity, then the accuracies in the order of zero_shot.TASKS, in per cent.
PAPER_ROWS = (
    ("0 %", "LLaMA-7B (paper)", 12.62, 22.14, 73.18, 78.35, 72.99, 67.01, 67.45, 41.38, 42.4),
    ("20 % w/o tune", "SlimLLM (paper)", 15.95, 26.09, 72.72, 75.95, 69.82, 66.06, 64.48, 39.33, 40.2),
    ("20 % w/ tune", "SlimLLM (paper)", 15.55, 26.66, 74.71, 76.61, 71.23, 66.54, 66.96, 40.61, 40.2),
    ("50 % w/o tune", "SlimLLM (paper)", 37.89, 67.68, 63.33, 65.40, 49.94, 58.80, 45.83, 30.38, 37.00),
    ("50 % w/ tune", "SlimLLM (paper)", 26.71, 42.19, 62.78, 68.99, 54.73, 61.01, 54.55, 33.28, 36.80),
)
METHOD_NAMES = {
    "slimllm": "SlimLLM",
    "flap": "FLAP",
    "llm_pruner": "LLM-Pruner",
    "wanda_sp": "Wanda-sp",
    "magnitude": "magnitude",
    "random": "random",
}
TEXT_HEADINGS = {"wikitext2": "WikiText2", "ptb": "PTB", "python_manual": "Python manual"}


def paper_cells(results: list[dict]) -> list[list[str]]:
    """The paper's main table: header, then a row for each result of ``slimllm evaluate``, dense first, as strings.

    Perplexity, then the accuracy that the paper reports of each task in per cent, then their average. ``*`` marks a
    figure of a limited run, ``-`` one that is not there; an average over fewer than all tasks says over how many.
    The paper's own rows follow where the model is LLaMA-7B.
    """
    texts = list(dict.fromkeys(f["data"] for r in results for f in r["perplexity"]))
    paper = any(re.search(r"(?i)\bllama-?7b", r["fingerprint"]["model"]) for r in results)
    if paper:
        texts = ["wikitext2", "ptb", *(text for text in texts if text not in ("wikitext2", "ptb"))]
    header = ["Ratio", "Method", *(TEXT_HEADINGS.get(t, t) for t in texts), *(task.heading for task in zero_shot.TASKS.values()), "Average"]
    rows = []
    for r in results:
        pruning = r["fingerprint"]["pruning"]
        if pruning is None:
            ratio, method, order = "0 %", r["fingerprint"]["model"], (0.0, False)
        else:
            tuned, removed = r["fingerprint"]["adapter"] is not None or pruning.get("tuned", False), pruning["removed"]
            ratio = f"{removed:.0%}".replace("%", " %") + (" w/ tune" if tuned else " w/o tune")
            named = METHOD_NAMES[pruning.get("method", "slimllm")]
            method = f"{named}, {pruning['recipe']}: {pruning['recovery']}, {pruning['layer_ratio'] or 'plan'}"
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
    record.results_in(folder, "table.json")
    write_text(folder / "table.md", "\n".join(paper_table(results)) + "\n")
    write_text(folder / "table.tex", latex(cells))
    rows = [dict(zip(cells[0], row)) for row in cells[1:]]
    write_text(folder / "table.json", record.dumps({"format": record.FORMAT, "rows": rows}))


def comparison_table(rows: list[dict]) -> list[str]:
    """Markdown: a row per model, by the share removed; perplexities, the average over the zero-shot tasks, size, seconds.

    The nats lost are the mean over the texts of ln(perplexity / the dense model's).
    """
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))
    headings = [TEXT_HEADINGS.get(text, text) for text in texts]
    header = ["Decoder removed", "Method", "", *headings, "Nats lost", "Zero-shot", "Parameters", "MB", "s"]
    dense = {f["data"]: f["pruned"] for row in rows if row["name"] == "dense" for f in row["perplexity"]}
    cells, tasks = [header], []
    for r in sorted(rows, key=lambda row: round(row["removed"], 2)):
        found = {f["data"]: f"{f['pruned']:.1f}{'*' if f['limited'] else ''}" for f in r["perplexity"]}
        tasks += r["tasks"].values()
        scores = [100 * task["metrics"][task["reported"]] for task in r["tasks"].values()]
        lost = [math.log(f["pruned"] / dense[f["data"]]) for f in r["perplexity"]]
        average = _average(scores, any(task["limited"] for task in r["tasks"].values()))
        size = [f"{r['parameters'] / 1e6:.1f} M", f"{r['bytes'] / 1e6:.0f}", f"{r['seconds']:.0f}"]
        perplexities = [found.get(text, "-") for text in texts]
        name, nats = METHOD_NAMES.get(r["name"], r["name"]), f"{sum(lost) / len(lost):.3f}" if lost else "-"
        cells.append([f"{r['removed']:.1%}".replace("%", " %"), name, r["variant"], *perplexities, nats, average, *size])
    questions = sorted({task["questions"] for task in tasks if task["limited"]})
    limited = [f"* limited: zero-shot on the first {questions[-1]} questions of each task only"] if questions else []
    return [*aligned(cells), *_limits([f for r in rows for f in r["perplexity"]]), *limited]


def ablation_table(rows: list[dict], shares) -> list[str]:
    """Markdown: a row for each variant, a column for each share removed and text, perplexities inside. Takes ablation rows."""
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))
    found = {(r["name"], r["variant"], r["share"]): {f["data"]: f for f in r["perplexity"]} for r in rows}
    names = [key[:2] for key in found if key[2] in shares]
    header = ["Ingredient", "Variant", *(f"{share:.0%}: {TEXT_HEADINGS.get(t, t)}".replace("%", " %") for share in shares for t in texts)]
    cells = [header]
    for name in dict.fromkeys(names):
        figures = [found.get((*name, share), {}).get(text) for share in shares for text in texts]
        cells.append([*name, *(f"{f['pruned']:.1f}{'*' if f['limited'] else ''}" if f else "-" for f in figures)])
    return [*aligned(cells), *_limits([f for r in rows for f in r["perplexity"]])]
