"""Layer importance -> how many heads and channels each layer keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from .cli import UserError
from .config import PruneConfig
from .families import Limits, ModelShape, limits_of
from .importance.layers import layer_weights

SPREAD = 4.0  # how evenly `auto` spreads the budget over the layers
MAX_RATIO = 0.9  # of one layer, with `auto`
# The share of the heads that goes, to that of the channels:
ATTENTION_SHARES = (1.0, 0.5)  # `auto` tries these
COMMON_ATTENTION_SHARE = 0.5  # where all layers keep the same number of heads


@dataclass
class LayerPlan:
    """What one layer keeps. ``ratio`` is the share of its channels that was asked of it (Eq. 11), before rounding."""

    ratio: float
    heads: int
    kv_heads: int
    channels: int
    clipped: bool = False


class HeadUnits:
    """The steps in which a layer's heads can go, so that every layer keeps regular groups.

    ``group``: a step is a KV head with all its query heads (a plain head where there is no grouping).
    ``query``: a step is one query head out of each KV head's group.
    """

    def __init__(self, shape: ModelShape, head_unit: str, divisor: int = 0):
        group_size = shape.heads // shape.kv_heads
        self.by_query = head_unit == "query" and group_size > 1
        self.steps = group_size if self.by_query else shape.kv_heads
        self.units = shape.heads if self.by_query else shape.kv_heads  # what the search chooses from
        self.classes = shape.kv_heads if self.by_query else 1  # runs of units that lose the same number
        self._shape, self._divisor = shape, divisor

    def widths(self, kept_steps: int) -> tuple[int, int]:
        """(query heads, KV heads) that a layer with this many steps has."""
        heads = self._shape.heads // self.steps * kept_steps
        return heads, self._shape.kv_heads if self.by_query else kept_steps

    def kept_steps(self, ratio: float, round_to: int) -> int:
        """Steps kept at ``ratio``: steps - round(ratio * steps), at least one, or the nearest that :meth:`allowed_steps` has."""
        wanted = self.steps - round(ratio * self.steps)
        if round_to == 1 and not self._divisor:
            return max(1, wanted)
        return min(self.allowed_steps(round_to), key=lambda n: (abs(n - self.steps * (1 - ratio)), -n))

    def allowed_steps(self, round_to: int) -> list[int]:
        """The numbers of steps at which heads x head size is a multiple of ``round_to`` and the heads divide ``divisor``."""

        def allowed(heads):
            return heads * self._shape.head_dim % round_to == 0 and self._divisor % heads == 0

        return [n for n in range(1, self.steps + 1) if allowed(self.widths(n)[0])]


def probe(shape: ModelShape, ratio: float, config: PruneConfig) -> list[LayerPlan]:
    """Plans that take ``ratio`` of every layer."""
    return _from_ratios(shape, HeadUnits(shape, config.head_unit), [ratio] * shape.layers, config.round_to, Limits())


def spread(sensitivity: list[float], total: float) -> list[float]:
    """Ratios [L] with the given sum for ``--layer_ratio auto``: r_l = (lambda - s_l / median(s)) / SPREAD, within 0 .. MAX_RATIO.

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
    """The plans between which ``--layer_ratio auto`` chooses, all of the same size: {attention share: plans}.

    Where two shares give the same plan, or one cannot meet the budget, there are fewer.
    """
    found, failed = {}, None
    for share in ATTENTION_SHARES:
        try:
            plans = plan(shape, sensitivity, config, share)
        except UserError as error:
            failed = error
            continue
        if plans not in found.values():
            found[share] = plans
    if not found:
        raise failed
    return found


