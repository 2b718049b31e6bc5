"""The algorithm: two passes of the calibration tokens through the layers, one layer in memory at a time.

Pass 1 measures layer importance on the dense model; pass 2 prunes the layers in order, each from what the already
pruned layers before it give. Attention goes first, then the feed-forward part (paper section 3, Algorithm 1).
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from . import allocation, surgery
from .config import PruneConfig
from .evaluation import evaluation_dtype
from .families import ModelShape, family_of, limits_of, shape_of
from .importance.channels import CHANNEL_SCORES, ChannelStatistics, select_channels
from .importance.heads import greedy_search, output_gram
from .record import return_free_memory
from .recovery import NEEDS_INPUT_COVARIANCE
from .runner import LayerRunner, Sublayer

log = logging.getLogger("slimllm")

PROBE_RATIO = 0.5  # how much of each layer the allocation `auto` takes away to see what it costs


@dataclass
class LayerReport:
    """What happened to one layer; heads, kv_heads and channels are the indices kept, ascending.

    The errors are the share of the projection's output variance missed on the calibration tokens, (before recovery,
    after); None where nothing was removed. ``sensitivity`` is that of :func:`layer_sensitivities`, where it was measured.
    """

    index: int
    cosine: float
    ratio: float
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    sensitivity: float | None = None
    attention_error: tuple[float, float] | None = None
    mlp_error: tuple[float, float] | None = None
    clipped: bool = False
    seconds: float = 0.0


@torch.no_grad()
def prune(
    model, ids: torch.Tensor, config: PruneConfig, device="cpu", on_layer=lambda report: None, held_back: torch.Tensor | None = None
) -> list[LayerReport]:
    """Prunes ``model`` in place and returns one report a layer.

    Args:
        model: a dense causal LM of a supported family, on the CPU; its layers visit ``device`` one by one.
        ids: calibration token ids [samples, length]. config: settings, ``resolve`` done.
        on_layer: called with each LayerReport as it is ready.
        held_back: token ids [samples, length] that the costs are measured on with ``layer_ratio`` auto, and only then needed.
    Raises:
        UserError: the budget cannot be met; the model's outputs on the calibration tokens are not finite.
    """
    family = family_of(model.config)
    shape = shape_of(model.config, family)
    runner = LayerRunner(model, family, ids, device)
    cosine = runner.layer_cosines()
    sensitivity = None
    if config.layer_ratio == "auto":
        sensitivity = layer_sensitivities(model, ids, held_back, config, device)
        plans = _best_plan(model, ids, held_back, allocation.candidates(shape, sensitivity, config), config, device)
    else:
        plans = allocation.plan(shape, cosine, config)
    pruned = [index for index, p in enumerate(plans) if _removes(shape, p)]
    hidden = runner.embed() if pruned else None
    reports = []
    for index, layer_plan in enumerate(plans):
        started = time.perf_counter()
        report = LayerReport(
            index,
            cosine[index],
            layer_plan.ratio,
            list(range(shape.heads)),
            list(range(shape.kv_heads)),
            list(range(shape.channels)),
            clipped=layer_plan.clipped,
            sensitivity=sensitivity and sensitivity[index],
        )
        if pruned and index <= pruned[-1]:  # what follows the last pruned layer need not run
            with runner.layer(index) as layer:
                if index in pruned:
                    _prune_layer(runner, hidden, layer, layer_plan, shape, config, report)
                else:
                    runner.advance(hidden, layer, index)
        report.seconds = time.perf_counter() - started
        reports.append(report)
        on_layer(report)
        return_free_memory()  # batches come and go; without this the holes they leave add up over the layers
    return reports


@torch.no_grad()
def layer_sensitivities(model, ids: torch.Tensor, held_back: torch.Tensor, config: PruneConfig, device="cpu") -> list[float]:
    """What it costs to prune each layer alone, [L]: KL divergence (nats a token) of the dense model's next-token distribution
    from that of the model with PROBE_RATIO of this one layer's heads and channels removed and the outputs recovered.

    Measured on ``held_back``, pruned from ``ids`` (both [samples, length]); the model is left as it is. All layers' probes
    go through each later layer together, so that it visits ``device`` once.
    """
    family = family_of(model.config)
    shape = shape_of(model.config, family)
    seen, held = (LayerRunner(model, family, samples, device) for samples in (ids, held_back))
    plans = allocation.probe(shape, PROBE_RATIO, config)
    dtype = evaluation_dtype(model.dtype, seen.device)
    hidden, streams = seen.embed(), [held.embed(dtype)]  # the dense model's states, then those of each probe so far
    for index in tqdm(range(shape.layers), desc="layer sensitivity", unit="layer", leave=False, disable=None):
        with seen.layer(index) as layer:
            probe, states = copy.deepcopy(layer), hidden.copy()
            report = LayerReport(index, 0.0, PROBE_RATIO, [], [], [])
            _prune_layer(seen, states, probe, plans[index], shape, config, report)
            states.close()
            seen.advance(hidden, layer, index)
            streams.append(streams[0].copy())
            held.advance(streams[-1], probe.to(dtype), index)
            whole = copy.deepcopy(layer).to(dtype)
            for stream in streams[:-1]:
                held.advance(stream, whole, index)
        return_free_memory()
    costs = held.divergences(streams[0], streams[1:])
    for store in (hidden, *streams):
        store.close()
    return costs


@torch.no_grad()
def plan_divergences(model, ids: torch.Tensor, held_back: torch.Tensor, candidates: list, config: PruneConfig, device="cpu") -> list[float]:
    """KL divergence (nats a token) of the dense model's next-token distribution from that of the model pruned by each candidate.

    Measured on ``held_back``, pruned from ``ids`` (both [samples, length]); the model is left as it is, and no pruned one is
    ever whole in memory: a candidate, one LayerPlan a layer, is tried on a copy of one layer at a time.
    """
    family = family_of(model.config)
    shape = shape_of(model.config, family)
    seen, held = (LayerRunner(model, family, samples, device) for samples in (ids, held_back))
    dtype = evaluation_dtype(model.dtype, seen.device)
    dense = held.embed(dtype)
    trials = [(plans, seen.embed(), held.embed(dtype)) for plans in candidates]
    for index in tqdm(range(shape.layers), desc="plans", unit="layer", leave=False, disable=None):
        with seen.layer(index) as layer:
            for plans, hidden, stream in trials:
                pruned, report = copy.deepcopy(layer), LayerReport(index, 0.0, plans[index].ratio, [], [], [])
                _prune_layer(seen, hidden, pruned, plans[index], shape, config, report)
                held.advance(stream, pruned.to(dtype), index)
            held.advance(dense, copy.deepcopy(layer).to(dtype), index)
        return_free_memory()
    costs = held.divergences(dense, [stream for _, _, stream in trials])
    for store in (dense, *(store for _, *stores in trials for store in stores)):
        store.close()
    return costs


def _best_plan(model, ids, held_back, candidates: dict, config, device) -> list[allocation.LayerPlan]:
    """The candidate that moves the model's distribution least."""
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    costs = plan_divergences(model, ids, held_back, list(candidates.values()), config, device)
    best = costs.index(min(costs))
    for i, (share, cost) in enumerate(zip(candidates, costs)):
        log.info("plan where heads lose %g x what channels lose: divergence %.4f nats a token%s", share, cost, ", taken" * (i == best))
    return list(candidates.values())[best]


