"""The algorithm: two passes of the calibration tokens through the layers, one layer in memory at a time.

Pass 1 measures layer importance on the dense model; pass 2 prunes the layers in order, each from what the already
pruned layers before it give. Attention goes first, then the feed-forward part (paper section 3, Algorithm 1).
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from . import allocation, surgery
from .cli import UserError
from .config import PruneConfig
from .families import Family, ModelShape, family_of, shape_of
from .importance.channels import channel_scores, select_channels
from .importance.heads import greedy_search, output_gram
from .importance.layers import cosine_sum
from .record import return_free_memory
from .recovery import NEEDS_INPUT_COVARIANCE, RECOVERIES
from .statistics import ActivationStore, Covariance, MemoryBudget, PairMoments, SquareSum

TOKENS_PER_BATCH = 2048
MIN_ACTIVATION_BYTES = 64 << 20


@dataclass
class LayerReport:
    """What happened to one layer; heads, kv_heads and channels are the indices kept, ascending.

    The errors are the share of the projection's output variance missed on the calibration tokens, (before recovery,
    after); None where nothing was removed.
    """

    index: int
    cosine: float
    ratio: float
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    attention_error: tuple[float, float] | None = None
    mlp_error: tuple[float, float] | None = None
    clipped: bool = False
    seconds: float = 0.0


@torch.no_grad()
def prune(model, ids: torch.Tensor, config: PruneConfig, device="cpu", on_layer=lambda report: None) -> list[LayerReport]:
    """Prunes ``model`` in place and returns one report a layer.

    Args:
        model: a dense causal LM of a supported family, on the CPU; its layers visit ``device`` one by one.
        ids: calibration token ids [samples, length]. config: settings, ``resolve_depth`` done.
        on_layer: called with each LayerReport as it is ready.
    Raises:
        UserError: the budget cannot be met; the model's outputs on the calibration tokens are not finite.
    """
    family = family_of(model.config)
    shape = shape_of(model.config, family)
    runner = LayerRunner(model, family, ids, device)
    cosine = runner.layer_cosines()
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


def _removes(shape: ModelShape, p: allocation.LayerPlan) -> bool:
    return (p.heads, p.kv_heads, p.channels) != (shape.heads, shape.kv_heads, shape.channels)


def _prune_layer(runner, hidden, layer, plan, shape, config, report) -> None:
    family, index = runner.family, report.index
    attention, mlp = getattr(layer, family.attention), getattr(layer, family.mlp)

    norm, arguments = getattr(layer, family.attention_norm), runner.kwargs[index]
    with Sublayer(hidden, norm, attention, attention.o_proj, arguments, runner.budget) as sub:
        if plan.heads < shape.heads:
            sub.run(input_covariance=True)
            heads, kv_heads = _choose_heads(sub, plan, shape, config)
            recovered, report.attention_error = sub.recover(surgery.columns(heads, shape.head_dim), config)
            surgery.slice_heads(attention, heads, kv_heads, recovered)
            report.heads, report.kv_heads = heads.tolist(), kv_heads.tolist()
        else:
            sub.run()

    with Sublayer(hidden, getattr(layer, family.mlp_norm), mlp, mlp.down_proj, {}, runner.budget) as sub:
        if plan.channels < shape.channels:
            sub.run(input_covariance=config.recovery in NEEDS_INPUT_COVARIANCE, output_covariance=True, norms=True)
            channels = _choose_channels(sub, mlp, plan, shape, config)
            recovered, report.mlp_error = sub.recover(channels, config)
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
    scores = channel_scores(
        sub.output_covariance.matrix(),
        sub.weight,
        mlp.gate_proj.weight.float(),
        mlp.up_proj.weight.float(),
        sub.input_norm.norm(),
        sub.block_input_norm.norm(),
    )
    return select_channels(scores, shape.channels - plan.channels, config.keep_lowest)


class LayerRunner:
    """Runs single layers on the calibration tokens, on ``device``, whatever device the model itself is on."""

    def __init__(self, model, family: Family, ids: torch.Tensor, device):
        self.family, self.ids, self.device = family, ids, torch.device(device)
        self.decoder = getattr(model, family.decoder)
        self.layers = getattr(self.decoder, family.layers)
        self.home = next(self.layers.parameters()).device
        self.batch = max(1, TOKENS_PER_BATCH // ids.shape[1])
        layer_bytes = sum(p.nbytes for p in self.layers[0].parameters())
        self.budget = MemoryBudget(max(MIN_ACTIVATION_BYTES, layer_bytes))
        self.kwargs = self._layer_arguments()

    def _layer_arguments(self) -> list[dict]:
        """Mask, position embeddings and the like that each layer is called with, for one sample (they broadcast)."""
        recorders = nn.ModuleList(_Recorder() for _ in self.layers)
        setattr(self.decoder, self.family.layers, recorders)
        try:
            self.decoder(input_ids=self.ids[:1].to(self.home), use_cache=False)
        finally:
            setattr(self.decoder, self.family.layers, self.layers)
        return [_to(recorder.kwargs, self.device) for recorder in recorders]

    def embed(self) -> ActivationStore:
        hidden = ActivationStore(self.budget)
        for batch in self.ids.split(self.batch):
            hidden.append(self.decoder.embed_tokens(batch.to(self.home)).to(self.device))
        return hidden

    @contextmanager
    def layer(self, index: int):
        layer = self.layers[index].to(self.device)
        yield layer
        layer.to(self.home)

    def advance(self, hidden: ActivationStore, layer: nn.Module, index: int) -> float:
        """Replaces the hidden states by the layer's output; returns the mean cosine similarity of the two."""
        cosines = 0.0
        for i, states in enumerate(hidden):
            output = layer(states, **self.kwargs[index])
            output = output[0] if isinstance(output, tuple) else output
            cosines += cosine_sum(states, output)
            hidden[i] = output
        return cosines / self.ids.numel()

    def layer_cosines(self) -> list[float]:
        """c_l of each layer of the model as it is (Eq. 11)."""
        hidden, cosine = self.embed(), []
        for index in tqdm(range(len(self.layers)), desc="layer importance", unit="layer", leave=False, disable=None):
            with self.layer(index) as layer:
                cosine.append(self.advance(hidden, layer, index))
        hidden.close()
        bad = (~torch.tensor(cosine).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"layer {bad[0]} gives values that are not finite on the calibration tokens; try --dtype float32 or bfloat16")
        return cosine


