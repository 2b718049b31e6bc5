"""``--layer_ratio auto``: the sparsity spread by what pruning each layer alone costs the whole model.

Probes measure that cost, and layer importance counts as much as they do. Candidates are plans of one size that differ in how much the heads
lose; the one whose next-token distribution diverges least from the dense model's is pruned for good (docs/method.md, section 6).
"""

from __future__ import annotations

import copy
import logging
import math

import torch
from torch import nn

from ...errors import UserError
from ...models.shape import ModelShape
from ...plan import LayerPlan
from ...settings.pruning import PruneConfig
from ...streaming.activations import ActivationStore
from ...streaming.runner import mean_cosines
from ...utils import processes
from ...utils.device import evaluation_dtype
from ..importance.layers import importance_weights
from ..layer import LayerPruner
from .inputs import Allocation, AllocationInputs
from .sizing import Sizing, plans_from_ratios

log = logging.getLogger("slimllm")

TRIAL_TOKENS = 4096  # calibration tokens that trials are pruned from, at most; fewer make channels look dearer than heads
MOST_PROBES = 32  # layers that are pruned alone to see what it costs; in deeper models, runs of neighbouring layers
MOST_TRIED = 12  # layers, evenly spread, in which candidates are compared; the others stay whole in this
PROBE_RATIO = 0.5  # how much of each layer is taken away to see what it costs
SPREAD = 4.0  # how evenly the sparsity is spread over the layers
MAX_RATIO = 0.9  # the largest ratio of one layer
ATTENTION_SHARES = (1.0, 0.5)  # of each candidate: the share of the heads that goes, divided by the share of the channels that goes


def auto(inputs: AllocationInputs) -> Allocation:
    """Probes, candidates, choice. Without a model all layers are assumed to cost the same, and the first candidate is the result."""
    shape, config = inputs.shape, inputs.config
    if inputs.run is None:
        alike = [0.0] * len(shape.layers)
        return Allocation(next(iter(candidates(shape, alike, alike, config).values())))
    sensitivity = layer_sensitivities(inputs)
    plans_by_share = candidates(shape, sensitivity, inputs.scores(), config)
    return Allocation(_best(plans_by_share, inputs), sensitivity)


