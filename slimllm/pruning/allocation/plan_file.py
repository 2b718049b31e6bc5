"""A plan read back from a file: ``--plan FILE`` prunes exactly the units that it names."""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import UserError
from ...models.parts import Kept, PartShape
from ...models.shape import LayerShape, ModelShape, alike, irregular, limits_of
from ...plan import LayerPlan, by_part, shape_by_part
from ...utils.files import check_plain


def read_plan(path: str, shape: ModelShape, runtime: str = "any") -> tuple[ModelShape, list[LayerPlan]]:
    """(the shape of the model with the layers and parts that stay, one LayerPlan for each of these layers), from a run's ``pruning.json``
    or any JSON object with such a ``layers`` list.

    Each of ``layers`` has ``kept``: for each part of the layer the indices kept, by the sort of unit, such as
    ``{"attention": {"heads": [0, 2], "kv_heads": [0]}, "mlp": {"channels": [...]}}``; the lists ``heads``, ``kv_heads`` and ``channels``
    alone, without the parts around them, mean the same. A part all of whose lists are empty goes whole, and so does a layer of such parts.
    Kept KV heads all have the same number of query heads. Raises UserError, naming file and layer, for what is no such plan, does not fit
    the model, or what ``runtime`` cannot hold.
    """
    check_plain(path, "--plan ")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        layers = content["layers"]
    except OSError as error:
        raise UserError(f"--plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--plan {path}: not a JSON object with a list of layers, such as a run's pruning.json") from None
    if not isinstance(layers, list) or len(layers) != len(shape.layers):
        count = len(layers) if isinstance(layers, list) else "no list of"
        raise UserError(f"--plan {path}: it has {count} layers, the model {len(shape.layers)}")
    _check_model(path, content, shape)
    kept = [
        None if _is_gone(entry) else _kept(entry, layer, f"--plan {path}, layer {index}")
        for index, (entry, layer) in enumerate(zip(layers, shape.layers))
    ]
    staying = [own and ({kind: units for kind, units in own.items() if any(units.values())} or None) for own in kept]
    if not any(own is not None for own in staying):
        raise UserError(f"--plan {path}: all layers go, and one at least must stay")
    shape = shape.with_staying(staying)
    plans = [LayerPlan.of_kept(own, layer) for own, layer in zip([own for own in staying if own is not None], shape.layers)]
    _check_limits(path, plans, shape, runtime)
    return shape, plans


def _is_gone(entry) -> bool:
    """Whether an entry keeps nothing of any part of its layer."""
    parts = entry.get("kept") if isinstance(entry, dict) else None
    whole = isinstance(parts, dict) and parts and all(isinstance(part, dict) and part for part in parts.values())
    return bool(whole) and all(indices == [] for part in parts.values() for indices in part.values())


def _check_model(path: str, content: dict, shape: ModelShape) -> None:
    """Raises UserError for the record of a run on a model of other widths, whose indices mean other units here."""
    try:
        units, name = shape_by_part(content["model"]["shape"])["layers"], content["model"]["name"]
    except (KeyError, TypeError, AttributeError):
        return  # no record of a run, but a plan
    if units != shape.units:
        raise UserError(f"--plan {path}: it counts the units of {name}, a model of other widths; give that one as --base_model")


def _check_limits(path: str, plans: list[LayerPlan], shape: ModelShape, runtime: str) -> None:
    """Raises UserError for plans of a model that ``runtime`` cannot hold."""
    limits = limits_of(runtime, shape)
    coarse = [{part.kind: plan.units[part.kind] for part in layer.parts if not part.fine} for layer, plan in zip(shape.layers, plans)]
    units = [plan.units for plan in plans]
    if limits.same_heads and irregular(alike(shape, units if limits.same_channels else coarse)):
        raise UserError(f"--plan {path}: {irregular(alike(shape, units))}; --runtime {runtime} needs them alike")
    whole = [layer.units[kind] == counts for layer, kept in zip(shape.layers, coarse) for kind, counts in kept.items() if "heads" in counts]
    if limits.whole_heads and not all(whole):
        raise UserError(f"--plan {path}: it removes heads, and no head of this model can go; choose by --prune channels")
    heads = {counts["heads"] for kept in coarse for counts in kept.values() if "heads" in counts}
    if limits.divisor and (odd := [count for count in heads if count and limits.divisor % count]):
        raise UserError(f"--plan {path}: {odd[0]} heads do not divide the hidden size, which --runtime {runtime} needs")


def _kept(entry, layer: LayerShape, where: str) -> dict[str, Kept]:
    """What one entry keeps of each part of its layer."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a JSON object")
    older = {"heads": None, "kv_heads": None, "channels": None}
    listed = by_part(older | entry)["kept"]
    kinds = [part.kind for part in layer.parts]
    if not isinstance(listed, dict) or sorted(listed) != sorted(kinds):
        shown = ", ".join(map(str, listed)) or "nothing" if isinstance(listed, dict) else listed
        raise UserError(f"{where}: it lists {shown}, and the layer's parts are {', '.join(kinds)}")
    kept_by_part = {}
    for part in layer.parts:
        indices = listed[part.kind]
        if not isinstance(indices, dict):
            raise UserError(f"{where}: {part.kind}: not a JSON object")
        kept = {sort: _by_unit(part, sort, indices.get(sort), f"{where}: {sort}") for sort in part.sorts}
        if fault := part.check_kept(kept):
            raise UserError(f"{where}: {fault}")
        kept_by_part[part.kind] = kept
    return kept_by_part


def _by_unit(part: PartShape, sort: str, values, where: str) -> list:
    """The indices kept of one sort; of the channels of experts there may be a list for each expert, and all stay where none are named."""
    if part.kind == "experts" and sort == "channels":
        if values is None:
            return list(range(part.units[sort]))
        if isinstance(values, list) and values and all(isinstance(each, list) for each in values):
            return [_indices(each, part.units[sort], where) for each in values]
    return _indices(values, part.units[sort], where)


def _indices(values, count: int, where: str) -> list[int]:
    whole = isinstance(values, list) and all(type(value) is int and 0 <= value < count for value in values)
    if not whole or len(set(values)) != len(values):
        raise UserError(f"{where} must be different whole numbers from 0 to {count - 1}")
    return sorted(values)
