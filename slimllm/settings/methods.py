"""The parts of the method by name, and the methods and recipes made of them: what the flags of ``--help``'s group "method" take.

To add one: a function, and one entry here. The functions of this package are named by their place and imported when they are first
called, so that the tables cost nothing to read.
"""

from __future__ import annotations

import functools
import importlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from .. import plugins
from ..errors import UserError, first_line, nearest


@dataclass(frozen=True)
class Entry:
    """A function that does one part of the method. Calling the entry calls it.

    ``function``: the function, or "module:function" inside this package. ``needs``: what it is given besides what every function of
    its kind is given, names from CAN_NEED; what no entry in use needs is not computed. Raises ValueError for another name.
    """

    function: Callable | str
    needs: frozenset[str] = frozenset()

    CAN_NEED: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        object.__setattr__(self, "needs", frozenset(self.needs))
        for name in sorted(self.needs - set(self.CAN_NEED)):
            raise ValueError(f"needs {name!r}: a {type(self).__name__} can need {', '.join(self.CAN_NEED)}{nearest(name, self.CAN_NEED)}")

    def __call__(self, *arguments):
        if isinstance(self.function, str):
            return _imported(self.function)(*arguments)
        try:
            return self.function(*arguments)
        except UserError:
            raise
        except Exception as error:
            at = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in plugins.loaded]
            if not at:  # a function of a program that calls this package
                raise
            where = f"{Path(at[-1].filename).name}, line {at[-1].lineno}"
            raise UserError(
                f"{self.function.__name__} ({where}): {type(error).__name__}: {first_line(error)}; what a {type(self).__name__} does not "
                "name in its needs is None"
            ) from error


@functools.cache
def _imported(place: str) -> Callable:
    """The function that "module:function" names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"slimllm.{module}"), name)


class HeadChoice(Entry):
    """How heads are scored and chosen: (HeadStatistics, how many units each group loses) -> the units to keep, ascending.

    Can need ``input_norm``: the norm of each input of the output projection; ``gradients``: the saliency of each unit.
    """

    CAN_NEED = ("input_norm", "gradients")


class ChannelScore(Entry):
    """How channels are ranked: ChannelStatistics -> the importance of each channel [I]; the lowest go.

    Can need ``output_covariance``: of the feed-forward part's output; ``input_variance``: of each input of the output projection;
    ``input_covariance``: of these; ``gradients``: the saliency of each channel.
    """

    CAN_NEED = ("output_covariance", "input_variance", "input_covariance", "gradients")


class ExpertScore(Entry):
    """How experts are ranked: ExpertStatistics -> the importance of each expert [E]; the lowest go.

    Can need ``routed_output``: the norms of what each expert gives to the tokens that are routed to it.
    """

    CAN_NEED = ("routed_output",)


class LayerRatio(Entry):
    """How the sparsity is spread over the layers: AllocationInputs -> Allocation, a plan for each layer.

    Can need ``prices``: the price list (``--prices``, ``--price_list``); and of the settings ``alpha`` and ``pruned_layers``. Settings that
    it does not need are said to have no effect.
    """

    CAN_NEED = ("prices", "alpha", "pruned_layers")


class Pricing(Entry):
    """How the price list is measured: (AllocationInputs, Fits, token ids to measure on) -> a list of Price."""


@dataclass(frozen=True)
class Recovery(Entry):
    """What the kept output weights become: (weight, bias, keep, moments, input covariance, ridge) -> Recovered.

    Can need ``input_covariance``, the setting ``ridge``, and ``look_back``: it then gets one more, what is to be made up for, or None.
    ``adds_bias``: the projection has a bias afterwards, also where it had none.
    ``title`` and ``colour``: in pictures.
    """

    adds_bias: bool = True
    title: str | None = None
    colour: str | None = None

    CAN_NEED = ("input_covariance", "ridge", "look_back")


@dataclass(frozen=True)
class Method:
    """A pruning method as its authors' code does it: what it sets where the user says nothing, by the names in the tables below.

    ``all_layers``: by default every layer is pruned. ``dense_states``: as published, each layer is pruned from the states that the
    dense model gives it, not from those that the pruned layers before it give. ``whole_layers``: whole layers go, as many as come nearest
    to the amount, and nothing else; ``in_a_row``: one behind the other; ``whole_parts``: whole parts go in their place. ``title``: its name
    in tables and pictures; ``source``: where it is from, in Markdown, for model cards; ``colour``: in pictures.
    """

    head_choice: str
    channel_score: str
    layer_ratio: str
    recovery: str
    expert_score: str = "routed"
    all_layers: bool = False
    dense_states: bool = False
    whole_layers: bool = False
    in_a_row: bool = False
    whole_parts: bool = False
    title: str | None = None
    source: str | None = None
    colour: str | None = None

    @property
    def takes_whole(self) -> bool:
        """Whether it chooses no single head or channel."""
        return self.whole_layers or self.whole_parts


@dataclass(frozen=True)
class Recipe:
    """What is set in place of the method's own choices, where the user says nothing. ``title`` and ``colour``: in pictures."""

    settings: Mapping = field(default_factory=dict)
    title: str | None = None
    colour: str | None = None


