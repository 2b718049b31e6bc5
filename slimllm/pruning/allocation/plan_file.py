"""A plan read back from a file: ``--plan FILE`` prunes exactly the heads and channels that it names."""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import UserError
from ...models.shape import ModelShape, irregular, limits_of
from ...utils.files import check_plain
from .plan import Kept, LayerPlan


def read_plan(path: str, shape: ModelShape, runtime: str = "any") -> list[LayerPlan]:
    """One LayerPlan per layer, from a run's ``pruning.json`` or any JSON object with such a ``layers`` list.

    Each of ``layers`` has ``heads``, ``kv_heads`` and ``channels``, the indices kept; kept KV heads all have the same number of
    query heads. Raises UserError, naming file and layer, for what is no such plan, does not fit the model, or what ``runtime``
    cannot hold.
    """
    check_plain(path, "--plan ")
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
    except OSError as error:
        raise UserError(f"--plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"--plan {path}: not a JSON object with a list of layers, such as a run's pruning.json") from None
    if not isinstance(layers, list) or len(layers) != shape.layers:
        count = len(layers) if isinstance(layers, list) else "no list of"
        raise UserError(f"--plan {path}: it has {count} layers, the model {shape.layers}")
    plans = [_layer_plan(entry, shape, f"--plan {path}, layer {index}") for index, entry in enumerate(layers)]
    limits = limits_of(runtime, shape)
    widths = [(p.heads, p.kv_heads, p.channels if limits.same_channels else 0) for p in plans]
    if limits.same_heads and irregular(widths):
        raise UserError(
            f"--plan {path}: {irregular([(p.heads, p.kv_heads, p.channels) for p in plans])}; --runtime {runtime} needs them alike"
        )
    if limits.whole_heads and any(p.heads < shape.heads for p in plans):
        raise UserError(f"--plan {path}: it removes heads, and no head of this model can go; choose by --prune channels")
    if limits.divisor and limits.divisor % plans[0].heads:
        raise UserError(f"--plan {path}: {plans[0].heads} heads do not divide the hidden size, which --runtime {runtime} needs")
    return plans


def _layer_plan(entry, shape: ModelShape, where: str) -> LayerPlan:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a JSON object")
    heads, kv_heads, channels = (
        _indices(entry.get(name), count, f"{where}: {name}")
        for name, count in (("heads", shape.heads), ("kv_heads", shape.kv_heads), ("channels", shape.channels))
    )
    size = shape.heads // shape.kv_heads
    per_group = [sum(head // size == group for head in heads) for group in range(shape.kv_heads)]
    kept = {per_group[group] for group in kv_heads}
    if len(kept) != 1 or 0 in kept or sum(per_group[group] for group in kv_heads) != len(heads):
        raise UserError(
            f"{where}: each of the kept KV heads must keep the same number of its {size} query heads, and no other head may stay"
        )
    return LayerPlan(1 - len(channels) / shape.channels, len(heads), len(kv_heads), len(channels), kept=Kept(heads, kv_heads, channels))


def _indices(values, count: int, where: str) -> list[int]:
    whole = isinstance(values, list) and values and all(isinstance(value, int) and 0 <= value < count for value in values)
    if not whole or len(set(values)) != len(values):
        raise UserError(f"{where} must be different whole numbers from 0 to {count - 1}, at least one")
    return sorted(values)
