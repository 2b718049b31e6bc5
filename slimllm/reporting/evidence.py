"""The page of ``slimllm evidence``: what its folder holds, each protocol in a table of its own, and apart from it what papers report."""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError, first_line
from ..evaluation.latency import milliseconds
from ..settings.evidence import LORA, LORA_TITLE, PROTOCOLS
from ..settings.tasks import MATH, MMLU_MATH, TASKS
from ..utils.files import write_text
from . import record
from .card import portable, shared_texts
from .figures import nats_lost
from .page import template
from .paper_table import accuracy_cells, task_cells
from .published import ARENA_COLUMNS, ARENA_NOTE, ARENA_ROWS, PUBLISHED
from .record import PruningRecord
from .tables import TEXT_HEADINGS, aligned, limits_line
from .trial_tables import CHAT, chat_cells

ARENA_TASKS = {
    "boolq": "BoolQ",
    "arc_easy": "ARC-E",
    "arc_challenge": "ARC-C",
    "winogrande": "WinoG.",
    "piqa": "PIQA",
    "hellaswag": "HellaS.",
    "openbookqa": "OBQA",
}
MARKDOWN, PAGE = "evidence.md", "evidence.html"
RUNTIME_TITLES = {"llama_cpp": "llama.cpp", "vllm": "vLLM"}
HEADINGS = ["model", "decoder removed", "whole model removed"]  # that each table begins with
NOT_LIKE_FOR_LIKE = (
    "Not measured here. A figure belongs beside one above only where model, share and tokens per block are the same, and what calibrated "
    "it does not come from the text that it is measured on. Without post-training; WikiText-2 and PTB, perplexity per token."
)


@dataclass(frozen=True)
class Row:
    """A model that is measured: the dense one, or what ``recipe`` made of it without ``share`` of its decoder. ``model``: where it is."""

    name: str
    model: str
    recipe: str | None = None
    share: float = 0.0

    @property
    def title(self) -> str:
        how = {None: "dense", LORA: LORA_TITLE}
        return how.get(self.recipe, self.recipe) + (f", {100 * self.share:g} %" if self.recipe else "")


@dataclass
class Section:
    """A part of the page."""

    heading: str
    notes: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass
class Found:
    """What there is of a row: the record of its pruning, what was measured of it, and its latency beside the dense model, in transformers
    and by the name of another program (``speeds``).
    """

    row: Row
    run: PruningRecord | None
    measured: dict
    latency: dict
    speeds: dict[str, dict]

    @classmethod
    def of(cls, row: Row, folder: Path) -> Found:
        """What ``folder`` has of a row. Raises UserError for a file that is damaged."""
        files = [measured_file(folder, row), latency_file(folder, row), *(speed_file(folder, row, name) for name in RUNTIME_TITLES)]
        try:
            run = PruningRecord.read(row.model) if row.recipe and (Path(row.model) / PruningRecord.FILE).is_file() else None
            measured, latency, *speeds = (record.read_json(file) if file.is_file() else {} for file in files)
        except (OSError, ValueError) as error:
            raise UserError(f"{first_line(error)}; remove it, and the same command makes it anew") from None
        return cls(row, run, measured, latency, dict(zip(RUNTIME_TITLES, speeds)))

    @property
    def first_cells(self) -> list[str]:
        if self.run is None:
            return [self.row.title, "0 %" if self.row.recipe is None else "-", "0 %" if self.row.recipe is None else "-"]
        sizes = self.run.parameters
        return [self.row.title, *(f"{share:.2%}".replace("%", " %") for share in (sizes.decoder_removed, sizes.removed))]

    def figures(self, tokens: int) -> dict[str, dict]:
        """Its perplexities in blocks of so many tokens, by text."""
        return {f["data"]: f for f in self.measured.get("perplexity", ()) if f["seq_len"] == tokens}


def measured_file(folder: Path, row: Row) -> Path:
    """The results of ``slimllm evaluate``."""
    return folder / "measured" / f"{row.name}.json"


