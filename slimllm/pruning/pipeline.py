"""The algorithm: two passes of the calibration tokens through the layers, one layer in memory at a time.

Pass 1 measures layer importance on the dense model; pass 2 prunes the layers in order, each from what the already
pruned layers before it give (paper section 3, Algorithm 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..models.adapter import LayerAdapter
from ..models.families import dense_family_of
from ..models.shape import shape_of
from .allocation.inputs import Allocation, AllocationInputs
from .allocation.layer_ratios import LAYER_RATIOS
from .allocation.plan import LayerPlan
from .config import PruneConfig
from .layer import LayerReport, prune_layer, removes, whole_layer
from .runner import LayerRunner, Progress, no_progress


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
) -> list[LayerReport]:
    """Prunes ``model`` in place and returns one report per layer.

    Args:
        model: a dense causal LM of a supported family, on the CPU; its layers visit ``device`` one by one.
        ids: calibration token ids [samples, length]. config: settings, ``resolve`` done.
        on_layer: called with each LayerReport as it is ready. progress: called with (stage, layers done, layers) in between.
        probe_ids: token ids [samples, length] that costs are measured on with ``layer_ratio`` auto, and only then needed.
        plans: what to remove from each layer, where that is decided already; else ``config.layer_ratio`` decides it.
    Raises:
        UserError: the sparsity cannot be met; the model's outputs on the calibration tokens are not finite.
    """
    adapter, shape = LayerAdapter(model.config, dense_family_of(model.config)), shape_of(model.config)
    runner = LayerRunner(model, adapter, ids, device, progress)

    cosine = runner.layer_cosines()  # pass 1
    if plans is None:
        inputs = AllocationInputs(shape, config, cosine, model, adapter, ids, probe_ids, device, progress)
        allocation = LAYER_RATIOS[config.layer_ratio](inputs)
    else:
        allocation = Allocation(plans)

    sensitivity = allocation.sensitivity or [None] * shape.layers  # pass 2
    reports = [whole_layer(i, cosine[i], plan, shape, sensitivity[i]) for i, plan in enumerate(allocation.plans)]
    pruned = [report.index for report, plan in zip(reports, allocation.plans) if removes(shape, plan)]
    after_last = pruned[-1] + 1 if pruned else 0  # what follows the last pruned layer need not run
    hidden = runner.embed() if pruned else None
    started = time.perf_counter()
    for index, layer in runner.visit(stop=after_last):
        if index in pruned:
            prune_layer(runner, hidden, layer, index, allocation.plans[index], shape, config, reports[index])
        else:
            runner.advance(hidden, layer, index)
        reports[index].seconds, started = time.perf_counter() - started, time.perf_counter()
        on_layer(reports[index])
    for report in reports[after_last:]:
        on_layer(report)
    if hidden is not None:
        hidden.close()
    return reports
