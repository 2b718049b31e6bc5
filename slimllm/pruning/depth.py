"""``--drop_layers``, ``--drop_parts``: which go whole, and the run on the model that is left (docs/method.md, section 10)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UserError
from ..models.adapter import Mixer, Part, ProjectedPart
from ..models.depth import shallow_source
from ..models.shape import ModelShape, Staying
from ..models.source import ModelSource
from ..run import Measure, Run
from ..settings.methods import METHODS, RECOVERIES
from ..settings.pruning import PruneConfig
from ..streaming.activations import ActivationStore
from ..streaming.runner import LayerRunner, cosine_sum, mean_cosines
from ..streaming.sizes import Sizes
from .part_run import PartRun, join, part_runs, taken

log = logging.getLogger("slimllm")

IN_A_ROW, ONE_BY_ONE = "in a row", "one by one"
HELD_OUT = 4  # one in so many samples tells which way is better


@torch.no_grad()
def least_turning(run: Run, measure: Measure) -> dict:
    """``staying``: what stays of each layer, where those layers and parts go that turn the states least: of the highest cosine between
    the states before and behind them (Eq. 11), measured on the calibration samples. So ShortGPT ranks layers (Men et al. 2024), and
    LLM-Drop parts (He et al. 2024). ``cosine`` [L]: that of each layer.

    Where what stands before a gap is fitted anew, ReplaceMe's layers in a row go instead if the model loses less by that (:func:`_better`).
    """
    config, whole = run.config, run.shape.with_layers(range(len(run.shape.given_layers)))
    count, tried = config.drop_layers or 0, ways(config)
    row, cosine = _in_a_row(run, count) if IN_A_ROW in tried else ([], None)
    of_parts = {}
    if config.drops_parts:
        cosine, of_parts = _cosines(run.runner(run.samples.ids))
    elif cosine is None:
        cosine = run.runner(run.samples.ids).layer_cosines()
    kept = {ONE_BY_ONE: sorted(range(len(cosine)), key=lambda index: cosine[index])[: len(cosine) - count], IN_A_ROW: row}
    order = sorted(of_parts, key=of_parts.get, reverse=True)
    found = {way: config.without_parts(whole.with_layers(kept[way]), order).all_staying for way in tried}
    return {"staying": _better(run, found, measure), "cosine": cosine}


def ways(config: PruneConfig) -> list[str]:
    """The ways to let whole layers go: of two the better one is taken, or the first where samples are too few to tell."""
    method = METHODS[config.method]
    if method.in_a_row:
        return [IN_A_ROW]
    both = refits(config) and (config.drop_layers or 0) > 1 and not method.takes_whole
    return [ONE_BY_ONE, IN_A_ROW] if both else [ONE_BY_ONE]


def refits(config: PruneConfig) -> bool:
    """Whether outputs are fitted anew, so that what stands before a gap can make up for it."""
    return "look_back" in RECOVERIES[config.recovery].needs


def _better(run: Run, found: dict[str, Staying], measure: Measure) -> Staying:
    """Of the ways in which layers can go, the one by which the model loses least on a quarter of the samples; it is refitted on the others.

    One gap of a few layers is made up for better than as many gaps of one layer each, but a gap of half of the layers hardly at all.
    """
    first, held_out = next(iter(found.values())), len(run.samples.ids) // HELD_OUT
    if all(staying == first for staying in found.values()) or not held_out:
        return first
    fitted_on, measured_on = run.samples.ids[:-held_out], run.samples.ids[-held_out:]
    losses, failed = {}, None
    for way, staying in found.items():
        try:
            losses[way] = measure(_without(run, staying, bridged(run, staying, fitted_on)), measured_on)
        except UserError as error:  # some families' class cannot do without just these layers
            failed = error
    if not losses:
        raise failed
    log.info("perplexity of calibration samples without the layers: %s", ", ".join(f"{way} {value:.2f}" for way, value in losses.items()))
    return found[min(losses, key=losses.get)]


def _cosines(runner: LayerRunner) -> tuple[list[float], dict[tuple[int, str], float]]:
    """c_l of each layer of the model as it is, and the same of each part by (layer, kind): the mean cosine of the states before it and
    of these with what it alone adds to them.
    """
    hidden, of_layers, of_parts = runner.embed(), [], {}
    for index, layer in runner.visit("importance of layers and parts"):
        before = hidden.copy()
        for step in runner.adapter.steps(layer):
            runs = taken(runner, hidden, step, index)
            for part_run in runs:
                if isinstance(part := part_run.part, ProjectedPart):
                    both = zip(hidden, part_run.outputs)
                    of_parts[index, part.kind] = sum(cosine_sum(states, part.join(states, output)) for states, output in both)
            join(runs)
        of_layers.append(sum(map(cosine_sum, before, hidden)))
        before.close()
    hidden.close()
    tokens = runner.ids.numel()
    return mean_cosines(of_layers, tokens), dict(zip(of_parts, mean_cosines(list(of_parts.values()), tokens)))


def _in_a_row(run: Run, count: int) -> tuple[list[int], list[float]]:
    """(the layers that stay, c_l of all) where ``count`` layers in a row go: those whose output points nearest to where the input of the
    first of them does, as ReplaceMe chooses them (Shopkhoev et al. 2025). The first layer stays: nothing before it could make up for it.
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
    return [index for index in range(len(cosine)) if not begin <= index < begin + count], cosine


