"""What each layer is to keep, and what it kept: ``{part: units}`` and ``{part: indices}`` of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .models.parts import Kept, PartShape, Units, units_of_kept
from .models.shape import LayerShape, ModelShape, limits_of
from .settings.pruning import PruneConfig


@dataclass
class LayerPlan:
    """What one layer keeps. ``ratio`` is the share that was asked of it (Eq. 11), before rounding.

    ``units``: how many units of each sort each part keeps; all, some or none. ``clipped``: a part would have lost everything, and keeps one
    step. ``kept``: which units, where that is decided already; else they are chosen by their importance.
    """

    ratio: float
    units: dict[str, Units]
    clipped: bool = False
    kept: dict[str, Kept] | None = None

    @classmethod
    def of_kept(cls, kept: dict[str, Kept], layer: LayerShape) -> LayerPlan:
        """The plan of a layer that keeps exactly these units; its ratio is the share that its last part loses."""
        units = units_of_kept(kept)
        lost = [max(1 - units[part.kind][sort] / part.units[sort] for sort in part.sorts) for part in layer.parts]
        return cls(lost[-1], units, kept=kept)


@dataclass
class LayerReport:
    """What happened to one layer. ``kept``: the indices that each part kept, ascending.

    ``errors``: of each part that lost something, the share of its output projection's variance that is missed on the calibration tokens,
    (before recovery, after). ``cosine``: c_l of Eq. 11, where the plans go by it. ``sensitivity``: what pruning this layer alone costs,
    where it was measured. ``starved``: how many of its experts saw too few tokens to be fitted anew, and have the weights that they had.
    """

    index: int
    cosine: float | None
    ratio: float
    kept: dict[str, Kept]
    sensitivity: float | None = None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    clipped: bool = False
    seconds: float = 0.0
    starved: int = 0

    @classmethod
    def of_whole(cls, index: int, layer: LayerShape, plan: LayerPlan, cosine=None, sensitivity=None) -> LayerReport:
        """The report of a layer from which nothing was removed yet."""
        kept = {kind: {sort: list(range(count)) for sort, count in by_sort.items()} for kind, by_sort in layer.units.items()}
        return cls(index, cosine, plan.ratio, kept, sensitivity, clipped=plan.clipped)

    @property
    def units(self) -> dict[str, Units]:
        """How many units of each sort each part kept."""
        return units_of_kept(self.kept)


# What a part with these units takes of something: (part, units, whether its inputs and its output have biases) -> a number
Measure = Callable[[PartShape, Units, bool, bool], float]


def removed(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig, measure: Measure) -> float:
    """What the plans remove of what ``measure`` counts, less the biases that the recovery and the runtime's form of the model add."""
    new_bias, flags = config.adds_bias(shape), bias_flags(shape, plans, config)
    gone = 0
    for layer, plan in zip(shape.layers, plans, strict=True):
        for part in layer.parts:
            units = plan.units[part.kind]
            output_bias = part.output_bias or part.output_flag in flags or (new_bias and units != part.units)
            gone += measure(part, part.units, part.input_bias, part.output_bias)
            gone -= measure(part, units, part.input_bias or part.input_flag in flags, output_bias)
    return gone


def removed_parameters(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig) -> int:
    """Decoder parameters that the plans remove, less the biases that are added (:func:`removed`)."""
    return removed(shape, plans, config, parameters)


def parameters(part: PartShape, units: Units, input_bias: bool, output_bias: bool) -> int:
    """The parameters of a part (a Measure)."""
    return part.parameters(units, input_bias, output_bias)


def bias_flags(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig) -> set[str]:
    """The config's flags that the pruned model sets, each of which gives all projections that go by it a bias, in every layer: those by
    which some output projection gets or has one.
    """
    if not limits_of(config.runtime, shape).all_biases:
        return set()
    new_bias, pairs = config.adds_bias(shape), zip(shape.layers, plans, strict=True)
    return {
        part.output_flag
        for layer, plan in pairs
        for part in layer.parts
        if part.output_flag and (part.output_bias or (new_bias and plan.units[part.kind] != part.units))
    }


def is_gone(kept: dict[str, Kept]) -> bool:
    """Whether nothing is kept of any part of a layer: it is gone whole."""
    return not any(indices for part in kept.values() for indices in part.values())


def by_part(layer: dict) -> dict:
    """A layer of a record, or of a plan file, with what it keeps by part, where it lists heads, KV heads and channels side by side.

    Early records listed them side by side.
    """
    if "kept" in layer:
        return layer
    kept = {"attention": {"heads": layer["heads"], "kv_heads": layer["kv_heads"]}, "mlp": {"channels": layer["channels"]}}
    errors = {kind: layer[f"{kind}_error"] for kind in kept if layer.get(f"{kind}_error")}
    older = {"heads", "kv_heads", "channels", "attention_error", "mlp_error"}
    return {name: value for name, value in layer.items() if name not in older} | {"kept": kept, "errors": errors}


def shape_by_part(shape: dict) -> dict:
    """The sizes of a model with what each part of each layer has, where an older record has the same numbers for all layers."""
    if not isinstance(shape.get("layers"), int):
        return shape
    units = {"attention": {sort: shape[sort] for sort in ("heads", "kv_heads")}, "mlp": {"channels": shape["channels"]}}
    return {name: shape[name] for name in ("hidden", "vocab", "tied")} | {"layers": [units] * shape["layers"]}
