"""Slices the projections of one layer, in place."""

from __future__ import annotations

import torch
from torch import nn

from ..models.adapter import LayerAdapter, keep_rows
from .recovery import Recovered


def slice_heads(adapter: LayerAdapter, layer: nn.Module, heads: torch.Tensor, kv_heads: torch.Tensor, recovered: Recovered) -> None:
    """Keeps these query heads [n] and KV heads [m] (n a multiple of m, each KV head's query heads in a row)."""
    channels = adapter.widths(layer)[2]
    for linear, rows in adapter.head_rows(layer, heads, kv_heads):
        keep_rows(linear, rows)
    _set_projection(adapter.attention(layer).output, recovered)
    adapter.set_widths(layer, len(heads), len(kv_heads), channels)


def slice_channels(adapter: LayerAdapter, layer: nn.Module, channels: torch.Tensor, recovered: Recovered) -> None:
    """Keeps these feed-forward channels [n]."""
    heads, kv_heads, _ = adapter.widths(layer)
    for linear, rows in adapter.channel_rows(layer, channels):
        keep_rows(linear, rows)
    _set_projection(adapter.mlp(layer).output, recovered)
    adapter.set_widths(layer, heads, kv_heads, len(channels))


def _set_projection(linear: nn.Linear, recovered: Recovered) -> None:
    dtype, trained = linear.weight.dtype, linear.weight.requires_grad
    linear.weight = nn.Parameter(recovered.weight.to(dtype).contiguous(), requires_grad=trained)
    linear.bias = None if recovered.bias is None else nn.Parameter(recovered.bias.to(dtype), requires_grad=trained)
    linear.in_features = linear.weight.shape[1]


def slice_skeleton(adapter: LayerAdapter, model, widths: list[tuple[int, int, int]], new_bias: bool) -> None:
    """Gives the layers of a model without weights the shapes of a pruned one: (heads, KV heads, channels) of each.

    ``new_bias``: pruned output projections have a bias.
    """
    for layer, (heads, kv_heads, channels) in zip(adapter.layers(model), widths, strict=True):
        before = adapter.widths(layer)
        if heads < before[0]:
            shape = _shape_of_recovered(adapter.attention(layer).output, heads * adapter.head_dim, new_bias)
            slice_heads(adapter, layer, torch.arange(heads), torch.arange(kv_heads), shape)
        if channels < before[2]:
            slice_channels(adapter, layer, torch.arange(channels), _shape_of_recovered(adapter.mlp(layer).output, channels, new_bias))


def _shape_of_recovered(linear: nn.Linear, inputs: int, new_bias: bool) -> Recovered:
    has_bias = new_bias or linear.bias is not None
    return Recovered(linear.weight[:, :inputs], linear.weight.new_empty(linear.out_features) if has_bias else None)
