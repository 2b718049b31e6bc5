"""Ways to spread the sparsity over the layers: each takes AllocationInputs and gives an Allocation."""

from __future__ import annotations

from ...models.shape import ModelShape
from ...settings.methods import LAYER_RATIOS
from ...settings.pruning import PruneConfig
from ..importance.layers import importance_weights, uniform_weights
from .inputs import Allocation, AllocationInputs
from .plan import LayerPlan, plan


def importance(inputs: AllocationInputs) -> Allocation:
    """The paper's: more from the layers that turn their input least (Eq. 11)."""
    return _weighted(inputs, importance_weights(inputs.scores(), inputs.config.pruned_layers, inputs.config.alpha))


def uniform(inputs: AllocationInputs) -> Allocation:
    """The same from each of the layers that turn their input least."""
    return _weighted(inputs, uniform_weights(inputs.scores(), inputs.config.pruned_layers))


def middle(inputs: AllocationInputs) -> Allocation:
    """LLM-Pruner's (Ma et al. 2023): the same from each layer but the first and the last, which stay whole, two first ones for one last."""
    shape, config = inputs.shape, inputs.config
    first = round(2 / 3 * (shape.layers - config.pruned_layers))
    return _weighted(inputs, [float(first <= index < first + config.pruned_layers) for index in range(shape.layers)])


def _weighted(inputs: AllocationInputs, weights: list[float]) -> Allocation:
    return Allocation(plan(inputs.shape, lambda amount: [amount * weight for weight in weights], inputs.config))


def without_scores(shape: ModelShape, config: PruneConfig) -> list[LayerPlan]:
    """The plans of a model whose layers all matter the same, from its shape alone. Raises UserError for a sparsity that cannot be met."""
    return LAYER_RATIOS[config.layer_ratio](AllocationInputs(shape, config, [0.0] * shape.layers)).plans
