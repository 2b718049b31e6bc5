"""What a way to spread the sparsity is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...models.adapter import LayerAdapter
from ...models.shape import ModelShape
from ..runner import LayerRunner, Progress, no_progress
from .plan import LayerPlan

if TYPE_CHECKING:
    from ..config import PruneConfig


@dataclass
class AllocationInputs:
    """All that is known before the first layer is pruned.

    ``layer_scores`` [L]: the dense model's layer cosines. ``model``: the dense model, left as it is, or None where only the shape is
    known; then layers are taken to matter the same. ``ids``: calibration tokens [samples, length]; ``probe_ids``: tokens of the
    same form that nothing is fitted to.
    """

    shape: ModelShape
    config: PruneConfig
    layer_scores: list[float]
    model: torch.nn.Module | None = None
    adapter: LayerAdapter | None = None
    ids: torch.Tensor | None = None
    probe_ids: torch.Tensor | None = None
    device: torch.device | str = "cpu"
    progress: Progress = no_progress

    def runner(self, ids: torch.Tensor) -> LayerRunner:
        return LayerRunner(self.model, self.adapter, ids, self.device, self.progress)


@dataclass
class Allocation:
    """One plan per layer. ``sensitivity`` [L]: what pruning each layer alone costs, where it was measured."""

    plans: list[LayerPlan]
    sensitivity: list[float] | None = None
