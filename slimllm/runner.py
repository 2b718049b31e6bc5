"""Runs single layers on the calibration tokens, and takes the statistics that pruning one of them needs."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from .cli import UserError
from .config import PruneConfig
from .families import Family
from .importance.layers import cosine_sum
from .recovery import RECOVERIES
from .statistics import ActivationStore, Covariance, MemoryBudget, PairMoments, SquareSum

TOKENS_PER_BATCH = 2048
MIN_ACTIVATION_BYTES = 64 << 20
LOGIT_ROWS = 64  # no more rows of the vocabulary's width are held in float32 at a time


class LayerRunner:
    """Runs single layers on the calibration tokens, on ``device``, whatever device the model itself is on."""

    def __init__(self, model, family: Family, ids: torch.Tensor, device):
        self.family, self.ids, self.device = family, ids, torch.device(device)
        self.decoder, self.head = getattr(model, family.decoder), model.lm_head
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

    def embed(self, dtype: torch.dtype | None = None) -> ActivationStore:
        """The hidden states before the first layer, in ``dtype`` or the model's own."""
        hidden = ActivationStore(self.budget)
        for batch in self.ids.split(self.batch):
            hidden.append(self.decoder.embed_tokens(batch.to(self.home)).to(device=self.device, dtype=dtype))
        return hidden

    @contextmanager
    def layer(self, index: int):
        layer = self.layers[index].to(self.device)
        yield layer
        layer.to(self.home)

    def advance(self, hidden: ActivationStore, layer: nn.Module, index: int) -> float:
        """Replaces the hidden states by the layer's output; returns the mean cosine similarity of the two."""
        cosines, arguments = 0.0, None
        for i, states in enumerate(hidden):
            arguments = arguments or _to(self.kwargs[index], states.dtype)
            output = layer(states, **arguments)
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

    def divergences(self, reference: ActivationStore, others: list[ActivationStore]) -> list[float]:
        """Mean over tokens of KL(p || q) in nats, one for each of ``others``.

        p and q are the next-token distributions that follow from the last layer's states in ``reference`` and the other.
        """
        norm, head = (copy.deepcopy(module).to(device=self.device, dtype=reference[0].dtype) for module in (self.decoder.norm, self.head))
        totals = [0.0] * len(others)
        for i, states in enumerate(reference):
            chunks = states.flatten(0, 1).split(LOGIT_ROWS)
            rivals = [other[i].flatten(0, 1).split(LOGIT_ROWS) for other in others]
            for c, rows in enumerate(chunks):
                log_p = head(norm(rows)).float().log_softmax(-1)
                p = log_p.exp()
                entropy = float((p * log_p).sum())
                for k, rival in enumerate(rivals):
                    logits = head(norm(rival[c])).float()  # sum of p log q = sum of p logits - logsumexp(logits)
                    totals[k] += entropy - float((p * logits).sum() - logits.logsumexp(-1).sum())
        return [total / self.ids.numel() for total in totals]


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

    def recover(self, keep: torch.Tensor, config: PruneConfig, new_bias: bool = True):
        """(Recovered, (error before, error after)) for the kept input columns ``keep``; replaces the outputs.

        Without ``new_bias`` a projection that has none gets none: the fit goes through zero.
        """
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
        moments, covariance = before, self.input_covariance
        if bias is None and not new_bias:
            moments, covariance = moments.about_zero(), covariance and covariance.about_zero()
        recovered = RECOVERIES[config.recovery](weight, bias, keep, moments, covariance, config.ridge)
        if bias is None and not new_bias:
            recovered.bias = None  # it is zero
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


def _to(value, place: torch.device | torch.dtype):
    """The tensors inside on another device, or its floating-point ones in another dtype."""
    if isinstance(value, torch.Tensor):
        return value if isinstance(place, torch.dtype) and not value.is_floating_point() else value.to(place)
    if isinstance(value, dict):
        return {key: _to(item, place) for key, item in value.items()}
    return tuple(_to(item, place) for item in value) if isinstance(value, tuple) else value