def latency_file(folder: Path, row: Row) -> Path:
    """The results of ``slimllm latency``."""
    return folder / "measured" / f"{row.name}_latency.json"


def speed_file(folder: Path, row: Row, runtime: str) -> Path:
    """The results of ``slimllm llama-cpp-speed`` or ``vllm-speed``."""
    return folder / "measured" / f"{row.name}_{runtime}.json"


def protocol_of(tokens: int) -> str:
    return f"{tokens} tokens per block ({PROTOCOLS[tokens]})"


def check(folder: Path, rows: list[Row]) -> None:
    """Raises UserError for a file of an earlier run that :func:`write` could not read."""
    for row in rows:
        Found.of(row, folder)


def write(folder: Path, name: str, rows: list[Row], protocols: tuple[int, ...], results: dict) -> list[str]:
    """evidence.md, evidence.html and nats_lost.png in ``folder``. Returns the lines of the first part, which a terminal shows.

    ``results``: what evidence.json holds: ``steps``, each with its command and its failure where it failed, and ``left_out``, lines.
    """
    found = [Found.of(row, folder) for row in rows]
    lines = {protocol_of(n): drawn for n in protocols if (drawn := _lines(found, n))}
    picture = nats_lost(lines, name, folder) if lines else None
    environment = results["environment"]
    about = f"{name}, pruned and measured by slimllm {environment['slimllm']}: {portable(results['command'])}"
    measured = [_models(found), *(_perplexity(found, n) for n in protocols), _tasks(found), _generation(found), _chat(found)]
    measured += [_latency(found), *(_speeds(found, name) for name in RUNTIME_TITLES), _arena(found)]
    sections = [section for section in measured if len(section.rows) > 1]
    rest = [_faults(results), _commands(results), _published(), _published_arena()]
    sections += [section for section in rest if section.notes or section.rows or section.commands]
    page = template("evidence.html.jinja")
    write_text(folder / PAGE, page.render(name=name, about=about, picture=picture, sections=sections))
    shown = ["![nats per token lost](nats_lost.png)", ""] if picture else []
    text = [f"# {name}", "", about, "", *shown, *(line for section in sections for line in _markdown(section))]
    write_text(folder / MARKDOWN, "\n".join(text).rstrip() + "\n")
    return [line for section in sections if section.heading.startswith("Perplexity") for line in _markdown(section)]


def _markdown(section: Section) -> list[str]:
    notes = [line for note in section.notes for line in (note, "")]
    commands = ["```bash", *section.commands, "```", ""] if section.commands else []
    return [f"## {section.heading}", "", *notes, *([*aligned(section.rows), ""] if section.rows else []), *commands]


def lost(dense: dict[str, dict], pruned: dict[str, dict]) -> float | None:
    """The mean over the texts of the nats per token that were lost; None where no text was measured of both, or one has no end."""
    pairs = [(dense[text]["perplexity"], figure["perplexity"]) for text, figure in pruned.items() if text in dense]
    if not pairs or not all(math.isfinite(value) for pair in pairs for value in pair):
        return None
    return sum(math.log(after / before) for before, after in pairs) / len(pairs)


