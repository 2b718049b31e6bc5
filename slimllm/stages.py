"""The order of work: what is done with a model from its calibration samples to the record of the run.

Each stage is a function of the :class:`Work` and leaves what it came to there. Where a run was stopped, a stage takes what it left and
goes on. ``hf_prune.py`` goes through all of ALL, ``slimllm.prune`` and the experiments through those of IN_MEMORY.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .data import calibration, texts
from .data.calibration import Calibration, CalibrationSource
from .deploy import checkpoint, export_gguf
from .deploy.runtimes import check_buildable, convert_for_runtime
from .deploy.sink import CheckpointSink, pruned_skeleton
from .deploy.weight_files import weight_bytes
from .errors import UserError
from .evaluation.perplexity import continuations, nats_per_byte, perplexities
from .models import loading
from .models.adapter import LayerAdapter
from .models.checked import warn_of_length
from .models.gguf_tensors import GgufTensors
from .models.loading import WholeModel
from .models.source import ModelSource
from .plan import LayerPlan, LayerReport
from .pruning import pipeline, vocabulary
from .pruning.allocation.inputs import Allocation
from .pruning.allocation.layer_ratios import without_scores
from .pruning.allocation.plan_file import read_plan
from .pruning.allocation.price_list import PriceList
from .reporting import card, figures, record
from .reporting.record import ModelInfo, Parameters, PruningRecord
from .run import Run
from .streaming.journal import resuming
from .streaming.sizes import Footprint
from .training import distillation
from .training.distillation import Distillation
from .training.teacher import Teacher
from .utils import processes
from .utils.device import evaluation_dtype, name_of, saving_dtype
from .utils.files import atomic_file

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
    teacher: Teacher | None = None
    lent: bool = False
    allocation: Allocation | None = None
    layers: list[LayerReport] = field(default_factory=list)
    distillation: Distillation | None = None
    perplexities: dict[str, list[float]] = field(default_factory=dict)
    nats_per_byte: dict[str, list[float]] = field(default_factory=dict)
    info: ModelInfo | None = None
    record: PruningRecord | None = None

    @property
    def writes(self) -> bool:
        """Whether the pruned model is written at all, to be kept or only to be looked at."""
        config = self.run.config
        return config.save_model or bool(self.texts) or config.test_after_train or config.distill != "none"

    @property
    def checkpoint(self) -> Path:
        """Where the pruned model is written."""
        return self.folder if self.run.config.save_model else self.run.journal.folder / "checkpoint"

    @property
    def distillation_finished(self) -> bool:
        """Whether a run that was stopped had come to the end of the distillation."""
        return self.run.known("distillation") is not None


Stage = Callable[[Work], None]


def go_through(stages: Sequence[Stage], work: Work) -> Work:
    for stage in stages:
        stage(work)
    return work


def plans_of(run: Run) -> list[LayerPlan] | None:
    """The plans of ``--plan``, or None where the layers' importance decides. Raises UserError early for a sparsity that cannot be met."""
    kept, tokens = run.config.tokens_of(run.shape.vocab), run.shape.vocab
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
    plans = read_plan(run.config.plan, run.shape, run.config.runtime)
    check_buildable([plan.units for plan in plans])
    return plans


def likely_plans(work: Work) -> tuple[list[LayerPlan], str]:
    """(the plans, or what they will be like, from the model's config alone; where they are from, in words)."""
    run = work.run
    if work.plans:
        return work.plans, f"the plan of {run.config.plan}"
    if run.config.vocab == "auto":
        return [LayerPlan(0.0, layer.units) for layer in run.shape.layers], "--vocab auto decides by what it measures: nothing removed yet,"
    return without_scores(run), "all layers taken to matter the same"


def load(work: Work) -> None:
    """The model, of which no weight is read yet, its tokenizer, and the texts to measure on."""
    run, config = work.run, work.run.config
    work.texts = texts.load_texts(config.eval_data)
    with run.clock("loading"):
        run.tokenizer = run.tokenizer or loading.load_tokenizer(config.base_model)
        if work.writes and processes.is_first():
            work.checkpoint.mkdir(exist_ok=True)
            if config.vocab == "keep":
                checkpoint.write_tokenizer(run.tokenizer, work.checkpoint, config.base_model, run.model_config)
        sizes = config.max_seq_len, config.eval_limit
        work.blocks = [texts.blocks_of(text, run.tokenizer, run.model_config, *sizes) for text in work.texts]
        run.source = loading.open_source(config.base_model, run.dtype, config=run.model_config)
    size, kind = run.source.model.num_parameters() / 1e6, run.model_config.model_type
    log.info("%s: %s, %d layers, %.1f M parameters, %s", config.base_model, kind, len(run.source), size, run.dtype)
    sources = (config.calibration, config.plan, config.price_list, *(config.vocab_text or ()))
    identity = record.identity(config, run.source.weights.files, work.texts, sources)
    processes.from_first(lambda: run.journal.check(identity))


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
    known = run.known("calibration")
    if known is not None:
        with resuming(work.folder / "calibration.safetensors"):
            return Calibration.read(work.folder, known)
    with WholeModel(run.source, run.eval_device) as whole:
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


