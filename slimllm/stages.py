"""The order of work: what is done with a model from its calibration samples to the record of the run.

Each stage is a function of the :class:`Work` and leaves what it came to there. Where a run was stopped, a stage takes what it left and
goes on. ``hf_prune.py`` goes through all of ALL, ``slimllm.prune`` and the experiments through those of IN_MEMORY.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import cli, plugins
from .data import calibration, texts
from .data.calibration import Calibration, CalibrationSource
from .deploy import checkpoint, export_gguf, gguf_architecture, whole_model
from .deploy.runtimes import convert_for_runtime
from .deploy.sink import CheckpointSink, pruned_skeleton
from .deploy.weight_files import weight_bytes
from .errors import Recurring, UserError
from .evaluation import answers
from .evaluation.perplexity import continuations, nats_per_byte, perplexities
from .modeling import missing_modules, take_out
from .models import loading
from .models.adapter import LayerAdapter
from .models.checked import warn_of_length
from .models.gguf_tensors import GgufTensors
from .models.loading import WholeModel
from .models.shape import Staying, check_missing
from .models.source import ModelSource
from .plan import LayerPlan, LayerReport
from .pruning import depth, pipeline, vocabulary
from .pruning.allocation.inputs import Allocation
from .pruning.allocation.layer_ratios import without_scores
from .pruning.allocation.plan_file import read_plan
from .pruning.allocation.price_list import PriceList
from .reporting import card, figures, page, record
from .reporting.record import ModelInfo, Parameters, PruningRecord
from .run import Run
from .settings.common import short_name
from .settings.samples import is_sample_file
from .streaming.journal import resuming
from .streaming.sizes import Footprint
from .training import distillation
from .training.distillation import Distillation
from .training.teacher import Teacher
from .utils import processes
from .utils.device import evaluation_dtype, name_of, saving_dtype
from .utils.files import atomic_file, file_hash, write_text

log = logging.getLogger("slimllm")


@dataclass
class Work:
    """A run, where its results go, and what its stages came to so far.

    ``folder``: where everything is written, None for a model in memory. ``save_dtype``: what the pruned model is saved in. ``given``:
    what the calibration samples are made of. ``plans``: what is to go, where that is decided already. ``predicted``: what it
    was expected to take. ``model``: the model in memory, in
    place of a folder: when the layers are pruned it becomes the pruned one. ``lent``: the teacher is another's, who closes it.
    """

    run: Run
    folder: Path | None = None
    save_dtype: torch.dtype | None = None
    given: CalibrationSource = None
    plans: list[LayerPlan] | None = None
    model: torch.nn.Module | None = None
    predicted: Footprint | None = None
    texts: list[texts.EvalText] = field(default_factory=list)
    # what the stages came to
    blocks: list[torch.Tensor] = field(default_factory=list)
    vocabulary: vocabulary.Kept | None = None
    blocks_now: list[torch.Tensor] | None = None  # of the texts in the tokens that stay, where some go
    drawn: calibration.Calibration | None = None  # the samples in the tokens of the model that was given
    staying: Staying | None = None  # what stays of the layers, where some or parts of some go whole
    cosine: list[float] | None = None  # of all layers, where these go by it
    teacher: Teacher | None = None
    lent: bool = False
    allocation: Allocation | None = None
    layers: list[LayerReport] = field(default_factory=list)
    distillation: Distillation | None = None
    perplexities: dict[str, list[float]] = field(default_factory=dict)
    nats_per_byte: dict[str, list[float]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    answers: dict[str, list[dict]] = field(default_factory=dict)
    chat: dict[str, dict] = field(default_factory=dict)
    info: ModelInfo | None = None
    record: PruningRecord | None = None
    exports: bool = False  # whether llama.cpp has a form for the checkpoint

    @property
    def writes(self) -> bool:
        """Whether the pruned model is written at all, to be kept or only to be looked at."""
        config = self.run.config
        return config.save_model or bool(self.texts) or config.test_after_train or bool(self.prompts) or config.distill != "none"

    @property
    def checkpoint(self) -> Path:
        """Where the pruned model is written."""
        return self.folder if self.run.config.save_model else self.run.journal.folder / "checkpoint"

    @property
    def distillation_finished(self) -> bool:
        """Whether a run that was stopped had come to the end of the distillation."""
        return self.run.known("distillation", dict) is not None


Stage = Callable[[Work], None]


def go_through(stages: Sequence[Stage], work: Work, announce: Callable[[str], None] | None = None) -> Work:
    """``announce``: called with a line for each stage that has something to do, before it begins."""
    titles = _titles(work) if announce else {}
    for stage in stages:
        if stage in titles:
            announce(f"[{list(titles).index(stage) + 1} of {len(titles)}] {titles[stage]}")
        stage(work)
    return work


def plans_of(run: Run) -> list[LayerPlan] | None:
    """The plans of ``--plan``, or None where the layers' importance decides. Raises UserError early for a sparsity that cannot be met,
    and for a model that the runtime cannot compute.
    """
    kept, tokens = run.config.tokens_of(run.shape.vocab), run.shape.vocab
    check_missing(run.shape, run.config.runtime)
    if run.config.runtime == "gguf" and (reason := gguf_architecture.obstacle(run.model_config)):
        raise UserError(f"--runtime gguf: {reason}; name another runtime")
    if run.config.vocab != "keep":
        run.tokenizer = run.tokenizer or loading.load_tokenizer(run.config.base_model)
        always = vocabulary.check(run)
        if kept is not None:
            run.shape = run.shape.with_tokens(min(tokens, max(kept, always)))
    if run.config.plan is None:
        if run.config.fit is not None:
            run.tokenizer = run.tokenizer or loading.load_tokenizer(run.config.base_model)
            overhead = export_gguf.metadata_bytes(run.tokenizer, run.config.base_model, run.model_config)
            run.file_overhead = overhead * (kept or tokens) // tokens
        if kept is not None:
            without_scores(run)
        return None
    run.shape, plans = read_plan(run.config.plan, run.shape, run.config.runtime)
    check_missing(run.shape, run.config.runtime)
    return plans


def likely_allocation(work: Work) -> tuple[Allocation, str]:
    """(what is to go, or what that will be like, from the model's config alone; where it is from, in words)."""
    run = work.run
    if work.plans:
        return Allocation(work.plans), f"the plan of {run.config.plan}"
    if run.config.vocab == "auto":
        whole = [LayerPlan(0.0, layer.units) for layer in run.shape.layers]
        return Allocation(whole), "--vocab auto decides by what it measures: nothing removed yet,"
    by = f"the plan of least loss by {run.config.price_list}" if run.config.price_list else "all layers taken to matter the same"
    by += ", attention to go whole before the rest," if run.config.drops_parts else ""
    return without_scores(run), by


def load(work: Work) -> None:
    """The model, of which no weight is read yet, its tokenizer, and the texts to measure on."""
    run, config = work.run, work.run.config
    work.texts = texts.load_texts(config.eval_data)
    with run.clock("loading"):
        run.tokenizer = run.tokenizer or loading.load_tokenizer(config.base_model)
        work.prompts = answers.prompts_of(run.tokenizer, config.prompt) if config.asks else []
        if work.writes and processes.is_first():
            work.checkpoint.mkdir(exist_ok=True)
            if config.vocab == "keep":
                checkpoint.write_tokenizer(run.tokenizer, work.checkpoint, config.base_model, run.model_config)
        sizes = config.max_seq_len, config.eval_limit
        work.blocks = [texts.blocks_of(text, run.tokenizer, run.model_config, *sizes) for text in work.texts]
        run.source = loading.open_source(config.base_model, run.dtype, config=run.model_config)
    size, kind = run.source.model.num_parameters() / 1e6, run.model_config.model_type
    log.info("%s: %s, %d layers, %.1f M parameters, %s", config.base_model, kind, len(run.source), size, run.dtype)
    if whole_model.is_whole(config.base_model):
        log.info("that is the text model inside %s; the rest of it is left alone%s", config.base_model, _ways_back(config.runtime))
    sources = (config.calibration, config.plan, config.price_list, *(config.vocab_text or ()))
    identity = record.identity(config, run.source.weights.files, work.texts, sources)
    pruned = len(run.journal.layers()) == len(run.shape.layers)
    free = [record.PROCESSES] if pruned else []  # no states are needed any more, of which each process keeps its own
    processes.from_first(lambda: run.journal.check(identity, free))


def _ways_back(runtime: str) -> str:
    """What to say, where the layers may differ in width, of how the pruned text model gets into the whole again."""
    return "" if runtime == "transformers" else " (a text model of --runtime transformers can be put back into it)"


def calibrate(work: Work) -> None:
    """The calibration samples, and those that costs are measured on and that the model is distilled on."""
    run = work.run
    if run.samples is None:
        with run.clock("calibration"):
            run.samples = processes.from_first(lambda: _calibrated(work))
    samples = run.samples
    own = f" and {samples.own} of the model's own" if samples.own and samples.source != "self" else ""
    log.info("calibration: %d samples of %d tokens, %s%s, sha256 %s", *samples.ids.shape, samples.source, own, samples.sha256[:12])
    _set_numbers_drawn(run)
    if work.model is not None:
        warn_of_length(run.model_config, seq_len=samples.ids.shape[1])


def _calibrated(work: Work) -> Calibration:
    """The samples: made, or as a stopped run left them."""
    run = work.run
    known = run.known("calibration", dict)
    if known is not None:
        with resuming(work.folder / "calibration.safetensors"):
            return Calibration.read(work.folder, known)
    with WholeModel(run.source, run.eval_device, run.progress) as whole:
        samples = calibration.samples_for(run.config, work.given, whole, run.tokenizer)
    if work.folder is not None:
        samples.save(work.folder)
    run.keep("calibration", samples.to_dict())
    return samples


def _set_numbers_drawn(run: Run) -> None:
    """Gives the settings the numbers of samples that there are, where these are not those that were asked for; says so."""
    config, samples = run.config, run.samples
    if samples.source == "self":
        return
    own = round(config.self_share * config.num_examples)
    run.config = config.as_drawn(len(samples.ids), samples.own)
    if run.config is not config:
        asked = f"{config.num_examples} samples, {own} of the model's own, were asked for"
        log.info("calibration: %s; %s gives %d, %d of its own", asked, samples.source, len(samples.ids), samples.own)


DENSE = "dense.json"  # what the dense model's figures are, for the next run on the calibration samples beside it


def measure_dense(work: Work) -> None:
    """The perplexity of the model that is given, and its answers; as the run measured them whose calibration samples are used."""
    run, config = work.run, work.run.config
    alone = processes.count() == 1 and not config.test_after_train and bool(work.blocks or work.prompts)
    identity = _dense_identity(work) if alone else {}
    if alone and run.known("dense") is None and (found := _measured_beside(config.calibration, identity)):
        log.info("the dense model was measured by the run in %s", Path(config.calibration).parent)
        run.keep("dense", found["perplexities"])
        run.keep("dense_answers", found["answers"])
        run.keep("dense_chat", found["chat"])
    _measure(work, run.source, "dense", work.blocks)
    if alone:
        figures_of = {"perplexities": work.perplexities["dense"], "answers": work.answers.get("dense", []), "chat": work.chat.get("dense")}
        write_text(work.folder / DENSE, json.dumps({"identity": identity, **figures_of}))


def _dense_identity(work: Work) -> dict:
    """All that the dense model's figures follow from."""
    run, environment = work.run, record.environment()
    files = run.source.weights.files
    beside = sorted({file for path in files for file in path.parent.glob("*") if file.suffix in (".json", ".jinja", ".model")})
    texts_read = [hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest() for ids in work.blocks]
    machine = [str(run.eval_device), name_of(evaluation_dtype(run.source.dtype, run.eval_device))]
    return {
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "beside": [[path.name, file_hash(path)] for path in beside if files[0].suffix != ".gguf"],
        "texts": [[*ids.shape, digest] for ids, digest in zip(work.blocks, texts_read)],
        "prompts": [*work.prompts, *_chat_prompts(work)],
        "machine": machine,
        "program": [environment[name] for name in ("slimllm", "commit", "torch", "transformers")],
        "plugins": dict(plugins.loaded),
    }


def _measured_beside(source: str | None, identity: dict) -> dict | None:
    """What the run that made the calibration file ``source`` measured of the dense model, where that follows from the same."""
    path = Path(source or "").parent / DENSE
    if not is_sample_file(source) or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values, said = found["perplexities"], found["answers"]
        whole = found["identity"] == identity and len(values) == len(identity["texts"]) and len(said) == len(identity["prompts"])
        usable = all(type(value) is float and 0 < value < math.inf for value in values)
        usable &= all(isinstance(answer["text"], str) and isinstance(answer["fault"], str | None) for answer in said)
        answers.ChatQuality(**found["chat"] or {}) if found["chat"] else None
        return found if whole and usable else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # it only saves time


def measure_pruned(work: Work) -> None:
    """The perplexity of the checkpoint, which was compared with the model in memory when it was written."""
    if work.run.config.save_model:
        log.info("saved, loaded again and compared: the same logits")
    if work.writes:
        _measure(work, loading.open_source(str(work.checkpoint), work.run.dtype, "DIR"), "pruned", work.blocks_now or work.blocks)


def _measure(work: Work, source: ModelSource, stage: str, blocks: list[torch.Tensor]) -> None:
    """Prints the continuations that were asked for, measures the perplexity on each text, and asks the model its prompts."""
    run = work.run

    def measured() -> list[float]:
        if run.config.test_after_train and processes.is_first():
            with WholeModel(source, run.eval_device) as whole:
                for text in continuations(whole.model(), run.tokenizer, run.config.seed, run.config.temperature, run.config.top_p):
                    log.info("[%s] %s", stage, text)
        if not blocks:
            return []
        names = [f"{text.name} ({stage})" for text in work.texts]
        dtype = evaluation_dtype(source.dtype, run.eval_device)
        return perplexities(source, blocks, names, run.eval_device, dtype, run.progress, run.config.tmp_dir)

    with run.clock("evaluation"):
        work.perplexities[stage] = run.once(stage, measured)
        if work.prompts and processes.is_first():
            work.answers[stage] = run.once(f"{stage}_answers", lambda: _answers(work, source))
            work.chat[stage] = run.once(f"{stage}_chat", lambda: _chat_quality(work, stage))
    tokenizer = run.tokenizer
    work.nats_per_byte[stage] = [nats_per_byte(value, ids, tokenizer) for value, ids in zip(work.perplexities[stage], blocks)]
    for text, value, nats in zip(work.texts, work.perplexities[stage], work.nats_per_byte[stage]):
        log.info("%s: %s perplexity %.3f, %.4f nats per byte", stage, text.name, value, nats)


def _answers(work: Work, source: ModelSource) -> list[dict]:
    """The answers to the prompts; none of a model that is large and that nothing else needs whole."""
    run = work.run
    with WholeModel(source, run.eval_device) as whole:
        if not (whole.is_small or (whole.fits and run.config.self_share)):
            why = "no answers: the whole model would take %.1f GB, which nothing else in this run needs; slimllm chat asks it"
            log.info(why, whole.bytes / 1e9)
            return []
        try:
            return answers.answers(whole.model(), run.tokenizer, work.prompts, _chat_prompts(work))
        except UserError as error:  # of a chat template that wants more than a question
            log.warning("no answers: %s", error)
            return []


def _chat_prompts(work: Work) -> tuple[str, ...]:
    """What is asked beside the prompts that are shown; nothing in a run by the paper's recipe, which is to take no longer than that."""
    return answers.CHAT if work.run.tokenizer.chat_template and work.run.config.recipe != "paper" else ()


def _chat_quality(work: Work, stage: str) -> dict | None:
    """The figures of the answers that are not shown, by the likelihood of the model that is pruned; None where there are no such."""
    run, entries = work.run, work.answers[stage][len(work.prompts) :]
    if not entries:
        return None
    where = run.eval_device, evaluation_dtype(run.source.dtype, run.eval_device), run.progress, run.config.tmp_dir
    return dataclasses.asdict(answers.chat_quality(entries, run.source, run.tokenizer, *where))


def perplexity_held_out(run: Run, source: ModelSource, blocks: torch.Tensor) -> float:
    """The perplexity of a model on token ids [blocks, seq_len] that it was not fitted on: what fewer tokens or layers cost."""
    dtype = evaluation_dtype(source.dtype, run.eval_device)
    [found] = perplexities(source, [blocks], ["the text held out"], run.eval_device, dtype, run.progress, run.config.tmp_dir)
    return found


def trim(work: Work) -> None:
    """The vocabulary: from here on the model is the one that has some of its tokens alone, where that is asked for."""
    run = work.run
    if run.config.vocab == "keep":
        return
    old = run.tokenizer
    with run.clock("vocabulary"):
        measure = functools.partial(perplexity_held_out, run)
        found = run.once("vocabulary", lambda: dataclasses.asdict(vocabulary.chosen(run, measure)))
        with resuming(run.journal.folder / "vocabulary.json"):
            work.vocabulary, work.drawn = vocabulary.Kept(**found), run.samples
        vocabulary.apply(run, work.vocabulary)
    if run.config.fit is not None:
        run.file_overhead = export_gguf.metadata_bytes(run.tokenizer, run.config.base_model, run.model_config, work.vocabulary.ids)
    if work.writes and processes.is_first():
        checkpoint.write_tokenizer(run.tokenizer, work.checkpoint, run.config.base_model, run.model_config, work.vocabulary.ids)
        vocabulary.write_map(work.checkpoint, work.vocabulary)
    work.blocks_now = [
        texts.blocks_in_other_tokens(text, blocks, old, run.tokenizer, run.model_config, run.config.eval_limit)
        for text, blocks in zip(work.texts, work.blocks)
    ]


def teach(work: Work) -> None:
    """What the dense model makes of the samples to distil on, before it is pruned."""
    run = work.run
    if run.config.distill != "none" and not work.distillation_finished and work.teacher is None:
        with run.clock("distillation"):
            work.teacher = Teacher(run.source, run.samples.distill_ids, run.device, run.progress, run.config.tmp_dir)


def drop(work: Work) -> None:
    """Whole layers and parts: from here on the model is the one without them, where some are to go."""
    run = work.run
    if run.shape.staying is None:
        return
    with run.clock("pruning"):
        work.staying = run.shape.staying
        if work.plans is None:
            found = run.once("staying", lambda: depth.least_turning(run, functools.partial(perplexity_held_out, run)))
            work.staying, work.cosine = found["staying"], found["cosine"]
        depth.apply(run, work.staying)
    check_missing(run.shape, run.config.runtime)
    if run.config.runtime == "gguf" and (reason := gguf_architecture.obstacle(run.model_config)):
        raise Recurring(f"--runtime gguf: without these layers: {reason}; let others or none go, or name another runtime")


def allocate(work: Work) -> None:
    """What is to go from each layer (pass 1)."""
    with work.run.clock("pruning"):
        work.allocation = pipeline.allocate(work.run, work.plans)
    measured = work.run.known("price_list", dict)
    if measured is not None and processes.is_first():
        PriceList.from_dict(measured).write(work.folder)


def prune(work: Work) -> None:
    """The layers, one after the other (pass 2); to a checkpoint as they are done, where there is a folder."""
    run = work.run
    if work.folder is not None and work.writes and processes.is_first():
        run.sink = CheckpointSink(work.checkpoint, run.source, run.config, run.samples.ids[:2, :64], run.device, work.save_dtype)
    with run.clock("pruning"):
        work.layers = pipeline.prune(run, work.allocation)


def finish(work: Work) -> None:
    """The pruned model in the form that the runtime asks for: the checkpoint closed and compared, or the model in memory itself."""
    run = work.run
    if work.folder is None:
        if work.staying is not None:
            adapter = LayerAdapter(work.model.config)
            layers = [layer for layer, kinds in zip(adapter.layers(work.model), work.staying) if kinds is not None]
            for layer, left in zip(layers, adapter.layers(run.source.model), strict=True):
                take_out(layer, missing_modules(left))
            adapter.set_layers(work.model, torch.nn.ModuleList(layers))
            vars(work.model.config).update(vars(run.model_config))
        _take_over(run.source.adapter, run.source.model, work.model)
        convert_for_runtime(work.model, run.config.runtime)
    elif work.writes:
        with run.clock("saving"):
            if run.sink:
                run.sink.finish(compare=not work.distillation_finished)
            processes.wait()


def distil(work: Work) -> None:
    """Trains the pruned model to predict what the dense one predicts, where that is asked for."""
    run = work.run
    if run.config.distill == "none":
        return
    if work.folder is None:
        with run.clock("distillation"):
            work.distillation = _distil(work, work.model)
        return
    student = loading.load_model(str(work.checkpoint), run.dtype, "DIR")
    names = distillation.trained_names(student, run.config.distill)
    weights = run.journal.folder / "distilled.safetensors"
    if work.distillation_finished:
        with resuming(weights):
            student.load_state_dict(load_file(weights), strict=False)
        work.distillation = Distillation(**run.known("distillation", dict))
    else:
        with run.clock("distillation"):
            work.distillation = _distil(work, student)
        if processes.is_first():
            with atomic_file(weights) as partial:
                save_file({name: student.get_parameter(name).data.contiguous() for name in names}, partial)
            run.keep("distillation", dataclasses.asdict(work.distillation))
    with run.clock("saving"):
        if run.sink:
            run.sink.replace(student, names)
        processes.wait()


def _distil(work: Work, student) -> Distillation:
    found = distillation.distil(work.run, student, work.teacher, work.save_dtype)
    if not work.lent:
        work.teacher.close()
    return found


def write_record(work: Work) -> None:
    """The record of the run, its picture and the model card, in the first of several processes."""
    run = work.run
    if not processes.is_first():
        return
    work.record = of_run = record_of(work)
    of_run.predicted_loss = work.allocation.predicted_loss
    of_run.predicted_memory = {"cpu_bytes": work.predicted.host, "gpu_bytes": work.predicted.device}
    if work.writes:
        of_run.bytes = {"dense": _dense_bytes(run), "pruned": weight_bytes(work.checkpoint)}
    of_run.write(work.folder)
    figures.layer_figure(of_run, work.folder / "figures")
    work.exports = run.config.save_model and card.exports(work.folder)
    page.write(work.folder, of_run, str(run.config.folder), cli.program(), work.exports)
    if run.config.save_model:
        card.write(work.folder, of_run)


def _dense_bytes(run: Run) -> int:
    """Bytes of the files of the model to prune; of a text model inside a larger one those that it takes in them."""
    if whole_model.is_whole(run.config.base_model):
        stored = loading.stored_dtype(run.config.base_model, run.model_config) or run.dtype
        return loading.bytes_on_disk(run.config.base_model, stored, run.shape)
    return sum(path.stat().st_size for path in run.source.weights.files)


def record_of(work: Work) -> PruningRecord:
    """What the run did, and what came of it."""
    run, samples = work.run, work.drawn or work.run.samples
    dtype = name_of(evaluation_dtype(run.source.dtype, run.eval_device))
    pairs = zip(work.texts, work.blocks, *(work.perplexities.get(stage, []) for stage in ("dense", "pruned")))
    evaluation = [
        text.figure(
            ids,
            run.config.eval_limit,
            dtype=dtype,
            calibration_overlap=calibration.overlap(samples.ids, ids.flatten()),
            dense=dense,
            pruned=pruned,
            nats_per_byte={stage: values[index] for stage, values in work.nats_per_byte.items() if values},
        )
        for index, (text, ids, dense, pruned) in enumerate(pairs)
    ]
    return PruningRecord(
        run.config.to_dict(),
        work.info,
        samples.to_dict(),
        parameters_of(work),
        evaluation,
        run.clock.seconds,
        [dataclasses.asdict(layer) for layer in all_layers(work)],
        work.distillation and dataclasses.asdict(work.distillation),
        answers=[
            {"prompt": prompt, "dense": dense, "pruned": pruned}
            for prompt, dense, pruned in zip(work.prompts, *(work.answers.get(stage, []) for stage in ("dense", "pruned")))
        ],
        vocabulary=work.vocabulary and work.vocabulary.described(),
        chat={stage: quality for stage, quality in work.chat.items() if quality},
    )


def all_layers(work: Work) -> list[LayerReport]:
    """The reports of the layers of the model that was given, by their numbers in it; of what is gone whole nothing is kept."""
    if work.staying is None:
        return work.layers
    of_those_kept = iter(work.layers)
    found = []
    for index, (layer, kinds) in enumerate(zip(work.run.shape.given_layers, work.staying, strict=True)):
        report = LayerReport(index, None, 1.0, {}) if kinds is None else next(of_those_kept)
        kept = {kind: report.kept.get(kind, {sort: [] for sort in units}) for kind, units in layer.units.items()}
        found.append(dataclasses.replace(report, index=index, kept=kept, cosine=work.cosine and work.cosine[index]))
    return found


def identify(work: Work) -> None:
    """What a record says of the model to prune: before the work, since the hub may be asked for the model's card."""
    run = work.run
    weights = run.source.weights
    work.info = ModelInfo(
        name=short_name(run.config.base_model),
        type=run.model_config.model_type,
        dtype=name_of(run.source.dtype),
        device=str(run.device),
        shape=run.shape.to_dict(),
        pruned_from=_pruned_from(Path(run.config.base_model)),
        **(weights.origin if isinstance(weights, GgufTensors) else card.origin_of(run.config.base_model)),
    )


def _pruned_from(folder: Path) -> str | None:
    """The model that the one in ``folder`` was pruned from, where that is a checkpoint of an earlier run."""
    try:
        earlier = PruningRecord.read(folder).model
    except (OSError, ValueError):
        return None
    return earlier.pruned_from or earlier.name


def parameters_of(work: Work) -> Parameters:
    """How many there were, and are."""
    shape = work.run.shape
    model = work.model
    if model is None:
        model = pruned_skeleton(work.run.source, [layer.units for layer in work.layers], work.run.config)
    active = None
    if shape.is_mixture:
        left = shape.active_parameters([layer.units for layer in work.layers])
        active = {"dense": shape.active_parameters() + shape.parameters_gone, "pruned": left}
    decoder = shape.decoder_parameters + shape.layer_parameters_gone
    return Parameters.of(shape.dense_parameters, model.num_parameters(), decoder, shape.token_parameters_gone, active)


def of_model(model, config, tokenizer=None, **rest) -> Work:
    """The work on a model in memory, which stays as it is until all layers are pruned; the settings are resolved for it.

    So its layers are in memory twice for as long as that takes. ``rest``: of the Run.
    """
    if config.vocab != "keep":
        raise UserError(f"--vocab {config.vocab}: only of a model's files; use hf_prune.py with the folder that holds it")
    run = Run.of(config, model.config, source=ModelSource.of(_twin(model)), tokenizer=tokenizer, **rest)
    return Work(run, model=model, save_dtype=saving_dtype(run.config.save_dtype, None, model.dtype))


def _twin(model):
    """A copy of ``model`` with parameters of its own over the same memory: what prunes it leaves ``model`` as it is."""
    own = {id(p): torch.nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    shared = {id(thing): thing for thing in (model.config, *model.buffers())}
    return copy.deepcopy(model, own | shared)


def _take_over(adapter: LayerAdapter, pruned, model) -> None:
    """Gives the layers of ``model`` what surgery changed in those of its :func:`_twin`: parameters, buffers, numbers and config of each
    module.
    """
    for source, target in zip(adapter.layers(pruned), adapter.layers(model), strict=True):
        for theirs, own in zip(source.modules(), target.modules(), strict=True):
            own._parameters, own._buffers = theirs._parameters, theirs._buffers
            vars(own).update({name: value for name, value in vars(theirs).items() if isinstance(value, int) or name == "config"})


def _titles(work: Work) -> dict[Stage, str]:
    """What each stage that has something to do in this run does, in words."""
    config = work.run.config
    measures = config.asks or config.measures_texts
    titles = {
        calibrate: ("calibration samples", True),
        measure_dense: ("how good the dense model is", measures),
        trim: ("which tokens stay", config.vocab != "keep"),
        drop: ("which layers and parts go whole", work.run.shape.staying is not None),
        teach: ("what the dense model says on the samples to distil on", config.distill != "none"),
        allocate: ("how much goes from each layer", work.plans is None),
        prune: ("pruning", True),
        distil: ("distillation", config.distill != "none"),
        measure_pruned: ("how good the pruned model is", measures),
    }
    return {stage: title for stage, (title, holds) in titles.items() if holds}


ALL = (load, identify, calibrate, measure_dense, trim, teach, drop, allocate, prune, finish, distil, measure_pruned, write_record)
IN_MEMORY = (identify, calibrate, teach, drop, allocate, prune, finish, distil)