def _removes(shape: ModelShape, p: allocation.LayerPlan) -> bool:
    return (p.heads, p.kv_heads, p.channels) != (shape.heads, shape.kv_heads, shape.channels)


def _prune_layer(runner, hidden, layer, plan, shape, config, report) -> None:
    family, index = runner.family, report.index
    attention, mlp = getattr(layer, family.attention), getattr(layer, family.mlp)
    new_bias = limits_of(config.runtime, shape).new_bias

    norm, arguments = getattr(layer, family.attention_norm), runner.kwargs[index]
    with Sublayer(hidden, norm, attention, attention.o_proj, arguments, runner.budget) as sub:
        if plan.heads < shape.heads:
            sub.run(input_covariance=True)
            heads, kv_heads = _choose_heads(sub, plan, shape, config)
            recovered, report.attention_error = sub.recover(surgery.columns(heads, shape.head_dim), config, new_bias)
            surgery.slice_heads(attention, heads, kv_heads, recovered)
            report.heads, report.kv_heads = heads.tolist(), kv_heads.tolist()
        else:
            sub.run()

    with Sublayer(hidden, getattr(layer, family.mlp_norm), mlp, mlp.down_proj, {}, runner.budget) as sub:
        if plan.channels < shape.channels:
            sub.run(input_covariance=config.recovery in NEEDS_INPUT_COVARIANCE, output_covariance=True, norms=True)
            channels = _choose_channels(sub, mlp, plan, shape, config)
            recovered, report.mlp_error = sub.recover(channels, config, new_bias)
            surgery.slice_channels(mlp, channels, recovered)
            report.channels = channels.tolist()
        else:
            sub.run()


def _choose_heads(sub, plan, shape, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept query heads and KV heads, ascending (Algorithm 1 on whatever unit the heads go in)."""
    units = allocation.HeadUnits(shape, config.head_unit)
    gram = output_gram(sub.input_covariance.matrix(), sub.weight, units.units)
    removed = units.steps - (plan.heads // shape.kv_heads if units.by_query else plan.kv_heads)
    keep = torch.tensor(greedy_search(gram, removed, units.classes, not config.no_greedy), device=gram.device)
    if units.by_query:
        return keep, torch.arange(shape.kv_heads, device=keep.device)
    return surgery.columns(keep, shape.heads // shape.kv_heads), keep


def _choose_channels(sub, mlp, plan, shape, config) -> torch.Tensor:
    statistics = ChannelStatistics(
        sub.output_covariance.matrix(),
        sub.weight,
        mlp.gate_proj.weight.float(),
        mlp.up_proj.weight.float(),
        sub.input_norm.norm(),
        sub.block_input_norm.norm(),
        config.seed,
    )
    return select_channels(CHANNEL_SCORES[config.channel_score](statistics), shape.channels - plan.channels, config.keep_lowest)
