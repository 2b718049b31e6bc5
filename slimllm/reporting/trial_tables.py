"""Tables of many prunings of one model: the comparison of methods, and the ablation."""

from __future__ import annotations

import math
from pathlib import Path

from ..evaluation.answers import ChatQuality
from ..settings.compare import QUANTIZATIONS
from ..settings.methods import METHODS, title_of
from .paper_table import _average, accuracy
from .tables import TEXT_HEADINGS, aligned, limits_line


def comparison_table(rows: list[dict]) -> list[str]:
    """Markdown: a row per model, by the share removed; perplexities, the average over the zero-shot tasks, size, seconds.

    The nats lost are the mean over the texts of ln(perplexity / the dense model's). Where one model has other tokens it is nats per byte in
    place of both, and how much more than the dense model's they are in the mean.
    """
    texts = list(dict.fromkeys(f["data"] for row in rows for f in row["perplexity"]))
    headings = [TEXT_HEADINGS.get(text, text) for text in texts]
    per_byte = tokens_differ(rows)
    figure, digits = ("nats_per_byte", 4) if per_byte else ("pruned", 1)
    lost_heading = "More than dense" if per_byte else "Nats lost"
    timed, chatted = any("tokens_per_second" in row for row in rows), any(row.get("chat") for row in rows)
    header = ["Decoder removed", "Method", "", *headings, lost_heading, "Zero-shot", *CHAT * chatted, "Parameters", "MB", "s"]
    header += ["Tokens/s"] * timed
    dense = {f["data"]: f[figure] for row in rows if row["name"] == "dense" for f in row["perplexity"]}
    cells, tasks = [header], []
    for r in sorted(rows, key=lambda row: round(row["removed"], 2)):
        by_text = {f["data"]: f"{f[figure]:.{digits}f}{'*' if f['limited'] else ''}" for f in r["perplexity"]}
        tasks += r["tasks"].values()
        scores = [accuracy(task) for task in r["tasks"].values()]
        ratios = [f[figure] / dense[f["data"]] for f in r["perplexity"]]
        lost = [ratio - 1 if per_byte else math.log(ratio) for ratio in ratios]
        average = _average(scores, any(task["limited"] for task in r["tasks"].values()))
        size = [f"{r['parameters'] / 1e6:.1f} M", f"{r['bytes'] / 1e6:.0f}", "-" if r["seconds"] is None else f"{r['seconds']:.0f}"]
        figures = [by_text.get(text, "-") for text in texts]
        mean = sum(lost) / len(lost) if lost else math.nan
        shown = "-" if not lost else f"{mean:.1%}".replace("%", " %") if per_byte else f"{mean:.3f}"
        variant = Path(r["folder"]).name if "folder" in r else r["variant"]
        about = f"{r['removed']:.1%}".replace("%", " %"), title_of(METHODS, r["name"]), variant
        speed = f"{r['tokens_per_second']['generation']:.1f}" if "tokens_per_second" in r else "-"
        cells.append([*about, *figures, shown, average, *chat_cells(r.get("chat")) * chatted, *size, *[speed] * timed])
    questions = sorted({task["questions"] for task in tasks if task["limited"]})
    limited = [f"* limited: zero-shot on the first {questions[-1]} questions of each task only"] if questions else []
    unit = ["nats per byte, since not all models have the same tokens"] if per_byte else []
    return [*aligned(cells), *unit, *limits_line([f for r in rows for f in r["perplexity"]]), *limited]


CHAT = ["Chat faults", "Chat nats"]  # answers that loop or stop at once; nats per token that the dense model gives the others


def chat_cells(chat: dict | None) -> list[str]:
    """The cells below ``CHAT`` of a model's ChatQuality."""
    if not chat:
        return ["-", "-"]
    quality = ChatQuality(**chat)
    return [f"{quality.faults} of {quality.prompts}", "-" if quality.nats is None else f"{quality.nats:.2f}"]


def split_name(name: str) -> tuple[str, str]:
    """(the model, the type of fewer bits that it is shown in or nothing) of the name of a row: ``dense, q8_0``."""
    model, _, kind = name.rpartition(", ")
    return (model, kind) if kind in QUANTIZATIONS else (name, "")


def tokens_differ(rows: list[dict]) -> bool:
    """Whether one of the models has other tokens than the dense one: their perplexities per token cannot be compared."""
    return any(row.get("other_tokens") for row in rows)


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
