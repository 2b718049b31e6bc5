"""``--drop_layers``: which layers go whole, and the run on the model that is left (docs/method.md, section 10)."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import torch
from torch import nn

from ..models.adapter import ProjectedPart
from ..models.depth import shallow_source
from ..run import Run
from ..settings.methods import METHODS, RECOVERIES
from ..streaming.activations import ActivationStore
from ..streaming.runner import LayerRunner, cosine_sum, mean_cosines
from .part_run import PartRun, part_runs

log = logging.getLogger("slimllm")


def least_turning(run: Run) -> dict:
    """``layers``: those that stay, ascending, where the ``drop_layers`` go that turn their input least: of the highest cosine between input
    and output (Eq. 11), measured on the calibration samples, ``cosine`` [L]. So ShortGPT ranks layers (Men et al. 2024).
    """
    if METHODS[run.config.method].in_a_row:
        return _in_a_row(run, run.config.drop_layers)
    cosine = run.runner(run.samples.ids).layer_cosines()
    ranked = sorted(range(len(cosine)), key=lambda index: cosine[index])
    return {"layers": sorted(ranked[: len(cosine) - run.config.drop_layers]), "cosine": cosine}


@torch.no_grad()
def _in_a_row(run: Run, count: int) -> dict:
    """The same of ``count`` layers in a row: those whose output points nearest to where the input of the first of them does, as ReplaceMe
    chooses them (Shopkhoev et al. 2025). The first layer stays: nothing before it could make up for it.
    """
    runner = run.runner(run.samples.ids)
    behind, turned, across = deque([runner.embed()]), [], []
    for index, layer in runner.visit("layers in a row"):
        states = behind[-1].copy()
        turned.append(runner.advance(states, layer, index))
        behind.append(states)
        if len(behind) > count:
            first = behind.popleft()
            across.append(sum(map(cosine_sum, first, states)))
            first.close()
    for states in behind:
        states.close()
    across, cosine = (mean_cosines(sums, runner.ids.numel()) for sums in (across, turned))
    begin = max(range(1, len(across)), key=lambda index: across[index])
    return {"layers": [index for index in range(len(cosine)) if not begin <= index < begin + count], "cosine": cosine}


def apply(run: Run, kept: list[int]) -> None:
    """From now on the run is one on the model with these layers; they are numbered anew. With a recovery that fits outputs anew, what
    stands before a gap makes up for it as far as it can (:func:`bridged`).
    """
    gone = sorted(set(range(len(run.source))) - set(kept))
    fitted = bridged(run, kept) if "look_back" in RECOVERIES[run.config.recovery].needs else {}
    run.source = shallow_source(run.source, kept, fitted)
    run.model_config = run.source.config
    run.shape = run.shape.with_layers(kept)
    log.info("gone whole: layer%s %s; those that stay are numbered anew", "s" if len(gone) > 1 else "", ", ".join(map(str, gone)))


@dataclass(frozen=True)
class _AcrossGap:
    """What the fit of a part before a gap is to add (an Aim): what its layer's output lacks to the states ``ahead``, those of the dense
    model behind the gap. ``beside``: the parts of the same step, which add something too.
    """

    part: ProjectedPart
    ahead: ActivationStore
    beside: list[PartRun]

    def beyond(self, i: int, states: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[tokens, D] float32: what is to be added to Y, of batch ``i``, whose residual stream is ``states`` and whose Y is ``y``."""
        missing = (self.ahead[i].float() - states.float()).flatten(0, -2) / self.part.multiplier - y.float()
        for other in self.beside:
            missing -= other.outputs[i].flatten(0, -2).float()
        return missing


@torch.no_grad()
def bridged(run: Run, kept: list[int]) -> dict[str, torch.Tensor]:
    """The output projections before each gap, by their names, refitted to give what the layers that are gone gave besides.

    The projection is the last of the last layer that stays: W' = argmin ||X W'^T - (Y + S - Z)||^2 + ridge, with Z the residual stream
    behind that layer in the model as it is by then and S the dense model's behind the gap (docs/method.md, section 10). Before the first
    layer that stays, behind a norm and behind experts nothing is fitted.
    """
    runner, found, waiting = run.runner(run.samples.ids), {}, None
    dense = runner.embed()
    hidden = dense.copy()
    last = max(set(range(len(run.source))) - set(kept))  # behind which nothing is to be made up for
    for index, layer in runner.visit("layers before a gap", stop=last + 1):
        if index in kept and waiting is not None:
            found |= _fitted(run, runner, *waiting, hidden, dense)
            waiting = None
        runner.advance(dense, layer, index)
        if index in kept and index + 1 not in kept and index + 1 < len(run.source):
            waiting = layer, index
        elif index in kept:
            runner.advance(hidden, layer, index)
    if waiting is not None:
        found |= _fitted(run, runner, *waiting, hidden, dense)
    for states in (hidden, dense):
        states.close()
    return found


def _fitted(run: Run, runner: LayerRunner, layer: nn.Module, index: int, hidden: ActivationStore, ahead: ActivationStore) -> dict:
    """The tensors of a layer before a gap that change; ``hidden``, the states before it, become what it then gives."""
    *steps, last = runner.adapter.steps(layer)
    for step in steps:
        runs = part_runs(runner, hidden, step, index)
        for part_run in runs:
            part_run.take()
        for part_run in runs:
            part_run.join()
    *beside, fitted = part_runs(runner, hidden, last, index)
    for part_run in beside:
        part_run.take()
    part, found = fitted.part, {}
    if isinstance(part, ProjectedPart) and part.post_norm is None:
        fitted.take({"input_covariance"}, _AcrossGap(part, ahead, beside))
        every = torch.arange(part.output.in_features, device=part.output.weight.device)
        recovered, _ = fitted.recover(every, run.config.recovery, run.config.ridge_for(runner.tokens), False, True)
        name = next(name for name, module in layer.named_modules() if module is part.output)
        prefix = f"{runner.adapter.layer_name(index)}{name}"
        found[f"{prefix}.weight"] = recovered.weight.to(run.dtype).cpu()
        if recovered.bias is not None:
            found[f"{prefix}.bias"] = recovered.bias.to(run.dtype).cpu()
    else:
        fitted.take()
        log.info("layer %d: what follows it and goes is not made up for, since its output passes a norm or a router", index)
    for part_run in (*beside, fitted):
        part_run.join()
    return found