HEAD_CHOICES = {
    "greedy": HeadChoice("pruning.importance.heads:greedy"),
    "leave_one_out": HeadChoice("pruning.importance.heads:leave_one_out_only"),
    "taylor": HeadChoice("pruning.importance.heads:taylor", {"gradients"}),
    "fluctuation": HeadChoice("pruning.importance.heads:fluctuation"),
    "wanda": HeadChoice("pruning.importance.heads:wanda", {"input_norm"}),
    "osscar": HeadChoice("pruning.importance.reconstruction:heads"),
    "magnitude": HeadChoice("pruning.importance.heads:magnitude"),
    "random": HeadChoice("pruning.importance.heads:random"),
}

CHANNEL_SCORES = {
    "feature_space": ChannelScore("pruning.importance.channels:feature_space", {"output_covariance"}),
    "unweighted": ChannelScore("pruning.importance.channels:unweighted"),
    "taylor": ChannelScore("pruning.importance.channels:taylor", {"gradients"}),
    "fluctuation": ChannelScore("pruning.importance.channels:fluctuation", {"input_variance"}),
    "wanda": ChannelScore("pruning.importance.channels:wanda"),
    "osscar": ChannelScore("pruning.importance.reconstruction:channels", {"input_covariance"}),
    "magnitude": ChannelScore("pruning.importance.channels:magnitude"),
    "random": ChannelScore("pruning.importance.channels:random"),
}

EXPERT_SCORES = {
    "routed": ExpertScore("pruning.importance.experts:routed", {"routed_output"}),
    "reap": ExpertScore("pruning.importance.experts:reap", {"routed_output"}),
    "frequency": ExpertScore("pruning.importance.experts:frequency"),
    "random": ExpertScore("pruning.importance.experts:random"),
}

LAYER_RATIOS = {
    "importance": LayerRatio("pruning.allocation.layer_ratios:importance", {"alpha", "pruned_layers"}),
    "uniform": LayerRatio("pruning.allocation.layer_ratios:uniform", {"pruned_layers"}),
    "middle": LayerRatio("pruning.allocation.layer_ratios:middle", {"pruned_layers"}),
    "ranking": LayerRatio("pruning.allocation.ranking:ranking"),
    "auto": LayerRatio("pruning.allocation.auto:auto", {"prices", "pruned_layers"}),
}

PRICES = {
    "gradient": Pricing("pruning.allocation.prices:gradient"),
    "streams": Pricing("pruning.allocation.prices:streams"),
}

RECOVERIES = {
    "none": Recovery("pruning.recovery:none", adds_bias=False, colour="#999999"),
    "bias": Recovery("pruning.recovery:bias", colour="#7b5ea7"),
    "linear": Recovery("pruning.recovery:linear", title="linear (the paper)", colour="#3b6fb6"),
    "least_squares": Recovery(
        "pruning.recovery:least_squares", {"input_covariance", "ridge", "look_back"}, title="least squares", colour="#e08a2e"
    ),
    "rotation": Recovery("pruning.recovery:rotation", {"input_covariance", "ridge", "look_back"}, colour="#2f7f5f"),
}

