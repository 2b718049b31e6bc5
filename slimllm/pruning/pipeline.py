"""The algorithm: two passes of the calibration tokens through the layers, one layer in memory at a time.

Pass 1 measures layer importance on the dense model; pass 2 prunes the layers in order, each from what the already
pruned layers before it give (paper section 3, Algorithm 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

import torch
from torch import nn

from ..models.families import dense_family_of
from ..models.shape import shape_of
from ..models.source import ModelSource
from ..settings.methods import LAYER_RATIOS
from ..settings.pruning import PruneConfig
from ..streaming.activations import ActivationStore
from ..streaming.journal import Journal
from ..streaming.progress import Progress, no_progress
from ..streaming.runner import LayerRunner
from .allocation.inputs import Allocation, AllocationInputs
from .allocation.plan import LayerPlan
from .importance.taylor import Saliency, saliencies
from .layer import LayerReport, prune_layer, removes, whole_layer


class Sink(Protocol):
    """Where the layers go as they are done."""

    def begin(self, plans: list[LayerPlan], done: int, journal: Journal | None) -> None:
        """Called before the first layer, or where a run goes on, before layer ``done``."""

    def layer(self, index: int, layer: nn.Module) -> None:
        """Called with each layer, pruned or not, before it leaves memory; when it returns, the layer is on the disk."""

    def streams(self) -> dict[str, ActivationStore]:
        """What of it a run that goes on will need again, by name."""


@torch.no_grad()
def prune(
    model,
    ids: torch.Tensor,
    config: PruneConfig,
    device: torch.device | str = "cpu",
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    probe_ids: torch.Tensor | None = None,
    progress: Progress = no_progress,
    plans: list[LayerPlan] | None = None,
    sink: Sink | None = None,
    journal: Journal | None = None,
) -> list[LayerReport]:
    """Prunes ``model``, in place where it is in memory, and returns one report per layer.

    Args:
        model: a dense causal LM of a supported family, or a ModelSource of one; its layers visit ``device`` one by one.
        ids: calibration token ids [samples, length]. config: settings, ``resolved``.
        on_layer: called with each LayerReport as it is ready. progress: called with (stage, layers done, layers) in between.
        probe_ids: token ids [samples, length] that costs are measured on with ``layer_ratio`` auto, and only then needed.
        plans: what to remove from each layer, where that is decided already; else ``config.layer_ratio`` decides it.
        sink: where layers go when they are done, pruned or not. journal: what a stopped run left, and this one may leave.
    Raises:
        UserError: the sparsity cannot be met; the model's outputs on the calibration tokens are not finite.
    """
    source = ModelSource.of(model)
    shape = shape_of(source.config, dense_family_of(source.config))
    runner = LayerRunner(source, ids, device, progress, tmp_dir=config.tmp_dir)
    saliency = _saliencies(runner, config, plans, journal)
    cosine, allocation = _allocate(runner, ids, config, probe_ids, plans, saliency, journal)  # pass 1

    sensitivity = allocation.sensitivity or [None] * shape.layers  # pass 2
    reports = [whole_layer(i, cosine[i], plan, shape, sensitivity[i]) for i, plan in enumerate(allocation.plans)]
    pruned = [report.index for report, plan in zip(reports, allocation.plans) if removes(shape, plan)]
    after_last = pruned[-1] + 1 if pruned else 0  # what follows the last pruned layer need not run
    stop = shape.layers if sink or journal else after_last
    done = [LayerReport(**report) for report in journal.layers()] if journal else []
    reports[: len(done)] = done
    for report in done:
        on_layer(report)
    hidden = _states_after(len(done), runner, journal) if len(done) < after_last else None
    if sink:
        sink.begin(allocation.plans, len(done), journal)
    started = time.perf_counter()
    for index, layer in runner.visit(start=len(done), stop=stop):
        if index in pruned:
            prune_layer(runner, hidden, layer, index, allocation.plans[index], shape, config, reports[index], saliency[index])
        elif index < after_last:
            runner.advance(hidden, layer, index)
        reports[index].seconds = time.perf_counter() - started
        if sink:
            sink.layer(index, layer)
        if journal:
            streams = {"hidden": hidden} if index + 1 < after_last else {}
            journal.finish_layer(index, asdict(reports[index]), streams | (sink.streams() if sink else {}))
        on_layer(reports[index])
        started = time.perf_counter()
    for report in reports[max(len(done), stop) :]:
        on_layer(report)
    if hidden is not None:
        hidden.close()
    return reports


def _saliencies(runner: LayerRunner, config, plans, journal) -> list[Saliency | None]:
    """The layers' first-order importance, where something is chosen by it: measured, or as a stopped run left it."""
    if plans is not None or not config.needs_gradients:
        return [None] * len(runner.source)
    known = journal.get("saliency") if journal else None
    if known is None:
        known = [saliency.to_dict() for saliency in saliencies(runner)]
        if journal:
            journal.put("saliency", known)
    return [Saliency.of(values, runner.device) for values in known]


def _allocate(runner: LayerRunner, ids, config, probe_ids, plans, saliency, journal) -> tuple[list[float | None], Allocation]:
    """(layer cosines where they count, what goes from each layer), measured, or as a stopped run left them."""
    known = journal.get("allocation") if journal else None
    if known:
        return known["cosine"], Allocation([LayerPlan.of(plan) for plan in known["plans"]], known["sensitivity"])
    shape = shape_of(runner.source.config)
    inputs = AllocationInputs(shape, config, None, runner.source, ids, probe_ids, runner.device, runner.progress, saliency)
    allocation = LAYER_RATIOS[config.layer_ratio](inputs) if plans is None else Allocation(plans)
    cosine = inputs.layer_scores or [None] * shape.layers  # pass 1 ran only where the plans go by it
    if journal:
        journal.put("allocation", {"cosine": cosine, **asdict(allocation)})
    return cosine, allocation


def _states_after(done: int, runner: LayerRunner, journal: Journal | None) -> ActivationStore:
    """The states of the calibration tokens before layer ``done``: embedded, or as a stopped run left them."""
    if not done:
        return runner.embed()
    runner.prepare()
    return journal.restore(done - 1, "hidden", runner.store(), runner.device)
