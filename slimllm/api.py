"""Pruning as functions: what ``hf_prune.py`` does, without the command line, and without a line printed.

result = slimllm.prune(model, tokenizer, target_sparsity=0.2, recipe="best", calibration=texts)
slimllm.save(result, "my-smaller-model")
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .data import calibration as calibrations
from .data.calibration import Calibration
from .data.texts import check_vocabulary
from .deploy import checkpoint, reference
from .deploy.runtimes import convert_for_runtime
from .deploy.sink import pruned_skeleton
from .errors import UserError, nearest
from .models import loading
from .models.adapter import LayerAdapter
from .models.checked import warn_of_length
from .models.families import dense_family_of
from .models.gguf_tensors import GgufTensors
from .models.given import check_model, in_eval_mode
from .models.shape import shape_of
from .models.source import ModelSource
from .pruning import pipeline
from .pruning.allocation.layer_ratios import without_scores
from .pruning.allocation.plan_file import read_plan
from .pruning.layer import LayerReport
from .reporting import card
from .reporting.record import ModelInfo, Parameters, PruningRecord, Stopwatch
from .settings.pruning import PruneConfig
from .streaming.journal import Journal
from .streaming.progress import Progress, no_progress
from .training import distillation
from .training.distillation import Distillation, Teacher
from .utils.device import device_of, name_of, saving_dtype
from .utils.outputs import atomic_dir

log = logging.getLogger("slimllm")

# Flags that are settings of prune() too; the others concern the model, texts to measure on, or where things go.
_SETTINGS = {
    f.name
    for f in dataclasses.fields(PruneConfig)
    if f.metadata.get("group") in ("sparsity", "method", "distillation", "calibration") or f.name in ("device", "tmp_dir", "save_dtype")
} - {"calibration"}

DISTILL_SELF_SHARE = 0.5  # of the samples that a model is distilled on; the rest are calibration text

TokenIds = torch.Tensor | np.ndarray | Sequence[Sequence[int]]
CalibrationSource = str | os.PathLike | Sequence[str] | TokenIds | Calibration | None


@dataclass
class PruneResult:
    """A pruned model and how it came about.

    ``model``: pruned, in the class that ``config.runtime`` asks for; without its weights where these went to a sink. ``layers``: one
    LayerReport each. ``parameters``: counts and the shares removed. ``info``: the dense model. ``seconds``: of each phase.
    ``distillation``: how that went, where there was one.
    """

    model: torch.nn.Module
    tokenizer: object
    config: PruneConfig
    calibration: Calibration
    layers: list[LayerReport]
    info: ModelInfo
    parameters: Parameters
    seconds: dict[str, float] = field(default_factory=dict)
    distillation: Distillation | None = None

    def record(self, evaluation: Sequence[dict] = ()) -> PruningRecord:
        """The run's record, with perplexities where some were measured (EvalText.figure)."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return PruningRecord(
            self.config.to_dict(),
            self.info,
            self.calibration.to_dict(),
            self.parameters,
            list(evaluation),
            self.seconds,
            layers,
            self.distillation and dataclasses.asdict(self.distillation),
        )


