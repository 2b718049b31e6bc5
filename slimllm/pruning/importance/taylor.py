"""First-order importance, as LLM-Pruner has it (Ma et al. 2023): |weight * its gradient|, the gradient of the language-model loss.

One backward pass of the mean loss over the calibration tokens through the dense model, one layer in memory at a time: forward,
keeping what each layer is given; then from the last layer to the first, each run again with gradients.
"""

from __future__ import annotations

import torch
from torch import nn

from ...models.adapter import ProjectedPart
from ...streaming.runner import LOGIT_ROWS, LayerRunner, frozen
from ...utils import processes

# Of one layer: sums of this importance over all weights that go with a unit, {part: {sort: [units]}}
Saliency = dict[str, dict[str, torch.Tensor]]


def to_lists(saliency: Saliency) -> dict[str, dict[str, list[float]]]:
    """The same with lists of numbers in place of tensors, which JSON can hold."""
    return {kind: {sort: values.tolist() for sort, values in by_sort.items()} for kind, by_sort in saliency.items()}


def from_lists(lists: dict[str, dict[str, list[float]]]) -> Saliency:
    """What :func:`to_lists` gave."""
    return {kind: {sort: torch.tensor(values) for sort, values in by_sort.items()} for kind, by_sort in lists.items()}


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
    last_first, total = [], len(runner.source)
    for index in reversed(range(total)):
        for _, layer in runner.visit(start=index, stop=index + 1):
            last_first.append(_backward(runner, layer, index, inputs[index], upstream))
        inputs[index].close()
        runner.progress("gradients, backward", total - index, total)
    upstream.close()
    return last_first[::-1]


def _loss_gradient(runner: LayerRunner, norm, head, states: torch.Tensor, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The gradient, by the last states, of the mean loss over ``tokens`` predicted tokens; of one batch, [samples, length, D]."""
    gradient = torch.zeros_like(states)
    targets = ids.to(states.device)
    for sample, sample_ids, into in zip(states, targets, gradient):
        for start in range(0, len(sample) - 1, LOGIT_ROWS):
            part = slice(start, min(start + LOGIT_ROWS, len(sample) - 1))
            rows = sample[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = runner.adapter.logits(head, norm(rows))
                loss = nn.functional.cross_entropy(logits, sample_ids[1:][part], reduction="sum") / tokens
            (into[part],) = torch.autograd.grad(loss, rows)
    return gradient


def _backward(runner: LayerRunner, layer: nn.Module, index: int, inputs, upstream) -> Saliency:
    """Replaces ``upstream``, the gradients of the layer's outputs, by those of its inputs; gives the layer's saliency."""
    parts = [part for part in runner.adapter.parts(layer) if isinstance(part, ProjectedPart)]
    linears = [linear for part in parts for linear in part.linears]
    with frozen(layer):
        for linear in linears:
            linear.weight.requires_grad_()
        gradients = []
        for i in range(len(inputs)):
            found = runner.backward(layer, index, inputs, upstream, i, lambda: [linear.weight for linear in linears])
            gradients = [total + own for total, own in zip(gradients, found)] if gradients else found
        processes.add(*gradients)
        importance = {linear: (linear.weight.detach() * gradient).abs().float() for linear, gradient in zip(linears, gradients)}
    return {part.kind: _unit_sums(part, importance) for part in parts}


def _unit_sums(part: ProjectedPart, importance: dict[nn.Linear, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over all weights that go with a unit of the part: rows of its input projections, columns of its output projection."""
    everything = {sort: list(range(count)) for sort, count in part.units.items()}
    rows = torch.cat([importance[linear].sum(1)[which] for linear, which in part.rows(everything)])
    return {sort: values.cpu() for sort, values in part.unit_sums(rows, importance[part.output].sum(0)).items()}
