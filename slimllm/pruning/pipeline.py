"""The algorithm: two passes of the calibration tokens through the layers, one layer in memory at a time.

Pass 1 measures layer importance on the dense model; pass 2 prunes the layers in order, each from the output of the
already pruned layers before it (paper section 3, Algorithm 1).
"""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from ..plan import LayerPlan, LayerReport
from ..run import Run
from ..settings.methods import CHANNEL_SCORES, HEAD_CHOICES, LAYER_RATIOS
from ..streaming.activations import ActivationStore
from ..streaming.runner import LayerRunner
from .allocation.inputs import Allocation, AllocationInputs
from .importance import taylor
from .layer import LayerPruner


@torch.no_grad()
def allocate(run: Run, plans: list[LayerPlan] | None = None) -> Allocation:
    """Pass 1: how much goes from each layer, measured now, or as a stopped run left it. ``plans``: where it is decided already.

    Raises UserError where the sparsity cannot be met, or the model's outputs on the calibration tokens are not finite.
    """
    saliency = _saliencies(run) if plans is None else None
    stored = run.known("allocation", dict)
    if stored:
        plans = [LayerPlan(**plan) for plan in stored.pop("plans")]
        return Allocation(plans, **stored, saliency=saliency)
    if plans is not None:
        allocation = Allocation(plans)
    else:
        inputs = AllocationInputs(run.shape, run.config, run, saliency=saliency, file_overhead=run.file_overhead)
        allocation = LAYER_RATIOS[run.config.layer_ratio](inputs)
        allocation.cosine, allocation.saliency = inputs.layer_scores, saliency  # measured only where the plans go by them
    measured = {name: getattr(allocation, name) for name in ("sensitivity", "cosine", "predicted_loss")}
    run.keep("allocation", {"plans": [asdict(plan) for plan in allocation.plans], **measured})
    return allocation


@torch.no_grad()
def prune(run: Run, allocation: Allocation) -> list[LayerReport]:
    """Pass 2: prunes ``run.source``, in place where it is in memory, and returns one report per layer.

    What a stopped run finished is not done again. Layers go to ``run.sink`` when they are done, pruned or not.
    """
    shape, plans, journal, sink = run.shape, allocation.plans, run.layer_journal, run.sink
    done = [LayerReport(**report) for report in journal.layers()] if journal else []
    pruned = [index for index, plan in enumerate(plans) if plan.units != shape.layers[index].units]
    after_last = pruned[-1] + 1 if pruned else 0  # what follows the last pruned layer need not run
    stop = len(shape.layers) if sink or journal else after_last
    reports = [LayerReport.of_whole(index, layer, plan) for index, (layer, plan) in enumerate(zip(shape.layers, plans))]
    reports[: len(done)] = done
    for report in done:
        run.on_layer(report)
    runner, hidden, dense = run.runner(run.samples.ids), None, None
    if len(done) < after_last:
        hidden = _states_after(len(done), runner, run, "hidden")
        if run.config.look_back and done and pruned[0] < len(done):
            dense = _states_after(len(done), runner, run, "dense")
    if sink:
        sink.begin([plan.units for plan in plans], len(done), journal)
    pruner, started = LayerPruner(run, runner, allocation.saliency), time.perf_counter()
    for index, layer in runner.visit(start=len(done), stop=stop):
        if index in pruned:
            if run.config.look_back and dense is None:
                dense = hidden.copy()
            reports[index] = pruner.prune(layer, index, plans[index], hidden, dense)
        elif index < after_last:
            for states in (hidden,) if dense is None else (hidden, dense):
                runner.advance(states, layer, index)
        allocation.complete(reports[index])
        reports[index].seconds = time.perf_counter() - started
        if sink:
            sink.layer(index, layer)
        if journal:
            streams = {"hidden": hidden, "dense": dense} if index + 1 < after_last else {}
            streams = {name: states for name, states in streams.items() if states is not None}
            journal.finish_layer(index, asdict(reports[index]), streams | (sink.streams() if sink else {}))
        run.on_layer(reports[index])
        started = time.perf_counter()
    for report in reports[max(len(done), stop) :]:
        allocation.complete(report)
        run.on_layer(report)
    for states in (hidden, dense):
        if states is not None:
            states.close()
    return reports


def _saliencies(run: Run) -> list[taylor.Saliency] | None:
    """The layers' first-order importance, where something is chosen by it."""
    config = run.config
    needs = HEAD_CHOICES[config.head_choice].needs | CHANNEL_SCORES[config.channel_score].needs
    if "gradients" not in needs or config.prune == "experts":
        return None
    lists = run.once("saliency", lambda: [taylor.to_lists(saliency) for saliency in taylor.saliencies(run.runner(run.samples.ids))])
    return [taylor.from_lists(layer) for layer in lists]


def _states_after(done: int, runner: LayerRunner, run: Run, name: str) -> ActivationStore:
    """The states of the calibration tokens before layer ``done``: embedded, or as a stopped run left them under this ``name``."""
    if not done:
        return runner.embed()
    runner.prepare()
    return run.journal.restore(done - 1, name, runner.store(), runner.device)
