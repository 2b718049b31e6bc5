"""``slimllm evidence MODEL``: prunes by each recipe and share, measures by each protocol, and puts all of it on one page.

A step is a command of another program, run in this process: what it leaves is that program's own file, and anyone can run it alone.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import cli
from ..data import calibration
from ..data.texts import HUB_TEXTS, blocks_of, load_texts
from ..deploy import vllm
from ..errors import Terminated, UserError, first_line
from ..evaluation import generation
from ..experiments.trials import state_of_model
from ..models import loading
from ..models.shape import limits_of, shape_of
from ..reporting import evidence as page
from ..reporting import record
from ..reporting.evidence import Row, latency_file, measured_file
from ..reporting.record import PruningRecord, TrainingRecord
from ..reporting.tables import aligned
from ..settings.common import short_name
from ..settings.evidence import LORA, EvidenceConfig
from ..settings.latency import LatencyConfig
from ..settings.pruning import PruneConfig
from ..training.data import check_rows
from ..utils.files import writing
from ..utils.memory import memory_errors, reset_peak, return_free_memory
from ..utils.outputs import is_results
from . import COMMANDS
from .prune import foresee

log = logging.getLogger("slimllm")

FILE = "evidence.json"
MAKERS = ("prune", "train", "export-gguf")  # programs that make a model, which is there or is not; what others leave can be completed
TEXTS = ("wikitext2", "ptb", "c4")
IN_MAKING = PruneConfig.max_seq_len  # tokens per block of the texts that pruning and training measure on
IDENTITY = ("dtype", "calibration", "num_examples", "distill_examples", "seed", "eval_data", "eval_limit", "limit", "tune", "runtime")
NOT_FORESEEN = (
    "not foreseen: the time of measurements and training, which grows with texts, questions and the model; perplexity holds one layer at a "
    "time in memory, tasks, generation and training the whole model, latency that and the dense one"
)


@dataclass(frozen=True)
class Step:
    """A command: ``program`` and its ``words``, what it is for, and the ``file`` that it leaves; ``row``: the model that it is about."""

    row: Row
    what: str
    program: str
    words: tuple[str, ...]
    file: Path

    @property
    def name(self) -> str:
        return f"{self.row.name}, {self.what}"

    def is_done(self, known: dict) -> bool:
        """Whether its file is there, of the same command; ``known``: the finished and failed steps by name."""
        entry = known.get(self.name, {"failed": "not begun"})
        same = self.program in MAKERS or entry.get("command") == [self.program, *self.words]
        return self.file.is_file() and same and "failed" not in entry

    def again(self, anew: bool) -> list[str]:
        """The flags with which it goes on where it was stopped, unless it is to begin ``anew``, or replaces what a stopped run left."""
        folder = self.file.parent
        if self.program == "prune":
            stopped = not anew and any(folder.parent.glob(f".{folder.name}.*.partial"))
            return ["--resume"] * stopped + ["--overwrite"] * folder.exists()
        if self.program == "train" and folder.exists():
            stopped = not anew and any(folder.glob("checkpoint-*"))
            return ["--resume_from_checkpoint", "last"] if stopped else ["--overwrite"]
        return ["--overwrite"] if self.program == "export-gguf" and self.file.exists() else []

    @property
    def makes(self) -> str | None:
        """The model that it makes, as other steps name it."""
        if self.program in MAKERS:
            return str(self.file) if self.program == "export-gguf" else self.row.model
        return None


def run(config: EvidenceConfig) -> int:
    """Every step that is not done yet, then the page. Returns exit status 1 where one failed."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("it is one process; start it without torchrun")
    model_config = loading.load_config(config.base_model)
    _check_widths(config, model_config)
    most = model_config.max_position_embeddings
    left_out = [f"{page.protocol_of(n)}: beyond the model's context of {most} tokens" for n in config.protocols if n > most]
    too_long = [n for n in config.length if n + LatencyConfig.new_tokens > most] if config.latency else []
    left_out += [f"latency at {n} tokens: with those that follow, beyond the model's context of {most} tokens" for n in too_long]
    left_out += not_beside(config)
    rows, lengths = rows_of(config), [n for n in config.protocols if n <= most]
    _check_sources(config)
    if config.dry_run:
        texts = dict.fromkeys(lengths, config.eval_data)
        _print_plan(config, [*makers(config, config.eval_data), *measurements(config, rows, texts, most)], left_out)
        return 0
    generation.check(config.generation, config.include_path)
    folder = Path(config.output)
    file = record.results_in(folder, FILE)
    with record.results_at(file, config.overwrite):
        fingerprint = {"model": state_of_model(config.base_model), **{name: getattr(config, name) for name in IDENTITY}}
        fingerprint |= record.hashes_of(sources_of(config))
        results = record.continued(file, fingerprint, config.overwrite)
        results.setdefault("steps", {})
        if config.overwrite:
            _forget(folder)
        page.check(folder, rows)
        texts, missing = at_hand(config.eval_data)
        texts, short = long_enough(texts, [IN_MAKING, *lengths], config.base_model, model_config)
        results["left_out"] = left_out + missing + short
        for line in results["left_out"]:
            log.info("left out: %s", line)
        steps = [*makers(config, texts[IN_MAKING]), *measurements(config, rows, {n: texts[n] for n in lengths}, most)]
        record.save_results(results, file)
        cli.log_to_file(folder / "log.txt")
        _go_through(steps, config, results, file)
        done = {step.name: results["steps"][step.name] for step in steps}  # those of other flags stay in the file
        lines = page.write(folder, short_name(config.base_model), rows, config.protocols, results | {"steps": done})
    failed = [name for name, entry in done.items() if "failed" in entry]
    log.info("\n%s\n\neverything lies in %s/: %s is the page", "\n".join(lines).rstrip(), folder, page.PAGE)
    for name in failed:
        log.info("failed: %s: %s", name, done[name]["failed"])
    return 1 if failed or missing else 0