def prune(
    model,
    tokenizer=None,
    *,
    calibration: CalibrationSource = None,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    progress: Progress = no_progress,
    config: PruneConfig | None = None,
    timed: Stopwatch | None = None,
    sink: pipeline.Sink | None = None,
    journal: Journal | None = None,
    **settings,
) -> PruneResult:
    """Prunes ``model``, in place where it is in memory; then distils it, where ``config.distill`` says so.

    A ModelSource is only pruned: :func:`distil` takes the model that comes of it. A model in memory is changed when all layers are done:
    where anything raises before, a callback or Ctrl-C too, it is as it was; while it is distilled, it is the pruned one. So its layers
    are in memory twice for as long as it takes. It is pruned in eval mode, and is in its own mode again afterwards.

    Args:
        model: a dense causal LM of a supported family, as from_pretrained gives it, or a ModelSource that reads one layer at a time.
            Of one that torch.compile, DataParallel or DistributedDataParallel is wrapped around, the model inside is pruned.
        tokenizer: the model's. Not needed where ``calibration`` is token ids and ``layer_ratio`` is not "auto".
        calibration: texts, token ids [samples, length] (a tensor, an array or lists of integers), a :class:`Calibration`, or what
            ``--calibration`` takes (a name, file or folder); by default Bookcorpus, or samples of the model itself where the hub is
            out of reach.
        on_layer: called with each LayerReport as it is ready. progress: called with (what is done, layers done, layers).
        settings: ``target_sparsity=0.2``, ``recipe="best"`` and every other flag of ``hf_prune.py`` that concerns the sparsity, the
            method, the samples or the device. ``config``: all of them at once, instead; it is not written to, and the result's
            ``config`` is a frozen copy with all that was left open.
        timed: where the seconds of each phase are added up. sink: where the layers go as they are done, which a ModelSource needs;
            journal: what keeps a run that is stopped (pipeline.prune).
    Raises:
        UserError: a setting, the model or the calibration cannot be used; one line says what and what to do.
    """
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise UserError(f"{unknown[0]}: not a setting of prune(){nearest(unknown[0], _SETTINGS)}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer: a {type(tokenizer).__name__}, not a tokenizer of transformers (AutoTokenizer.from_pretrained)")
    if not isinstance(model, ModelSource):
        with in_eval_mode(check_model(model)) as model:
            return _prune(model, tokenizer, calibration, on_layer, progress, config, timed, sink, journal, settings)
    return _prune(model, tokenizer, calibration, on_layer, progress, config, timed, sink, journal, settings)


def _prune(model, tokenizer, calibration, on_layer, progress, config, timed, sink, journal, settings) -> PruneResult:
    """:func:`prune`, of a model or ModelSource that is known to be one."""
    if config is None:
        config = PruneConfig(base_model=getattr(model.config, "_name_or_path", "") or type(model).__name__, **settings)
    elif settings:
        raise UserError(f"config and {next(iter(settings))}: give one of them")
    elif not isinstance(config, PruneConfig):
        raise UserError(f"config: a {type(config).__name__}, not a PruneConfig; give a dict's entries as settings (**config)")
    source = ModelSource.of(model)
    shape = shape_of(source.config, dense_family_of(source.config))
    config = config.resolved(shape)
    plans = plans_of(config, shape)
    calibration = _source_of(calibration, source.config.vocab_size)
    device, timed = device_of("device", config.device), timed or Stopwatch()
    info = ModelInfo(
        name=Path(config.base_model).name,
        type=source.config.model_type,
        dtype=name_of(source.dtype),
        device=str(device),
        shape=dataclasses.asdict(shape),
        **(source.weights.origin if isinstance(source.weights, GgufTensors) else card.origin_of(config.base_model)),
    )
    size = source.model.num_parameters()
    if not isinstance(calibration, Calibration):
        with timed("calibration"):
            calibration = calibrate(source, tokenizer, config, calibration, device_of("eval_device", config.eval_device))
    config = _as_drawn(config, calibration)
    if not source.streams:
        warn_of_length(source.config, seq_len=calibration.ids.shape[1])
    teacher = None if source.streams else teach(source, calibration, config, progress, timed)
    model = source.model
    pruned = source if source.streams else ModelSource.of(_twin(model))
    with timed("pruning"):
        layers = pipeline.prune(pruned, calibration.ids, config, device, on_layer, calibration.probe_ids, progress, plans, sink, journal)
    if source.streams:
        widths = [(len(layer.heads), len(layer.kv_heads), len(layer.channels)) for layer in layers]
        model = pruned_skeleton(source, widths, config)
    else:
        _take_over(source.adapter, pruned.model, model)
        convert_for_runtime(model, config.runtime)
    parameters = Parameters.of(size, model.num_parameters(), shape.decoder_parameters)
    saved = saving_dtype(config.save_dtype, None, model.dtype)
    distillation = teacher and distil(model, teacher, config, progress, timed, saved)
    if teacher:
        teacher.close()
    return PruneResult(model, tokenizer, config, calibration, layers, info, parameters, timed.seconds, distillation)


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


