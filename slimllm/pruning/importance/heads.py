"""Head importance and the greedy search (paper Algorithm 1), from a covariance instead of per-token outputs.

X [T, n] is the input of o_proj with weight W [D, n]; unit i (a head, or a KV group's heads together) owns a block of
columns, and O_i = X_i W_i^T is its output. With C the covariance of X,
gram[i, i′, d] = W_i[d] C_ii′ W_i′[d]^T = Cov(O_i[:, d], O_i′[:, d]) (Eq. b of docs/method.md), so the similarity of any set of units
follows without the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class HeadStatistics:
    """One attention. covariance: [n, n] of the output projection's input. weight: [D, n]. units: into how many equal blocks of
    columns the input falls. groups: how many equal runs of units there are, each of which loses the same number. input_norm: [n],
    ||X[:, j]|| over tokens. saliency: [units], from gradients (:mod:`taylor`). seed: for what is random. Norm and saliency are None
    for a choice that does not need them (HeadChoice).
    """

    covariance: torch.Tensor
    weight: torch.Tensor
    units: int
    groups: int = 1
    input_norm: torch.Tensor | None = None
    saliency: torch.Tensor | None = None
    seed: int = 0

    @cached_property
    def gram(self) -> torch.Tensor:
        """Of the outputs of the units: :func:`output_gram`."""
        return output_gram(self.covariance, self.weight, self.units)


def greedy(s: HeadStatistics, removed: int) -> list[int]:
    """The paper's Algorithm 1: the units that matter least go, then swaps that raise the similarity."""
    return greedy_search(s.gram, removed, s.groups)


def leave_one_out_only(s: HeadStatistics, removed: int) -> list[int]:
    """The first step of Algorithm 1 alone: the units without which the similarity stays highest go."""
    return greedy_search(s.gram, removed, s.groups, swap=False)


