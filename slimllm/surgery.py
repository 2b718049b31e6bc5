"""Slices the Linear modules of one layer, in place."""

from __future__ import annotations

import torch
from torch import nn

from .recovery import Recovered


def columns(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the columns (or rows) of whole blocks: [len(blocks) * width]."""
    return (blocks[:, None] * width + torch.arange(width, device=blocks.device)).flatten()


def _keep_rows(linear: nn.Linear, rows: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.data[rows].contiguous(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[rows].contiguous(), requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


def _set_projection(linear: nn.Linear, recovered: Recovered) -> None:
    dtype = linear.weight.dtype
    linear.weight = nn.Parameter(recovered.weight.to(dtype).contiguous(), requires_grad=linear.weight.requires_grad)
    linear.bias = None if recovered.bias is None else nn.Parameter(recovered.bias.to(dtype), requires_grad=linear.weight.requires_grad)
    linear.in_features = linear.weight.shape[1]


def slice_heads(attention: nn.Module, heads: torch.Tensor, kv_heads: torch.Tensor, recovered: Recovered) -> None:
    """Keeps these query heads [n] and KV heads [m] (n a multiple of m, each KV head's query heads in a row)."""
    width = attention.head_dim
    _keep_rows(attention.q_proj, columns(heads, width))
    _keep_rows(attention.k_proj, columns(kv_heads, width))
    _keep_rows(attention.v_proj, columns(kv_heads, width))
    _set_projection(attention.o_proj, recovered)
    attention.num_key_value_groups = len(heads) // len(kv_heads)


def slice_channels(mlp: nn.Module, channels: torch.Tensor, recovered: Recovered) -> None:
    """Keeps these feed-forward channels [n]."""
    _keep_rows(mlp.gate_proj, channels)
    _keep_rows(mlp.up_proj, channels)
    _set_projection(mlp.down_proj, recovered)
    mlp.intermediate_size = len(channels)
