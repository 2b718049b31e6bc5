"""From the price list to a plan: the least predicted loss that frees what is asked for, exact to one channel.

Each part takes the number of units at which its own loss less the price of what it frees is least; the price is the one at which all of
them together free enough. What a runtime demands (widths alike, multiples of 32) only leaves fewer numbers to choose from.
"""

from __future__ import annotations

import bisect
import contextlib
from dataclasses import dataclass

import torch

from ...errors import UserError
from ...models.shape import ModelShape
from ...plan import LayerPlan
from .budget import Budget, together
from .price_list import PriceList
from .sizing import Sizing, Slot

EVENNESS = 3.5  # how strongly parts are kept from losing much of themselves, in mean prices times the share that goes of all
EVENNESS_OF_MIXTURES = 1.0  # the same of experts: fewer of them are missed less than fewer heads or channels
MOST = 0.9  # the share that a part loses at most, unless nothing else frees enough
STEEP = 1e3  # nats per share beyond that
WEIGHINGS = 30  # how often several budgets are weighed against each other
DEAREST = 1e30  # nats that all of a target is worth at most: beyond what any prices come to
NEARLY = 1.01  # budgets that are met to within so much of each other bind alike

Assignment = list[tuple["Offer", int]]  # offers, and the position of what each is to keep


@dataclass(frozen=True)
class Offer:
    """What one part may keep, or several parts that are to keep the same: numbers of ``steps`` [n], the ``loss`` in nats of each, which
    is what is minimised, and what each ``frees`` of what is asked for.
    """

    slots: list[Slot]
    steps: torch.Tensor
    loss: torch.Tensor
    frees: torch.Tensor

    def best(self, price: float) -> int:
        """The position of the number of steps at which loss - price x freed is least."""
        return int((self.loss - price * self.frees).argmin())


def predicted(prices: PriceList, sizing: Sizing, plans: list[LayerPlan]) -> float:
    """What plans cost by the price list: the sum over their parts, nats per token."""
    total = 0.0
    for slot in (*sizing.coarse, *sizing.fine):
        scale, exponent = prices.curve_of(slot.layer, slot.part.kind, slot.steps.sort)
        total += scale * (1 - slot.kept(plans) / slot.steps.count) ** exponent
    return total


def solve_all(prices: PriceList, sizing: Sizing, budgets: list[Budget]) -> list[LayerPlan]:
    """One plan per layer that meets all the budgets, ``exact`` ones to within one channel. Raises UserError where the parts cannot free as
    much.

    Where the plan for one of them meets the others too, that is it. Else several bind, and they are weighed against each other until one
    plan just meets them all: what is missed gets more weight, what is exceeded less.
    """
    found = [solve(prices, sizing, budget) for budget in budgets]
    if len(budgets) == 1:
        return found[0]
    weights, beyond = [1 / len(budgets)] * len(budgets), 1.0
    slack = [_widest_step(sizing, budget) for budget in budgets]

    def missed(plans: list[LayerPlan]) -> float:
        """By how many channels a budget is missed, at most."""
        return max(max(0.0, (budget.target - budget.removed(plans)) / step - budget.exact) for budget, step in zip(budgets, slack))

    for _ in range(WEIGHINGS if min(map(missed, found)) else 0):
        plans = solve(prices, sizing, together(budgets, weights, beyond))
        found.append(plans)
        met = [budget.removed(plans) / budget.target for budget in budgets]
        weights = [weight / share for weight, share in zip(weights, met)]
        weights = [weight / sum(weights) for weight in weights]
        if max(met) / min(met) < NEARLY:
            beyond /= min(met)
    if min(map(missed, found)) and sizing.fine:  # steps of heads are too large to meet them all: the channels beside them make up for it
        for plans in list(found):
            for budget in budgets:
                coarse, fine = (_offers(prices, sizing, budget, slots, tied) for slots, tied in _kinds(sizing))
                fixed = [(offer, offer.steps.tolist().index(offer.slots[0].kept(plans))) for offer in coarse]
                with contextlib.suppress(UserError):
                    found.append(_nearest(fine, fixed, budget))
    return min(found, key=lambda plans: (missed(plans), predicted(prices, sizing, plans)))


def _kinds(sizing: Sizing) -> tuple[tuple[list[Slot], bool], ...]:
    """Coarse and fine parts, and whether all layers are to be alike in them."""
    return (sizing.coarse, sizing.limits.same_heads), (sizing.fine, sizing.limits.same_channels)


def _widest_step(sizing: Sizing, budget: Budget) -> float:
    """The most that one channel frees, or where no channel goes one step of heads."""
    slots, tied = next(kind for kind in reversed(_kinds(sizing)) if kind[0])
    step = sizing.config.round_to if sizing.fine else 1
    return (len(slots) if tied else 1) * max(budget.frees(slot, slot.steps.count - step) for slot in slots if slot.steps.count > step)


def solve(prices: PriceList, sizing: Sizing, budget: Budget) -> list[LayerPlan]:
    """One plan per layer. Raises UserError where the parts cannot free that much."""
    coarse, fine = (_offers(prices, sizing, budget, slots, tied) for slots, tied in _kinds(sizing))
    if not fine:
        return _nearest(coarse, [], budget)
    found, failed = [], None
    for kept in _coarse_ways(coarse, fine, budget):
        fixed = list(zip(coarse, kept, strict=True))
        try:
            plans = _nearest(fine, fixed, budget)
        except UserError as error:
            failed = error
            continue
        beyond = budget.removed(plans) - budget.target  # whole heads may free too much
        missed = (abs(beyond) if budget.exact else -beyond) > 2 * _tolerance(fine, budget)
        found.append((missed, _loss(coarse + fine, plans), plans))
    if not found:
        raise failed
    return min(found, key=lambda entry: entry[:2])[2]