class Sublayer:
    """The attention or the feed-forward part of one layer, on all calibration tokens.

    Its output projection maps X [T, n] to Y [T, D]. ``run`` computes both once and takes the statistics asked for;
    ``recover`` replaces Y by what the kept columns of X give, with no module run again. On exit Y is added to the
    hidden states.
    """

    def __init__(self, hidden: ActivationStore, norm, block, projection, arguments: dict, budget: MemoryBudget):
        self.hidden, self.norm, self.block, self.projection, self.arguments = hidden, norm, block, projection, arguments
        self.inputs, self.outputs, self._pruned = (ActivationStore(budget) for _ in range(3))

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if not failed:
            for i, states in enumerate(self.hidden):
                self.hidden[i] = states + self.outputs[i].view_as(states)
        for store in (self.inputs, self.outputs, self._pruned):
            store.close()

    @property
    def weight(self) -> torch.Tensor:
        return self.projection.weight.float()

    def run(self, input_covariance=False, output_covariance=False, norms=False) -> None:
        dims, size = self.projection.weight.shape
        device = self.projection.weight.device
        self.input_covariance = Covariance(size, device) if input_covariance else None
        self.output_covariance = Covariance(dims, device) if output_covariance else None
        self.input_norm, self.block_input_norm = SquareSum(size, device), SquareSum(dims, device)
        seen = {}
        hook = self.projection.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
        for states in self.hidden:
            block_input = self.norm(states)
            self.block(block_input, **self.arguments)
            x, y = seen["x"].flatten(0, -2), seen["y"].flatten(0, -2)
            if self.input_covariance:
                self.input_covariance.update(x.float())
            if self.output_covariance:
                self.output_covariance.update(y.float())
            if norms:
                self.input_norm.update(x.float())
                self.block_input_norm.update(block_input.flatten(0, -2).float())
            if input_covariance or norms:  # something will be removed
                self.inputs.append(x)
            self.outputs.append(y)
        hook.remove()

    def recover(self, keep: torch.Tensor, config: PruneConfig):
        """(Recovered, (error before, error after)) for the kept input columns ``keep``; replaces the outputs."""
        weight, bias = self.weight, self.projection.bias
        bias = None if bias is None else bias.float()
        before, after = (PairMoments(len(weight), weight.device) for _ in range(2))
        gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        gone[keep] = False
        columns = gone.nonzero().flatten() if len(keep) > len(gone) / 2 else keep  # the smaller product of the two
        part = weight[:, columns]
        for x, y in zip(self.inputs, self.outputs):
            if columns is keep:
                pruned = nn.functional.linear(x[:, keep].float(), part, bias)
            else:
                pruned = y.float() - x[:, columns].float() @ part.T
            before.update(pruned, y.float())
            self._pruned.append(pruned)
        recovered = RECOVERIES[config.recovery](weight, bias, keep, before, self.input_covariance, config.ridge)
        for i, y in enumerate(self.outputs):
            if recovered.scale is None:
                new = nn.functional.linear(self.inputs[i][:, keep].float(), recovered.weight, recovered.bias)
            else:
                new = self._pruned[i] * recovered.scale + recovered.shift
            after.update(new, y.float())
            self.outputs[i] = new.to(y.dtype)
        return recovered, (before.relative_error(), after.relative_error())


class _Recorder(nn.Module):
    """Stands in for a layer: keeps the keyword arguments and hands the hidden states on."""

    def forward(self, hidden_states, **kwargs):
        self.kwargs = kwargs
        return hidden_states


def _to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return tuple(_to(item, device) for item in value) if isinstance(value, tuple) else value
