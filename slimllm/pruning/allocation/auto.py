"""``--layer_ratio auto``: the sparsity spread by what pruning each layer alone costs the whole model.

Probes measure that cost, and layer importance has its say; candidates are plans of one size that differ in how much the heads lose; the
candidate that moves the model's next-token distribution least is taken.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ...errors import UserError
from ...models.shape import Limits, ModelShape
from ...streaming.activations import ActivationStore
from ...streaming.runner import mean_cosines
from ...utils import processes
from ...utils.device import evaluation_dtype
from ..importance.layers import importance_weights
from ..layer import prune_layer
from .head_units import HeadUnits
from .inputs import Allocation, AllocationInputs
from .plan import LayerPlan, from_ratios, plan

if TYPE_CHECKING:
    from ...settings.pruning import PruneConfig

log = logging.getLogger("slimllm")

TRIAL_TOKENS = 4096  # calibration tokens that trials are pruned from, at most; fewer make channels look dearer than heads
MOST_PROBES = 32  # layers that are pruned alone to see what it costs; in deeper models, runs of neighbouring layers
MOST_TRIED = 12  # layers, evenly spread, in which candidates are compared; the others stay whole in this
PROBE_RATIO = 0.5  # how much of each layer is taken away to see what it costs
SPREAD = 4.0  # how evenly the sparsity is spread over the layers
MAX_RATIO = 0.9  # of one layer
ATTENTION_SHARES = (1.0, 0.5)  # the share of the heads that goes, to that of the channels, of each candidate


def auto(inputs: AllocationInputs) -> Allocation:
    """Probes, candidates, choice. Without a model all layers are taken to cost the same, and the first candidate is the answer."""
    shape, config = inputs.shape, inputs.config
    if inputs.source is None:
        alike = [0.0] * shape.layers
        return Allocation(next(iter(candidates(shape, alike, alike, config).values())))
    sensitivity = layer_sensitivities(inputs)
    found = candidates(shape, sensitivity, inputs.scores(), config)
    return Allocation(_best(found, inputs), sensitivity)


def probe(shape: ModelShape, ratio: float, config: PruneConfig) -> list[LayerPlan]:
    """Plans that take ``ratio`` of every layer."""
    return from_ratios(shape, HeadUnits(shape, config.head_unit), [ratio] * shape.layers, config.round_to, Limits(), parts=config.prune)


def layer_sensitivities(inputs: AllocationInputs) -> list[float]:
    """What it costs to prune each layer alone, [L]: KL divergence (nats per token) of the dense model's next-token distribution
    from that of the model with PROBE_RATIO of this one layer's heads and channels removed and the outputs recovered.

    Measured on ``probe_ids``, pruned from ``ids``; the model is left as it is. A model of more than MOST_PROBES layers is probed in
    that many runs of neighbouring layers, pruned together, and a run's cost is shared among its layers in proportion to how
    much each of them changes the residual stream; so the time grows with the depth and not with its square. All probes go through
    each later layer together, so that it is read once.
    """
    plans, layers = probe(inputs.shape, PROBE_RATIO, inputs.config), inputs.shape.layers
    size = math.ceil(layers / MOST_PROBES)
    changes, cosines = [], []

    def visit(index, layer, seen, hidden, held, streams):
        states, pruned = hidden.copy(), copy.deepcopy(layer)
        prune_layer(seen, states, pruned, index, plans[index], inputs.shape, inputs.config, saliency=inputs.saliency[index])
        states.close()
        cosines.append(seen.advance(hidden, layer, index))
        if index % size == 0:
            streams.append(streams[0].copy())
        wanted = streams[-1].copy()
        held.advance(wanted, layer, index)
        held.advance(streams[-1], pruned, index)
        changes.append(_relative_change(wanted, streams[-1]))
        wanted.close()
        return streams[1:-1]

    costs = _divergences(inputs, "layer sensitivity", visit)
    if inputs.layer_scores is None:
        inputs.layer_scores = mean_cosines(cosines, processes.share(_trial_ids(inputs)).numel())
    runs = [changes[start : start + size] for start in range(0, layers, size)]
    return [cost * change / max(sum(run), torch.finfo(torch.float32).tiny) for cost, run in zip(costs, runs) for change in run]


def _relative_change(before: ActivationStore, after: ActivationStore) -> float:
    """Mean over tokens of |after - before|^2 / |before|^2."""
    parts = [((b.float() - a.float()).square().sum(-1) / a.float().square().sum(-1)).flatten() for a, b in zip(before, after)]
    change, tokens = processes.total(float(torch.cat(parts).sum()), sum(map(len, parts)))
    return change / tokens


def plan_divergences(inputs: AllocationInputs, plans_by_candidate: list[list[LayerPlan]]) -> list[float]:
    """KL divergence (nats per token) of the dense model's next-token distribution from that of the model pruned by each candidate.

    Measured on ``probe_ids``, pruned from ``ids``; the model is left as it is, and no pruned one is ever whole in memory: a
    candidate, one LayerPlan per layer, is tried on a copy of one layer at a time, and in MOST_TRIED layers at most.
    """
    layers, trials = inputs.shape.layers, []
    compared = {round(layers * (i + 0.5) / MOST_TRIED - 0.5) for i in range(MOST_TRIED)} if layers > MOST_TRIED else range(layers)

    def visit(index, layer, seen, hidden, held, streams):
        if not trials:
            trials.extend((plans, hidden.copy()) for plans in plans_by_candidate)
            streams.extend(streams[0].copy() for _ in trials)
        for (plans, states), stream in zip(trials, streams[1:]):
            tried = copy.deepcopy(layer) if index in compared else layer
            if index in compared:
                prune_layer(seen, states, tried, index, plans[index], inputs.shape, inputs.config, saliency=inputs.saliency[index])
            else:
                seen.advance(states, tried, index)
            held.advance(stream, tried, index)
        return []

    costs = _divergences(inputs, "plans", visit)
    for _, states in trials:
        states.close()
    return costs


@torch.no_grad()
def _divergences(inputs: AllocationInputs, stage: str, visit: Callable) -> list[float]:
    """The divergence of each stream that ``visit`` made from that of the dense model, after the last layer.

    ``visit(index, layer, seen, hidden, held, streams)`` works on one dense layer, in the dtype of evaluation: ``hidden`` are the states of
    the trials' calibration tokens before the first layer, or where ``visit`` left them, run by ``seen``; ``streams`` those of
    the probe tokens, run by ``held``: the dense model's, then one per trial, which it may append. It gives the streams that the
    dense layer is still to be run on.
    """
    dtype = evaluation_dtype(inputs.source.dtype, torch.device(inputs.device))
    seen = inputs.runner(_trial_ids(inputs), dtype)
    held = inputs.runner(inputs.probe_ids, dtype)
    hidden, streams = seen.embed(), [held.embed()]
    for index, layer in seen.visit(stage):
        for stream in (streams[0], *visit(index, layer, seen, hidden, held, streams)):
            held.advance(stream, layer, index)
    costs = held.divergences(streams[0], streams[1:])
    for store in (hidden, *streams):
        store.close()
    return costs


def _trial_ids(inputs: AllocationInputs) -> torch.Tensor:
    return inputs.ids[: max(1, TRIAL_TOKENS // inputs.ids.shape[1])]


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


def candidates(shape: ModelShape, sensitivity: list[float], scores: list[float], config: PruneConfig) -> dict[float, list[LayerPlan]]:
    """The plans to choose between, all of the same size: {attention share: plans}.

    A layer's ratio is the mean of what its cost (``sensitivity`` [L]) and its importance (``scores`` [L], the layer cosines) say: by
    cost alone, what is measured on one kind of text decides too much of what is lost on another. Where two shares give the same plan,
    or one cannot meet the sparsity, there are fewer.
    """
    weights = importance_weights(scores, config.pruned_layers, config.alpha)

    def ratios(amount):
        by_cost = spread(sensitivity, amount * config.pruned_layers)
        return [(cost + min(amount * weight, MAX_RATIO)) / 2 for cost, weight in zip(by_cost, weights)]

    found, failed = {}, None
    for share in ATTENTION_SHARES:
        try:
            plans = plan(shape, ratios, config, share)
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
