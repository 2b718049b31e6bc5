"""The table of the paper, from results of evaluations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..settings.methods import METHODS, title_of
from ..settings.tasks import TASKS
from ..utils.files import write_text
from . import record
from .tables import TEXT_HEADINGS, aligned

# Guo et al., table 1: LLaMA-7B. WikiText2 and PTB perplexity, then the accuracies in the order of TASKS, in per cent.
PAPER_ROWS = (
    ("0 %", "LLaMA-7B (paper)", 12.62, 22.14, 73.18, 78.35, 72.99, 67.01, 67.45, 41.38, 42.4),
    ("20 % w/o tune", "SlimLLM (paper)", 15.95, 26.09, 72.72, 75.95, 69.82, 66.06, 64.48, 39.33, 40.2),
    ("20 % w/ tune", "SlimLLM (paper)", 15.55, 26.66, 74.71, 76.61, 71.23, 66.54, 66.96, 40.61, 40.2),
    ("50 % w/o tune", "SlimLLM (paper)", 37.89, 67.68, 63.33, 65.40, 49.94, 58.80, 45.83, 30.38, 37.00),
    ("50 % w/ tune", "SlimLLM (paper)", 26.71, 42.19, 62.78, 68.99, 54.73, 61.01, 54.55, 33.28, 36.80),
)

PAPER_TEXTS = (("wikitext2", 128), ("ptb", 128))  # and the tokens per block that their perplexities are of


def paper_cells(results: list[dict]) -> list[list[str]]:
    """The paper's main table: header, then a row for each result of ``slimllm evaluate``, dense first, as strings.

    Perplexity, then the accuracy that the paper reports of each task in per cent, then their average. ``*`` marks a
    figure of a limited run, ``-`` one that is not there; an average over fewer than all tasks comes with their number.
    The paper's own rows follow where the model is LLaMA-7B.
    """
    texts = list(dict.fromkeys((f["data"], f["seq_len"]) for r in results for f in r["perplexity"]))
    paper = any(re.search(r"(?i)\bllama-?7b", r["fingerprint"]["model"]) for r in results)
    if paper:
        texts = [*PAPER_TEXTS, *(text for text in texts if text not in PAPER_TEXTS)]
    several = len({length for _, length in texts}) > 1
    headings = [TEXT_HEADINGS.get(name, name) + (f", {length} tokens" if several else "") for name, length in texts]
    header = ["Ratio", "Method", *headings, *(task.heading for task in TASKS.values()), "Average"]
    rows = []
    for r in results:
        pruning = r["fingerprint"]["pruning"]
        if pruning is None:
            ratio, method, order = "0 %", r["fingerprint"]["model"], (0.0, False)
        else:
            tuned, removed = r["fingerprint"]["adapter"] is not None or pruning.get("tuned", False), pruning["removed"]
            ratio = f"{removed:.0%}".replace("%", " %") + (" w/ tune" if tuned else " w/o tune")
            named = title_of(METHODS, pruning.get("method", "slimllm"))
            method = f"{named}, {pruning['recipe']}: {pruning['recovery']}, {pruning['layer_ratio'] or 'plan'}"
            order = (removed, tuned)
        by_text = {(f["data"], f["seq_len"]): f"{f['perplexity']:.2f}{'*' if f['limited'] else ''}" for f in r["perplexity"]}
        rows.append((order, [ratio, method, *(by_text.get(text, "-") for text in texts), *task_cells(r["tasks"])]))
    table = [header] + [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    if paper:
        for ratio, method, wikitext2, ptb, *scores in PAPER_ROWS:
            blanks = ["-"] * (len(texts) - 2)
            cells = [f"{score:.2f}" for score in scores]
            table.append([ratio, method, f"{wikitext2:.2f}", f"{ptb:.2f}", *blanks, *cells, _average(scores, False)])
    return table


def task_cells(tasks: dict) -> list[str]:
    """The accuracies of one model in the order of TASKS, in per cent, and their average."""
    scores = [accuracy(task) for name, task in tasks.items() if name in TASKS]
    return [*accuracy_cells(tasks, TASKS), _average(scores, any(task["limited"] for task in tasks.values()))]


def accuracy(task: dict) -> float:
    """What tables show of a task, in per cent."""
    return 100 * task["metrics"][task["reported"]]


def accuracy_cells(tasks: dict, names: Iterable[str]) -> list[str]:
    """The accuracies of one model in the order of ``names``, in per cent."""
    return [f"{accuracy(tasks[name]):.2f}{'*' * tasks[name]['limited']}" if name in tasks else "-" for name in names]


def _average(scores: list[float], limited: bool) -> str:
    if not scores:
        return "-"
    of = "" if len(scores) == len(TASKS) else f" ({len(scores)} task{'s' * (len(scores) > 1)})"
    return f"{sum(scores) / len(scores):.2f}{'*' if limited else ''}{of}"


def paper_table(results: list[dict]) -> list[str]:
    """:func:`paper_cells` as lines of Markdown, with a line that explains ``*`` where it occurs."""
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