def _as_drawn(config: PruneConfig, calibration: Calibration) -> PruneConfig:
    """The settings with the samples that there are, where they are not those that were asked for; says so."""
    if calibration.source == "self":
        return config
    found, own = config.as_drawn(len(calibration.ids), calibration.own), round(config.self_share * config.num_examples)
    if found is not config:
        asked = f"{config.num_examples} samples, {own} of the model's own, were asked for"
        log.info("calibration: %s; %s gives %d, %d of its own", asked, calibration.source, len(calibration.ids), calibration.own)
    return found


def teach(source: ModelSource, calibration: Calibration, config: PruneConfig, progress: Progress, timed: Stopwatch) -> Teacher | None:
    """What the dense model makes of the samples to distil on, before it is pruned; None where nothing is to be distilled."""
    if config.distill == "none":
        return None
    with timed("distillation"):
        return Teacher(source, calibration.distill_ids, device_of("device", config.device), progress, config.tmp_dir)


def distil(
    model, teacher: Teacher, config: PruneConfig, progress: Progress, timed: Stopwatch, saved: torch.dtype | None = None
) -> Distillation:
    """Distils a pruned model in memory, in place, as the settings say; ``saved``: the dtype that it will be saved in, or its own."""
    with timed("distillation"):
        return distillation.distil(
            model, teacher, config.distill, config.distill_epochs, config.distill_learning_rate, config.seed, progress, saved
        )


def plans_of(config: PruneConfig, shape):
    """The plans of ``--plan``, or None where the layers' importance decides. Raises UserError early for a sparsity that cannot be met."""
    if config.plan is not None:
        return read_plan(config.plan, shape, config.runtime)
    without_scores(shape, config)
    return None


