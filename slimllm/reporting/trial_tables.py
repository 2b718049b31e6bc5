"""Tables of many prunings of one model: the comparison of methods, and the ablation."""

from __future__ import annotations

import math

from ..settings.methods import METHODS, title_of
from .paper_table import _average
from .tables import TEXT_HEADINGS, aligned, limits_line


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
        by_text = {f["data"]: f"{f['pruned']:.1f}{'*' if f['limited'] else ''}" for f in r["perplexity"]}
        tasks += r["tasks"].values()
        scores = [100 * task["metrics"][task["reported"]] for task in r["tasks"].values()]
        lost = [math.log(f["pruned"] / dense[f["data"]]) for f in r["perplexity"]]
        average = _average(scores, any(task["limited"] for task in r["tasks"].values()))
        size = [f"{r['parameters'] / 1e6:.1f} M", f"{r['bytes'] / 1e6:.0f}", f"{r['seconds']:.0f}"]
        perplexities = [by_text.get(text, "-") for text in texts]
        name, nats = title_of(METHODS, r["name"]), f"{sum(lost) / len(lost):.3f}" if lost else "-"
        cells.append([f"{r['removed']:.1%}".replace("%", " %"), name, r["variant"], *perplexities, nats, average, *size])
    questions = sorted({task["questions"] for task in tasks if task["limited"]})
    limited = [f"* limited: zero-shot on the first {questions[-1]} questions of each task only"] if questions else []
    return [*aligned(cells), *limits_line([f for r in rows for f in r["perplexity"]]), *limited]


def ablation_table(rows: list[dict], shares) -> list[str]:
    """Markdown: a row for each variant, a column for each share removed and text, perplexities inside. Takes ablation rows."""
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))
    by_run = {(r["name"], r["variant"], r["share"]): {f["data"]: f for f in r["perplexity"]} for r in rows}
    names = [key[:2] for key in by_run if key[2] in shares]
    header = ["Ingredient", "Variant", *(f"{share:.0%}: {TEXT_HEADINGS.get(t, t)}".replace("%", " %") for share in shares for t in texts)]
    cells = [header]
    for name in dict.fromkeys(names):
        figures = [by_run.get((*name, share), {}).get(text) for share in shares for text in texts]
        cells.append([*name, *(f"{f['pruned']:.1f}{'*' if f['limited'] else ''}" if f else "-" for f in figures)])
    return [*aligned(cells), *limits_line([f for r in rows for f in r["perplexity"]])]
