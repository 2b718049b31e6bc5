"""Ways to spread the sparsity over the layers: each takes AllocationInputs and gives an Allocation."""

from __future__ import annotations

from ...run import Run
from ...settings.methods import LAYER_RATIOS
from ..importance.layers import importance_weights, uniform_weights
from .inputs import Allocation, AllocationInputs
from .sizing import plans_from_ratios


def importance(inputs: AllocationInputs) -> Allocation:
    """The paper's: more from the layers whose output points most nearly where their input does (Eq. 11)."""
    return weighted(inputs, importance_weights(inputs.scores(), inputs.config.pruned_layers, inputs.config.alpha))


def uniform(inputs: AllocationInputs) -> Allocation:
    """The same from each of the layers whose output points most nearly where their input does."""
    return weighted(inputs, uniform_weights(inputs.scores(), inputs.config.pruned_layers))


def middle(inputs: AllocationInputs) -> Allocation:
    """LLM-Pruner's (Ma et al. 2023): the same from each layer but the first and last few, which stay whole, twice as many at the start."""
    shape, config = inputs.shape, inputs.config
    first = round(2 / 3 * (len(shape.layers) - config.pruned_layers))
    return weighted(inputs, [float(first <= index < first + config.pruned_layers) for index in range(len(shape.layers))])


def weighted(inputs: AllocationInputs, weights: list[float]) -> Allocation:
    return Allocation(plans_from_ratios(inputs.shape, lambda amount: [amount * weight for weight in weights], inputs.config))


def without_scores(run: Run) -> Allocation:
    """What is to go from a model whose layers all matter the same, from its shape alone, or by a price list that the settings name.

    Raises UserError for a sparsity that cannot be met.
    """
    scores = [0.0] * len(run.shape.layers)
    inputs = AllocationInputs(run.shape, run.config, layer_scores=scores, file_overhead=run.file_overhead)
    return LAYER_RATIOS[run.config.layer_ratio](inputs)
