"""What one run has, from its settings to where its layers go. The stages of a run and the method itself work on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from .data.calibration import Calibration
from .models.parts import Units
from .models.shape import ModelShape, shape_of
from .models.source import ModelSource
from .settings.pruning import PruneConfig
from .streaming.activations import ActivationStore
from .streaming.journal import Journal
from .streaming.progress import Progress, no_progress
from .streaming.runner import LayerRunner
from .utils.clock import Stopwatch
from .utils.device import device_of

# The perplexity of a model on token ids [blocks, seq_len]
Measure = Callable[[ModelSource, torch.Tensor], float]


class Sink(Protocol):
    """Where the layers go as they are done."""

    def begin(self, units: list[dict[str, Units]], done: int, journal: Journal | None) -> None:
        """Called before the first layer, or where a run goes on, layer ``done``. ``units``: what the parts of a layer will have."""

    def layer(self, index: int, layer: nn.Module) -> None:
        """Called with each layer, pruned or not, before it leaves memory; when it returns, the layer is on the disk."""

    def streams(self) -> dict[str, ActivationStore]:
        """The states that the sink has to get back when a stopped run is resumed, by name."""


@dataclass
class Run:
    """One run of pruning.

    ``config``: all settings, resolved for the model and frozen. ``model_config``: that of the model to prune; ``source``: the model, once
    it is opened, whose weights come one layer at a time. ``samples``: the calibration samples, once there are some. ``on_layer``: called
    with the report of each layer as it is ready; ``progress``: with what is being done, and how much of it is. ``clock``: seconds of each
    phase. ``journal``: what a stopped run left, and this one may leave. ``sink``: where the layers go as they are done. ``dtype``: what the
    layers are computed in. ``file_overhead``: bytes of a GGUF file of the model that hold no weights, for ``--fit``.
    """

    config: PruneConfig
    model_config: object
    source: ModelSource | None = None
    dtype: torch.dtype | None = None
    file_overhead: int = 0
    tokenizer: object = None
    samples: Calibration | None = None
    on_layer: Callable[[object], None] = lambda report: None
    progress: Progress = no_progress
    clock: Stopwatch = field(default_factory=Stopwatch)
    journal: Journal | None = None
    sink: Sink | None = None

    @classmethod
    def of(cls, config: PruneConfig, model_config, **rest) -> Run:
        """The run of these settings on a model with this config. Raises UserError for what the model cannot be given."""
        run = cls(config.resolved(shape_of(model_config)), model_config, **rest)
        if run.config.drop_layers:
            run.shape = run.shape.with_fewer_layers(run.config.drop_layers)
        run.shape = run.config.without_parts(run.shape, run.shape.likely_order())
        return run

    @cached_property
    def shape(self) -> ModelShape:
        """The shape of the model to prune."""
        return shape_of(self.model_config)

    @cached_property
    def device(self) -> torch.device:
        """Where the layers are computed."""
        return device_of("device", self.config.device)

    @cached_property
    def eval_device(self) -> torch.device:
        """Where perplexity is computed, and what the model itself writes."""
        return device_of("eval_device", self.config.eval_device)

    def runner(self, ids: torch.Tensor, dtype: torch.dtype | None = None) -> LayerRunner:
        """What runs the layers on token ids [samples, length]."""
        return LayerRunner(self.source, ids, self.device, self.progress, dtype, self.config.tmp_dir)

    @property
    def layer_journal(self) -> Journal | None:
        """Where finished layers and the states after them are kept, unless nothing is to be kept that large (``--no_resume``)."""
        return None if self.config.resume is False else self.journal

    def known(self, name: str, kind: type = object):
        """The entry ``name``, of this ``kind``, that a stopped run left, or None."""
        return self.journal.get(name, kind) if self.journal else None

    def keep(self, name: str, value) -> None:
        """Stores an entry for a run that resumes this one; ``value`` is something that JSON can hold."""
        if self.journal:
            self.journal.put(name, value)

    def once(self, name: str, make: Callable[[], object]):
        """What ``make()`` gives, which JSON can hold; or what it gave in the run that was stopped."""
        value = self.known(name)
        if value is None:
            value = make()
            self.keep(name, value)
        return value