def _lines(found: list[Found], tokens: int) -> dict[str, list[tuple[float, float]]]:
    """By recipe, the points (share of the decoder removed, nats lost) of the picture."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in found[1:]:
        nats = lost(found[0].figures(tokens), one.figures(tokens))
        if one.run is not None and nats is not None:
            lines.setdefault(one.row.recipe, []).append((one.run.parameters.decoder_removed, nats))
    return lines


def _models(found: list[Found]) -> Section:
    section = Section("Models", rows=[[*HEADINGS, "parameters", "calibration", "s to prune", "peak memory of that"]])
    flattered: list[str] = []
    for one in found:
        if one.run is None:
            count = one.measured.get("parameters")
            section.rows.append([*one.first_cells, f"{count / 1e6:.1f} M" if count else "-", "-", "-", "-"])
            continue
        run, samples = one.run, one.run.calibration
        memory = " + ".join(f"{value / 1e9:.2f} GB {kind[:3].upper()}" for kind, value in run.peak_memory.items())
        of = f"{samples['samples']} x {samples['length']} tokens, {Path(samples['source']).name}"
        seconds = sum(value for name, value in run.seconds.items() if name != "evaluation")
        section.rows.append([*one.first_cells, f"{run.parameters.pruned / 1e6:.1f} M", of, f"{seconds:.0f}", memory])
        shared = shared_texts(run)
        flattered += [f"{one.row.title}: {', '.join(shared)}"] if shared else []
    if flattered:
        section.notes.append(f"Calibration samples share runs of text with what is measured on, which flatters. {'; '.join(flattered)}.")
    if before := _pruned_before(found):
        section.notes.append(
            f"What stands for the dense model was pruned before: {before['of']} without {100 * before['removed']:.2f} % of its decoder. "
            "Shares count from it, and so do the nats lost."
        )
    section.notes.append("Peak memory is that of the one process that did all steps; a pruning in a process of its own takes less.")
    return section


def _pruned_before(found: list[Found]) -> dict | None:
    """How the model that all others were made of was pruned itself; None where it was not."""
    return found[0].measured.get("fingerprint", {}).get("pruning")


def _perplexity(found: list[Found], tokens: int) -> Section:
    figures = [one.figures(tokens) for one in found]
    texts = list(dict.fromkeys(text for of in figures for text in of))
    section = Section(f"Perplexity at {protocol_of(tokens)}", rows=[[*HEADINGS, *(TEXT_HEADINGS.get(t, t) for t in texts), "nats lost"]])
    for one, of in zip(found, figures):
        if of:
            cells = [f"{of[t]['perplexity']:.2f}{'*' if of[t]['limited'] else ''}" if t in of else "-" for t in texts]
            nats = lost(figures[0], of)
            section.rows.append([*one.first_cells, *cells, "-" if nats is None else f"{nats:.3f}"])
    dtypes = dict.fromkeys(one.measured["fingerprint"]["dtype"] for one, of in zip(found, figures) if of)
    section.notes = [*limits_line([f for of in figures for f in of.values()]), *(f"measured in {name}" for name in dtypes)]
    return section


def _tasks(found: list[Found]) -> Section:
    scored = [one for one in found if one.measured.get("tasks")]
    besides = [name for name in MATH if any(name in one.measured["tasks"] for one in scored)]
    header = [*HEADINGS, *(task.heading for task in TASKS.values()), "Average", *(MATH[name].heading for name in besides)]
    some = [task for one in scored for task in one.measured["tasks"].values() if task["limited"]]
    most = max((task["questions"] for task in some), default=0)
    notes = [f"* limited: the first {most} questions of each task only"] if some else []
    notes.append("lm-eval's definitions; accuracy in per cent, acc_norm for HellaSwag, ARC-c, OBQA and MathQA, acc for the others")
    notes += ["MMLU with five solved examples, the rest without any."] if set(besides) & set(MMLU_MATH) else []
    cells = ([*task_cells(one.measured["tasks"]), *accuracy_cells(one.measured["tasks"], besides)] for one in scored)
    return Section("Multiple choice", notes, [header, *([*one.first_cells, *row] for one, row in zip(scored, cells))])


def _generation(found: list[Found]) -> Section:
    scored = [(one, one.measured["generation"]) for one in found if one.measured.get("generation")]
    columns = list(dict.fromkeys((name, metric) for _, tasks in scored for name, task in tasks.items() for metric in task["metrics"]))
    rows = [[*HEADINGS, *(f"{name}: {metric}" for name, metric in columns)]]
    for one, tasks in scored:
        values = [(tasks.get(name), metric) for name, metric in columns]
        cells = [_cell(t["metrics"].get(m), t["limited"]) if t else "-" for t, m in values]
        rows.append([*one.first_cells, *cells])
    every = [task for _, tasks in scored for task in tasks.values()]
    notes = ["All of it is lm-eval's: prompts, examples, metrics."]
    notes += ["Through the chat template."] if any(task["chat_template"] for task in every) else []
    most = max((task["questions"] for task in every if task["limited"]), default=0)
    return Section("Generation", notes + ([f"* limited: the first {most} questions of each task only"] if most else []), rows)


def _cell(value: float | None, limited: bool) -> str:
    """A metric; None where there is none, or it is not finite."""
    return "-" if value is None else f"{value:.4f}{'*' * limited}"


def _chat(found: list[Found]) -> Section:
    """The dense model's answers are in the record of every pruning."""
    asked = [one for one in found if one.run is not None and one.run.chat.keys() >= {"dense", "pruned"}]
    rows = [[*HEADINGS, *CHAT]]
    if asked:
        rows.append([*found[0].first_cells, *chat_cells(asked[0].run.chat["dense"])])
    rows += [[*one.first_cells, *chat_cells(one.run.chat["pruned"])] for one in asked]
    note = "Answers that repeat themselves or stop at once, and the nats per token that the dense model gives the others."
    return Section("Chat", [note, "Before training, where a model was trained afterwards."], rows)


