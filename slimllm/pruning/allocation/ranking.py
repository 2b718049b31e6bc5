"""``--layer_ratio ranking``: one ranking of the heads and channels of all layers, as FLAP has it (An et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import UserError
from ...models.shape import ModelShape, limits_of
from ..sublayer import Sublayer
from .head_units import HeadUnits
from .inputs import Allocation, AllocationInputs
from .plan import LayerPlan, fill_with_channels, from_ratios, removed_parameters

if TYPE_CHECKING:
    from ...settings.pruning import PruneConfig


def ranking(inputs: AllocationInputs) -> Allocation:
    """FLAP's: on the dense model, S_j = Var(X_j) ||W[:, j]||^2 of each input of an output projection, squared for attention,
    standardised within each layer for the two apart; the lowest of all layers go, a head counting as many channels as it has weights.

    Without a model all layers are taken to matter the same. Raises UserError where the runtime wants layers alike.
    """
    shape, config = inputs.shape, inputs.config
    limits = limits_of(config.runtime, shape)
    if limits.same_heads:
        raise UserError(
            f"--layer_ratio ranking and --runtime {config.runtime}: it decides of each head by itself, and all layers keep the same "
            "number there; leave one away"
        )
    units = HeadUnits(shape, config.head_unit)
    ranks = _ranks(inputs, units) if inputs.source else _equal_ranks(shape, units)
    return Allocation(plans_of(ranks, shape, units, config))


@dataclass
class Ranks:
    """Standardised scores of the steps in which the heads go [L, steps] and of the channels [L, I]: the lower, the sooner they go."""

    steps: torch.Tensor
    channels: torch.Tensor


def plans_of(ranks: Ranks, shape: ModelShape, units: HeadUnits, config: PruneConfig) -> list[LayerPlan]:
    """One LayerPlan per layer: the lowest of all go, until ``pruning_ratio`` of their cost or ``target_sparsity`` is met.

    A step of heads costs (2 G + 2) h / 3 channels where it is a KV head with its G query heads. The highest of each layer stays.
    """
    heads, kv_heads = (whole - less for whole, less in zip(units.widths(units.steps), units.widths(units.steps - 1)))
    step_cost = (2 * heads + 2 * kv_heads) * shape.head_dim / 3
    scores = torch.cat([ranks.steps.sort(dim=1).values[:, :-1], ranks.channels.sort(dim=1).values[:, :-1]], 1)
    order = scores.flatten().argsort(stable=True)
    part = order % scores.shape[1] < units.steps - 1
    if config.prune != "both":
        order = order[part if config.prune == "heads" else ~part]
        part = order % scores.shape[1] < units.steps - 1
    layer = order // scores.shape[1]

    def planned(count: int) -> list[LayerPlan]:
        gone = torch.stack([torch.bincount(layer[:count][part[:count] == kind], minlength=shape.layers) for kind in (True, False)])
        ratios = [float(channels) / shape.channels for channels in gone[1]]
        plans = from_ratios(shape, units, ratios, config.round_to, limits_of(config.runtime, shape))
        for plan, steps, ratio in zip(plans, gone[0].tolist(), ratios):
            plan.heads, plan.kv_heads = units.widths(units.kept_steps(steps / units.steps, config.round_to) if steps else units.steps)
            plan.ratio = ratio or float(steps > 0) / shape.channels
            plan.clipped = False
        return plans

    if config.target_sparsity is None:
        costs = torch.where(part, step_cost, 1.0).cumsum(0)
        whole = shape.layers * ((config.prune != "channels") * units.steps * step_cost + (config.prune != "heads") * shape.channels)
        return planned(int((costs - config.pruning_ratio * whole).abs().argmin()) + 1 if config.pruning_ratio else 0)
    target = config.target_sparsity * shape.decoder_parameters
    low, high = 0, len(order)
    if removed_parameters(shape, planned(high), config) < target:
        most = removed_parameters(shape, planned(high), config) / shape.decoder_parameters
        raise UserError(f"--target_sparsity {config.target_sparsity}: all layers together can give up at most {most:.3f}; lower it")
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if removed_parameters(shape, planned(middle), config) < target else (low, middle)
    if config.prune == "heads":
        near = (planned(max(low - 1, 0)), planned(low))
        return min(near, key=lambda plans: abs(removed_parameters(shape, plans, config) - target))
    plans = planned(low)
    fill_with_channels(shape, plans, target, config)
    return plans


def _equal_ranks(shape: ModelShape, units: HeadUnits) -> Ranks:
    """Of a model whose layers all look the same: the same share of everything goes."""
    return Ranks(*(torch.linspace(-1, 1, count).expand(shape.layers, -1) for count in (units.steps, shape.channels)))


@torch.no_grad()
def _ranks(inputs: AllocationInputs, units: HeadUnits) -> Ranks:
    runner = inputs.runner(inputs.ids)
    adapter, hidden = runner.adapter, runner.embed()
    steps, channels = [], []
    for index, layer in runner.visit("fluctuation"):
        for block, arguments, power, into in (
            (adapter.attention(layer), runner.arguments[index], 2, steps),
            (adapter.mlp(layer), {}, 1, channels),
        ):
            with Sublayer(hidden, block, arguments, runner.memory) as sub:
                sub.run(variance=True)
                scores = (sub.input_variance.var_x * sub.weight.square().sum(0)) ** power
                into.append(((scores - scores.mean()) / scores.std().clamp_min(torch.finfo(scores.dtype).tiny)).cpu())
    hidden.close()
    of_units = torch.stack(steps).view(inputs.shape.layers, units.groups, units.units // units.groups, -1).mean(-1)
    return Ranks(of_units.sort(dim=-1).values.mean(1), torch.stack(channels))  # a step: one unit of each group, its lowest first
