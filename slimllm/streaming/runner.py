"""Runs single layers on the calibration tokens, and takes the statistics that pruning one of them needs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
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
        self._token_inputs: list[ActivationStore] = []  # one for each layer, of families whose layers are given something for each token

    def store(self) -> ActivationStore:
        """An empty store for activations, which shares the memory that this runner may use with its other stores."""
        return ActivationStore(self.memory)

    @contextmanager
    def _decoder(self):
        """(what runs the decoder with recorders in place of its layers, the first recorder)"""
        recorders = nn.ModuleList(_Recorder(layer, self.adapter.family.pairs) for layer in self.adapter.layers(self.source.model))
        with self.source.decoder(recorders) as decoder:

            def run(ids):
                decoder(input_ids=ids.to(self.source.home), use_cache=False)

            if self.arguments is None:
                run(self.ids[:1])
                self.arguments = [self._own(recorder.arguments) for recorder in recorders]
                self._keep_token_inputs(run, recorders)
            yield run, recorders[0]

    def _own(self, value):
        return _to(_to(value, self.device), self.dtype)

    def _keep_token_inputs(self, run, recorders) -> None:
        name = self.adapter.family.token_input
        if self.arguments[0].get(name) is None:
            return
        self._token_inputs = [self.store() for _ in recorders]
        for batch in self.ids.split(self.batch):
            run(batch)
            for store, recorder in zip(self._token_inputs, recorders):
                store.append(self._own(recorder.arguments[name]).contiguous())

    def prepare(self) -> None:
        """Finds the ``arguments`` of the layers where no states are embedded."""
        with self._decoder():
            pass

    @contextmanager
    def arguments_of(self, hidden: ActivationStore, i: int, index: int, shared: torch.Tensor | None = None):
        """What layer ``index`` is called with besides the states of batch ``i`` of ``hidden``; the keys and values that it leaves there
        for later layers are kept beside ``hidden``. ``shared``: those of an earlier layer [2, ...], where not those beside ``hidden``.
        """
        family, arguments = self.adapter.family, dict(self.arguments[index])
        if self._token_inputs:
            arguments[family.token_input] = self._token_inputs[index][i]
        if family.shared is None:
            yield arguments
            return
        kind = self.source.config.layer_types[index]
        shared = self._shared(hidden, i, kind) if shared is None else shared
        arguments[family.shared] = {} if shared is None else {kind: tuple(shared)}
        yield arguments
        if shared is None and kind in arguments[family.shared]:
            hidden.store_beside(kind).append(torch.stack(arguments[family.shared][kind]).detach())

    @staticmethod
    def _shared(hidden: ActivationStore, i: int, kind: str) -> torch.Tensor | None:
        """The keys and values that layers of this kind share of batch ``i`` [2, ...], where one has left them."""
        store = hidden.beside.get(kind, ())
        return store[i] if i < len(store) else None

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

    def backward(
        self, layer: nn.Module, index: int, inputs: ActivationStore, upstream: ActivationStore, i: int, others: Callable[[], list]
    ) -> list[torch.Tensor]:
        """Replaces batch ``i`` of ``upstream``, the gradient of what the layer gives, by that of what it was given, batch ``i`` of
        ``inputs``; returns those of the tensors that ``others()`` names once the layer has run.

        Gradients of keys and values that layers share add up beside ``upstream`` until the layer that left them takes them.
        """
        kind = self.source.config.layer_types[index] if self.adapter.family.shared else ""
        states, shared = inputs[i].detach().requires_grad_(), self._shared(inputs, i, kind)
        shared = None if shared is None else shared.detach().requires_grad_()
        with torch.enable_grad(), self.arguments_of(inputs, i, index, shared) as arguments:
            outputs, gradients = [_states_of(layer(states, **arguments))], [upstream[i]]
            sums = upstream.beside.get(f"gradient of {kind}", ())
            if shared is None and len(sums) and kind in arguments[self.adapter.family.shared]:
                outputs.append(torch.stack(arguments[self.adapter.family.shared][kind]))
                gradients.append(sums[i])
        wanted = [states, *([] if shared is None else [shared]), *others()]
        upstream[i], *found = torch.autograd.grad(outputs, wanted, gradients)
        if shared is not None:
            into, own = upstream.store_beside(f"gradient of {kind}"), found.pop(0)
            if i < len(into):
                into[i] = into[i] + own
            else:
                into.append(own)
        return found

    def advance(self, hidden: ActivationStore, layer: nn.Module, index: int) -> float:
        """Replaces the hidden states by the layer's output; returns the sum over tokens of the cosine similarity of the two."""
        cosines = 0.0
        for i, states in enumerate(hidden):
            with self.arguments_of(hidden, i, index) as arguments:
                output = _states_of(layer(states, **arguments))
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


def _states_of(output) -> torch.Tensor:
    """The states that a layer gives, alone or with something beside them."""
    return output[0] if isinstance(output, tuple) else output


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


def _to(value, place):
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
