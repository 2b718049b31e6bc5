"""Layer ratios -> how many heads and channels each layer keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UserError
from ...models.shape import Limits, ModelShape, limits_of
from .head_units import HeadUnits

if TYPE_CHECKING:
    from ...settings.pruning import PruneConfig

# The share of the heads that goes, to that of the channels, where all layers keep the same number of heads
COMMON_ATTENTION_SHARE = 0.5


@dataclass(frozen=True)
class Kept:
    """The indices that one layer keeps, each list ascending."""

    heads: list[int]
    kv_heads: list[int]
    channels: list[int]


@dataclass
class LayerPlan:
    """What one layer keeps. ``ratio`` is the share of its channels that was asked of it (Eq. 11), before rounding.

    ``kept``: which heads and channels, where that is decided already; else they are chosen by their importance.
    """

    ratio: float
    heads: int
    kv_heads: int
    channels: int
    clipped: bool = False
    kept: Kept | None = None

    @classmethod
    def of(cls, values: dict) -> LayerPlan:
        """The plan whose fields, as asdict gives them, are ``values``."""
        return cls(**values | {"kept": values["kept"] and Kept(**values["kept"])})


def plan(shape: ModelShape, ratios: Callable[[float], list[float]], config: PruneConfig, attention: float | None = None) -> list[LayerPlan]:
    """One LayerPlan per layer, from ``ratios``: an amount -> the ratio of each layer [L], in proportion to it.

    ``attention``: the share of the heads that goes, to that of the channels, which make up for the rest. By default it is 1, or
    with ``target_sparsity`` COMMON_ATTENTION_SHARE where the runtime wants one number of heads.

    With ``pruning_ratio`` each layer's ratio is rounded on its own, as published. With ``target_sparsity`` the ratios
    are scaled, heads rounded, and channels take up the rest, so that the decoder's parameters (biases that the
    recovery adds included) meet the target to within half a channel (half of ``round_to`` channels; of each layer, where
    the runtime wants the same number in all). Where it wants one number of heads, that is the one at which heads lose most
    nearly that share of what channels lose: the layers that importance would spare lose them too. Where only heads go, the
    target is met to within half a step of one layer's heads.
    Raises UserError where the pruned layers cannot give that much.
    """
    limits = limits_of(config.runtime, shape)
    if limits.same_channels:

        def ratios(amount):
            return [amount * config.pruned_layers / shape.layers] * shape.layers

    if config.prune != "both":
        attention = 1.0
    elif attention is None:
        attention = COMMON_ATTENTION_SHARE if limits.same_heads and config.target_sparsity is not None else 1.0
    units = HeadUnits(shape, config.head_unit, limits.divisor)
    if config.round_to > shape.channels or not units.allowed_steps(config.round_to):
        raise UserError(
            f"--round_to {config.round_to}: the model's {shape.heads} heads of size {shape.head_dim} and {shape.channels} channels "
            "allow no such multiple"
        )
    if config.target_sparsity is None:
        plans = from_ratios(shape, units, ratios(config.pruning_ratio), config.round_to, limits, parts=config.prune)
        if attention == 1.0:
            return plans
        share = removed_parameters(shape, plans, config) / shape.decoder_parameters
        config = dataclasses.replace(config, pruning_ratio=None, target_sparsity=share)
    return _for_target(shape, units, ratios, config, limits, attention)


def from_ratios(
    shape: ModelShape,
    units: HeadUnits,
    ratios: list[float],
    round_to: int,
    limits: Limits,
    attention: float = 1.0,
    steps: int | None = None,
    parts: str = "both",
) -> list[LayerPlan]:
    """One plan per layer; ``steps``: of heads, in every layer, instead of what the ratios say. ``parts``: what goes (``--prune``)."""
    plans = []
    mean = sum(ratios) / len(ratios)
    if parts == "channels":
        attention, steps = 0.0, units.steps
    for ratio in ratios:
        inside = min(ratio, 1.0)
        of_heads = attention * (min(mean, 1.0) if limits.same_heads else inside)
        kept = steps or (units.kept_steps(of_heads, round_to) if of_heads else units.steps)
        heads = units.widths(kept)
        if not ratio or parts == "heads":
            clipped = not steps and round(of_heads * units.steps) >= units.steps
            plans.append(LayerPlan(ratio, *heads, shape.channels, clipped))
            continue
        channels = shape.channels - round(inside * shape.channels)
        if round_to > 1:
            channels = round(channels / round_to) * round_to
        channels = min(max(channels, round_to), shape.channels)
        clipped = (not steps and round(of_heads * units.steps) >= units.steps) or round(inside * shape.channels) >= shape.channels
        plans.append(LayerPlan(ratio, *heads, channels, clipped))
    return plans


def removed_parameters(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig) -> int:
    """Decoder parameters that the plans remove, less the biases that the recovery and the runtime's form of the model add."""
    kept, new_bias = _pruned_shape(shape, plans, config), config.adds_bias(shape)
    left = sum(
        kept.layer_parameters(
            p.heads,
            p.kv_heads,
            p.channels,
            o_bias=kept.o_bias or (new_bias and p.heads < shape.heads),
            down_bias=kept.mlp_bias or (new_bias and p.channels < shape.channels),
        )
        for p in plans
    )
    return shape.decoder_parameters - left


