"""Ratios of the layers -> how many units each part of each layer keeps, so that the size that was asked for is met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ...errors import UserError
from ...models.parts import ChannelSteps, ExpertSteps, HeadSteps, PartShape, all_steps, goes
from ...models.shape import ModelShape, alike, irregular, limits_of
from ...plan import LayerPlan, bias_flags, removed_parameters
from ...settings.pruning import PruneConfig

# The share of the heads that goes, divided by that of the channels, where all layers keep the same number of heads
COMMON_ATTENTION_SHARE = 0.5
EXPERTS_SHARE = 3.0  # the same of the experts of a mixture, beside the channels of each

Ratios = Callable[[float], list[float]]  # an amount -> the ratio of each layer [L], in proportion to it


def plans_from_ratios(shape: ModelShape, ratios: Ratios, config: PruneConfig) -> list[LayerPlan]:
    """One LayerPlan per layer, from the ratios of the layers.

    With ``pruning_ratio`` each layer's ratio is rounded on its own, as published. With ``target_sparsity`` the ratios
    are scaled, heads rounded, and channels take up the rest, so that the decoder's parameters (biases that the
    recovery adds included) meet the target to within half a channel (half of ``round_to`` channels; of each layer, where
    the runtime wants the same number in all). Where it wants one number of heads, or of experts, that is the one at which these lose most
    nearly COMMON_ATTENTION_SHARE, or EXPERTS_SHARE, times what channels lose: the layers that importance would spare lose them too. Where
    only heads go, the target is met to within half a step of one layer's heads.
    Raises UserError where the pruned layers cannot give that much.
    """
    sizing = Sizing(shape, config)
    limits = sizing.limits
    if limits.same_channels:

        def ratios(amount):
            return [amount * config.pruned_layers / len(shape.layers)] * len(shape.layers)

    if config.sparsity_of(shape) is None:
        return sizing.rounded(ratios(config.pruning_ratio))
    share = EXPERTS_SHARE if shape.is_mixture else COMMON_ATTENTION_SHARE
    together = config.prune == "both" and (limits.same_heads or shape.is_mixture)
    return sizing.for_target(ratios, share if together else 1.0)


@dataclass(frozen=True)
class Slot:
    """One part of one layer that may lose units, and the steps in which it does."""

    layer: int
    part: PartShape
    steps: HeadSteps | ChannelSteps | ExpertSteps

    def kept(self, plans: list[LayerPlan]) -> int:
        """The steps that the plans keep of it."""
        return self.steps.of(plans[self.layer].units[self.part.kind])

    def keep(self, plans: list[LayerPlan], steps: int) -> None:
        """Changes the plans, in place: this part is to keep so many steps."""
        units = plans[self.layer].units
        units[self.part.kind] = units[self.part.kind] | self.steps.units(steps)


class Sizing:
    """How ratios become units, for one model and its settings.

    ``coarse``: the parts whose steps are few (heads, experts); ``fine``: those that make up for what these leave (channels).
    Raises UserError where ``round_to`` leaves one of these no number of units, and where a runtime wants layers alike that are not alike
    in the model.
    """

    def __init__(self, shape: ModelShape, config: PruneConfig):
        self.shape, self.config, self.limits = shape, config, limits_of(config.runtime, shape)
        if shape.is_mixture and config.layer_ratio == "uniform" and not irregular(alike(shape, shape.units)):
            self.limits = replace(self.limits, same_heads=True, same_channels=True)  # so that its family's own class holds what is left
        slots = [
            Slot(index, part, steps)
            for index, layer in enumerate(shape.layers)
            for part in layer.parts
            for steps in all_steps(part, config.head_unit, self.limits.divisor)
        ]
        slots = [slot for slot in slots if goes(config.prune, slot.part, slot.steps.sort, shape.is_mixture)]
        for slot in slots:
            if not slot.steps.allowed(config.round_to):
                sizes = " and ".join(part.in_words() for part in shape.layers[slot.layer].parts)
                raise UserError(f"--round_to {config.round_to}: the model's {sizes} allow no such multiple")
        self._check_alike()
        self.coarse, self.fine = ([slot for slot in slots if slot.steps.fine == fine] for fine in (False, True))

    def _check_alike(self) -> None:
        if not self.limits.same_heads:
            return
        units = [
            {part.kind: part.units for part in layer.parts if self.limits.same_channels or not part.fine} for layer in self.shape.layers
        ]
        if odd := irregular(alike(self.shape, units)):
            raise UserError(
                f"--runtime {self.config.runtime}: it needs layers alike, and in this model {odd}; prune the dense model it came from"
            )

    @cached_property
    def target(self) -> float:
        """Parameters to remove."""
        return self.config.sparsity_of(self.shape) * self.shape.decoder_parameters

    def removed(self, plans: list[LayerPlan]) -> int:
        """Decoder parameters that the plans remove, less the biases that they add."""
        return removed_parameters(self.shape, plans, self.config)

    def out_of_reach(self, most: list[LayerPlan]) -> UserError:
        """The error for a target that is more than what the plans ``most`` remove."""
        name, value = self.config.amount
        gone = self.config.as_asked(self.shape, self.removed(most))
        return UserError(f"--{name} {value}: {self._layers_in_words()} can give up at most {gone}; {self._way_to_more()}")

    def rounded(self, ratios: list[float], attention: float = 1.0, common: int | None = None) -> list[LayerPlan]:
        """One plan per layer, each ratio rounded to whole steps.

        ``attention``: the share of it that coarse parts lose. ``common``: steps that these keep in every layer, whatever the ratios say.
        """
        plans = [LayerPlan(ratio, layer.units) for ratio, layer in zip(ratios, self.shape.layers, strict=True)]
        mean = sum(ratios) / len(ratios)
        for slot in self.coarse:
            asked = attention * min(mean if self.limits.same_heads else ratios[slot.layer], 1.0)
            if common is None:
                self._lose(slot, plans, asked)
            else:
                slot.keep(plans, common)
        for slot in self.fine:
            self._lose(slot, plans, min(ratios[slot.layer], 1.0))
        return plans

    def largest(self, fits: Callable[[list[LayerPlan]], bool]) -> list[LayerPlan] | None:
        """The plans that keep the most, of those that fit and have all layers lose the same; None where none does.

        Where experts and channels of each go, they keep so much that no more of either fits, and the experts lose most nearly
        EXPERTS_SHARE times what the channels lose.
        """
        multiple, found, first = self.config.round_to, {}, 0
        widths = sorted({*self.fine[0].steps.allowed(multiple), self.fine[0].steps.count}, reverse=True) if self.fine else [0]
        for common in self.coarse[0].steps.allowed(multiple) if self.coarse else [0]:
            for place in range(first, len(widths)):  # what is too wide for fewer experts is too wide for more of them
                plans = self._alike(common, widths[place])
                if fits(plans):
                    found[place], first = plans, place
                    break
            if self.fine and not found:
                return None
        both = self.coarse and self.fine
        return min(found.values(), key=lambda plans: self._unevenness(plans, EXPERTS_SHARE)) if both else found.get(first)

    def _alike(self, coarse: int, fine: int) -> list[LayerPlan]:
        """All layers keep so many steps of the coarse parts that lose units, and so many of the fine ones."""
        kept = [(slot, fine if slot.steps.fine else coarse) for slot in (*self.coarse, *self.fine)]
        ratio = max(1 - steps / slot.steps.count for slot, steps in kept)
        plans = [LayerPlan(ratio, layer.units) for layer in self.shape.layers]
        for slot, steps in kept:
            slot.keep(plans, steps)
        return plans

    def _unevenness(self, plans: list[LayerPlan], attention: float) -> float:
        """How far the share that the coarse parts lose is from ``attention`` times what the fine ones lose."""
        coarse, fine = (
            1 - sum(slot.kept(plans) for slot in slots) / sum(slot.steps.count for slot in slots) for slots in (self.coarse, self.fine)
        )
        return abs(coarse - attention * fine)

    def _lose(self, slot: Slot, plans: list[LayerPlan], ratio: float) -> None:
        """Takes ``ratio`` of a part, as far as something of it stays."""
        if ratio:
            slot.keep(plans, slot.steps.kept(ratio, self.config.round_to))
            plans[slot.layer].clipped |= slot.steps.count - round(ratio * slot.steps.count) < slot.steps.least

    def for_target(self, ratios: Ratios, attention: float) -> list[LayerPlan]:
        """Plans that remove ``target_sparsity``; where that is nothing all stays, since what loses a channel may get biases for it."""
        if self.target <= 0:
            return self.rounded([0.0] * len(self.shape.layers))
        if not self.fine:
            return self._coarse_alone(ratios)
        if not self.limits.same_heads or not self.coarse:
            return self._filled(ratios, attention)
        options, failed = [], None
        for common in self.coarse[0].steps.allowed(self.config.round_to):
            try:
                plans = self._filled(ratios, attention, common)
            except UserError as error:
                failed = error
                continue
            missed = abs(self.removed(plans) - self.target)
            options.append((missed, self._unevenness(plans, attention), -common, plans))
        if not options:
            raise failed
        if self.shape.is_mixture:  # channels of experts come in steps so large that they cannot make up for every number of experts
            step = self.config.round_to * sum(slot.part.unit_parameters() for slot in self.fine)
            near = max(step / 2, min(missed for missed, *_ in options))
            options = [entry for entry in options if entry[0] <= near]
        return min(options, key=lambda entry: entry[1:3])[3]

    def _filled(self, ratios: Ratios, attention: float, common: int | None = None) -> list[LayerPlan]:
        """Plans that meet the target; with ``common``, of so many steps of heads in every layer.

        Heads go as at the scale that just meets it. Where that is so much that channels cannot make up for it, as of few layers that lose
        a step each at that very scale, fewer of the layers lose the last one.
        """
        failed = None
        for plans in reversed(self._between(*self._around_target(lambda scale: self.rounded(ratios(scale), attention, common)))):
            plans = [replace(plan, units=dict(plan.units)) for plan in plans]  # which are changed in place
            try:
                self.fill(plans)
            except UserError as error:
                failed = failed or error
                continue
            return plans
        raise failed

    def _coarse_alone(self, ratios: Ratios) -> list[LayerPlan]:
        """Plans that keep all channels, nearest to the target."""
        options = self._between(*self._around_target(lambda scale: self.rounded(ratios(scale))))
        return min(options, key=lambda plans: abs(self.removed(plans) - self.target))

    def _between(self, fewer: list[LayerPlan], more: list[LayerPlan]) -> list[list[LayerPlan]]:
        """From the plans that remove ``fewer`` to those that remove ``more``: one layer more changes each time, of the largest ratio first;
        or all at once, where the runtime wants them alike.
        """
        layers = range(len(self.shape.layers))
        order = sorted((i for i in layers if fewer[i].units != more[i].units), key=lambda i: -more[i].ratio)
        counts = (0, len(order)) if self.limits.same_heads else range(len(order) + 1)
        return [[more[i] if i in order[:count] else fewer[i] for i in layers] for count in counts]

    def _around_target(self, planned: Callable[[float], list[LayerPlan]]) -> tuple[list[LayerPlan], list[LayerPlan]]:
        """(plans that just miss the target, plans that just meet it), on both sides of the scale of the ratios at which it is met.

        Raises UserError where no scale meets it.
        """
        low, high = 0.0, 1.0
        while self.removed(planned(high)) < self.target:
            if high > 1e6:
                raise self.out_of_reach(planned(high))
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.removed(planned(middle)) < self.target else (low, middle)
        return planned(low), planned(high)

    @property
    def _may_take_more_layers(self) -> bool:
        return self.config.pruned_layers < len(self.shape.layers)

    def _layers_in_words(self) -> str:
        return f"{self.config.pruned_layers} pruned layers" if self._may_take_more_layers else f"all {len(self.shape.layers)} layers"

    def _way_to_more(self) -> str:
        less = self.config.way_to_less
        if self.config.prune == "experts":
            return f"{less}: each keeps as many experts as a token is routed to, and all that is no expert"
        return "raise --pruned_layers" if self._may_take_more_layers else f"{less}: a part of each layer must stay"

    def fill(self, plans: list[LayerPlan]) -> None:
        """Changes what the fine parts of the pruned layers keep, in steps, until the removed parameters are nearest to the target.

        The heads stay; the surplus is shared in proportion to what each layer loses, largest remainder first, or where the runtime
        wants all layers alike, falls to all of them together.
        """
        step, together = self.config.round_to, self.limits.same_channels
        flags = bias_flags(self.shape, plans, self.config)
        pruned = self.fine if together else [slot for slot in self.fine if slot.kept(plans) < slot.steps.count]
        part, units = self.fine[0].part, plans[self.fine[0].layer].units[self.fine[0].part.kind]
        unit = step * part.unit_parameters(part.input_flag in flags, units) * (sum(slot.part.times for slot in pruned) if together else 1)
        surplus = round((self.removed(plans) - self.target) / unit)  # steps to give back
        if together:
            before, count = pruned[0].kept(plans), pruned[0].steps.count
            moved = min(max(before + surplus * step, step), count)
            surplus -= (moved - before) // step
            for slot in pruned:
                slot.keep(plans, moved)
            pruned = []
        while surplus and pruned:
            share = sum(plans[slot.layer].ratio for slot in pruned)
            parts = [surplus * plans[slot.layer].ratio / share for slot in pruned]
            whole = [int(part) for part in parts]
            rest = sorted(range(len(parts)), key=lambda i: -abs(parts[i] - whole[i]))
            for i in rest[: abs(surplus - sum(whole))]:
                whole[i] += 1 if surplus > 0 else -1
            for slot, steps in zip(pruned, whole):
                before = slot.kept(plans)
                moved = min(max(before + steps * step, step), _most(slot, step))
                surplus -= (moved - before) // step
                slot.keep(plans, moved)
            pruned = [slot for slot in pruned if (slot.kept(plans) < _most(slot, step) if surplus > 0 else slot.kept(plans) > step)]
        if surplus and (together or not self.shape.is_mixture):  # else the layers' own numbers of experts make up for most of it
            name, value = self.config.amount
            raise UserError(
                f"--{name} {value}: the heads come in steps too coarse for this, "
                f"{surplus * step} channels too {'few' if surplus > 0 else 'many'} would stay; "
                "choose another share, --pruned_layers or --head_unit"
            )


def _most(slot: Slot, step: int) -> int:
    """Steps that a part keeps at most once it is pruned."""
    return (slot.steps.count - 1) // step * step