METHODS = {
    "slimllm": Method(
        "greedy",
        "feature_space",
        "importance",
        "linear",
        title="SlimLLM",
        source="[SlimLLM](https://arxiv.org/abs/2505.22689) (Guo et al. 2025)",
    ),
    "llm_pruner": Method(
        "taylor",
        "taylor",
        "middle",
        "none",
        title="LLM-Pruner",
        source="[LLM-Pruner](https://arxiv.org/abs/2305.11627) (Ma et al. 2023)",
    ),
    "flap": Method(
        "fluctuation",
        "fluctuation",
        "ranking",
        "bias",
        all_layers=True,
        dense_states=True,
        title="FLAP",
        source="[FLAP](https://arxiv.org/abs/2312.11983) (An et al. 2024)",
    ),
    "wanda_sp": Method(
        "wanda",
        "wanda",
        "uniform",
        "none",
        all_layers=True,
        title="Wanda-sp",
        source="Wanda-sp ([An et al. 2024](https://arxiv.org/abs/2312.11983), after [Wanda](https://arxiv.org/abs/2306.11695))",
    ),
    "osscar": Method(
        "osscar",
        "osscar",
        "uniform",
        "least_squares",
        all_layers=True,
        title="OSSCAR",
        source="[OSSCAR](https://arxiv.org/abs/2403.12983) (Meng et al. 2024)",
    ),
    "shortgpt": Method(
        "random",
        "random",
        "uniform",
        "none",
        all_layers=True,
        whole_layers=True,
        title="ShortGPT",
        source="[ShortGPT](https://arxiv.org/abs/2403.03853) (Men et al. 2024)",
    ),
    "replaceme": Method(
        "random",
        "random",
        "uniform",
        "least_squares",
        all_layers=True,
        whole_layers=True,
        in_a_row=True,
        title="ReplaceMe",
        source="[ReplaceMe](https://arxiv.org/abs/2505.02819) (Shopkhoev et al. 2025)",
    ),
    "llm_drop": Method(
        "random",
        "random",
        "uniform",
        "none",
        all_layers=True,
        whole_parts=True,
        title="LLM-Drop",
        source="[LLM-Drop](https://arxiv.org/abs/2406.15786) (He et al. 2024)",
    ),
    "magnitude": Method("magnitude", "magnitude", "uniform", "none", all_layers=True, source="magnitude, a baseline"),
    "random": Method(
        "random", "random", "uniform", "none", "random", all_layers=True, source="random choice, a baseline", colour="#999999"
    ),
}

_BEST = {"recovery": "least_squares", "layer_ratio": "auto", "self_share": 0.5, "look_back": 0.3}
RECIPES = {  # "paper": the published method, of which nothing is changed; the others are what measured best
    "paper": Recipe(),
    "best": Recipe(_BEST, "this project: best", "#e08a2e"),
    "distilled": Recipe({**_BEST, "distill": "all"}, "this project: distilled", "#d1495b"),
}

COLOURS = ("#3b6fb6", "#a33c3c", "#2f8f6b", "#7b5ea7", "#8a7d4f", "#1b9aaa", "#c06fb0", "#5d4037")  # of entries without one of their own


def title_of(table: Mapping, name: str) -> str:
    """What tables and pictures call the entry ``name``: the name itself where it has no title, or ``table`` does not know it."""
    return getattr(table.get(name), "title", None) or name


def source_of(method: str) -> str:
    """Where a method is from, in Markdown."""
    return getattr(METHODS.get(method), "source", None) or title_of(METHODS, method)


def looks(table: Mapping, others: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """(title, colour) in pictures of each entry, and of what else ``others`` names, as results that were made elsewhere may."""
    names = dict.fromkeys([*table, *others])
    return {
        name: (title_of(table, name), getattr(table.get(name), "colour", None) or COLOURS[position % len(COLOURS)])
        for position, name in enumerate(names)
    }