def _latency(found: list[Found]) -> Section:
    header = [*HEADINGS, "batch", "prompt", "prefill", "faster", "decode per step", "faster", "weights", "peak memory"]
    section = Section("Latency and memory in transformers", ["Each beside the dense model, in turns: faster is against that."], [header])
    for one in found:
        entries = one.latency.get("measurements", ())
        base = {(e["batch_size"], e["length"]): e for e in entries if e["model"] == "dense"}
        for e in entries:
            if e["model"] == "dense":
                continue
            beside = base[e["batch_size"], e["length"]]
            cells = [str(e["batch_size"]), f"{e['length']} tokens"]
            for kind in ("prefill", "decode"):
                cells += [milliseconds(e[kind]), f"{statistics.median(beside[kind]) / statistics.median(e[kind]):.2f} x"]
            size = [one.latency["sizes"][name]["weight_bytes"] / 1e9 for name in ("dense", e["model"])]
            weights = f"{size[0]:.3f} -> {size[1]:.3f} GB"
            peak = f"{beside['peak_bytes'] / 1e9:.2f} -> {e['peak_bytes'] / 1e9:.2f} GB"
            section.rows.append([*one.first_cells, *cells, weights, peak])
    return section


def _speeds(found: list[Found], runtime: str) -> Section:
    section = Section(
        f"Speed in {RUNTIME_TITLES[runtime]}", ["Each beside the dense model, where that could be measured: faster is against it."]
    )
    section.rows = [[*HEADINGS, "size", "prompt, tokens/s", "generation, tokens/s"]]
    for one in found:
        models = one.speeds[runtime].get("models", ())
        for f in models[-1:]:
            faster = [f" ({f[kind] / models[0][kind]:.2f} x)" * (len(models) > 1) for kind in ("prompt", "generation")]
            cells = [f"{f[kind]:.1f}{ratio}" for kind, ratio in zip(("prompt", "generation"), faster)]
            section.rows.append([*one.first_cells, f"{f['bytes'] / 1e6:.1f} MB", *cells])
    return section


