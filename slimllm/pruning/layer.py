"""One layer pruned: attention first, then the feed-forward part, which sees what the pruned attention gives (paper section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..models.adapter import columns
from ..models.shape import ModelShape
from ..settings.methods import CHANNEL_SCORES, HEAD_CHOICES, RECOVERIES
from ..streaming.activations import ActivationStore
from ..streaming.runner import LayerRunner
from ..utils import processes
from . import surgery
from .allocation.head_units import HeadUnits
from .allocation.plan import LayerPlan
from .importance.channels import ChannelStatistics, select_channels
from .importance.heads import HeadStatistics
from .importance.taylor import Saliency
from .sublayer import Sublayer

if TYPE_CHECKING:
    from ..settings.pruning import PruneConfig


@dataclass
class LayerReport:
    """What happened to one layer; heads, kv_heads and channels are the indices kept, ascending.

    The errors are the share of the projection's output variance missed on the calibration tokens, (before recovery,
    after); None where nothing was removed. ``cosine``: c_l of Eq. 11, where the plans go by it. ``sensitivity``: what pruning this
    layer alone costs, where it was measured.
    """

    index: int
    cosine: float | None
    ratio: float
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    sensitivity: float | None = None
    attention_error: tuple[float, float] | None = None
    mlp_error: tuple[float, float] | None = None
    clipped: bool = False
    seconds: float = 0.0


def whole_layer(index: int, cosine: float | None, plan: LayerPlan, shape: ModelShape, sensitivity: float | None = None) -> LayerReport:
    """The report of a layer from which nothing was removed yet."""
    everything = [list(range(count)) for count in (shape.heads, shape.kv_heads, shape.channels)]
    return LayerReport(index, cosine, plan.ratio, *everything, sensitivity=sensitivity, clipped=plan.clipped)


def removes(shape: ModelShape, plan: LayerPlan) -> bool:
    return (plan.heads, plan.kv_heads, plan.channels) != (shape.heads, shape.kv_heads, shape.channels)


def prune_layer(
    runner: LayerRunner,
    hidden: ActivationStore,
    layer: nn.Module,
    index: int,
    plan: LayerPlan,
    shape: ModelShape,
    config: PruneConfig,
    report: LayerReport | None = None,
    saliency: Saliency | None = None,
) -> None:
    """Prunes ``layer`` in place and advances ``hidden``, the states before it, to what it now gives; completes ``report``.

    With ``config.dense_stream`` to what it gave before. ``saliency``: the layer's, for a choice that goes by gradients.
    """
    adapter = runner.adapter
    report = report or whole_layer(index, None, plan, shape)
    how = {"recovery": config.recovery, "ridge": config.ridge_for(runner.tokens), "replace": not config.dense_stream}
    new_bias = config.adds_bias(shape)

    with Sublayer(hidden, adapter.attention(layer), runner.arguments[index], runner.memory) as sub:
        if plan.heads < shape.heads:
            sub.run(input_covariance=True, norms="input_norm" in HEAD_CHOICES[config.head_choice].needs)
            heads, kv_heads = processes.from_first(lambda: _choose_heads(sub, plan, shape, config, index, saliency), runner.device)
            recovered, report.attention_error = sub.recover(columns(heads, shape.head_dim), new_bias=new_bias, **how)
            surgery.slice_heads(adapter, layer, heads, kv_heads, recovered)
            report.heads, report.kv_heads = heads.tolist(), kv_heads.tolist()
        else:
            sub.run()

    with Sublayer(hidden, adapter.mlp(layer), {}, runner.memory) as sub:
        if plan.channels < shape.channels:
            needs = CHANNEL_SCORES[config.channel_score].needs if plan.kept is None else frozenset()
            sub.run(
                input_covariance="input_covariance" in RECOVERIES[config.recovery].needs,
                output_covariance="output_covariance" in needs,
                norms=True,
                variance="input_variance" in needs,
            )
            channels = processes.from_first(
                lambda: _choose_channels(sub, adapter.gate_and_up(layer), plan, shape, config, index, saliency), runner.device
            )
            recovered, report.mlp_error = sub.recover(channels, new_bias=new_bias, **how)
            surgery.slice_channels(adapter, layer, channels, recovered)
            report.channels = channels.tolist()
        else:
            sub.run()


def _choose_heads(sub: Sublayer, plan: LayerPlan, shape: ModelShape, config: PruneConfig, index: int, saliency) -> tuple:
    """Kept query heads and KV heads, ascending: those of the plan, or by their importance, on whatever unit the heads go in."""
    device = sub.weight.device
    if plan.kept is not None:
        return torch.tensor(plan.kept.heads, device=device), torch.tensor(plan.kept.kv_heads, device=device)
    units = HeadUnits(shape, config.head_unit)
    removed = units.steps - (plan.heads // shape.kv_heads if units.by_query else plan.kv_heads)
    statistics = HeadStatistics(
        sub.input_covariance.matrix(),
        sub.weight,
        units.units,
        units.groups,
        input_norm=sub.input_norm.norm() if "input_norm" in HEAD_CHOICES[config.head_choice].needs else None,
        saliency=saliency and saliency.of_units(units.units),
        seed=config.seed + index,
    )
    keep = torch.tensor(HEAD_CHOICES[config.head_choice](statistics, removed), device=device)
    if units.by_query:
        return keep, torch.arange(shape.kv_heads, device=device)
    return columns(keep, shape.heads // shape.kv_heads), keep


def _choose_channels(
    sub: Sublayer, gate_and_up, plan: LayerPlan, shape: ModelShape, config: PruneConfig, index: int, saliency
) -> torch.Tensor:
    """Kept channels, ascending: those of the plan, or by their importance."""
    if plan.kept is not None:
        return torch.tensor(plan.kept.channels, device=sub.weight.device)
    statistics = ChannelStatistics(
        sub.output_covariance and sub.output_covariance.matrix(),
        sub.weight,
        *gate_and_up,
        sub.input_norm.norm(),
        sub.block_input_norm.norm(),
        activation_variance=sub.input_variance and sub.input_variance.var_x,
        saliency=saliency and saliency.channels,
        seed=config.seed + index,
    )
    return select_channels(CHANNEL_SCORES[config.channel_score](statistics), shape.channels - plan.channels, config.keep_lowest)