def _pruned_shape(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig) -> ModelShape:
    """The shape with the biases that every layer of the pruned model has."""
    if not config.adds_bias(shape) or not limits_of(config.runtime, shape).all_biases:
        return shape
    attention, mlp = any(p.heads < shape.heads for p in plans), any(p.channels < shape.channels for p in plans)
    return dataclasses.replace(
        shape, qkv_bias=shape.qkv_bias or attention, o_bias=shape.o_bias or attention, mlp_bias=shape.mlp_bias or mlp
    )


def _for_target(shape, units, ratios, config, limits, attention) -> list[LayerPlan]:
    if config.prune == "heads":
        return _heads_alone(shape, units, ratios, config, limits)
    if not limits.same_heads:
        return _with_heads(shape, units, ratios, config, limits, attention)
    found, failed = [], None
    for steps in units.allowed_steps(config.round_to) if config.prune == "both" else [units.steps]:
        try:
            plans = _with_heads(shape, units, ratios, config, limits, attention, steps)
        except UserError as error:
            failed = error
            continue
        channels = 1 - sum(p.channels for p in plans) / (shape.channels * shape.layers)
        found.append((abs(1 - steps / units.steps - attention * channels), -steps, plans))
    if not found:
        raise failed
    return min(found, key=lambda entry: entry[:2])[2]


def _with_heads(shape, units, ratios, config, limits, attention, steps=None) -> list[LayerPlan]:
    """Plans that meet the target; with ``steps``, of so many steps of heads in every layer."""

    def planned(scale):
        return from_ratios(shape, units, ratios(scale), config.round_to, limits, attention, steps, config.prune)

    _, plans = _around_target(shape, planned, config)
    fill_with_channels(shape, plans, config.target_sparsity * shape.decoder_parameters, config, limits.same_channels)
    return plans


def _heads_alone(shape, units, ratios, config, limits) -> list[LayerPlan]:
    """Plans of whole channels, nearest to the target: the last layers to lose a step of their heads are those of the smallest ratio."""
    target = config.target_sparsity * shape.decoder_parameters

    def planned(scale):
        return from_ratios(shape, units, ratios(scale), config.round_to, limits, parts="heads")

    fewer, more = _around_target(shape, planned, config)
    order = sorted((i for i in range(shape.layers) if fewer[i].heads != more[i].heads), key=lambda i: -more[i].ratio)
    counts = (0, len(order)) if limits.same_heads else range(len(order) + 1)
    found = [[more[i] if i in order[:count] else fewer[i] for i in range(shape.layers)] for count in counts]
    return min(found, key=lambda plans: abs(removed_parameters(shape, plans, config) - target))


def _around_target(shape, planned, config) -> tuple[list[LayerPlan], list[LayerPlan]]:
    """(plans at the last scale that removes less than the target, at the first that does not). Raises UserError where none does."""
    target = config.target_sparsity * shape.decoder_parameters
    low, high = 0.0, 1.0
    while removed_parameters(shape, planned(high), config) < target:
        if high > 1e6:
            most = removed_parameters(shape, planned(high), config) / shape.decoder_parameters
            raise UserError(
                f"--target_sparsity {config.target_sparsity}: {_pruned_layers(config, shape)} can give up at most "
                f"{most:.3f} of the decoder's parameters; {_way_to_more(config, shape)}"
            )
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if removed_parameters(shape, planned(middle), config) < target else (low, middle)
    return planned(low), planned(high)


def _may_take_more_layers(config, shape) -> bool:
    return config.layer_ratio != "auto" and config.pruned_layers < shape.layers


def _pruned_layers(config, shape) -> str:
    return f"{config.pruned_layers} pruned layers" if _may_take_more_layers(config, shape) else f"all {shape.layers} layers"


def _way_to_more(config, shape) -> str:
    return "raise --pruned_layers" if _may_take_more_layers(config, shape) else "lower it: a part of each layer must stay"


def fill_with_channels(shape, plans, target, config, together: bool = False) -> None:
    """Moves the kept channels of the pruned layers, in steps, until the removed parameters are nearest to ``target``.

    The heads stay; the surplus is shared in proportion to what each layer loses, largest remainder first, or falls to all
    layers ``together``.
    """
    step = config.round_to
    lowest, highest = step, (shape.channels - 1) // step * step
    pruned = [p for p in plans if p.channels < shape.channels] if not together else plans
    unit = _pruned_shape(shape, plans, config).channel_parameters * step * (len(plans) if together else 1)
    surplus = round((removed_parameters(shape, plans, config) - target) / unit)  # steps to give back
    if together:
        moved = min(max(plans[0].channels + surplus * step, lowest), shape.channels)
        surplus -= (moved - plans[0].channels) // step
        for p in plans:
            p.channels = moved
        pruned = []
    while surplus and pruned:
        share = sum(p.ratio for p in pruned)
        parts = [surplus * p.ratio / share for p in pruned]
        whole = [int(part) for part in parts]
        rest = sorted(range(len(parts)), key=lambda i: -abs(parts[i] - whole[i]))
        for i in rest[: abs(surplus - sum(whole))]:
            whole[i] += 1 if surplus > 0 else -1
        for p, steps in zip(pruned, whole):
            moved = min(max(p.channels + steps * step, lowest), highest)
            surplus -= (moved - p.channels) // step
            p.channels = moved
        pruned = [p for p in pruned if (p.channels < highest if surplus > 0 else p.channels > lowest)]
    if surplus:
        raise UserError(
            f"--target_sparsity {target / shape.decoder_parameters:.4g}: the heads come in steps too coarse for this, "
            f"{surplus * step} channels too {'few' if surplus > 0 else 'many'} would stay; "
            "choose another share, --pruned_layers or --head_unit"
        )