def measure_dense(work: Work) -> None:
    """The perplexity of the model that is given."""
    _measure(work, work.run.source, "dense", work.blocks)


def measure_pruned(work: Work) -> None:
    """The perplexity of the checkpoint, which was compared with the model in memory when it was written."""
    if work.run.config.save_model:
        log.info("saved, loaded again and compared: the same logits")
    if work.writes:
        _measure(work, loading.open_source(str(work.checkpoint), work.run.dtype, "DIR"), "pruned", work.blocks_now or work.blocks)


def _measure(work: Work, source: ModelSource, stage: str, blocks: list[torch.Tensor]) -> None:
    """Prints the continuations that were asked for, and measures the perplexity on each text."""
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
    tokenizer = run.tokenizer
    work.nats_per_byte[stage] = [nats_per_byte(value, ids, tokenizer) for value, ids in zip(work.perplexities[stage], blocks)]
    for text, value, nats in zip(work.texts, work.perplexities[stage], work.nats_per_byte[stage]):
        log.info("%s: %s perplexity %.3f, %.4f nats per byte", stage, text.name, value, nats)


def perplexity_held_out(run: Run, source: ModelSource, blocks: torch.Tensor) -> float:
    """The perplexity of a model on token ids [blocks, seq_len] of a text, by which fewer tokens are priced."""
    dtype = evaluation_dtype(source.dtype, run.eval_device)
    [found] = perplexities(source, [blocks], ["the text held out"], run.eval_device, dtype, run.progress, run.config.tmp_dir)
    return found


def trim(work: Work) -> None:
    """The vocabulary: from here on the model is the one that has some of its tokens alone, where that is asked for."""
    run = work.run
    if run.config.vocab == "keep":
        return
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
    sizes = run.config.max_seq_len, run.config.eval_limit
    work.blocks_now = [texts.blocks_of(text, run.tokenizer, run.model_config, *sizes) for text in work.texts]


def teach(work: Work) -> None:
    """What the dense model makes of the samples to distil on, before it is pruned."""
    run = work.run
    if run.config.distill != "none" and not work.distillation_finished and work.teacher is None:
        with run.clock("distillation"):
            work.teacher = Teacher(run.source, run.samples.distill_ids, run.device, run.progress, run.config.tmp_dir)


def allocate(work: Work) -> None:
    """What is to go from each layer (pass 1)."""
    with work.run.clock("pruning"):
        work.allocation = pipeline.allocate(work.run, work.plans)
    measured = work.run.known("price_list")
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
        work.distillation = Distillation(**run.known("distillation"))
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
        of_run.bytes = {"dense": sum(path.stat().st_size for path in run.source.weights.files), "pruned": weight_bytes(work.checkpoint)}
    of_run.write(work.folder)
    figures.layer_figure(of_run, work.folder / "figures")
    if run.config.save_model:
        card.write(work.folder, of_run)


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
        [dataclasses.asdict(layer) for layer in work.layers],
        work.distillation and dataclasses.asdict(work.distillation),
        vocabulary=work.vocabulary and work.vocabulary.described(),
    )


def identify(work: Work) -> None:
    """What a record says of the model to prune: before the work, since the hub may be asked for the model's card."""
    run = work.run
    weights = run.source.weights
    work.info = ModelInfo(
        name=Path(run.config.base_model).name,
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
    return Parameters.of(shape.dense_parameters, model.num_parameters(), shape.decoder_parameters, shape.parameters_gone)


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
    """Gives the layers of ``model`` what surgery changed in those of its :func:`_twin`: parameters, numbers and config of each module."""
    for source, target in zip(adapter.layers(pruned), adapter.layers(model), strict=True):
        for theirs, own in zip(source.modules(), target.modules(), strict=True):
            own._parameters = theirs._parameters
            vars(own).update({name: value for name, value in vars(theirs).items() if isinstance(value, int) or name == "config"})


ALL = (load, identify, calibrate, measure_dense, trim, teach, allocate, prune, finish, distil, measure_pruned, write_record)
IN_MEMORY = (identify, calibrate, teach, allocate, prune, finish, distil)
