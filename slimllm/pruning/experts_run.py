"""The experts of a layer on all calibration tokens: how tokens are routed to them, what they give, and their recovery.

Notation: expert e reads x and gives g_e(x) W_e a_e(x), with g the router's weight and a the input of its output projection W_e; where the
class has biases, g_e(x) (W_e a_e(x) + b_e). What the part gives is the sum over the experts that a token is routed to, and of what stays
whole beside them. None of the recoveries can raise the mean squared error on the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..models.adapter import Experts
from ..models.parts import Kept
from ..models.slicing import slice_experts
from ..settings.methods import RECOVERIES
from ..streaming.activations import ActivationStore
from ..streaming.runner import LayerRunner
from ..streaming.statistics import Covariance, CrossCovariance, PairMoments, SquareSum
from ..utils import processes

SWEEPS = 3  # over all experts, each of which is fitted to what the others leave


class ExpertsRun:
    """The experts of a layer, run on the residual stream ``hidden``.

    :meth:`take` computes what they give and how tokens are routed to them; :meth:`cut` takes some away; :meth:`recover` routes the tokens
    anew, refits those that stay to what the part gave before, and computes what it gives now; :meth:`join` adds that to the residual
    stream. ``tokens``, ``norms``: as in :class:`importance.experts.ExpertStatistics`.
    """

    def __init__(self, runner: LayerRunner, hidden: ActivationStore, part: Experts, index: int):
        self.part, self.hidden = part, hidden
        self.outputs, self._read, self._missing, self._inputs = (runner.store() for _ in range(4))
        self._routes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(self, needs: set[str] = frozenset()) -> None:
        """Runs the part. ``needs``: ``routed_output``, for ``norms``."""
        count, device = self.part.units["experts"], next(self.part.experts.parameters()).device
        self.tokens = torch.zeros(count, device=device)
        self.norms = torch.zeros(count, device=device) if "routed_output" in needs else None
        for states in self.hidden:
            given, _, call = self._give(states)
            self.outputs.append(given)
            self._count(*call)
        processes.add(*(sums for sums in (self.tokens, self.norms) if sums is not None))

    def _give(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple]:
        """(what the part gives, [T, D]; what of that its experts alone give; what they were called with) for some of the residual stream.
        Where what they give together is scaled behind them, their weights are taken as scaled.
        """
        caught, scale = [], self.part.scale
        hook = self.part.experts.register_forward_hook(lambda _, args, output: caught.extend((output, args)))
        given = self.part.give(states)
        hook.remove()
        output, (read, routed, weights) = caught
        if scale != 1:
            output, weights = output * scale, weights * scale
        return given.flatten(0, -2), output, (read, routed, weights)

    def _count(self, states: torch.Tensor, routed: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds up over tokens: their ``states`` [T, D], the experts that they are ``routed`` to [T, k], and these experts' ``weights``."""
        for expert in range(len(self.tokens)):
            rows, places = torch.where(routed == expert)
            self.tokens[expert] += len(rows)
            if self.norms is not None and len(rows):
                alone = (values[rows, places][:, None] for values in (routed, weights))
                self.norms[expert] += self.part.experts(states[rows], *alone).float().norm(dim=-1).sum()

    def take_channels(self, needs: set[str]) -> None:
        """Statistics of the channels of each expert that is left, on the tokens that are routed to it now. ``needs``:
        ``output_covariance``, of what the part gave, and ``input_variance``.
        """
        count, size = self.part.units.values()
        dims, device = self.outputs[0].shape[-1], self.outputs[0].device
        self.input_norms, self.read_norms = ([SquareSum(n, device) for _ in range(count)] for n in (size, dims))
        self.input_variances = [PairMoments(size, device) for _ in range(count)] if "input_variance" in needs else None
        self.output_covariance = Covariance(dims, device) if "output_covariance" in needs else None
        for i, states in enumerate(self.hidden):
            read, routed, weights = self._give(states)[2]
            if self.output_covariance:
                self.output_covariance.update(self.outputs[i].float())
            for expert in range(count):
                rows, inputs = self._weighted_inputs(read, routed, weights, expert)
                if len(rows):
                    self.input_norms[expert].update(inputs[:, :size])
                    self.read_norms[expert].update(read[rows].float())
                    if self.input_variances:
                        self.input_variances[expert].update(inputs[:, :size], inputs[:, :size])
        for statistic in (*self.input_norms, *self.read_norms, *(self.input_variances or ()), self.output_covariance):
            if statistic:
                statistic.merge()

    def cut(self, kept: Kept) -> None:
        """Takes all that is not ``kept`` away, in place."""
        slice_experts(self.part, kept)

    def recover(
        self, recovery: str, ridge_for: Callable[[int], float], replace: bool, beyond: Callable | None = None
    ) -> tuple[tuple[float, float], int]:
        """Refits what is left, in place; returns ((error before, error after), how many experts saw too few tokens to be fitted).

        The errors are :meth:`PairMoments.relative_error` of what the part gives without and with the recovery. ``ridge_for(tokens)``: the
        strength of the ridge; ``beyond``: as :meth:`part_run.Aim.beyond`. ``replace``: what the part gives from now on takes the place of
        what it gave.
        """
        starved = 0
        if recovery == "none" or not self.part.row.fits:
            return ((error := self._finish(replace)), error), starved
        before, moments = self._route(beyond)
        if "look_back" in RECOVERIES[recovery].needs:
            starved = self._sweep(recovery, ridge_for)
        else:
            self._scale(recovery, moments.about_zero())
        return (before.relative_error(), self._finish(replace)), starved

    def _route(self, beyond: Callable | None) -> tuple[PairMoments, PairMoments]:
        """Routes the tokens to what is left, and keeps what they read and what is missing of the output; returns the moments of the part's
        output now and before, and those of its experts' alone.
        """
        moments = None
        for i, states in enumerate(self.hidden):
            (given, by_experts, (read, routed, weights)), wanted = self._give(states), self.outputs[i].float()
            given, by_experts = given.float(), by_experts.float()
            moments = moments or [PairMoments(given.shape[-1], given.device) for _ in range(2)]
            moments[0].update(given, wanted)
            if beyond:
                wanted = wanted + beyond(i, states, self.outputs[i])
            moments[1].update(by_experts, by_experts + wanted - given)
            self._read.append(read)
            self._routes.append((routed, weights))
            self._missing.append(wanted - given)
        for moment in moments:
            moment.merge()
        return tuple(moments)

    def _scale(self, recovery: str, moments: PairMoments) -> None:
        """A recovery of each output dimension, through zero: the rows of all output projections are scaled alike (Eq. e)."""
        size = len(moments.mean_x)
        nothing = torch.zeros(size, 0, device=moments.mean_x.device), None, torch.zeros(0, dtype=torch.long, device=moments.mean_x.device)
        scale = processes.from_first(lambda: RECOVERIES[recovery](*nothing, moments, None, None), moments.mean_x.device).scale
        for expert in range(self.part.units["experts"]):
            weight, bias = self.part.projection(expert)
            weight.mul_(scale[:, None].to(weight.dtype))
            if bias is not None:
                bias.mul_(scale.to(bias.dtype))

    def _sweep(self, recovery: str, ridge_for: Callable[[int], float]) -> int:
        """Fits the experts one after the other, each to what is missing by then, SWEEPS times (block Gauss-Seidel). One that saw fewer
        tokens than its output projection has inputs stays as it is; returns how many these are.
        """
        count = self.part.units["experts"]
        tokens = sum(torch.bincount(routed.flatten(), minlength=count) for routed, _ in self._routes)
        processes.add(tokens)
        fitted = [expert for expert in range(count) if tokens[expert] >= self.part.units["channels"]]
        for _ in range(SWEEPS):
            for expert in fitted:
                self._fit(expert, recovery, ridge_for(int(tokens[expert])))
        return count - len(fitted)

    def _fit(self, expert: int, recovery: str, ridge: float) -> None:
        """Fits one expert's output projection to what is missing, from the tokens that are routed to it (Eq. i)."""
        weight, bias = self.part.projection(expert)
        columns = weight.float() if bias is None else torch.cat([weight.float(), bias.float()[:, None]], 1)
        (dims, size), device = columns.shape, weight.device
        covariance, shift, rows_of = Covariance(size, device), CrossCovariance(size, dims, device), {}
        for i in range(len(self._missing)):
            rows, inputs = self._weighted_inputs(self._read[i], *self._routes[i], expert)
            if len(rows):
                rows_of[i] = rows
                self._inputs.append(inputs)
                covariance.update(inputs)
                shift.update(inputs, self._missing[i][rows])
        covariance.merge()
        shift.merge()
        covariance, shift = covariance.about_zero(), shift.about_zero()
        everything = torch.arange(size, device=device), PairMoments(dims, device)
        refit = lambda: RECOVERIES[recovery](columns, None, *everything, covariance, ridge, shift)  # noqa: E731
        new = processes.from_first(refit, device).weight.to(weight.dtype)
        change = new.float() - columns
        gain = 2 * (change * shift.matrix().T).sum() - (change @ covariance.matrix() * change).sum()
        if gain > 0:  # not so only where rounding to the weights' own type undoes it
            weight.copy_(new[:, : weight.shape[1]])
            if bias is not None:
                bias.copy_(new[:, -1])
            for (i, rows), inputs in zip(rows_of.items(), self._inputs):
                self._missing[i] = self._missing[i].index_add(0, rows, inputs @ change.T, alpha=-1)
        self._inputs.close()

    def _weighted_inputs(
        self, read: torch.Tensor, routed: torch.Tensor, weights: torch.Tensor, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(which tokens of a batch are routed to an expert; g a of each [rows, I], with g as one more column where it has a bias)."""
        rows, places = torch.where(routed == expert)
        share = weights[rows, places].float()[:, None]
        inputs = self.part.activations(expert, read[rows]).float() * share
        return rows, inputs if self.part.projection(expert)[1] is None else torch.cat([inputs, share], 1)

    def _finish(self, replace: bool) -> float:
        """The error of what the part gives now."""
        moments = None
        for i, states in enumerate(self.hidden):
            given, before = self._give(states)[0], self.outputs[i]
            moments = moments or PairMoments(given.shape[-1], given.device)
            moments.update(given.float(), before.float())
            if replace:
                self.outputs[i] = given
        moments.merge()
        return moments.relative_error()

    def join(self) -> None:
        """Adds what the part gives to the residual stream, and forgets it."""
        for i, states in enumerate(self.hidden):
            self.hidden[i] = self.part.join(states, self.outputs[i])
        self.close()

    def close(self) -> None:
        """Forgets what the part gives and what its experts read; the statistics stay."""
        self._routes = []
        for store in (self.outputs, self._read, self._missing, self._inputs):
            store.close()
