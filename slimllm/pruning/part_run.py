"""One part of a layer on all calibration tokens: the statistics that its scores and its recovery need, and what it gives once pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..models.adapter import Experts, Mixer, Part, ProjectedPart
from ..settings.methods import RECOVERIES
from ..streaming.activations import ActivationStore
from ..streaming.runner import LayerRunner
from ..streaming.statistics import Covariance, CrossCovariance, PairMoments, SquareSum
from ..utils import processes
from .experts_run import ExpertsRun
from .recovery import Recovered


@dataclass(frozen=True)
class Aim:
    """What the fit of a pruned part's output is to make up for: a share of what its output and the parts before it have lost by then.

    ``dense``: the part, whole, on the states of the dense model. ``share``: of what is missing, 0 to 1. ``parts``: how many parts run side
    by side and make up for it together.
    """

    dense: PartRun | ExpertsRun
    share: float
    parts: int

    def beyond(self, i: int, states: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[tokens, D] float32: what is to be added to Y, of batch ``i``, whose residual stream is ``states`` and whose Y is ``y``.

        The share of (what the part gives in the dense model - Y + what the dense residual stream is ahead by).
        """
        part, lost = self.dense.part, self.dense.hidden[i].float() - states.float()
        missing = self.dense.outputs[i].float() - y.float()
        if part.post_norm is None:  # behind a norm there is no telling what would make up for it
            missing = missing + lost.flatten(0, -2) / (part.multiplier * self.parts)
        return self.share * missing


def part_runs(runner: LayerRunner, hidden: ActivationStore, step: list[Part | Mixer], index: int) -> list[PartRun | MixerRun | ExpertsRun]:
    """The runs of the parts of one step, which read the same states ``hidden``."""

    def kind_of(part) -> type:
        return MixerRun if isinstance(part, Mixer) else ExpertsRun if isinstance(part, Experts) else PartRun

    return [kind_of(part)(runner, hidden, part, index) for part in step]


def taken(runner: LayerRunner, hidden: ActivationStore, step: list[Part | Mixer], index: int) -> list[PartRun | MixerRun | ExpertsRun]:
    """The runs of parts that read the same states, each with what it gives."""
    runs = part_runs(runner, hidden, step, index)
    for part_run in runs:
        part_run.take()
    return runs


def join(runs: list[PartRun | MixerRun | ExpertsRun]) -> None:
    """Adds what they give to the states that they read."""
    for part_run in runs:
        part_run.join()


class MixerRun:
    """A part that is run on the residual stream ``hidden`` as it is; there are no statistics to take of it."""

    def __init__(self, runner: LayerRunner, hidden: ActivationStore, part: Mixer, index: int):
        self.part, self.hidden, self._runner, self._index = part, hidden, runner, index

    def take(self) -> None:
        """Nothing: it is computed where it joins."""

    def join(self) -> None:
        """Advances the residual stream."""
        for i, states in enumerate(self.hidden):
            with self._runner.arguments_of(self.hidden, i, self._index) as arguments:
                self.hidden[i] = self.part.after(states, arguments)

    def close(self) -> None:
        """Nothing is kept."""


