"""What a way to spread the sparsity is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...models.shape import ModelShape
from ...models.source import ModelSource
from ...streaming.progress import Progress, no_progress
from ...streaming.runner import LayerRunner
from ..importance.taylor import Saliency
from .plan import LayerPlan

if TYPE_CHECKING:
    from ...settings.pruning import PruneConfig


@dataclass
class AllocationInputs:
    """All that is known before the first layer is pruned.

    ``layer_scores`` [L]: the dense model's layer cosines, where they were measured already. ``source``: the dense model, left as it
    is, or None where only the shape is known; then layers are taken to matter the same. ``ids``: calibration tokens [samples,
    length]; ``probe_ids``: tokens of the same form that nothing is fitted to. ``saliency`` [L]: of each layer, where it was measured.
    """

    shape: ModelShape
    config: PruneConfig
    layer_scores: list[float] | None
    source: ModelSource | None = None
    ids: torch.Tensor | None = None
    probe_ids: torch.Tensor | None = None
    device: torch.device | str = "cpu"
    progress: Progress = no_progress
    saliency: list[Saliency | None] | None = None

    def __post_init__(self):
        self.saliency = self.saliency or [None] * self.shape.layers

    def scores(self) -> list[float]:
        """The layer cosines [L], measured now where they were not (pass 1)."""
        if self.layer_scores is None:
            self.layer_scores = self.runner(self.ids).layer_cosines()
        return self.layer_scores

    def runner(self, ids: torch.Tensor, dtype: torch.dtype | None = None) -> LayerRunner:
        return LayerRunner(self.source, ids, self.device, self.progress, dtype, self.config.tmp_dir)


@dataclass
class Allocation:
    """One plan per layer. ``sensitivity`` [L]: what pruning each layer alone costs, where it was measured."""

    plans: list[LayerPlan]
    sensitivity: list[float] | None = None
