"""The layer adapter: the one place that turns a row of the family table into modules, rows and columns of a real model.

Everything above asks it: which module is the attention, which rows of which projection belong to a head, how a block's
output joins the residual stream, what the final norm and the head make of the last states.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from .families import Family, family_of
from .shape import head_dim_of


@dataclass
class Block:
    """The attention or the feed-forward part of one layer.

    ``output`` is the projection whose input columns belong to heads or channels; ``norm`` comes before ``module``, ``post_norm``
    after it, and ``multiplier`` scales what is added to the residual.
    """

    module: nn.Module
    output: nn.Linear
    norm: nn.Module | None
    post_norm: nn.Module | None
    multiplier: float

    def prepare(self, states: torch.Tensor) -> torch.Tensor:
        """What ``module`` is given for the residual stream ``states`` [..., D]."""
        return states if self.norm is None else self.norm(states)

    def join(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The residual stream after this block, whose output projection gave ``output`` [..., D]."""
        output = output.view_as(states)
        if self.post_norm is not None:
            output = self.post_norm(output)
        return states + (output if self.multiplier == 1 else output * self.multiplier)

    @property
    def linears(self) -> list[nn.Linear]:
        return [child for child in self.module.children() if isinstance(child, nn.Linear)]


def columns(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the columns (or rows) of whole blocks: [len(blocks) * width]."""
    return (blocks[:, None] * width + torch.arange(width, device=blocks.device)).flatten()


class LayerAdapter:
    """The parts of models of one family, dense or pruned. ``config`` is the model's; ``family`` defaults to its row of the table."""

    def __init__(self, config, family: Family | None = None):
        self.family = family or family_of(config)
        self.config = config
        self.head_dim = head_dim_of(config)

    # the model

    def decoder(self, model) -> nn.Module:
        return getattr(model, self.family.decoder)

    def layers(self, model) -> nn.ModuleList:
        return getattr(self.decoder(model), self.family.layers)

    def set_layers(self, model, layers: nn.ModuleList) -> None:
        setattr(self.decoder(model), self.family.layers, layers)

    def final_norm(self, model) -> nn.Module:
        return getattr(self.decoder(model), self.family.final_norm)

    def head(self, model) -> nn.Module:
        return getattr(model, self.family.head)

    def last_states(self, model, ids: torch.Tensor, **inputs) -> torch.Tensor:
        """The states [..., D] that the head turns into logits: after the last layer and the final norm."""
        return self.decoder(model)(input_ids=ids, use_cache=False, **inputs).last_hidden_state

    def logits(self, head: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] in float32 of normed states [..., D], scaled and capped as the family's own class does."""
        logits = head(states).float()
        if divisor := self._setting(self.family.logits_divisor):
            logits = logits / divisor
        if cap := self._setting(self.family.logits_softcap):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _setting(self, name: str | None):
        return None if name is None else getattr(self.config, name, None)

    # one layer

    def attention(self, layer: nn.Module) -> Block:
        f = self.family
        return self._block(layer, f.attention, f.attention_output, f.attention_norm, f.attention_post_norm)

    def mlp(self, layer: nn.Module) -> Block:
        f = self.family
        return self._block(layer, f.mlp, f.mlp_output, f.mlp_norm, f.mlp_post_norm)

    def blocks(self, model) -> list[tuple[Block, Block]]:
        """(attention, feed-forward part) of each layer."""
        return [(self.attention(layer), self.mlp(layer)) for layer in self.layers(model)]

    def _block(self, layer, name: str, output: str, norm: str | None, post_norm: str | None) -> Block:
        module = getattr(layer, name)
        before, after = (None if n is None else getattr(layer, n) for n in (norm, post_norm))
        multiplier = self._setting(self.family.residual_multiplier)
        return Block(module, getattr(module, output), before, after, 1.0 if multiplier is None else multiplier)

    def widths(self, layer: nn.Module) -> tuple[int, int, int]:
        """(query heads, KV heads, channels) of a layer, from its modules."""
        attention, mlp = self.attention(layer), self.mlp(layer)
        heads = attention.output.in_features // self.head_dim
        inputs = [getattr(attention.module, name) for name in self.family.head_inputs]
        rows = sum(linear.out_features for linear in inputs)
        return heads, (rows // self.head_dim - heads) // 2, mlp.output.in_features

    def all_widths(self, model) -> list[tuple[int, int, int]]:
        return [self.widths(layer) for layer in self.layers(model)]

    def head_rows(self, layer: nn.Module, heads: torch.Tensor, kv_heads: torch.Tensor) -> list[tuple[nn.Linear, torch.Tensor]]:
        """(projection, its rows that belong to these query heads and KV heads), for each projection of queries, keys and values."""
        before, kv_before, _ = self.widths(layer)
        rows = [columns(chosen, self.head_dim) for chosen in (heads, kv_heads, kv_heads)]
        return self._rows(self.attention(layer).module, self.family.head_inputs, rows, [n * self.head_dim for n in (before, kv_before)])

    def channel_rows(self, layer: nn.Module, channels: torch.Tensor) -> list[tuple[nn.Linear, torch.Tensor]]:
        """(projection, its rows that belong to these channels), for gate and up."""
        return self._rows(self.mlp(layer).module, self.family.channel_inputs, [channels, channels], [self.widths(layer)[2]])

    @staticmethod
    def _rows(module, names: tuple[str, ...], rows: list[torch.Tensor], sizes: list[int]) -> list[tuple[nn.Linear, torch.Tensor]]:
        """Pairs each projection with its rows; where one holds all of them, stacked in this order. ``sizes``: all but the last."""
        linears = [getattr(module, name) for name in names]
        if len(linears) == len(rows):
            return list(zip(linears, rows))
        offsets = [sum(sizes[:i]) for i in range(len(rows))]
        return [(linears[0], torch.cat([offset + part for offset, part in zip(offsets, rows)]))]

    def gate_and_up(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [I, D] of the gate and the up projection, float32."""
        module = self.mlp(layer).module
        weights = [getattr(module, name).weight.float() for name in self.family.channel_inputs]
        gate, up = weights if len(weights) == 2 else weights[0].chunk(2)
        return gate, up

    def set_widths(self, layer: nn.Module, heads: int, kv_heads: int, channels: int) -> None:
        """Brings what the modules of a sliced layer know of their widths up to date."""
        attention = self.attention(layer).module
        attention.num_key_value_groups = heads // kv_heads
        if len(self.family.head_inputs) == 1:  # a fused projection is taken apart by what the module's config says
            attention.config = copy.copy(attention.config)
            attention.config.num_attention_heads, attention.config.num_key_value_heads = heads, kv_heads
            attention.num_key_value_heads = kv_heads
        self.mlp(layer).module.intermediate_size = channels

    # names of tensors in a checkpoint

    def layers_name(self) -> str:
        """What the names of all layers' tensors begin with, a point at its end."""
        return f"{self.family.decoder}.{self.family.layers}."

    def layer_name(self, index: int) -> str:
        return f"{self.layers_name()}{index}."

    def norm_name(self) -> str:
        return f"{self.family.decoder}.{self.family.final_norm}."

    def head_name(self) -> str:
        return f"{self.family.head}."

    def decoder_name(self) -> str:
        return f"{self.family.decoder}."

    def is_output_bias(self, name: str) -> bool:
        """Whether this is the name of a bias of an output projection, which only a recovery or the config's flags give."""
        return name.endswith((f".{self.family.attention_output}.bias", f".{self.family.mlp_output}.bias"))

    def rotary_heads(self, name: str, widths: list[tuple[int, int, int]]) -> int | None:
        """How many heads a tensor of this name holds whose rows rotary embeddings turn; None for any other tensor."""
        parts = name.split(".")
        if len(parts) < 5 or parts[-2] not in self.family.head_inputs[:2]:
            return None
        return widths[int(parts[2])][self.family.head_inputs.index(parts[-2])]


def keep_rows(linear: nn.Linear, rows: torch.Tensor) -> None:
    """Keeps these rows of a Linear, in place, in their order."""
    for name in ("weight", "bias"):
        old = getattr(linear, name)
        if old is not None:
            setattr(linear, name, nn.Parameter(old.data[rows].contiguous(), requires_grad=old.requires_grad))
    linear.out_features = len(rows)


def with_multi_head_attention(model):
    """The same model with each key/value head repeated for every query head that uses it (in place).

    For comparison with implementations that know multi-head attention only; the outputs stay the same.
    """
    adapter = LayerAdapter(model.config)
    for layer in adapter.layers(model):
        heads, kv_heads, channels = adapter.widths(layer)
        repeated = torch.arange(kv_heads).repeat_interleave(heads // kv_heads)
        for linear, rows in adapter.head_rows(layer, torch.arange(heads), repeated):
            keep_rows(linear, rows)
        adapter.set_widths(layer, heads, heads, channels)
    model.config.num_key_value_heads = model.config.num_attention_heads
    return model