def _highest(column_scores: torch.Tensor, s: HeadStatistics, removed: int) -> list[int]:
    """The units to keep where the importance of each is the sum of its columns' (or heads'), and the lowest of each group go."""
    scores = column_scores.view(s.groups, s.units // s.groups, -1).sum(-1)
    kept = scores.argsort(dim=1, descending=True, stable=True)[:, : scores.shape[1] - removed]
    return (kept + torch.arange(s.groups, device=kept.device)[:, None] * scores.shape[1]).flatten().sort().values.tolist()


def taylor(s: HeadStatistics, removed: int) -> list[int]:
    """LLM-Pruner's (Ma et al. 2023): sum of |weight * its gradient| over the rows of queries, keys and values and the columns of W."""
    return _highest(s.saliency, s, removed)


def fluctuation(s: HeadStatistics, removed: int) -> list[int]:
    """FLAP's (An et al. 2024): mean over a unit's columns of (Var(X[:, j]) ||W[:, j]||^2)^2."""
    return _highest((s.covariance.diagonal() * s.weight.square().sum(0)).square(), s, removed)


def wanda(s: HeadStatistics, removed: int) -> list[int]:
    """Wanda-sp's (An et al. 2024): sum over a unit's columns of mean_d |W[d, j]| * ||X[:, j]||."""
    return _highest(s.weight.abs().mean(0) * s.input_norm, s, removed)


def magnitude(s: HeadStatistics, removed: int) -> list[int]:
    """Sum over a unit's columns of ||W[:, j]||: no activations at all."""
    return _highest(s.weight.norm(dim=0), s, removed)


def random(s: HeadStatistics, removed: int) -> list[int]:
    """Chance, the floor that any choice must beat."""
    return _highest(torch.rand(s.units, generator=torch.Generator().manual_seed(s.seed)), s, removed)


def output_gram(covariance: torch.Tensor, weight: torch.Tensor, units: int) -> torch.Tensor:
    """Covariances of the units' outputs, per output dimension (Eq. b).

    Args:
        covariance: [n, n] of the projection's input. weight: [D, n]. units: how many equal blocks of columns.
    Returns:
        [units, units, D], float64.
    """
    dims, size = weight.shape
    width = size // units
    gram = torch.empty(units, units, dims, dtype=torch.float64, device=weight.device)
    for i in range(units):
        start = i * width
        product = weight[:, start : start + width] @ covariance[start : start + width, start:]  # [D, n - start]
        row = (product * weight[:, start:]).view(dims, units - i, width).sum(-1).T.double()
        gram[i, i:] = row
        gram[i:, i] = row
    return gram


def similarity(gram: torch.Tensor, keep: list[int]) -> float:
    """sim(S): sum over output dimensions of |Pearson correlation| of the kept units' sum with the whole output Y (Eq. a).

    A dimension in which either does not vary counts as 0. ``gram`` [units, units, D]; ``keep``: S, the indices of these units.
    """
    kept = gram[keep]
    return float(_correlation(kept[:, keep].sum((0, 1)), kept.sum((0, 1)), gram.sum((0, 1))).sum())


def _correlation(var_kept, covariance, var_all):
    scale = (var_kept.clamp_min(0) * var_all.clamp_min(0)).sqrt()
    return torch.where(scale > 0, covariance.abs() / torch.where(scale > 0, scale, 1.0), 0.0)


def leave_one_out(gram: torch.Tensor) -> torch.Tensor:
    """sim(all but i) for each unit i, [units]: the higher, the less the unit matters."""
    var_all = gram.sum((0, 1))
    total = gram.sum(1)  # [units, D]: Cov(O_i, Y)
    var_rest = var_all - 2 * total + gram.diagonal(dim1=0, dim2=1).T
    return _correlation(var_rest, var_all - total, var_all).sum(-1)


def greedy_search(gram: torch.Tensor, removed: int, groups: int = 1, swap: bool = True) -> list[int]:
    """The units to keep, ascending.

    The ``removed`` units with the highest leave-one-out similarity go; then each of them, in that order, is tried in
    place of every kept unit, and the best swap is taken if it raises sim(S). With ``groups`` > 1 the units form that
    many equal runs (the query heads of each KV head), each of which loses ``removed`` units, and swaps stay inside a run.

    ``gram`` [units, units, D] as from :func:`output_gram`. Cost: O(units * D) per tried unit, whatever the number of tokens.
    """
    units = gram.shape[0]
    size = units // groups
    score = leave_one_out(gram).view(groups, size)
    order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :removed]
    gone = (order + torch.arange(groups, device=order.device)[:, None] * size).flatten()
    gone = gone[torch.argsort(score.flatten()[gone], descending=True, stable=True)].tolist()
    kept = torch.ones(units, dtype=torch.bool, device=gram.device)
    kept[gone] = False
    if swap and removed:
        _swap(gram, kept, gone, size)
    return kept.nonzero().flatten().tolist()


def _swap(gram: torch.Tensor, kept: torch.Tensor, gone: list[int], group_size: int) -> None:
    """Tries each unit of ``gone`` in place of each kept unit of its group; updates ``kept`` in place."""
    var_all, with_all = gram.sum((0, 1)), gram.sum(1)
    var_unit = gram.diagonal(dim1=0, dim2=1).T  # [units, D]: Var(O_i)
    best = similarity(gram, kept.nonzero().flatten().tolist())
    for unit in gone:
        rivals = kept.nonzero().flatten()
        with_kept = gram[:, rivals].sum(1)  # [units, D]: Cov(O_i, sum of the kept)
        var_kept, cov_kept = with_kept[rivals].sum(0), with_all[rivals].sum(0)
        rivals = rivals[rivals // group_size == unit // group_size]
        variance = var_kept - 2 * with_kept[rivals] + var_unit[rivals] + 2 * (with_kept[unit] - gram[unit, rivals]) + var_unit[unit]
        candidates = _correlation(variance, cov_kept - with_all[rivals] + with_all[unit], var_all).sum(-1)
        value, index = candidates.max(0)
        if value > best:
            best = float(value)
            kept[rivals[index]] = False
            kept[unit] = True