def _arena(found: list[Found]) -> Section:
    """Whole texts and all questions only: what a leaderboard takes."""
    scores = {} if _pruned_before(found) else {one.row: _arena_scores(one) for one in found}  # whose rows are of dense models
    rows = [list(ARENA_COLUMNS)]
    for one in found:
        of = scores.get(one.row)
        if of:
            shown = [(of.get(name), 2 if name.endswith("PPL") else 3) for name in ARENA_COLUMNS[2:-1]]
            shown.append((_retention(scores[found[0].row], of), 3))
            method = "Dense FP" if one.row.recipe is None else f"SlimLLM, {one.row.title.rpartition(',')[0]}"
            kept = 1 - (one.run.parameters.decoder_removed if one.run else 0.0)
            rows.append([f"{kept:.0%}", method, *("-" if value is None else f"{value:.{digits}f}" for value, digits in shown)])
    notes = [
        "In the columns of the LowRankArena leaderboard (github.com/Zishan-Shao/lowrankarena) and by its rules: perplexity in blocks of "
        "2,048 tokens, acc_norm where a task has it, Q. Ret. the mean of what is kept of WT2, C4, MCQ Avg., MathQA and MMLU-M.",
        "All of it is measured with --tasks lowrankarena. C4 is GPTQ's part of it here, and the first 262,144 tokens of that split there.",
    ]
    return Section("Rows for LowRankArena", notes, rows)


def _arena_scores(one: Found) -> dict[str, float]:
    """What was measured whole of a model, by the leaderboard's columns."""
    texts = {name: f["perplexity"] for name, f in one.figures(2048).items() if not f["limited"]}
    found = {f"{heading} PPL": texts[name] for name, heading in (("wikitext2", "WT2"), ("c4", "C4")) if name in texts}
    tasks = {name: task for name, task in one.measured.get("tasks", {}).items() if not task["limited"]}
    accuracy = {name: task["metrics"].get("acc_norm", task["metrics"]["acc"]) for name, task in tasks.items()}
    found |= {heading: accuracy[name] for name, heading in ARENA_TASKS.items() if name in accuracy}
    if accuracy.keys() >= ARENA_TASKS.keys():
        found["MCQ Avg."] = statistics.mean(accuracy[name] for name in ARENA_TASKS)
    if "mathqa" in accuracy:
        found["MathQA"] = accuracy["mathqa"]
    if accuracy.keys() >= set(MMLU_MATH):
        questions = [tasks[name]["questions"] for name in MMLU_MATH]
        found["MMLU-M"] = statistics.fmean((accuracy[name] for name in MMLU_MATH), questions)
    return found


def _retention(dense: dict[str, float], pruned: dict[str, float]) -> float | None:
    """The leaderboard's mean of how much of the dense model's figures is kept; None where one is missing, or 0 in the dense model."""
    perplexities, accuracies = ("WT2 PPL", "C4 PPL"), ("MCQ Avg.", "MathQA", "MMLU-M")
    if not {*perplexities, *accuracies} <= dense.keys() & pruned.keys() or not all(dense[name] for name in accuracies):
        return None
    return statistics.mean([dense[name] / pruned[name] for name in perplexities] + [pruned[name] / dense[name] for name in accuracies])


def _faults(results: dict) -> Section:
    failed = [f"{name}: {step['failed']}" for name, step in results["steps"].items() if "failed" in step]
    return Section("Not measured", [*results["left_out"], *failed])


def _commands(results: dict) -> Section:
    versions = [f"{name} {value}" for name, value in results["environment"].items() if value not in (None, [], "")]
    commands = [portable(shlex.join(["slimllm", *step["command"]])) for step in results["steps"].values()]
    return Section("Commands and versions", [", ".join(versions)], commands=commands)


def _published() -> Section:
    rows = [["model", "removed", "method", "tokens per block", "WikiText2", "PTB", "needs", "source"]]
    for one in PUBLISHED:
        ptb = "-" if one.ptb is None else f"{one.ptb:.2f}"
        rows.append([one.model, one.share, one.method, str(one.tokens), f"{one.wikitext2:.2f}", ptb, one.needs, one.source])
    return Section("What papers report", [NOT_LIKE_FOR_LIKE], rows)


def _published_arena() -> Section:
    rows = [["model", *ARENA_COLUMNS], *map(list, ARENA_ROWS)]
    return Section("What LowRankArena shows", [ARENA_NOTE], rows)