def _check_widths(config: EvidenceConfig, model_config) -> None:
    """Raises UserError where nothing that is pruned could be measured in llama.cpp, since its layers would differ there."""
    if "llama_cpp" not in config.runtimes or not config.recipes:
        return
    shape = shape_of(model_config)
    limits = limits_of(config.runtime or "any", shape)
    differ = not (limits.same_heads and limits.same_channels) and not shape.is_mixture  # whose layers may be alike all the same
    if differ and shape.gguf and not shape.gguf_free:
        raise UserError(
            f"--runtimes llama_cpp: llama.cpp takes a {model_config.model_type} with one width for all layers only, so its pruned "
            "models would not run there; add --runtime gguf, which prunes for it"
        )


def _check_sources(config: EvidenceConfig) -> None:
    """Raises UserError for what the steps will read, and would be told to be wrong only after hours."""
    load_texts(tuple(name for name in config.eval_data or () if name not in HUB_TEXTS))
    calibration.check_source(config.calibration)
    if config.tune:
        check_rows(config.tune, "--tune")
    if "vllm" in config.runtimes:
        vllm.check_interpreter(config.vllm)


def sources_of(config: EvidenceConfig) -> list[str | None]:
    """The files and folders that the flags of IDENTITY may name: what they hold decides the figures as their names do."""
    return [config.calibration, config.tune, *(item.rpartition("=")[2] for item in config.eval_data or ())]


def _forget(folder: Path) -> None:
    """Removes the files of results of an earlier run; models are replaced by the programs that make them."""
    for file in (folder / "measured").glob("*.json"):
        if is_results(file):
            file.unlink()


def at_hand(eval_data: tuple[str, ...] | None) -> tuple[tuple[str, ...] | None, list[str]]:
    """(the texts among ``eval_data`` that can be had, a line for each that the hub does not give); None: what stands for TEXTS then."""
    had, missing = [], []
    for name in eval_data or TEXTS:
        try:
            load_texts((name,) if name in HUB_TEXTS else ())
            had.append(name)
        except UserError as error:
            missing.append(str(error))
    return (tuple(had), missing) if had else (("none",), missing) if eval_data else (None, [])