def plan(shape: ModelShape, signal: list[float], config: PruneConfig, attention: float | None = None) -> list[LayerPlan]:
    """One LayerPlan a layer, from the dense model's layer cosines [L] or, with ``--layer_ratio auto``, its sensitivities.

    ``attention``: the share of the heads that goes, to that of the channels, which make up for the rest. By default it is 1, or
    with ``target_sparsity`` COMMON_ATTENTION_SHARE where the runtime wants one number of heads.

    With ``pruning_ratio`` each layer's ratio is rounded on its own, as published. With ``target_sparsity`` the ratios
    are scaled, heads rounded, and channels take up the rest, so that the decoder's parameters (biases that the
    recovery adds included) meet the target to within half a channel (half of ``round_to`` channels; of each layer, where
    the runtime wants the same number in all). Where it wants one number of heads, that is the one at which heads lose most
    nearly that share of what channels lose: the layers that importance would spare lose them too.
    Raises UserError where the pruned layers cannot give that much.
    """
    limits = limits_of(config.runtime, shape)
    if limits.same_channels:

        def ratios(amount):
            return [amount * config.pruned_layers / shape.layers] * shape.layers
    elif config.layer_ratio == "auto":

        def ratios(amount):
            return spread(signal, amount * config.pruned_layers)
    else:
        weights = layer_weights(signal, config.pruned_layers, config.alpha, config.layer_ratio)

        def ratios(amount):
            return [amount * weight for weight in weights]

    if attention is None:
        attention = COMMON_ATTENTION_SHARE if limits.same_heads and config.target_sparsity is not None else 1.0
    units = HeadUnits(shape, config.head_unit, limits.divisor)
    if config.round_to > shape.channels or not units.allowed_steps(config.round_to):
        raise UserError(
            f"--round_to {config.round_to}: the model's {shape.heads} heads of size {shape.head_dim} and {shape.channels} channels "
            "allow no such multiple"
        )
    if config.target_sparsity is None:
        plans = _from_ratios(shape, units, ratios(config.pruning_ratio), config.round_to, limits)
        if attention == 1.0:
            return plans
        share = removed_parameters(shape, plans, config) / shape.decoder_parameters
        config = dataclasses.replace(config, pruning_ratio=None, target_sparsity=share)
    return _for_target(shape, units, ratios, config, limits, attention)


def _from_ratios(shape, units, ratios, round_to, limits: Limits, attention=1.0, steps: int | None = None) -> list[LayerPlan]:
    """A plan a layer; ``steps``: of heads, in every layer, instead of what the ratios say."""
    plans = []
    mean = sum(ratios) / len(ratios)
    for ratio in ratios:
        inside = min(ratio, 1.0)
        of_heads = attention * (min(mean, 1.0) if limits.same_heads else inside)
        kept = steps or (units.kept_steps(of_heads, round_to) if of_heads else units.steps)
        heads = units.widths(kept)
        if not ratio:
            plans.append(LayerPlan(0.0, *heads, shape.channels))
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
    kept, new_bias = _pruned_shape(shape, plans, config), config.recovery != "none" and limits_of(config.runtime, shape).new_bias
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
    if config.recovery == "none" or not limits_of(config.runtime, shape).all_biases:
        return shape
    attention, mlp = any(p.heads < shape.heads for p in plans), any(p.channels < shape.channels for p in plans)
    return dataclasses.replace(
        shape, qkv_bias=shape.qkv_bias or attention, o_bias=shape.o_bias or attention, mlp_bias=shape.mlp_bias or mlp
    )


def _for_target(shape, units, ratios, config, limits, attention) -> list[LayerPlan]:
    if not limits.same_heads:
        return _with_heads(shape, units, ratios, config, limits, attention)
    found, failed = [], None
    for steps in units.allowed_steps(config.round_to):
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
    target = config.target_sparsity * shape.decoder_parameters

    def planned(scale):
        return _from_ratios(shape, units, ratios(scale), config.round_to, limits, attention, steps)

    low, high = 0.0, 1.0
    while removed_parameters(shape, planned(high), config) < target:
        if high > 1e6:
            most = removed_parameters(shape, planned(high), config) / shape.decoder_parameters
            raise UserError(
                f"--target_sparsity {config.target_sparsity}: {config.pruned_layers} pruned layers can give up at most "
                f"{most:.3f} of the decoder's parameters; raise --pruned_layers"
            )
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if removed_parameters(shape, planned(middle), config) < target else (low, middle)
    plans = planned(high)
    _fill_with_channels(shape, plans, target, config, limits.same_channels)
    return plans


def _fill_with_channels(shape, plans, target, config, together: bool) -> None:
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
