"""Which units of a part stay: for each kind of part, the statistics that its scores need, and the choice itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..models.adapter import blocks_of_columns
from ..models.parts import Kept, PartShape
from ..settings.methods import CHANNEL_SCORES, HEAD_CHOICES
from ..settings.pruning import PruneConfig
from .importance.channels import ChannelStatistics, select_channels
from .importance.heads import HeadStatistics
from .part_run import PartRun


@dataclass(frozen=True)
class Choice:
    """What is known where the units of one part are chosen.

    ``run``: the part with its statistics. ``shape``: what it has. ``steps``: how many of the steps in which its units go it is to keep
    (:meth:`parts.AttentionShape.steps`). ``saliency``: first-order importance of its units, by sort, where gradients were taken.
    """

    run: PartRun
    shape: PartShape
    steps: int
    config: PruneConfig
    index: int
    saliency: dict[str, torch.Tensor] | None = None


def needs_of(kind: str, config: PruneConfig, chosen: bool) -> frozenset[str]:
    """The statistics that a part of this kind is pruned by. ``chosen``: which of its units stay is decided by importance, not by a plan."""
    of_kind = _KINDS[kind]
    return of_kind.always | (of_kind.table[getattr(config, of_kind.flag)].needs if chosen else frozenset())


def choose(kind: str, choice: Choice) -> Kept:
    """The units to keep, ascending. Raises UserError where a function of the tables gives something else."""
    kept, expected = _KINDS[kind].choose(choice), choice.shape.steps(choice.config.head_unit).units(choice.steps)
    for sort, indices in kept.items():
        whole = isinstance(indices, list) and all(isinstance(i, int) and 0 <= i < choice.shape.units[sort] for i in indices)
        if not whole or indices != sorted(set(indices)) or len(indices) != expected[sort]:
            raise UserError(
                f"{_flag_of(kind, choice.config)}, layer {choice.index}: it keeps the {sort} {indices}; it is to keep {expected[sort]} of "
                f"{choice.shape.units[sort]}, as a list of different whole numbers, ascending"
            )
    if fault := choice.shape.check_kept(kept):
        raise UserError(f"{_flag_of(kind, choice.config)}, layer {choice.index}: {fault}")
    return kept


def _flag_of(kind: str, config: PruneConfig) -> str:
    flag = _KINDS[kind].flag
    return f"--{flag} {getattr(config, flag)}"


def heads(c: Choice) -> Kept:
    """Query heads and KV heads by their importance, on whatever unit the heads go in."""
    steps, choice = c.shape.steps(c.config.head_unit), HEAD_CHOICES[c.config.head_choice]
    statistics = HeadStatistics(
        c.run.input_covariance.matrix(),
        c.run.weight,
        steps.candidates,
        steps.runs,
        input_norm=c.run.input_norm.norm() if "input_norm" in choice.needs else None,
        saliency=c.saliency and _of_candidates(c.saliency, steps.candidates),
        seed=c.config.seed + c.index,
    )
    keep = choice(statistics, steps.count - c.steps)
    if steps.by_query:
        return {"heads": keep, "kv_heads": list(range(c.shape.kv_heads))}
    return {"heads": blocks_of_columns(torch.tensor(keep), c.shape.heads // c.shape.kv_heads).tolist(), "kv_heads": keep}


def _of_candidates(saliency: dict[str, torch.Tensor], candidates: int) -> torch.Tensor:
    """Sums over each of so many equal runs of heads, [candidates]: a KV head goes only with all its query heads."""
    sums = saliency["heads"].view(candidates, -1).sum(1)
    return sums + saliency["kv_heads"] if candidates == len(saliency["kv_heads"]) else sums


def channels(c: Choice) -> Kept:
    """Feed-forward channels by their importance."""
    statistics = ChannelStatistics(
        c.run.output_covariance and c.run.output_covariance.matrix(),
        c.run.weight,
        *c.run.part.gate_and_up(),
        c.run.input_norm.norm(),
        c.run.read_norm.norm(),
        input_variance=c.run.input_variance and c.run.input_variance.var_x,
        saliency=c.saliency and c.saliency["channels"],
        seed=c.config.seed + c.index,
    )
    scores = CHANNEL_SCORES[c.config.channel_score](statistics)
    if scores.shape != (c.shape.channels,) or not bool(scores.isfinite().all()):
        raise UserError(
            f"{_flag_of('mlp', c.config)}, layer {c.index}: it gives scores of shape {list(scores.shape)}, or some that are not finite; "
            f"it is to give one number for each of {c.shape.channels} channels"
        )
    return {"channels": select_channels(scores, c.shape.channels - c.steps, c.config.keep_lowest).tolist()}


@dataclass(frozen=True)
class _Kind:
    """How parts of one kind are chosen from: the ``table`` of scores, the ``flag`` that names one, and the statistics that all need."""

    table: dict
    flag: str
    always: frozenset[str]
    choose: Callable[[Choice], Kept]


_KINDS = {
    "attention": _Kind(HEAD_CHOICES, "head_choice", frozenset({"input_covariance"}), heads),
    "mlp": _Kind(CHANNEL_SCORES, "channel_score", frozenset({"input_norm"}), channels),
}
