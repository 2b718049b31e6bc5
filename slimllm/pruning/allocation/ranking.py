"""``--layer_ratio ranking``: one ranking of the units of all layers, as FLAP has it (An et al. 2024)."""

from __future__ import annotations

import torch

from ...errors import UserError
from ...plan import LayerPlan
from ..part_run import part_runs
from .inputs import Allocation, AllocationInputs
from .sizing import Sizing, Slot


def ranking(inputs: AllocationInputs) -> Allocation:
    """FLAP's: on the dense model, each input j of an output projection scores Var(X[:, j]) ||W[:, j]||^2, squared for attention.

    The scores are standardised within each layer, attention and feed-forward part apart, and the lowest of all layers go; a head counts as
    many channels as it has weights. Without a model all layers are assumed to matter the same. Raises UserError where the runtime needs
    layers alike.
    """
    sizing = Sizing(inputs.shape, inputs.config)
    if sizing.limits.same_heads:
        raise UserError(
            f"--layer_ratio ranking and --runtime {inputs.config.runtime}: the first chooses each head by itself, and the second needs the "
            "same number of heads in all layers; leave one of the two out"
        )
    slots = [slot for layer in range(len(inputs.shape.layers)) for slot in (*sizing.coarse, *sizing.fine) if slot.layer == layer]
    scores = _scores(inputs) if inputs.run else {}
    return Allocation(plans_of([scores.get((slot.layer, slot.part.kind), _equal(slot)) for slot in slots], slots, sizing))


def plans_of(scores: list[torch.Tensor], slots: list[Slot], sizing: Sizing) -> list[LayerPlan]:
    """One LayerPlan per layer: the lowest of all go, until ``pruning_ratio`` of their cost or ``target_sparsity`` is met.

    ``scores``: of the steps of each slot [steps], standardised: the lower, the sooner they go. A KV head that goes with its g query heads
    of size h costs (2 g + 2) h / 3 channels. The highest of each slot stays.
    """
    config = sizing.config
    ranked = torch.cat([slot_scores.sort().values[:-1] for slot_scores in scores])
    owners = torch.cat([torch.full((len(slot_scores) - 1,), i) for i, slot_scores in enumerate(scores)])
    owners = owners[ranked.argsort(stable=True)]

    def planned(count: int) -> list[LayerPlan]:
        gone = torch.bincount(owners[:count], minlength=len(slots)).tolist()
        fine = {slot.layer: lost / slot.steps.count for slot, lost in zip(slots, gone) if slot.part.fine}
        plans = sizing.rounded([fine.get(layer, 0.0) for layer in range(len(sizing.shape.layers))], attention=0.0)
        for slot, lost in zip(slots, gone):
            if not slot.part.fine and lost:
                slot.keep(plans, slot.steps.kept(lost / slot.steps.count, config.round_to))
                plans[slot.layer].ratio = plans[slot.layer].ratio or 1 / _channels(sizing, slot.layer)
        for plan in plans:
            plan.clipped = False
        return plans

    if config.sparsity_of(sizing.shape) is None:
        if not config.pruning_ratio or not len(owners):
            return planned(0)
        steps = torch.tensor([_step_weights(slot) for slot in slots])
        costs = steps[owners].cumsum(0)
        whole = sum(float(cost) * slot.steps.count for cost, slot in zip(steps, slots))
        return planned(int((costs - config.pruning_ratio * whole).abs().argmin()) + 1)
    low, high = 0, len(owners)
    if sizing.removed(planned(high)) < sizing.target:
        raise sizing.out_of_reach(planned(high))
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if sizing.removed(planned(middle)) < sizing.target else (low, middle)
    if config.prune == "heads":
        near = (planned(max(low - 1, 0)), planned(low))
        return min(near, key=lambda plans: abs(sizing.removed(plans) - sizing.target))
    plans = planned(low)
    sizing.fill(plans)
    return plans


def _channels(sizing: Sizing, layer: int) -> int:
    return max((part.output_inputs() for part in sizing.shape.layers[layer].parts if part.fine), default=1)


def _step_weights(slot: Slot) -> float:
    """How many weights one step of this part holds."""
    count = slot.steps.count
    more, less = (slot.part.parameters(slot.steps.units(n), False, False) for n in (count, count - 1))
    return float(more - less)


def _equal(slot: Slot) -> torch.Tensor:
    """Scores of a model whose layers all look the same: the same share of everything goes."""
    return torch.linspace(-1, 1, slot.steps.count)


@torch.no_grad()
def _scores(inputs: AllocationInputs) -> dict[tuple[int, str], torch.Tensor]:
    """The scores of the steps of each part of each layer."""
    runner = inputs.run.runner(inputs.run.samples.ids)
    hidden, scores_by_part = runner.embed(), {}
    for index, layer in runner.visit("fluctuation"):
        shapes = {part.kind: part for part in inputs.shape.layers[index].parts}
        for step in runner.adapter.steps(layer):
            runs = part_runs(runner, hidden, step, index)
            for run in runs:
                if run.part.kind not in shapes:  # what has no units
                    continue
                run.take({"input_variance"})
                part = shapes[run.part.kind]
                scores = (run.input_variance.var_x * run.weight.square().sum(0)) ** (1 if part.fine else 2)
                scores = ((scores - scores.mean()) / scores.std().clamp_min(torch.finfo(scores.dtype).tiny)).cpu()
                scores_by_part[index, part.kind] = part.steps(inputs.config.head_unit).of_columns(scores)
            for run in runs:
                run.join()
    hidden.close()
    return scores_by_part