def long_enough(
    names: tuple[str, ...] | None, lengths: list[int], base_model: str, model_config
) -> tuple[dict[int, tuple[str, ...] | None], list[str]]:
    """(for each of the ``lengths`` in tokens the texts that fill a block of it, a line for each other); ``names`` as :func:`at_hand` gives
    them.
    """
    if names is None or "none" in names:
        return dict.fromkeys(lengths, names), []
    tokenizer, found, short = loading.load_tokenizer(base_model), {length: [] for length in lengths}, []
    for name in names:
        (text,) = load_texts((name,))
        for length in found:
            try:
                blocks_of(text, tokenizer, model_config, length)
                found[length].append(name)
            except UserError as error:
                short.append(f"--eval_data {error}")
    return {length: tuple(texts) or ("none",) for length, texts in found.items()}, short


# the steps


def rows_of(config: EvidenceConfig) -> list[Row]:
    """The models to measure, the dense one first."""
    pruned = [_row(config, recipe, share) for share in config.shares for recipe in config.recipes]
    return [Row("dense", config.base_model), *pruned]


def _row(config: EvidenceConfig, recipe: str, share: float) -> Row:
    name = f"{recipe}_{100 * share:g}"
    folder = Path(config.output) / "models" / name
    return Row(name, str(folder / "merged" if recipe == LORA else folder), recipe, share)


def makers(config: EvidenceConfig, texts: tuple[str, ...] | None) -> list[Step]:
    """Those that make the models; what lora trains comes before it, asked for or not."""
    recipes = dict.fromkeys(name for recipe in config.recipes for name in (("distilled", LORA) if recipe == LORA else (recipe,)))
    return [_maker(config, _row(config, recipe, share), texts) for share in config.shares for recipe in recipes]


def _maker(config: EvidenceConfig, row: Row, texts: tuple[str, ...] | None) -> Step:
    if row.recipe == LORA:
        folder = Path(row.model).parent
        words = [
            _row(config, "distilled", row.share).model,
            *_flags(config, "device", "seed", "eval_limit"),
            "--data_path",
            config.tune,
            "--merge",
        ]
        words += ["--extra_val_dataset", *texts] if texts else []
        words += ["--output_dir", str(folder)]
        return Step(row, "training", "train", tuple(words), folder / TrainingRecord.FILE)
    words = [config.base_model, "--recipe", row.recipe, "--target_sparsity", f"{row.share:g}"]
    words += _flags(config, "runtime", "calibration", "num_examples", "seed", "dtype", "device", "tmp_dir", "eval_limit")
    words += ["--distill_examples", str(config.distill_examples)] if row.recipe == "distilled" else []
    words += ["--eval_device", config.device] if config.device != "auto" else []
    words += ["--eval_data", *texts] if texts else []
    words += ["--output_dir", row.model]
    return Step(row, "pruning", "prune", tuple(words), Path(row.model) / PruningRecord.FILE)


def measurements(config: EvidenceConfig, rows: list[Row], texts: dict[int, tuple[str, ...] | None], most: int) -> list[Step]:
    """Those that measure, model by model; ``texts``: those for each length of a block; ``most``: tokens of the model's context."""
    shared = _flags(config, "dtype", "device", "tmp_dir", "limit")
    found = []
    for row in rows:
        file = measured_file(Path(config.output), row)

        def evaluation(what: str, *words: str, row=row, file=file) -> Step:
            return Step(row, what, "evaluate", (row.model, *words, *shared, "--output", str(file)), file)

        limit = _flags(config, "eval_limit")
        for length, names in texts.items():
            named = ["--eval_data", *names] if names else []
            if names != ("none",):
                words = "--tasks", "none", *named, "--max_seq_len", str(length), *limit
                found.append(evaluation(f"perplexity at {length}", *words))
        if config.tasks:
            source = _flags(config, "data_dir")
            found.append(evaluation("tasks", "--tasks", *config.tasks, *source, "--eval_data", "none"))
        said = [f"--{name}" for name in ("apply_chat_template", "confirm_run_unsafe_code") if getattr(config, name)]
        said += _flags(config, "include_path")
        nothing = ("--tasks", "none", "--eval_data", "none")
        found += [evaluation(name, *nothing, "--generation", name, *said) for name in config.generation]
        if config.latency and row.recipe:
            found.append(_latency(config, row, most))
    return found + [step for name in config.runtimes for step in _speeds(config, rows, name)]