class PartRun:
    """A part whose output projection maps X [T, n] to Y [T, D], run on the residual stream ``hidden``.

    :meth:`take` computes both once and takes the statistics asked for; :meth:`recover` replaces Y by what the kept columns of X give, with
    no module run again; :meth:`join` adds Y to the residual stream.
    """

    def __init__(self, runner: LayerRunner, hidden: ActivationStore, part: ProjectedPart, index: int):
        self.part, self.hidden, self._arguments = part, hidden, runner.arguments[index]
        self.inputs, self.outputs, self._pruned = (runner.store() for _ in range(3))

    @property
    def weight(self) -> torch.Tensor:
        """W, the output projection's weight [D, n], in float32."""
        return self.part.output.weight.float()

    def take(self, needs: set[str] = frozenset(), aim: Aim | None = None) -> None:
        """Runs the part. ``needs``: any of ``input_covariance`` and ``input_variance`` (of X), ``output_covariance`` (of Y),
        ``input_norm`` (of X and of what the part reads, over tokens, not centred). Without any, nothing can be removed from it afterwards.
        ``aim``: what a fit of Y is to make up for besides.
        """
        projection = self.part.output
        dims, size = projection.weight.shape
        device = projection.weight.device
        self.input_covariance = Covariance(size, device) if "input_covariance" in needs else None
        self.output_covariance = Covariance(dims, device) if "output_covariance" in needs else None
        self.input_variance = PairMoments(size, device) if "input_variance" in needs else None
        self.shift = CrossCovariance(size, dims, device) if aim else None
        norms = "input_norm" in needs
        self.input_norm, self.read_norm = SquareSum(size, device), SquareSum(dims, device)
        caught = {}
        hook = projection.register_forward_hook(lambda _, args, output: caught.update(x=args[0], y=output))
        for i, states in enumerate(self.hidden):
            read = self.part.read(states)
            self.part.run(read, self._arguments)
            x, y = caught["x"].flatten(0, -2), caught["y"].flatten(0, -2)
            if self.input_covariance:
                self.input_covariance.update(x.float())
            if self.output_covariance:
                self.output_covariance.update(y.float())
            if self.input_variance:
                self.input_variance.update(x.float(), x.float())
            if aim:
                self.shift.update(x.float(), aim.beyond(i, states, y))
            if norms:
                self.input_norm.update(x.float())
                self.read_norm.update(read.flatten(0, -2).float())
            if needs - {"input_variance"}:  # something will be removed
                self.inputs.append(x)
            self.outputs.append(y)
        hook.remove()
        norm_sums = (self.input_norm, self.read_norm) if norms else ()
        for statistic in (self.input_covariance, self.output_covariance, self.input_variance, self.shift, *norm_sums):
            if statistic:
                statistic.merge()

    def fit(self, keep: torch.Tensor, recovery: str, ridge: float, new_bias: bool) -> tuple[Recovered, PairMoments]:
        """(what the output projection becomes with the input columns ``keep``, ascending indices; the moments of Ŷ and Y).

        Without ``new_bias`` a projection that has no bias gets none: the fit goes through zero.
        """
        weight, bias = self.weight, self.part.output.bias
        bias = None if bias is None else bias.float()
        before = PairMoments(len(weight), weight.device)
        gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        gone[keep] = False
        columns = gone.nonzero().flatten() if len(keep) > len(gone) / 2 else keep  # the smaller product of the two
        column_weights = weight[:, columns]
        self._pruned.close()
        for x, y in zip(self.inputs, self.outputs):
            if columns is keep:
                pruned = nn.functional.linear(x[:, keep].float(), column_weights, bias)
            else:
                pruned = y.float() - x[:, columns].float() @ column_weights.T
            before.update(pruned, y.float())
            self._pruned.append(pruned)
        before.merge()
        moments, covariance, shift = before, self.input_covariance, self.shift
        if bias is None and not new_bias:
            moments, covariance, shift = moments.about_zero(), covariance and covariance.about_zero(), shift and shift.about_zero()
        statistics = (moments, covariance, ridge, *([shift] if "look_back" in RECOVERIES[recovery].needs else []))
        recovered = processes.from_first(lambda: RECOVERIES[recovery](weight, bias, keep, *statistics), weight.device)
        if bias is None and not new_bias:
            recovered.bias = None  # it is zero
        return recovered, before

    def recover(self, keep: torch.Tensor, recovery: str, ridge: float, new_bias: bool, replace: bool):
        """:meth:`fit` on the input columns ``keep``; returns (Recovered, (error before, error after)).

        The errors are :meth:`PairMoments.relative_error` of Ŷ and of the recovered output. ``replace``: the recovered output takes the
        place of Y.
        """
        recovered, before = self.fit(keep, recovery, ridge, new_bias)
        after = PairMoments(len(recovered.weight), recovered.weight.device)
        for i, y in enumerate(self.outputs):
            new = self._recovered_output(i, keep, recovered)
            after.update(new, y.float())
            if replace:
                self.outputs[i] = new.to(y.dtype)
        after.merge()
        return recovered, (before.relative_error(), after.relative_error())

    def _recovered_output(self, i: int, keep: torch.Tensor, recovered: Recovered) -> torch.Tensor:
        if recovered.scale is None:
            return nn.functional.linear(self.inputs[i][:, keep].float(), recovered.weight, recovered.bias)
        return self._pruned[i] * recovered.scale + recovered.shift

    def join(self) -> None:
        """Adds what the part gives to the residual stream, and forgets it."""
        for i, states in enumerate(self.hidden):
            self.hidden[i] = self.part.join(states, self.outputs[i])
        self.close()

    def close(self) -> None:
        """Forgets X and Y of all tokens; the statistics stay."""
        for store in (self.inputs, self.outputs, self._pruned):
            store.close()