def apply(run: Run, staying: Staying) -> None:
    """From now on the run is one on the model of which this stays; its layers are numbered anew. With a recovery that fits outputs anew,
    what stands before a gap makes up for it as far as it can (:func:`bridged`).
    """
    fitted = bridged(run, staying, run.samples.ids) if refits(run.config) else {}
    run.shape, run.source = run.shape.with_staying(staying), _without(run, staying, fitted)
    run.model_config = run.source.config
    if run.config.pruned_layers is not None and run.config.pruned_layers > len(run.source):  # layers whose parts all went
        run.config = run.config.having(pruned_layers=len(run.source))
    _log_what_went(run.shape)


def _without(run: Run, staying: Staying, fitted: dict[str, torch.Tensor]) -> ModelSource:
    """The model of which this stays, with the tensors ``fitted`` in it."""
    layers = run.shape.with_staying(staying).layers
    gone = {index: layer.missing for index, layer in zip(_numbers(staying), layers)}
    return shallow_source(run.source, _numbers(staying), fitted, gone)


def _numbers(staying: Staying) -> list[int]:
    """The numbers of the layers of which something stays."""
    return [index for index, kinds in enumerate(staying) if kinds is not None]


def _log_what_went(shape: ModelShape) -> None:
    gone = [index for index, kinds in enumerate(shape.staying or ()) if kinds is None]
    if gone:
        log.info("gone whole: layer%s %s; those that stay are numbered anew", "s" if len(gone) > 1 else "", ", ".join(map(str, gone)))
    parts: dict[str, list[int]] = {}
    for index, (layer, kinds) in enumerate(zip(shape.given, shape.staying or (), strict=True)):
        for part in layer.parts if kinds is not None else ():
            if part.kind not in kinds:
                parts.setdefault(part.title, []).append(index)
    for title, layers in parts.items():
        log.info("gone whole: %s of layer%s %s", title, "s" if len(layers) > 1 else "", ", ".join(map(str, layers)))


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
def bridged(run: Run, staying: Staying, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output projections before each gap, by their names, refitted to give what the layers and parts that are gone gave besides.

    The projection is that of the last part that stays: W' = argmin ||X W'^T - (Y + S - Z)||^2 + ridge, with Z the residual stream behind
    that part in the model as it is by then and S the dense model's behind the gap (docs/method.md, section 10). Before the first
    part that stays, behind a norm and behind experts nothing is fitted.
    """
    runner, found, waiting = run.runner(ids), {}, None
    before_gap, last = _before_gaps(run.source, staying)
    dense = runner.embed()
    hidden = dense.copy()
    for index, layer in runner.visit("what stands before a gap", stop=last + 1):
        for number, step in enumerate(runner.adapter.steps(layer)):
            left = _left(step, staying[index])
            if left and waiting is not None:
                found |= _fitted(run, runner, *waiting, hidden, dense)
                waiting = None
            join(taken(runner, dense, step, index))
            if (index, number) in before_gap:
                waiting = layer, index, left
            elif left:
                join(taken(runner, hidden, left, index))
    if waiting is not None:
        found |= _fitted(run, runner, *waiting, hidden, dense)
    for states in (hidden, dense):
        states.close()
    return found


def _left(step: list[Part | Mixer], kinds: Collection[str] | None) -> list[Part | Mixer]:
    """The parts of a step that stay, where parts of these kinds do (None: the layer is gone)."""
    return [] if kinds is None else [part for part in step if isinstance(part, Mixer) or part.kind in kinds]


def _before_gaps(source: ModelSource, staying: Staying) -> tuple[set[tuple[int, int]], int]:
    """((layer, number of the step) of each step that stays, at least in part, behind or beside which something is gone; the last layer of
    which something is gone).
    """
    found, stands, last = set(), None, 0
    for index, layer in enumerate(source.adapter.layers(source.model)):
        for number, step in enumerate(source.adapter.steps(layer)):
            left = _left(step, staying[index])
            stands = (index, number) if left else stands
            if len(left) < len(step):
                last = index
                found |= {stands} - {None}
    return found, last


def _fitted(
    run: Run,
    runner: LayerRunner,
    layer: nn.Module,
    index: int,
    step: list[Part | Mixer],
    hidden: ActivationStore,
    ahead: ActivationStore,
) -> dict:
    """The tensors of the last part of a ``step`` before a gap that change; ``hidden``, the states before it, become what it then gives."""
    *beside, fitted = part_runs(runner, hidden, step, index)
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
    join([*beside, fitted])
    return found


def activation_bytes(run: Run, sizes: Sizes) -> int:
    """Bytes of the states that are kept while layers in a row are looked for: those before each of so many, and behind the last."""
    copies = (run.config.drop_layers or 0) + 2 if IN_A_ROW in ways(run.config) else 0
    return copies * sizes.tokens * run.shape.streamed * sizes.compute


def peak_bytes(run: Run, sizes: Sizes) -> int:
    """Bytes while they are looked for, at most: these states, a layer, and the next one as stored."""
    largest = max(layer.parameters for layer in run.shape.given_layers)
    states = sizes.kept_in_memory(largest * sizes.compute, activation_bytes(run, sizes))
    return largest * (sizes.compute + sizes.stored) + states