def _offers(prices: PriceList, sizing: Sizing, budget: Budget, slots: list[Slot], tied: bool) -> list[Offer]:
    """An offer for each part, or where all layers are to be alike, one for all of them."""
    curves = [prices.curve_of(slot.layer, slot.part.kind, slot.steps.sort) for slot in slots]
    evenness = (EVENNESS_OF_MIXTURES if sizing.shape.is_mixture else EVENNESS) * prices.mean * budget.share
    offers = []
    for slot, (scale, exponent) in zip(slots, curves):
        steps = torch.tensor(sorted({*slot.steps.allowed(sizing.config.round_to), slot.steps.count}))
        gone = 1 - steps.double() / slot.steps.count
        loss = scale * gone**exponent + evenness * gone.square() + STEEP * (gone - MOST).clamp_min(0)
        frees = torch.tensor([budget.frees(slot, count) for count in steps.tolist()], dtype=torch.float64)
        offers.append(Offer([slot], steps, loss, frees))
    if not tied or not offers:
        return offers
    first = offers[0]
    return [Offer(slots, first.steps, sum(offer.loss for offer in offers), sum(offer.frees for offer in offers))]


def _plans(assignment: Assignment, shape: ModelShape) -> list[LayerPlan]:
    """The plans in which each offer keeps what it is assigned, and everything else is whole."""
    plans = [LayerPlan(0.0, layer.units) for layer in shape.layers]
    for offer, position in assignment:
        for slot in offer.slots:
            slot.keep(plans, int(offer.steps[position]))
    for plan, layer in zip(plans, shape.layers):
        whole = sum(part.parameters() for part in layer.parts)
        plan.ratio = 1 - sum(part.parameters(plan.units[part.kind]) for part in layer.parts) / whole
    return plans


def _loss(offers: list[Offer], plans: list[LayerPlan]) -> float:
    kept = [offer.slots[0].kept(plans) for offer in offers]
    return sum(float(offer.loss[offer.steps == count]) for offer, count in zip(offers, kept))


def _nearest(offers: list[Offer], fixed: Assignment, budget: Budget) -> list[LayerPlan]:
    """The plans nearest to the target, with some offers ``fixed``: those at the price at which it is met, or between the two at which it is
    just missed and just met. A budget that is not ``exact`` is met where it can be.
    """

    def planned(positions: list[int]) -> list[LayerPlan]:
        return _plans([*fixed, *zip(offers, positions)], budget.shape)

    if len(offers) == 1:  # the more it keeps, the less is removed
        positions = range(len(offers[0].steps))
        first = bisect.bisect_right(positions, -budget.target, key=lambda position: -budget.removed(planned([position])))
        candidates = [[position] for position in (first - 1, first) if position in positions]
    else:
        fewer, more = _around_target(offers, fixed, budget)
        moved = [k for k, (a, b) in enumerate(zip(fewer, more)) if a != b]
        candidates = [[more[k] if k in moved[:count] else fewer[k] for k in range(len(offers))] for count in range(len(moved) + 1)]
    options = [planned(positions) for positions in candidates]
    if budget.removed(most := max(options, key=budget.removed)) < budget.target - _tolerance(offers, budget):
        raise budget.out_of_reach(most)

    def missed(plans: list[LayerPlan]) -> tuple[bool, float]:
        beyond = budget.removed(plans) - budget.target
        return beyond < 0 and not budget.exact, abs(beyond)

    return min(options, key=missed)


def _around_target(offers: list[Offer], fixed: Assignment, budget: Budget) -> tuple[list[int], list[int]]:
    """(positions of the offers that just miss the target, those that just meet it), on both sides of a price. Raises UserError where none
    meets it.
    """

    def at(price: float) -> list[int]:
        return [offer.best(price) for offer in offers]

    def removed(positions: list[int]) -> float:
        return budget.removed(_plans([*fixed, *zip(offers, positions)], budget.shape))

    low, high = at(0.0), [int(offer.frees.argmax()) for offer in offers]
    if removed(low) >= budget.target:
        return low, low
    if removed(high) < budget.target - _tolerance(offers, budget):
        raise budget.out_of_reach(_plans([*fixed, *zip(offers, high)], budget.shape))
    cheap, dear = 0.0, 1.0 / budget.target
    while removed(at(dear)) < budget.target and dear * budget.target < DEAREST:
        cheap, dear = dear, 4 * dear
    for _ in range(60):
        middle = (cheap + dear) / 2
        cheap, dear = (middle, dear) if removed(at(middle)) < budget.target else (cheap, middle)
    return at(cheap), at(dear)


def _coarse_ways(coarse: list[Offer], fine: list[Offer], budget: Budget) -> list[list[int]]:
    """What the coarse offers may keep: any number where all layers are to have it, else what they keep on both sides of the price at which
    the target is met.
    """
    if len(coarse) <= 1:
        return [[position] for position in range(len(coarse[0].steps))] if coarse else [[]]
    ends = _around_target(coarse + fine, [], budget)
    return [list(way) for way in dict.fromkeys(tuple(positions[: len(coarse)]) for positions in ends)]


def _tolerance(offers: list[Offer], budget: Budget) -> float:
    """By how much a target may be missed: half the smallest step of an offer where it is to be met exactly, else by nothing."""
    if not budget.exact:
        return 0.0
    return min((float(offer.frees.sort().values.diff().min()) for offer in offers if len(offer.steps) > 1), default=0.0) / 2
