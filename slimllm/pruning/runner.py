"""Runs single layers on the calibration tokens, and takes the statistics that pruning one of them needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UserError
from ..models.adapter import Block
from ..models.source import ModelSource
from ..utils import processes
from ..utils.device import resolved
from .importance.layers import cosine_sum
from .recovery import RECOVERIES
from .statistics import ActivationMemory, ActivationStore, Covariance, PairMoments, SquareSum

TOKENS_PER_BATCH = 2048
MIN_ACTIVATION_BYTES = 64 << 20
LOGIT_ROWS = 64  # no more rows of the vocabulary's width are held in float32 at a time

Progress = Callable[[str, int, int], None]  # what is being done, how many layers are done, of how many


def no_progress(stage: str, done: int, total: int) -> None:
    pass


class LayerRunner:
    """Runs the layers of a source one by one on the token ids [samples, length], on ``device``.

    Where a run has several processes each takes its share of the samples, unless they are not to be ``split``.
    ``tokens``: how many all of them have. ``dtype``: what it computes in, the source's own by default. ``arguments``: what each layer is
    called with besides the states (mask, position embeddings and the like, for one sample; they broadcast); there after :meth:`embed`
    or :meth:`prepare`.
    """

    def __init__(
        self, source, ids: torch.Tensor, device="cpu", progress: Progress = no_progress, dtype=None, tmp_dir: str | None = None, split=True
    ):
        self.source, self.device, self.progress = ModelSource.of(source), resolved(device), progress
        self.ids, self.tokens = processes.share(ids) if split else ids, ids.numel()
        self.adapter, self.dtype = self.source.adapter, dtype or self.source.dtype
        self.batch = max(1, TOKENS_PER_BATCH // ids.shape[1])
        layer = self.adapter.layers(self.source.model)[0]
        layer_bytes = sum(p.numel() for p in layer.parameters()) * self.dtype.itemsize
        self.memory = ActivationMemory(max(MIN_ACTIVATION_BYTES, layer_bytes), tmp_dir)
        self.arguments: list[dict] | None = None

    def store(self) -> ActivationStore:
        return ActivationStore(self.memory)

    @contextmanager
    def _decoder(self):
        """(the decoder with recorders in place of its layers, the first recorder)"""
        recorders = nn.ModuleList(_Recorder() for _ in range(len(self.source)))
        with self.source.decoder(recorders) as decoder:

            def run(ids):
                decoder(input_ids=ids.to(self.source.home), use_cache=False)

            if self.arguments is None:
                run(self.ids[:1])
                self.arguments = [_to(_to(recorder.arguments, self.device), self.dtype) for recorder in recorders]
            yield run, recorders[0]

    def prepare(self) -> None:
        """Finds the ``arguments`` of the layers where no states are embedded."""
        with self._decoder():
            pass

    def embed(self) -> ActivationStore:
        """The hidden states before the first layer, as the decoder gives them to it."""
        hidden = self.store()
        with self._decoder() as (run, recorder):
            for batch in self.ids.split(self.batch):
                run(batch)
                hidden.append(recorder.states.to(device=self.device, dtype=self.dtype))
        return hidden

    def visit(self, stage: str | None = None, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Layers ``start`` to ``stop`` in turn, each on the device while it is worked on; reports progress as ``stage``."""
        total = len(self.source) if stop is None else stop
        for index, layer in self.source.visit(self.device, self.dtype, start, total):
            yield index, layer
            if stage:
                self.progress(stage, index + 1, total)

    def advance(self, hidden: ActivationStore, layer: nn.Module, index: int) -> float:
        """Replaces the hidden states by the layer's output; returns the sum over tokens of the cosine similarity of the two."""
        cosines = 0.0
        for i, states in enumerate(hidden):
            output = layer(states, **self.arguments[index])
            output = output[0] if isinstance(output, tuple) else output
            cosines += cosine_sum(states, output)
            hidden[i] = output
        return cosines

    def layer_cosines(self) -> list[float]:
        """c_l of each layer of the model as it is (Eq. 11)."""
        hidden = self.embed()
        sums = [self.advance(hidden, layer, index) for index, layer in self.visit("layer importance")]
        hidden.close()
        return mean_cosines(sums, self.ids.numel())

    def last_states(self, stage: str | None = None) -> ActivationStore:
        """The states after the last layer, before the final norm."""
        hidden = self.embed()
        for index, layer in self.visit(stage):
            self.advance(hidden, layer, index)
        return hidden

    def output_modules(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module]:
        """(final norm, output head) on the device, in ``dtype`` or the one it computes in."""
        dtype = dtype or self.dtype
        return self.source.final_norm(self.device, dtype), self.source.head(self.device, dtype)

    def divergences(self, reference: ActivationStore, others: list[ActivationStore]) -> list[float]:
        """Mean over tokens of KL(p || q) in nats, one for each of ``others``.

        p and q are the next-token distributions that follow from the last layer's states in ``reference`` and the other.
        """
        norm, head = self.output_modules()
        totals = [0.0] * len(others)
        for i, states in enumerate(reference):
            chunks = states.flatten(0, 1).split(LOGIT_ROWS)
            rivals = [other[i].flatten(0, 1).split(LOGIT_ROWS) for other in others]
            for c, rows in enumerate(chunks):
                log_p = self.adapter.logits(head, norm(rows)).log_softmax(-1)
                p = log_p.exp()
                entropy = float((p * log_p).sum())
                for k, rival in enumerate(rivals):
                    logits = self.adapter.logits(head, norm(rival[c]))  # sum of p log q = sum of p logits - logsumexp(logits)
                    totals[k] += entropy - float((p * logits).sum() - logits.logsumexp(-1).sum())
        *sums, tokens = processes.total(*totals, self.ids.numel())
        return [value / tokens for value in sums]


