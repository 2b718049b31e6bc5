"""First-order importance, as LLM-Pruner has it (Ma et al. 2023): E = |W * dL/dW| of each weight, L the language-model loss.

One backward pass of the mean loss of the calibration tokens through the dense model, one layer in memory at a time: forward,
keeping what each layer is given; then from the last layer to the first, each run again with gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...streaming.runner import LOGIT_ROWS, LayerRunner
from ...utils import processes


@dataclass
class Saliency:
    """Sums of E over all weights that one layer loses with a query head [H], a KV head [K], a channel [I]."""

    heads: torch.Tensor
    kv_heads: torch.Tensor
    channels: torch.Tensor

    def to_dict(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def of(cls, values: dict[str, list[float]], device="cpu") -> Saliency:
        """What :meth:`to_dict` gave."""
        return cls(**{name: torch.tensor(numbers, device=device) for name, numbers in values.items()})

    def of_units(self, units: int) -> torch.Tensor:
        """Sums of E over each of ``units`` equal runs of heads, [units]: a KV head goes only with all its query heads."""
        sums = self.heads.view(units, -1).sum(1)
        return sums + self.kv_heads if units == len(self.kv_heads) else sums


def saliencies(runner: LayerRunner) -> list[Saliency]:
    """One Saliency per layer of the dense model, from the runner's token ids."""
    with torch.no_grad():
        inputs, upstream = [], runner.embed()
        for index, layer in runner.visit("gradients, forward"):
            inputs.append(upstream.copy())
            runner.advance(upstream, layer, index)
    [tokens] = processes.total(runner.ids[:, 1:].numel())
    norm, head = runner.output_modules()
    for i, ids in enumerate(runner.ids.split(runner.batch)):
        upstream[i] = _loss_gradient(runner, norm, head, upstream[i], ids, tokens)
    found, total = [], len(runner.source)
    for index in reversed(range(total)):
        for _, layer in runner.visit(start=index, stop=index + 1):
            found.append(_backward(runner, layer, index, inputs[index], upstream))
        inputs[index].close()
        runner.progress("gradients, backward", total - index, total)
    upstream.close()
    return found[::-1]


def _loss_gradient(runner: LayerRunner, norm, head, states: torch.Tensor, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """dL / d(last states), for one batch [samples, length, D]; L is the mean over ``tokens`` predicted tokens."""
    gradient = torch.zeros_like(states)
    targets = ids.to(states.device)
    for sample, wanted, into in zip(states, targets, gradient):
        for start in range(0, len(sample) - 1, LOGIT_ROWS):
            part = slice(start, min(start + LOGIT_ROWS, len(sample) - 1))
            rows = sample[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = runner.adapter.logits(head, norm(rows))
                loss = nn.functional.cross_entropy(logits, wanted[1:][part], reduction="sum") / tokens
            (into[part],) = torch.autograd.grad(loss, rows)
    return gradient


def _backward(runner: LayerRunner, layer: nn.Module, index: int, inputs, upstream) -> Saliency:
    """Replaces ``upstream``, the gradients of the layer's outputs, by those of its inputs; gives the layer's saliency."""
    adapter = runner.adapter
    linears = [linear for block in (adapter.attention(layer), adapter.mlp(layer)) for linear in block.linears]
    before = [parameter.requires_grad for parameter in layer.parameters()]
    layer.requires_grad_(False)
    for linear in linears:
        linear.weight.requires_grad_()
    for i, states in enumerate(inputs):
        states = states.detach().requires_grad_()
        with torch.enable_grad():
            output = layer(states, **runner.arguments[index])
            output = output[0] if isinstance(output, tuple) else output
        output.backward(upstream[i])
        upstream[i] = states.grad
    gradients = [linear.weight.grad for linear in linears]
    processes.add(*gradients)
    importance = {linear: (linear.weight.detach() * gradient).abs().float() for linear, gradient in zip(linears, gradients)}
    for linear in linears:
        linear.weight.grad = None
    for parameter, wanted in zip(layer.parameters(), before):
        parameter.requires_grad_(wanted)
    return _sums(adapter, layer, importance)


def _sums(adapter, layer: nn.Module, importance: dict[nn.Linear, torch.Tensor]) -> Saliency:
    heads, kv_heads, channels = adapter.widths(layer)
    of_output = importance[adapter.attention(layer).output].sum(0)
    everything = [torch.arange(count) for count in (heads, kv_heads)]
    rows = torch.cat([importance[linear].sum(1)[which] for linear, which in adapter.head_rows(layer, *everything)])
    queries, keys, values = rows.split([count * adapter.head_dim for count in (heads, kv_heads, kv_heads)])
    of_channel = importance[adapter.mlp(layer).output].sum(0)
    gate_and_up = torch.cat([importance[linear].sum(1)[which] for linear, which in adapter.channel_rows(layer, torch.arange(channels))])
    return Saliency(
        (queries + of_output).view(heads, -1).sum(1), (keys + values).view(kv_heads, -1).sum(1), of_channel + gate_and_up.view(2, -1).sum(0)
    )
