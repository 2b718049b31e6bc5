"""Ways to spread the sparsity over the layers: each takes AllocationInputs and gives an Allocation."""

from __future__ import annotations

import logging

from ...plan import LayerPlan
from ...run import Run
from ...settings.methods import LAYER_RATIOS
from ..importance.layers import importance_weights, uniform_weights
from .budget import of_bytes
from .inputs import Allocation, AllocationInputs
from .sizing import Sizing, plans_from_ratios

log = logging.getLogger("slimllm")


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
    shape, config = inputs.shape, inputs.config
    if config.amount[0] == "fit":
        plans = [LayerPlan(0.0, layer.units) for layer in shape.layers]
    else:
        plans = plans_from_ratios(shape, lambda amount: [amount * weight for weight in weights], config)
    return Allocation(plans if config.fit is None else that_fit(inputs, plans))


def that_fit(inputs: AllocationInputs, most: list[LayerPlan]) -> list[LayerPlan]:
    """``--fit`` of a mixture of experts, all of whose layers lose the same: ``most``, or the largest plans with which the file fits and
    which remove as many parameters as ``most`` at least. No prices are needed.

    Raises UserError where none fits.
    """
    shape, config = inputs.shape, inputs.config
    sizing, budget = Sizing(shape, config), of_bytes(shape, config, inputs.file_overhead)
    gone, tried = sizing.removed(most), []

    def fits(plans: list[LayerPlan]) -> bool:
        tried.append(plans)
        return budget.removed(plans) >= budget.target and sizing.removed(plans) >= gone

    plans = most if fits(most) else sizing.largest(fits)
    if plans is None:
        raise budget.out_of_reach(max(tried, key=budget.removed))
    if inputs.run is not None:
        log.info("%s: the plan removes %s", budget.asked, budget.in_words(budget.removed(plans)))
    return plans


def without_scores(run: Run) -> Allocation:
    """What is to go from a model whose layers all matter the same, from its shape alone, or by a price list that the settings name.

    Raises UserError for a sparsity that cannot be met.
    """
    scores = [0.0] * len(run.shape.layers)
    inputs = AllocationInputs(run.shape, run.config, layer_scores=scores, file_overhead=run.file_overhead)
    return LAYER_RATIOS[run.config.layer_ratio](inputs)