def calibrate(model, tokenizer, config: PruneConfig, source: CalibrationSource, device: torch.device) -> Calibration:
    """The samples that ``source`` gives, and those that ``layer_ratio`` auto measures on.

    With them come the samples to distil on, where that is to be. What the model (or ModelSource) itself has to say, it says on
    ``device`` in the dtype of evaluation, whole; where it does not fit there,
    the samples that are measured on are held back from the text of ``source``.
    Raises UserError for a source that cannot be had or is too short, and where a tokenizer is needed and not there.
    """
    with loading.Voice(model, device) as voice:
        samples = _samples(voice, tokenizer, config, source)
        if config.distill != "none" and samples.distill_ids is None:
            spec, named = config.distill_samples, samples.source if source is None else source  # what it was in the end
            # what the model wrote once, it need not write again; but what is held out is text that nothing was fitted to
            known = samples.ids[: spec.num_examples // 2 if samples.own else 0]
            spec = dataclasses.replace(spec, num_examples=spec.num_examples - len(known))
            if isinstance(source, torch.Tensor) or samples.source.endswith(".safetensors"):
                text = samples.ids
            else:
                text = samples.ids[:0] if named == "self" else _drawn(named, voice, tokenizer, spec).ids
            if voice.fits and tokenizer is not None:
                text, _ = calibrations.with_own(text, DISTILL_SELF_SHARE, voice, tokenizer, spec)
            samples.distill_ids = torch.cat([known, text])
        return samples


def _source_of(given: CalibrationSource, vocab_size: int) -> str | list[str] | torch.Tensor | Calibration | None:
    """What samples are made from, in one of five forms. Raises UserError for anything else, and for token ids that are none."""
    if isinstance(given, Calibration):
        for ids in (given.ids, given.probe_ids, given.distill_ids):
            if ids is not None:
                _token_ids(ids, vocab_size)
        return given
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    if isinstance(given, torch.Tensor | np.ndarray):
        return _token_ids(given, vocab_size)
    if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
        empty = isinstance(given, Sequence) and not given
        what = "is empty" if empty else f"is a {type(given).__name__}"
        raise UserError(f"calibration: {what}; give texts, token ids [samples, length], or the name of a file, folder or data set")
    if all(isinstance(text, str) for text in given):
        return list(given)
    return _token_ids(given, vocab_size)


def _token_ids(given: TokenIds, vocab_size: int) -> torch.Tensor:
    """Token ids [samples, length] int64 on the CPU."""
    try:
        ids = given if isinstance(given, torch.Tensor) else torch.from_numpy(np.asarray(given))
    except (TypeError, ValueError, RuntimeError):
        raise UserError("calibration: neither texts nor token ids, lists of integers all of one length") from None
    if ids.ndim != 2 or not ids.numel():
        raise UserError(f"calibration: token ids are [samples, length], not {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"calibration: token ids are integers, not {name_of(ids.dtype)}")
    ids = ids.cpu().long()
    check_vocabulary(ids, vocab_size, "calibration")
    return ids


def _samples(voice: loading.Voice, tokenizer, config: PruneConfig, source: CalibrationSource) -> Calibration:
    """The samples to prune from, and those to measure on."""
    held_back = config.needs_probe_ids and not voice.fits
    if isinstance(source, torch.Tensor):
        samples = Calibration(source, "token ids")
    elif tokenizer is None:
        raise UserError("tokenizer: needed to make calibration samples; give one, or token ids [samples, length]")
    else:
        spec = config.samples
        own = round(config.self_share * spec.num_examples) if voice.fits and source != "self" else 0
        drawn = spec.num_examples - own + (calibrations.PROBE_SAMPLES if held_back else 0)
        samples = _drawn(source, voice, tokenizer, dataclasses.replace(spec, num_examples=max(drawn, 1), or_fewer=own > 0))
        if own and not samples.source.endswith(".safetensors"):
            text = samples.ids[:drawn] if samples.source != "self" else samples.ids[:0]
            samples.ids, samples.own = calibrations.with_own(text, config.self_share, voice, tokenizer, spec)
    if not config.needs_probe_ids or samples.probe_ids is not None:
        return samples
    if held_back:
        return samples.holding_back()
    if tokenizer is None:
        raise UserError("layer_ratio auto measures on the model's own text: give a tokenizer")
    samples.probe_ids = calibrations.probe_samples(voice, tokenizer, config.samples)
    return samples


def _drawn(source: str | Sequence[str] | None, voice: loading.Voice, tokenizer, spec: calibrations.SampleSpec) -> Calibration:
    """Samples of a named source, or of texts."""
    if source is None or isinstance(source, str):
        calibrations.check_source(source)
        return calibrations.load(source, voice, tokenizer, spec)
    return calibrations.from_text("\n".join(source), "texts", tokenizer, spec, voice.config)


def save(result: PruneResult, folder: str | os.PathLike, overwrite: bool = False) -> None:
    """Writes the checkpoint with its calibration samples, record and model card; ``folder`` appears when all of it is complete.

    It is read again, layer by layer, and compared; ``result`` stays as it is.
    Raises UserError where ``folder`` exists (without ``overwrite``, which replaces only what this function or ``hf_prune.py`` wrote) or
    cannot be written, RuntimeError where the comparison fails.
    """
    config, samples = result.config, result.calibration
    inputs = [config.base_model, config.calibration, samples.source, config.plan]
    with atomic_dir(Path(folder), overwrite, "choose another folder", inputs=inputs) as staging, in_eval_mode(result.model):
        dtype = saving_dtype(config.save_dtype, None, result.model.dtype)
        checkpoint.save(result.model, result.tokenizer, staging, samples.ids[:2, :64], config.base_model, dtype)
        reference.reload_and_compare(staging, result.model.dtype, result.model.device)
        samples.save(staging)
        record = result.record()
        record.config["save_ckpt_log_name"] = Path(folder).name
        record.write(staging)
        card.write(staging, record)