def _latency(config: EvidenceConfig, row: Row, most: int) -> Step:
    new = LatencyConfig.new_tokens
    lengths = [n for n in config.length if n + new <= most] or [max(1, most - new)]
    words = [row.model, "--baseline", config.base_model, *_flags(config, "dtype", "device"), "--repeats", str(config.repeats)]
    words += ["--batch_size", *map(str, config.batch_size), "--length", *map(str, lengths)]
    file = latency_file(Path(config.output), row)
    return Step(row, "latency", "latency", (*words, "--json", str(file)), file)


def _speeds(config: EvidenceConfig, rows: list[Row], runtime: str) -> list[Step]:
    """The speeds of each model in another program, beside the dense one where that is no .gguf file, in which it has fewer bits."""
    dense, *pruned = rows
    beside = [] if loading.is_gguf(dense.model) else [dense]
    found, models = [], {row: row.model for row in rows}
    if runtime == "llama_cpp":
        for row in (*beside, *pruned):
            file = Path(config.output) / "gguf" / f"{row.name}.gguf"
            models[row] = str(file)
            found.append(Step(row, "export", "export-gguf", (row.model, "--outtype", "f16", "--output", str(file)), file))
    for row in pruned:
        file = page.speed_file(Path(config.output), row, runtime)
        words = [*(models[each] for each in (*beside, row)), "--repeats", str(config.repeats), "--json", str(file)]
        words += ["--vllm", config.vllm] if runtime == "vllm" else []
        program = {"llama_cpp": "llama-cpp-speed", "vllm": "vllm-speed"}[runtime]
        found.append(Step(row, f"speed in {page.RUNTIME_TITLES[runtime]}", program, tuple(words), file))
    return found


def not_beside(config: EvidenceConfig) -> list[str]:
    """What is said of speeds that no dense model stands beside."""
    if config.runtimes and loading.is_gguf(config.base_model):
        name = short_name(config.base_model)
        return [f"speed of the dense model: {name} holds other types than the files beside it, in 16 bits; give the model as a folder"]
    return []


def _flags(config: EvidenceConfig, *names: str) -> list[str]:
    """The flags of these names, as far as they say something."""
    values = [(name, getattr(config, name)) for name in names]
    return [word for name, value in values if value not in (None, "auto") for word in (f"--{name}", str(value))]


# going through them


def _go_through(steps: list[Step], config: EvidenceConfig, results: dict, file: Path) -> None:
    """All of them, each result kept as soon as it is there; what needs a model that could not be made is passed over."""
    missing: set[str | None] = set()
    done = {step for step in steps if step.is_done(results["steps"])}  # by the files that are there now: steps of a model share one
    for number, step in enumerate(steps, 1):
        known = results["steps"]
        if missing.intersection((*step.words, *([] if step.makes == step.row.model else [step.row.model]))):
            known[step.name] = {"command": [step.program, *step.words], "failed": "there is no model, since it could not be made"}
            missing.add(step.makes)
            continue
        if step in done:
            log.info("%d of %d: %s: done before", number, len(steps), step.name)
            continue
        log.info("\n%d of %d: %s\n", number, len(steps), step.name)
        started = time.perf_counter()
        failed = _fault_of(step, step.again(config.overwrite))
        if failed and failed.startswith("--resume"):  # other versions of packages, a broken file: it cannot go on
            log.info("%s", failed)
            failed = _fault_of(step, step.again(anew=True))
        known[step.name] = {"command": [step.program, *step.words], "seconds": round(time.perf_counter() - started, 1)}
        if failed:
            known[step.name]["failed"] = failed
            missing.add(step.makes)
            log.error("failed: %s: %s", step.name, failed)
        record.save_results(results, file)
    record.save_results(results, file)


