"""``--layer_ratio auto``: what goes is decided over all parts of all layers at once, by what each costs (docs/method.md, section 6)."""

from __future__ import annotations

import dataclasses
import logging

from . import prices
from .budget import budgets_of
from .inputs import Allocation, AllocationInputs
from .price_list import PriceList
from .sizing import Sizing
from .solver import predicted, solve_all

log = logging.getLogger("slimllm")


def price_list_of(inputs: AllocationInputs) -> PriceList:
    """The file's, what was measured before, or what is measured now; without a model one by which all parts cost the same."""
    if inputs.config.price_list is not None:
        return PriceList.read(inputs.config.price_list, inputs.shape, inputs.config)
    if inputs.run is None:
        return PriceList.alike(inputs.shape, inputs.config)
    return PriceList.from_dict(inputs.run.once("price_list", lambda: dataclasses.asdict(prices.measured(inputs))))


def auto(inputs: AllocationInputs) -> Allocation:
    """The plan of least predicted loss. Without a model or a list all parts are assumed to cost the same per parameter."""
    config, shape = inputs.config, inputs.shape
    sizing, budgets = Sizing(shape, config), budgets_of(inputs)
    binding = [budget for budget in budgets if budget.target > 0]
    for budget in budgets if inputs.run is not None else []:
        if budget.target <= 0:
            gone = " and ".join(shape.gone_in_words)
            how = f"with {gone} that go the model meets that" if gone else "the model meets that as it is"
            log.info("%s: %s%s", budget.asked, how, "" if binding else ", so nothing is removed from its layers")
    price_list = price_list_of(inputs)
    plans = solve_all(price_list, sizing, binding or budgets[:1])
    if inputs.run is None:
        return Allocation(plans, predicted_loss=predicted(price_list, sizing, plans) if config.price_list else None)
    for budget in binding:
        log.info("%s: the plan removes %s", budget.asked, budget.in_words(budget.removed(plans)))
    gone = " and ".join(shape.gone_in_words)
    alone = f", of what goes from the layers that stay: what {gone} that go cost is not in it" if gone else ""
    log.info("predicted loss: %.3f nats per token%s", loss := predicted(price_list, sizing, plans), alone)
    return Allocation(plans, price_list.of_halves(len(shape.layers)), predicted_loss=loss)