class Probing:
    """The dense model, layer by layer, and beside it what variants of it make of the probe tokens.

    Layers are pruned from ``states``, those of TRIAL_TOKENS calibration tokens, which ``calibration`` runs. ``dense`` and ``variants`` are
    the probe tokens' states in the dense model and in each variant, which ``probes`` runs. All is computed in the dtype of evaluation, and
    the model is left as it is.
    """

    def __init__(self, inputs: AllocationInputs):
        run = inputs.run
        dtype = evaluation_dtype(run.source.dtype, run.device)
        self.calibration = run.runner(run.samples.ids[: max(1, TRIAL_TOKENS // run.samples.ids.shape[1])], dtype)
        self.probes = run.runner(run.samples.probe_ids, dtype)
        self.states, self.dense = self.calibration.embed(), self.probes.embed()
        self.variants: list[ActivationStore] = []
        self._pruner = LayerPruner(run, self.calibration, inputs.saliency)

    def pruned(self, layer: nn.Module, index: int, plan: LayerPlan, states: ActivationStore) -> nn.Module:
        """A copy of ``layer``, pruned from ``states``, which become those after it."""
        pruned = copy.deepcopy(layer)
        self._pruner.prune(pruned, index, plan, states)
        return pruned

    def change(self, variant: ActivationStore, layer: nn.Module, pruned: nn.Module, index: int) -> float:
        """Advances ``variant`` through the pruned layer; returns by what share of the whole layer's output the result differs from that."""
        whole = variant.copy()
        self.probes.advance(whole, layer, index)
        self.probes.advance(variant, pruned, index)
        change = _relative_change(whole, variant)
        whole.close()
        return change

    def costs(self) -> list[float]:
        """KL divergence (nats per token) of the dense model's next-token distribution from that of each variant, after the last layer."""
        costs = self.probes.divergences(self.dense, self.variants)
        for store in (self.states, self.dense, *self.variants):
            store.close()
        return costs


def probe(shape: ModelShape, ratio: float, config: PruneConfig) -> list[LayerPlan]:
    """Plans that take ``ratio`` of every layer."""
    return Sizing(shape, config.having(runtime="any")).rounded([ratio] * len(shape.layers))


@torch.no_grad()
def layer_sensitivities(inputs: AllocationInputs) -> list[float]:
    """What it costs to prune each layer alone, [L]: KL divergence (nats per token) of the dense model's next-token distribution
    from that of the model with PROBE_RATIO of this one layer's heads and channels removed and the outputs recovered.

    A model of more than MOST_PROBES layers is probed in that many runs of neighbouring layers, pruned together, and a run's cost is shared
    among its layers in proportion to how much each of them changes the residual stream; so the time grows with the depth and not with its
    square. All probes go through each later layer together, so that it is read once.
    """
    plans, layers = probe(inputs.shape, PROBE_RATIO, inputs.config), len(inputs.shape.layers)
    size = math.ceil(layers / MOST_PROBES)
    changes, cosines, probing = [], [], Probing(inputs)
    for index, layer in probing.calibration.visit("layer sensitivity"):
        states = probing.states.copy()
        pruned = probing.pruned(layer, index, plans[index], states)
        states.close()
        cosines.append(probing.calibration.advance(probing.states, layer, index))
        if index % size == 0:
            probing.variants.append(probing.dense.copy())
        *finished, current = probing.variants
        changes.append(probing.change(current, layer, pruned, index))
        for stream in (probing.dense, *finished):
            probing.probes.advance(stream, layer, index)
    if inputs.layer_scores is None:
        inputs.layer_scores = mean_cosines(cosines, probing.calibration.ids.numel())
    costs = probing.costs()
    runs = [changes[start : start + size] for start in range(0, layers, size)]
    return [cost * change / max(sum(run), torch.finfo(torch.float32).tiny) for cost, run in zip(costs, runs) for change in run]


def _relative_change(before: ActivationStore, after: ActivationStore) -> float:
    """Mean over tokens of |after - before|^2 / |before|^2."""
    parts = [((b.float() - a.float()).square().sum(-1) / a.float().square().sum(-1)).flatten() for a, b in zip(before, after)]
    change, tokens = processes.total(float(torch.cat(parts).sum()), sum(map(len, parts)))
    return change / tokens


@torch.no_grad()
def plan_divergences(inputs: AllocationInputs, plans_by_candidate: list[list[LayerPlan]]) -> list[float]:
    """KL divergence (nats per token) of the dense model's next-token distribution from that of the model pruned by each candidate.

    No pruned model is ever whole in memory: a candidate, one LayerPlan per layer, is tried on a copy of one layer at a time, and in
    MOST_TRIED layers at most.
    """
    layers, probing = len(inputs.shape.layers), Probing(inputs)
    compared = {round(layers * (i + 0.5) / MOST_TRIED - 0.5) for i in range(MOST_TRIED)} if layers > MOST_TRIED else range(layers)
    states_by_candidate = [probing.states.copy() for _ in plans_by_candidate]
    probing.variants = [probing.dense.copy() for _ in plans_by_candidate]
    for index, layer in probing.calibration.visit("plans"):
        for plans, states, variant in zip(plans_by_candidate, states_by_candidate, probing.variants):
            tried = layer
            if index in compared:
                tried = probing.pruned(layer, index, plans[index], states)
            else:
                probing.calibration.advance(states, layer, index)
            probing.probes.advance(variant, tried, index)
        probing.probes.advance(probing.dense, layer, index)
    for states in states_by_candidate:
        states.close()
    return probing.costs()


def spread(sensitivity: list[float], total: float) -> list[float]:
    """Ratios [L] with the given sum: q_l = (μ - s_l / median(s)) / SPREAD, within 0 .. MAX_RATIO (Eq. g of docs/method.md).

    This minimises sum over l of s_l q_l + (SPREAD / 2) median(s) q_l^2: what pruning each layer alone costs, which is nearly linear in
    q_l, and a quadratic term, since the more is gone from a layer the more each further unit costs. The price μ sets the sum.
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

    A layer's ratio is the mean of what its cost (``sensitivity`` [L]) and its importance (``scores`` [L], the layer cosines) give: by
    cost alone, what is measured on one kind of text decides too much of what is lost on another. Where two shares give the same plan,
    or one cannot meet the sparsity, there are fewer.
    """
    weights = importance_weights(scores, config.pruned_layers, config.alpha)

    def ratios(amount):
        by_cost = spread(sensitivity, amount * config.pruned_layers)
        return [(cost + min(amount * weight, MAX_RATIO)) / 2 for cost, weight in zip(by_cost, weights)]

    plans_by_share, failed = {}, None
    for share in ATTENTION_SHARES:
        try:
            plans = plans_from_ratios(shape, ratios, config, share)
        except UserError as error:
            failed = error
            continue
        if plans not in plans_by_share.values():
            plans_by_share[share] = plans
    if not plans_by_share:
        raise failed
    return plans_by_share


def _best(plans_by_share: dict[float, list[LayerPlan]], inputs: AllocationInputs) -> list[LayerPlan]:
    """The candidate whose next-token distribution diverges least from the dense model's."""
    if len(plans_by_share) == 1:
        return next(iter(plans_by_share.values()))
    costs = plan_divergences(inputs, list(plans_by_share.values()))
    best = costs.index(min(costs))
    for i, (share, cost) in enumerate(zip(plans_by_share, costs)):
        log.info(
            "candidate with %s: divergence %.4f nats per token%s",
            "equal ratios for heads and channels" if share == 1 else f"heads losing {share:g} of the ratio of channels",
            cost,
            ", chosen" if i == best else "",
        )
    return list(plans_by_share.values())[best]
