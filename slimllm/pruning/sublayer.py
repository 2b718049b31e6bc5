"""One part of a layer on all calibration tokens."""

from __future__ import annotations

import torch
from torch import nn

from ..models.adapter import Block as AdapterBlock
from ..settings.methods import RECOVERIES
from ..streaming.activations import ActivationMemory, ActivationStore
from ..streaming.statistics import Covariance, PairMoments, SquareSum
from ..utils import processes


class Sublayer:
    """The attention or the feed-forward part of one layer, on all calibration tokens.

    Its output projection maps X [T, n] to Y [T, D]. ``run`` computes both once and takes the statistics asked for;
    ``recover`` replaces Y by what the kept columns of X give, with no module run again. On exit Y joins the hidden states.
    """

    def __init__(self, hidden: ActivationStore, block: AdapterBlock, arguments: dict, memory: ActivationMemory):
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