def mean_cosines(sums: list[float], tokens: int) -> list[float]:
    """Means [L] of cosines whose sums over this process's ``tokens`` are given. Raises UserError where one is not finite."""
    *sums, tokens = processes.total(*sums, tokens)
    bad = [index for index, value in enumerate(sums) if not math.isfinite(value)]
    if bad:
        raise UserError(f"layer {bad[0]} gives values that are not finite on the calibration tokens; try --dtype float32 or bfloat16")
    return [value / tokens for value in sums]


class Sublayer:
    """The attention or the feed-forward part of one layer, on all calibration tokens.

    Its output projection maps X [T, n] to Y [T, D]. ``run`` computes both once and takes the statistics asked for;
    ``recover`` replaces Y by what the kept columns of X give, with no module run again. On exit Y joins the hidden states.
    """

    def __init__(self, hidden: ActivationStore, block: Block, arguments: dict, memory: ActivationMemory):
        self.hidden, self.block, self.arguments = hidden, block, arguments
        self.inputs, self.outputs, self._pruned = (ActivationStore(memory) for _ in range(3))

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if not failed:
            for i, states in enumerate(self.hidden):
                self.hidden[i] = self.block.join(states, self.outputs[i])
        for store in (self.inputs, self.outputs, self._pruned):
            store.close()

    @property
    def weight(self) -> torch.Tensor:
        return self.block.output.weight.float()

    def run(self, input_covariance=False, output_covariance=False, norms=False, variance=False) -> None:
        projection = self.block.output
        dims, size = projection.weight.shape
        device = projection.weight.device
        self.input_covariance = Covariance(size, device) if input_covariance else None
        self.output_covariance = Covariance(dims, device) if output_covariance else None
        self.input_variance = PairMoments(size, device) if variance else None
        self.input_norm, self.block_input_norm = SquareSum(size, device), SquareSum(dims, device)
        seen = {}
        hook = projection.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
        for states in self.hidden:
            block_input = self.block.prepare(states)
            self.block.module(block_input, **self.arguments)
            x, y = seen["x"].flatten(0, -2), seen["y"].flatten(0, -2)
            if self.input_covariance:
                self.input_covariance.update(x.float())
            if self.output_covariance:
                self.output_covariance.update(y.float())
            if variance:
                self.input_variance.update(x.float(), x.float())
            if norms:
                self.input_norm.update(x.float())
                self.block_input_norm.update(block_input.flatten(0, -2).float())
            if input_covariance or norms:  # something will be removed
                self.inputs.append(x)
            self.outputs.append(y)
        hook.remove()
        taken = (self.input_norm, self.block_input_norm) if norms else ()
        for statistic in (self.input_covariance, self.output_covariance, self.input_variance, *taken):
            if statistic:
                statistic.merge()

    def recover(self, keep: torch.Tensor, recovery: str, ridge: float, new_bias: bool = True, replace: bool = True):
        """(Recovered, (error before, error after)) for the kept input columns ``keep``; replaces the outputs, if that is to be.

        Without ``new_bias`` a projection that has none gets none: the fit goes through zero.
        """
        weight, bias = self.weight, self.block.output.bias
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
        before.merge()
        moments, covariance = before, self.input_covariance
        if bias is None and not new_bias:
            moments, covariance = moments.about_zero(), covariance and covariance.about_zero()
        recovered = processes.from_first(lambda: RECOVERIES[recovery](weight, bias, keep, moments, covariance, ridge), weight.device)
        if bias is None and not new_bias:
            recovered.bias = None  # it is zero
        for i, y in enumerate(self.outputs):
            if recovered.scale is None:
                new = nn.functional.linear(self.inputs[i][:, keep].float(), recovered.weight, recovered.bias)
            else:
                new = self._pruned[i] * recovered.scale + recovered.shift
            after.update(new, y.float())
            if replace:
                self.outputs[i] = new.to(y.dtype)
        after.merge()
        return recovered, (before.relative_error(), after.relative_error())


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it was called with and hands the hidden states on."""

    def forward(self, hidden_states, **arguments):
        self.states, self.arguments = hidden_states, arguments
        return hidden_states


def _to(value, place: torch.device | torch.dtype):
    """The tensors inside on another device, or its floating-point ones in another dtype."""
    if isinstance(value, torch.Tensor):
        return value if isinstance(place, torch.dtype) and not value.is_floating_point() else value.to(place)
    if isinstance(value, dict):
        return {key: _to(item, place) for key, item in value.items()}
    return tuple(_to(item, place) for item in value) if isinstance(value, tuple) else value
