"""``--layer_ratio auto``: the sparsity spread by what pruning each layer alone costs the whole model.

Probes measure that cost; candidates are plans of one size that differ in how much the heads lose; the candidate that moves
the model's next-token distribution least is taken.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ...errors import UserError
from ...models.shape import Limits, ModelShape
from ...utils.device import evaluation_dtype
from ..layer import prune_layer
from .head_units import HeadUnits
from .inputs import Allocation, AllocationInputs
from .plan import LayerPlan, from_ratios, plan

if TYPE_CHECKING:
    from ..config import PruneConfig

log = logging.getLogger("slimllm")

PROBE_RATIO = 0.5  # how much of each layer is taken away to see what it costs
SPREAD = 4.0  # how evenly the sparsity is spread over the layers
MAX_RATIO = 0.9  # of one layer
ATTENTION_SHARES = (1.0, 0.5)  # the share of the heads that goes, to that of the channels, of each candidate


def auto(inputs: AllocationInputs) -> Allocation:
    """Probes, candidates, choice. Without a model all layers are taken to cost the same, and the first candidate is the answer."""
    shape, config = inputs.shape, inputs.config
    if inputs.model is None:
        return Allocation(next(iter(candidates(shape, [0.0] * shape.layers, config).values())))
    sensitivity = layer_sensitivities(inputs)
    found = candidates(shape, sensitivity, config)
    return Allocation(_best(found, inputs), sensitivity)


def probe(shape: ModelShape, ratio: float, config: PruneConfig) -> list[LayerPlan]:
    """Plans that take ``ratio`` of every layer."""
    return from_ratios(shape, HeadUnits(shape, config.head_unit), [ratio] * shape.layers, config.round_to, Limits())


def layer_sensitivities(inputs: AllocationInputs) -> list[float]:
    """What it costs to prune each layer alone, [L]: KL divergence (nats per token) of the dense model's next-token distribution
    from that of the model with PROBE_RATIO of this one layer's heads and channels removed and the outputs recovered.

    Measured on ``probe_ids``, pruned from ``ids``; the model is left as it is. All layers' probes go through each later layer
    together, so that it visits the device once.
    """
    plans = probe(inputs.shape, PROBE_RATIO, inputs.config)

    def visit(index, layer, seen, hidden, held, streams):
        states, pruned = hidden.copy(), copy.deepcopy(layer)
        prune_layer(seen, states, pruned, index, plans[index], inputs.shape, inputs.config)
        states.close()
        seen.advance(hidden, layer, index)
        streams.append(streams[0].copy())
        held.advance(streams[-1], pruned.to(streams[0][0].dtype), index)
        return streams[1:-1]

    return _divergences(inputs, "layer sensitivity", visit)


def plan_divergences(inputs: AllocationInputs, plans_by_candidate: list[list[LayerPlan]]) -> list[float]:
    """KL divergence (nats per token) of the dense model's next-token distribution from that of the model pruned by each candidate.

    Measured on ``probe_ids``, pruned from ``ids``; the model is left as it is, and no pruned one is ever whole in memory: a
    candidate, one LayerPlan per layer, is tried on a copy of one layer at a time.
    """
    trials = []

    def visit(index, layer, seen, hidden, held, streams):
        if not trials:
            trials.extend((plans, hidden.copy()) for plans in plans_by_candidate)
            streams.extend(streams[0].copy() for _ in trials)
        for (plans, states), stream in zip(trials, streams[1:]):
            pruned = copy.deepcopy(layer)
            prune_layer(seen, states, pruned, index, plans[index], inputs.shape, inputs.config)
            held.advance(stream, pruned.to(stream[0].dtype), index)
        return []

    costs = _divergences(inputs, "plans", visit)
    for _, states in trials:
        states.close()
    return costs


@torch.no_grad()
def _divergences(inputs: AllocationInputs, stage: str, visit: Callable) -> list[float]:
    """The divergence of each stream that ``visit`` made from that of the dense model, after the last layer.

    ``visit(index, layer, seen, hidden, held, streams)`` works on one dense layer: ``hidden`` are the states of the calibration
    tokens before the first layer, or where ``visit`` left them, run by ``seen``; ``streams`` those of the probe tokens, run by ``held``:
    the dense model's, then one per trial, which it may append. It gives the streams that the dense layer is still to be run on.
    """
    seen, held = inputs.runner(inputs.ids), inputs.runner(inputs.probe_ids)
    dtype = evaluation_dtype(inputs.model.dtype, seen.device)
    hidden, streams = seen.embed(), [held.embed(dtype)]
    for index, layer in seen.visit(stage):
        through_dense = visit(index, layer, seen, hidden, held, streams)
        whole = copy.deepcopy(layer).to(dtype)
        for stream in (streams[0], *through_dense):
            held.advance(stream, whole, index)
    costs = held.divergences(streams[0], streams[1:])
    for store in (hidden, *streams):
        store.close()
    return costs


def spread(sensitivity: list[float], total: float) -> list[float]:
    """Ratios [L] with the given sum: r_l = (lambda - s_l / median(s)) / SPREAD, within 0 .. MAX_RATIO.

    This minimises sum over l of s_l r_l + (SPREAD / 2) median(s) r_l^2: what pruning each layer alone costs, which is
    nearly linear in r, and a quadratic term for what prunings of the same layer cost each other. lambda sets the sum.
    """
    s = torch.tensor(sensitivity, dtype=torch.float64)
    s = s / s.median().clamp_min(torch.finfo(torch.float64).tiny)

    def ratios(price):
        return ((price - s) / SPREAD).clamp(0, MAX_RATIO)

    low, high = float(s.min()), float(s.max()) + SPREAD * MAX_RATIO
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(ratios(middle).sum()) < total else (low, middle)
    return ratios(high).tolist()


def candidates(shape: ModelShape, sensitivity: list[float], config: PruneConfig) -> dict[float, list[LayerPlan]]:
    """The plans to choose between, all of the same size: {attention share: plans}.

    Where two shares give the same plan, or one cannot meet the sparsity, there are fewer.
    """
    found, failed = {}, None
    for share in ATTENTION_SHARES:
        try:
            plans = plan(shape, lambda amount: spread(sensitivity, amount * config.pruned_layers), config, share)
        except UserError as error:
            failed = error
            continue
        if plans not in found.values():
            found[share] = plans
    if not found:
        raise failed
    return found


def _best(found: dict[float, list[LayerPlan]], inputs: AllocationInputs) -> list[LayerPlan]:
    """The candidate that moves the model's distribution least."""
    if len(found) == 1:
        return next(iter(found.values()))
    costs = plan_divergences(inputs, list(found.values()))
    best = costs.index(min(costs))
    for i, (share, cost) in enumerate(zip(found, costs)):
        log.info("plan where heads lose %g x what channels lose: divergence %.4f nats per token%s", share, cost, ", taken" * (i == best))
    return list(found.values())[best]
