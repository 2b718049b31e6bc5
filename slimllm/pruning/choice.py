"""Which units of a part stay: for each kind of part, the statistics that its scores need, and the choice itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import UserError
from ..models.adapter import blocks_of_columns
from ..models.parts import Kept, PartShape
from ..settings.methods import CHANNEL_SCORES, EXPERT_SCORES, HEAD_CHOICES, RECOVERIES
from ..settings.pruning import PruneConfig
from .experts_run import ExpertsRun
from .importance.channels import ChannelStatistics, eigendecomposition, select_channels
from .importance.experts import ExpertStatistics
from .importance.heads import HeadStatistics
from .importance.taylor import Saliency
from .part_run import PartRun


@dataclass(frozen=True)
class Choice:
    """What is known where the units of one part are chosen.

    ``run``: the part with its statistics. ``shape``: what it has. ``saliency``: first-order importance of its units, by sort, where
    gradients were taken.
    """

    run: PartRun | ExpertsRun
    shape: PartShape
    config: PruneConfig
    index: int
    saliency: dict[str, torch.Tensor] | None = None

    @cached_property
    def scores(self):
        """What its kind chooses by, the same however many units stay: HeadStatistics, or the importance of each channel or expert."""
        return _KINDS[self.shape.kind].scores(self)


def choice_of(run: PartRun | ExpertsRun, shape: PartShape, config: PruneConfig, index: int, saliency: Saliency | None) -> Choice:
    """The choice from a part of layer ``index``; ``saliency``: first-order importance in that layer, where it was measured."""
    own = saliency and {sort: values.to(run.weight.device) for sort, values in saliency[shape.kind].items()}
    return Choice(run, shape, config, index, own)


def needs_of(kind: str, config: PruneConfig, chosen: bool) -> frozenset[str]:
    """The statistics that a part of this kind is pruned and recovered by. ``chosen``: which of its units stay is decided by importance, not
    by a plan.
    """
    of_kind = _KINDS[kind]
    recovery = RECOVERIES[config.recovery].needs & {"input_covariance"} if of_kind.recovered else frozenset()
    return of_kind.always | recovery | (of_kind.table[getattr(config, of_kind.flag)].needs if chosen else frozenset())


def choose(choice: Choice, steps: int) -> Kept:
    """The units to keep, ascending, where the part is to keep so many ``steps`` (:meth:`parts.AttentionShape.steps`).

    Raises UserError where a function of the tables gives something else.
    """
    kind = choice.shape.kind
    kept, expected = _KINDS[kind].choose(choice, steps), choice.shape.units | choice.shape.steps(choice.config.head_unit).units(steps)
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


def head_scores(c: Choice) -> HeadStatistics:
    """What query heads or KV heads are chosen by, on whatever unit the heads go in."""
    steps, choice = c.shape.steps(c.config.head_unit), HEAD_CHOICES[c.config.head_choice]
    return HeadStatistics(
        c.run.input_covariance.matrix(),
        c.run.weight,
        steps.candidates,
        steps.runs,
        input_norm=c.run.input_norm.norm() if "input_norm" in choice.needs else None,
        saliency=c.saliency and _of_candidates(c.saliency, steps.candidates),
        seed=c.config.seed + c.index,
    )


def heads(c: Choice, kept_steps: int) -> Kept:
    """Query heads and KV heads by their importance."""
    steps = c.shape.steps(c.config.head_unit)
    keep = HEAD_CHOICES[c.config.head_choice](c.scores, steps.count - kept_steps)
    if steps.by_query:
        return {"heads": keep, "kv_heads": list(range(c.shape.kv_heads))}
    return {"heads": blocks_of_columns(torch.tensor(keep), c.shape.heads // c.shape.kv_heads).tolist(), "kv_heads": keep}


def _of_candidates(saliency: dict[str, torch.Tensor], candidates: int) -> torch.Tensor:
    """Sums over each of so many equal runs of heads, [candidates]: a KV head goes only with all its query heads."""
    sums = saliency["heads"].view(candidates, -1).sum(1)
    return sums + saliency["kv_heads"] if candidates == len(saliency["kv_heads"]) else sums


def channel_scores(c: Choice) -> torch.Tensor:
    """The importance of each feed-forward channel [I]. Raises UserError where a function of the table gives something else."""
    statistics = ChannelStatistics(
        c.run.output_covariance and c.run.output_covariance.matrix(),
        c.run.weight,
        *c.run.part.gate_and_up(),
        c.run.input_norm.norm(),
        c.run.read_norm.norm(),
        input_variance=c.run.input_variance and c.run.input_variance.var_x,
        input_covariance=c.run.input_covariance.matrix() if "input_covariance" in CHANNEL_SCORES[c.config.channel_score].needs else None,
        saliency=c.saliency and c.saliency["channels"],
        seed=c.config.seed + c.index,
    )
    return _checked(c, CHANNEL_SCORES[c.config.channel_score](statistics), c.shape.channels, "channels")


def _checked(c: Choice, scores: torch.Tensor, count: int, sort: str, flag: str | None = None) -> torch.Tensor:
    if scores.shape != (count,) or not bool(scores.isfinite().all()):
        raise UserError(
            f"{flag or _flag_of(c.shape.kind, c.config)}, layer {c.index}: it gives scores of shape {list(scores.shape)}, or some that are "
            f"not finite; it is to give one number for each of {count} {sort}"
        )
    return scores


def channels(c: Choice, kept_steps: int) -> Kept:
    """Feed-forward channels by their importance."""
    gone = c.shape.channels - c.shape.steps().units(kept_steps)["channels"]
    return {"channels": select_channels(c.scores, gone, c.config.keep_lowest).tolist()}


def expert_scores(c: Choice) -> torch.Tensor:
    """The importance of each expert [E]. Raises UserError where a function of the table gives something else."""
    statistics = ExpertStatistics(c.run.tokens, c.run.norms, c.config.seed + c.index)
    return _checked(c, EXPERT_SCORES[c.config.expert_score](statistics), c.shape.experts, "experts")


def experts(c: Choice, kept_steps: int) -> Kept:
    """Experts by their importance, the same number out of each group, with all their channels; of equal ones the first stay."""
    scores = c.scores.view(c.shape.groups, -1)
    best = torch.argsort(scores, descending=True, stable=True)[:, :kept_steps].sort().values
    first = torch.arange(c.shape.groups, device=best.device)[:, None] * scores.shape[1]
    return {"experts": (first + best).flatten().tolist(), "channels": list(range(c.shape.channels))}


def expert_channels(c: Choice, count: int) -> list[list[int]]:
    """For each expert that is left, so many of its channels, ascending, by their importance in what it gives to the tokens routed to it."""
    run, score, scores = c.run, CHANNEL_SCORES[c.config.channel_score], []
    covariance = run.output_covariance and run.output_covariance.matrix()
    spectrum = None if covariance is None else eigendecomposition(covariance)  # once for all of them
    for expert in range(run.part.units["experts"]):
        statistics = ChannelStatistics(
            covariance,
            run.part.projection(expert)[0].float(),
            *run.part.gate_and_up(expert),
            run.input_norms[expert].norm(),
            run.read_norms[expert].norm(),
            input_variance=run.input_variances and run.input_variances[expert].var_x.nan_to_num(),  # of no tokens there is none
            seed=c.config.seed + c.index * c.shape.experts + expert,
            spectrum=spectrum,
        )
        scores.append(_checked(c, score(statistics), c.shape.channels, "channels", f"--channel_score {c.config.channel_score}"))
    return [select_channels(each, c.shape.channels - count, c.config.keep_lowest).tolist() for each in scores]


@dataclass(frozen=True)
class _Kind:
    """How parts of one kind are chosen from: the ``table`` of scores, the ``flag`` that names one, and the statistics that all need.
    ``recovered``: their output projection gets new weights afterwards.
    """

    table: dict
    flag: str
    always: frozenset[str]
    scores: Callable[[Choice], object]
    choose: Callable[[Choice, int], Kept]
    recovered: bool = True


_KINDS = {
    "attention": _Kind(HEAD_CHOICES, "head_choice", frozenset({"input_covariance"}), head_scores, heads),
    "mlp": _Kind(CHANNEL_SCORES, "channel_score", frozenset({"input_norm"}), channel_scores, channels),
    "experts": _Kind(EXPERT_SCORES, "expert_score", frozenset(), expert_scores, experts, recovered=False),
}
