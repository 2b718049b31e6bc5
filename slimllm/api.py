"""Pruning as functions: what ``hf_prune.py`` does, without the command line, and without a line printed.

result = slimllm.prune(model, tokenizer, target_sparsity=0.2, recipe="best", calibration=texts)
slimllm.save(result, "my-smaller-model")
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from . import stages
from .data.calibration import Calibration, CalibrationSource, source_of
from .deploy import checkpoint
from .deploy.reference import reload_and_compare
from .errors import UserError, nearest
from .models.given import check_model, in_eval_mode
from .plan import LayerReport
from .reporting import card
from .reporting.record import ModelInfo, Parameters, PruningRecord
from .settings.pruning import PruneConfig
from .streaming.progress import Progress, no_progress
from .training.distillation import Distillation
from .utils.device import saving_dtype
from .utils.outputs import atomic_dir

# Flags that are settings of prune() too; the others concern the model, texts to measure on, or where things go.
_SETTINGS = {
    f.name
    for f in dataclasses.fields(PruneConfig)
    if f.metadata.get("group") in ("sparsity", "method", "distillation", "calibration") or f.name in ("device", "tmp_dir", "save_dtype")
} - {"calibration"}


@dataclass
class PruneResult:
    """A pruned model and how it came about.

    ``model``: the one that was given, pruned, in the class that ``config.runtime`` asks for; whatever changes it later, another
    :func:`prune` too, changes it here. ``layers``: one LayerReport each. ``parameters``: counts and the
    shares removed. ``info``: the model that was given. ``seconds``: of each phase. ``distillation``: how that went, where there was one.
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
        distilled = self.distillation and dataclasses.asdict(self.distillation)
        about = self.config.to_dict(), self.info, self.calibration.to_dict(), self.parameters
        return PruningRecord(*about, list(evaluation), self.seconds, layers, distilled)


def prune(
    model,
    tokenizer=None,
    *,
    calibration: CalibrationSource = None,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    progress: Progress = no_progress,
    config: PruneConfig | None = None,
    **settings,
) -> PruneResult:
    """Prunes ``model`` in place; then distils it, where ``config.distill`` says so.

    The model is changed when all layers are done: where anything raises before, a callback or Ctrl-C too, it is as it was; while it is
    distilled, it is the pruned one. So its layers are in memory twice for as long as it takes. It is pruned in eval mode, and is in its own
    mode again afterwards. A model that was pruned can be pruned again, and what an earlier call returned then holds a model that it no
    longer describes: :func:`save` that first, or prune a ``copy.deepcopy`` of the model.

    Args:
        model: a causal LM of a supported family, dense or pruned before, as from_pretrained gives it. Of one that torch.compile,
            DataParallel or DistributedDataParallel is wrapped around, the model inside is pruned.
        tokenizer: the model's. Not needed where ``calibration`` is token ids.
        calibration: texts, token ids [samples, length] (a tensor, an array or lists of integers), a :class:`Calibration`, or what
            ``--calibration`` takes (a name, file or folder); by default Bookcorpus, or samples of the model itself where the hub is
            out of reach.
        on_layer: called with each LayerReport as it is ready. progress: called with (what is done, layers done, layers).
        settings: ``target_sparsity=0.2``, ``recipe="best"`` and every other flag of ``hf_prune.py`` that concerns the sparsity, the
            method, the samples or the device. ``config``: all of them at once, instead; it is not written to, and the result's
            ``config`` is a frozen copy with all that was left open.
    Raises:
        UserError: a setting, the model or the calibration cannot be used; one line says what and what to do.
    """
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise UserError(f"{unknown[0]}: not a setting of prune(){nearest(unknown[0], _SETTINGS)}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer: a {type(tokenizer).__name__}, not a tokenizer of transformers (AutoTokenizer.from_pretrained)")
    if config is not None and settings:
        raise UserError(f"config and {next(iter(settings))}: give one of them")
    if not isinstance(config, PruneConfig | None):
        raise UserError(f"config: a {type(config).__name__}, not a PruneConfig; give a dict's entries as settings (**config)")
    with in_eval_mode(check_model(model)) as model:
        if config is None:
            config = PruneConfig(base_model=getattr(model.config, "_name_or_path", "") or type(model).__name__, **settings)
        work = stages.of_model(model, config, tokenizer, on_layer=on_layer, progress=progress)
        work.plans = stages.plans_of(work.run)
        given = source_of(calibration, model.config.vocab_size)
        if isinstance(given, Calibration):
            work.run.samples = given
        work.given = given
        stages.go_through(stages.IN_MEMORY, work)
    run, parameters = work.run, stages.parameters_of(work)
    about = model, tokenizer, run.config, run.samples, stages.all_layers(work), work.info, parameters
    return PruneResult(*about, run.clock.seconds, work.distillation)


def save(result: PruneResult, folder: str | os.PathLike, overwrite: bool = False) -> None:
    """Writes the checkpoint with its calibration samples, record and model card; ``folder`` appears when all of it is complete.

    It is read again, layer by layer, and compared; ``result`` stays as it is.
    Raises UserError where ``folder`` exists (without ``overwrite``, which replaces only what this function or ``hf_prune.py`` wrote) or
    cannot be written, and where the model was pruned again since, RuntimeError where the comparison fails.
    """
    count, pruned = result.model.num_parameters(), result.parameters.pruned
    if count != pruned:
        raise UserError(
            f"result: its model has {count} parameters, and had {pruned} when it was pruned: it was changed since; save each result before "
            "its model is pruned again, or prune a copy (copy.deepcopy)"
        )
    config, samples = result.config, result.calibration
    inputs = [config.base_model, config.calibration, samples.source, config.plan, config.price_list]
    with atomic_dir(Path(folder), overwrite, "choose another folder", inputs=inputs) as staging, in_eval_mode(result.model):
        dtype = saving_dtype(config.save_dtype, None, result.model.dtype)
        checkpoint.save(result.model, result.tokenizer, staging, samples.ids[:2, :64], config.base_model, dtype)
        reload_and_compare(staging, result.model.dtype, result.model.device)
        samples.save(staging)
        record = result.record()
        record.config["save_ckpt_log_name"] = Path(folder).name
        record.write(staging)
        card.write(staging, record)