def _fault_of(step: Step, more: list[str]) -> str | None:
    """Runs one step, with ``more`` flags; what went wrong, in one line, or None."""
    command, words = COMMANDS[step.program], [*step.words, *more]
    try:
        with writing(step.file):
            step.file.parent.parent.mkdir(parents=True, exist_ok=True)
        with _as_if_alone(step.program, words), memory_errors(command.advice):
            settings = command.parsed(step.program, words)
            status = command.load()(settings)
        return f"exit status {status}" if status else None
    except UserError as error:
        return first_line(error)
    except (KeyboardInterrupt, Terminated) as error:
        error.__notes__ = []  # how a step alone goes on; this program has no --resume, and goes on by itself
        raise
    except Exception as error:  # whatever it is, the other steps are independent of it
        log.debug("%s", step.name, exc_info=True)  # the log file has where it happened
        return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _as_if_alone(program: str, words: list[str]):
    """What a step records as its command and its peak of memory is its own, and what it opens of the log is closed after it."""
    _let_go()
    argv, handlers = sys.argv, list(log.handlers)
    sys.argv = ["slimllm", program, *words]
    try:
        yield
    finally:
        sys.argv = argv
        for handler in [handler for handler in log.handlers if handler not in handlers]:
            log.removeHandler(handler)
            handler.close()


def _let_go() -> None:
    """Gives back what the step before left, which may hold a model in a cycle, and has the peak of the memory begin anew."""
    gc.collect()
    return_free_memory()
    reset_peak(torch.device("cpu"))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        reset_peak(torch.device("cuda"))


# beforehand


def _print_plan(config: EvidenceConfig, steps: list[Step], left_out: list[str]) -> None:
    """The steps as commands, and what each pruning is expected to take."""
    rows, total, disk, dense = [["pruning", "minutes, about", "peak memory", "of the GPU", "temporary", "weights on disk"]], 0.0, 0, 0
    for step in steps:
        if step.program != "prune":
            continue
        try:
            foreseen = foresee(COMMANDS["prune"].parsed("prune", list(step.words)))
        except UserError as error:
            rows.append([step.row.title, str(error), "", "", "", ""])
            continue
        seconds, takes = sum(foreseen.seconds().values()), foreseen.takes
        of_step = (step.row.recipe, LORA) if step.row.recipe == "distilled" and LORA in config.recipes else (step.row.recipe,)
        exports = sum(one.program == "export-gguf" and one.row.share == step.row.share and one.row.recipe in of_step for one in steps)
        in_16_bits = 2 * takes.result // foreseen.work.save_dtype.itemsize
        total, disk = total + seconds, disk + takes.result * len(of_step) + in_16_bits * exports
        dense = 2 * foreseen.work.run.shape.dense_parameters
        sizes = [f"{size / 1e9:.2f} GB" for size in (takes.host, takes.device, takes.temporary + takes.beside, takes.result)]
        rows.append([step.row.title, f"{seconds / 60:.1f}", *sizes])
    lines = [f"{cli.program()} {shlex.join([step.program, *step.words])}" for step in steps]
    log.info("dry run: %d steps; no weights read\n\n%s\n", len(steps), "\n".join(lines))
    log.info("%s\n", "\n".join(aligned(rows)))
    disk += dense * any(step.program == "export-gguf" and not step.row.recipe for step in steps)
    log.info("all prunings together: about %.1f minutes here; %.2f GB of models stay on the disk", total / 60, disk / 1e9)
    log.info("%s", NOT_FORESEEN)
    for line in left_out:
        log.info("left out: %s", line)
