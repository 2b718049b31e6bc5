"""Slices the projections of parts, in place."""

from __future__ import annotations

import torch
from torch import nn

from .adapter import LayerAdapter, Part, keep_rows
from .parts import Kept, Units


def slice_part(part: Part, kept: Kept, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Keeps these units of a part. ``weight`` [D, columns] and ``bias`` [D]: what its output projection becomes."""
    for linear, rows in part.rows(kept):
        keep_rows(linear, rows)
    linear = part.output
    dtype, trained = linear.weight.dtype, linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=trained)
    linear.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=trained)
    linear.in_features = weight.shape[1]
    part.note_units({sort: len(indices) for sort, indices in kept.items()})


def slice_skeleton(adapter: LayerAdapter, model, units: list[dict[str, Units]], new_bias: bool) -> None:
    """Gives the layers of a model without weights the shapes of a pruned one: what each part of each layer has then.

    ``new_bias``: pruned output projections have a bias.
    """
    for layer, after in zip(adapter.layers(model), units, strict=True):
        for part in adapter.parts(layer):
            if part.units == after[part.kind]:
                continue
            kept = {sort: list(range(count)) for sort, count in after[part.kind].items()}
            weight, bias = part.output.weight, part.output.bias
            if bias is None and new_bias:
                bias = weight.new_empty(len(weight))
            slice_part(part, kept, weight[:, : len(part.columns(kept))], bias)
