"""Slices the projections of parts, in place."""

from __future__ import annotations

import torch
from torch import nn

from .adapter import Experts, LayerAdapter, ProjectedPart, keep_rows
from .parts import Kept, Units, count_of


def slice_part(part: ProjectedPart, kept: Kept, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Keeps these units of a part. ``weight`` [D, columns] and ``bias`` [D]: what its output projection becomes."""
    for linear, rows in part.rows(kept):
        keep_rows(linear, rows)
    linear = part.output
    dtype, trained = linear.weight.dtype, linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=trained)
    linear.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=trained)
    linear.in_features = weight.shape[1]
    for name in part.row.per_head:
        numbers = getattr(part.module, name)
        setattr(part.module, name, nn.Parameter(numbers.data[kept["heads"]], requires_grad=numbers.requires_grad))
    part.note_units({sort: len(indices) for sort, indices in kept.items()})


def slice_experts(part: Experts, kept: Kept) -> None:
    """Keeps these experts of a part, of every tensor with an axis along the experts what belongs to them, and of each expert these
    channels, where ``kept`` names some: the same of all, or a list for each expert that stays.
    """
    for module, name, tensor, axis in part.tensors():
        if axis is None or len(kept["experts"]) == tensor.shape[axis]:
            continue
        indices = torch.as_tensor(kept["experts"], device=tensor.device)
        left = tensor.data.index_select(axis, indices)
        setattr(module, name, nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left)
        del tensor
    if count_of(kept.get("channels", [])) not in (0, part.units["channels"]):
        _slice_channels(part, kept["channels"])
    part.note_units(part.units)


def _slice_channels(part: Experts, channels: list) -> None:
    """Keeps ``channels`` of a part's experts: the same of all, or a list for each."""
    device = next(part.experts.parameters()).device
    own = torch.as_tensor(channels, device=device).expand(part.units["experts"], -1)
    rows = {1: own, 2: part.rows_of(own)}
    for name, tensor, axis, per_channel in part.by_channel():
        left = [tensor.data[expert].index_select(axis - 1, kept) for expert, kept in enumerate(rows[per_channel])]
        setattr(part.experts, name, nn.Parameter(torch.stack(left), requires_grad=tensor.requires_grad))
        del tensor, left


def slice_skeleton(adapter: LayerAdapter, model, units: list[dict[str, Units]], new_bias: bool) -> None:
    """Gives the layers of a model without weights the shapes of a pruned one: what each part of each layer has then.

    ``new_bias``: pruned output projections have a bias.
    """
    for layer, after in zip(adapter.layers(model), units, strict=True):
        for part in adapter.parts(layer):
            if part.units == after[part.kind]:
                continue
            kept = {sort: list(range(count)) for sort, count in after[part.kind].items()}
            if isinstance(part, Experts):
                slice_experts(part, kept)
                continue
            weight, bias = part.output.weight, part.output.bias
            if bias is None and new_bias:
                bias = weight.new_empty(len(weight))
            slice_part(part, kept, weight[:, : len(part.columns(kept))], bias)
