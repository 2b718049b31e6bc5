"""Runs single layers on the calibration tokens, and takes the statistics that pruning one of them needs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UserError
from ..models.source import ModelSource
from ..utils import processes
from ..utils.device import resolved
from ..utils.memory import activation_room
from .activations import ActivationMemory, ActivationStore
from .divergence import Divergence
from .progress import Progress, no_progress

TOKENS_PER_BATCH = 2048
MIN_ACTIVATION_BYTES = 64 << 20
LOGIT_ROWS = 64  # no more rows of the vocabulary's width are held in float32 at a time


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
        self.memory = ActivationMemory(activation_room(self.device, max(MIN_ACTIVATION_BYTES, layer_bytes)), tmp_dir)
        self.arguments: list[dict] | None = None

    def store(self) -> ActivationStore:
        """An empty store for activations, which shares the memory that this runner may use with its other stores."""
        return ActivationStore(self.memory)

    @contextmanager
    def _decoder(self):
        """(the decoder with recorders in place of its layers, the first recorder)"""
        recorders = nn.ModuleList(_Recorder(layer, self.adapter.family.pairs) for layer in self.adapter.layers(self.source.model))
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

    def output(self, layer: nn.Module, states: torch.Tensor, index: int) -> torch.Tensor:
        """What the layer makes of the states of some samples [samples, length, D]."""
        output = layer(states, **self.arguments[index])
        return output[0] if isinstance(output, tuple) else output

    def advance(self, hidden: ActivationStore, layer: nn.Module, index: int) -> float:
        """Replaces the hidden states by the layer's output; returns the sum over tokens of the cosine similarity of the two."""
        cosines = 0.0
        for i, states in enumerate(hidden):
            output = self.output(layer, states, index)
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
                for k, rival in enumerate(rivals):
                    totals[k] += float(Divergence.apply(self.adapter.logits(head, norm(rival[c])), log_p, p))
        *sums, tokens = processes.total(*totals, self.ids.numel())
        return [value / tokens for value in sums]


@contextmanager
def frozen(layer: nn.Module):
    """No parameter of the layer takes a gradient, unless the block asks for one; afterwards each does as before."""
    before = [parameter.requires_grad for parameter in layer.parameters()]
    layer.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in zip(layer.parameters(), before):
            parameter.requires_grad_(required)


def mean_cosines(sums: list[float], tokens: int) -> list[float]:
    """Means [L] of cosines whose sums over this process's ``tokens`` are given. Raises UserError where one is not finite."""
    *sums, tokens = processes.total(*sums, tokens)
    bad = [index for index, value in enumerate(sums) if not math.isfinite(value)]
    if bad:
        raise UserError(f"layer {bad[0]} gives values that are not finite on the calibration tokens; try --dtype float32 or bfloat16")
    return [value / tokens for value in sums]


class _Recorder(nn.Module):
    """Stands in for a layer, with the settings that decoders ask their layers for: keeps what it was called with and hands the hidden
    states on, in a pair where the layer's decoder takes one.
    """

    def __init__(self, layer: nn.Module, pair: bool):
        super().__init__()
        self._pair = pair
        self.__dict__ |= {name: value for name, value in vars(layer).items() if isinstance(value, str | int)}
        self._names = list(inspect.signature(layer.forward).parameters)[1:]

    def forward(self, hidden_states, *places, **arguments):
        self.states, self.arguments = hidden_states, dict(zip(self._names, places)) | arguments
        return (hidden_states, None) if self._pair else hidden_states


def _to(value, place: torch.device | torch.dtype):
    """The tensors inside on another device, or its floating-point ones in another dtype."""
    if isinstance(value, torch.Tensor):
        return value if isinstance(place, torch.dtype) and not value.is_floating_point() else value.to(place)
    if isinstance(value, dict):
        return {key: _to(item, place) for key, item in value.items()}
    return tuple(_to(item, place) for item in value) if isinstance(value, tuple) else value


def cosine_sum(inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    """Sum over tokens of the cosine similarity of a layer's input and output, both [..., D].

    Divided by the number of tokens it is c_l: a layer whose output points almost where its input does (cosine near 1) matters less.
    """
    return float(torch.nn.functional.cosine_similarity(inputs.float(), outputs.float(), dim=-1).double().sum())
