"""What a way to spread the sparsity is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.shape import ModelShape
from ...plan import LayerPlan, LayerReport
from ...run import Run
from ...settings.pruning import PruneConfig
from ..importance.taylor import Saliency


@dataclass
class AllocationInputs:
    """All that is known before the first layer is pruned.

    ``run``: the run, whose model is left as it is, or None where only the shape is known; then all layers are assumed to matter the same.
    ``layer_scores`` [L]: the dense model's layer cosines, where they were measured already. ``saliency`` [L]: of each layer, where it was
    measured. ``file_overhead``: bytes of a GGUF file of the model that hold no weights, for ``--fit``.
    """

    shape: ModelShape
    config: PruneConfig
    run: Run | None = None
    layer_scores: list[float] | None = None
    saliency: list[Saliency] | None = None
    file_overhead: int = 0

    def scores(self) -> list[float]:
        """The layer cosines [L], measured now where they were not (pass 1)."""
        if self.layer_scores is None:
            self.layer_scores = self.run.runner(self.run.samples.ids).layer_cosines()
        return self.layer_scores


@dataclass
class Allocation:
    """One plan per layer, and what was measured on the way, where it was: ``sensitivity`` [L], what half of each layer costs;
    ``cosine`` [L], c_l of Eq. 11; ``saliency`` [L], first-order importance; ``predicted_loss``, what the plans cost by the price
    list (nats per token).
    """

    plans: list[LayerPlan]
    sensitivity: list[float] | None = None
    cosine: list[float] | None = None
    saliency: list[Saliency] | None = None
    predicted_loss: float | None = None

    def complete(self, report: LayerReport) -> None:
        """Adds to a layer's report what was measured of the layer."""
        report.cosine = self.cosine and self.cosine[report.index]
        report.sensitivity = self.sensitivity and self.sensitivity[report.index]
