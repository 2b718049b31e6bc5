"""The kinds of parts that a layer can have, as numbers: what of a part can go, in what steps, and what each unit costs.

A part reads the residual stream and adds to it. It has units of one or more sorts, which plans and records count by name:
``{"heads": 9, "kv_heads": 3}`` of an attention, ``{"channels": 1536}`` of a feed-forward part. :mod:`adapter` holds the other half of a
kind: its modules, and how they are sliced.

To add one: docs/architecture.md#parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .families import PartRow

Units = dict[str, int]  # how many units of each sort
Kept = dict[str, list[int]]  # which units of each sort, ascending


def value_in_layer(config, name: str, index: int):
    """The config's entry ``name`` for one layer: of a pruned model, of one that has a list of them, or of all layers alike; or None."""
    value = getattr(config, f"{name}_per_layer", None)
    value = getattr(config, name, None) if value is None else value
    return value[index] if isinstance(value, list | tuple) else value


def head_dim_of(config) -> int:
    """The size of one head: the config's own, or hidden size / heads where it names none."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has_bias(config, bias: str | bool) -> bool:
    return bool(getattr(config, bias, False)) if isinstance(bias, str) else bias


def biases_of(config, row: PartRow) -> list[bool] | None:
    """Which layers' output projections have a bias, where the model is pruned and its config says so."""
    return getattr(config, f"{row.output}_bias_per_layer", None)


def _has_output_bias(config, row: PartRow, index: int) -> bool:
    """Whether the output projection has a bias, which pruned models say layer by layer."""
    listed = biases_of(config, row)
    return _has_bias(config, row.output_bias) if listed is None else listed[index]


class HeadSteps:
    """The steps in which the heads of one layer can go, so that it keeps regular groups: each KV head with the same number of query heads.

    ``group``: a step is a KV head with all its query heads (a plain head where there is no grouping). ``query``: a step is one query head
    of each KV head's group.

    SmolLM2 has 9 query heads on 3 KV heads, so 0 1 2, 3 4 5 and 6 7 8 are groups. ``group`` has 3 steps, and the search chooses one of 3
    units, a whole group: without one step 6 query and 2 KV heads are left. ``query`` has 3 steps too, and the search chooses among 9
    units, which form 3 runs that each lose one: without one step 6 query and 3 KV heads are left, such as 0 2, 3 4 and 7 8.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, head_unit: str, divisor: int = 0):
        group_size = heads // kv_heads
        self.by_query = head_unit == "query" and group_size > 1
        self.count = group_size if self.by_query else kv_heads
        self.candidates = heads if self.by_query else kv_heads  # units that the search chooses from
        self.runs = kv_heads if self.by_query else 1  # equal runs of them that lose the same number
        self._heads, self._kv_heads, self._head_dim, self._divisor = heads, kv_heads, head_dim, divisor

    def units(self, kept: int) -> Units:
        """What a layer with so many steps has."""
        return {"heads": self._heads // self.count * kept, "kv_heads": self._kv_heads if self.by_query else kept}

    def kept(self, ratio: float, round_to: int) -> int:
        """Steps kept at ``ratio``: count - round(ratio * count), at least one, or the nearest that :meth:`allowed` has."""
        rounded = self.count - round(ratio * self.count)
        if round_to == 1 and not self._divisor:
            return max(1, rounded)
        return min(self.allowed(round_to), key=lambda n: (abs(n - self.count * (1 - ratio)), -n))

    def allowed(self, round_to: int) -> list[int]:
        """The numbers of steps at which heads x head size is a multiple of ``round_to`` and the heads divide ``divisor``."""
        heads = [self.units(n)["heads"] for n in range(self.count + 1)]
        return [n for n in range(1, self.count + 1) if heads[n] * self._head_dim % round_to == 0 and self._divisor % heads[n] == 0]

    def of(self, units: Units) -> int:
        """The steps of a layer that has these units."""
        return units["heads"] // self._kv_heads if self.by_query else units["kv_heads"]

    def of_columns(self, scores):
        """Scores of the steps [count], from those of the output projection's columns [heads * head size]: a step is one unit of each run,
        each run's lowest first.
        """
        return scores.view(self.runs, self.count, -1).mean(-1).sort(-1).values.mean(0)


class ChannelSteps:
    """Feed-forward channels go one by one, or in multiples of ``round_to``."""

    def __init__(self, channels: int):
        self.count = channels

    def units(self, kept: int) -> Units:
        """What a layer with so many steps has: each step is one channel."""
        return {"channels": kept}

    def kept(self, ratio: float, round_to: int) -> int:
        """Channels kept at ``ratio``: count - round(ratio * count), to the nearest multiple of ``round_to``, at least one such multiple."""
        channels = self.count - round(ratio * self.count)
        if round_to > 1:
            channels = round(channels / round_to) * round_to
        return min(max(channels, round_to), self.count)

    def allowed(self, round_to: int) -> list[int]:
        """The multiples of ``round_to`` that a layer can keep."""
        return list(range(round_to, self.count + 1, round_to))

    def of(self, units: Units) -> int:
        """The steps of a layer that has these units."""
        return units["channels"]

    def of_columns(self, scores):
        """Scores of the steps [count], from those of the output projection's columns, which are the same here."""
        return scores


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer: query heads that share KV heads in equal groups."""

    kind: ClassVar[str] = "attention"
    sorts: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")
    title: ClassVar[str] = "attention"
    fine: ClassVar[bool] = False  # its steps are few: where a size is to be met, finer ones make up for it

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    input_bias: bool = False
    output_bias: bool = False
    qk_norm: str | None = None  # as PartRow has it

    @classmethod
    def of(cls, config, row: PartRow, index: int) -> AttentionShape:
        """That of layer ``index`` of a model, dense or pruned."""
        heads, kv_heads = (value_in_layer(config, name, index) for name in row.sizes)
        biases = _has_bias(config, row.input_bias), _has_output_bias(config, row, index)
        return cls(config.hidden_size, heads, kv_heads or heads, head_dim_of(config), *biases, row.qk_norm)

    @property
    def units(self) -> Units:
        """How many query heads and KV heads it has."""
        return {"heads": self.heads, "kv_heads": self.kv_heads}

    def steps(self, head_unit: str = "query", divisor: int = 0) -> HeadSteps:
        """The steps in which its heads can go. ``head_unit``: what a step is; ``divisor``: what the heads must divide (0: any number)."""
        return HeadSteps(self.heads, self.kv_heads, self.head_dim, head_unit, divisor)

    def parameters(self, units: Units | None = None, input_bias: bool | None = None, output_bias: bool | None = None) -> int:
        """Parameters of the part with these units; what is not mentioned is as in the model."""
        units = units or self.units
        wide, narrow = units["heads"] * self.head_dim, units["kv_heads"] * self.head_dim
        rows = wide + 2 * narrow
        biases = rows * (self.input_bias if input_bias is None else input_bias)
        biases += self.hidden * (self.output_bias if output_bias is None else output_bias)
        norms = {None: 0, "head": 2 * self.head_dim, "all": wide + narrow}[self.qk_norm]
        return self.hidden * (rows + wide) + biases + norms

    def matrices(self, units: Units) -> list[tuple[int, int]]:
        """(rows, columns) of its projections with these units."""
        wide, narrow = units["heads"] * self.head_dim, units["kv_heads"] * self.head_dim
        return [(wide, self.hidden), (narrow, self.hidden), (narrow, self.hidden), (self.hidden, wide)]

    def cache_numbers(self, units: Units | None = None) -> int:
        """Numbers that the KV cache holds per token."""
        return 2 * (units or self.units)["kv_heads"] * self.head_dim

    def pair_multiplications(self, units: Units | None = None) -> int:
        """Multiplications per pair of tokens, besides those per token, of which each matrix has as many as parameters."""
        return 2 * (units or self.units)["heads"] * self.head_dim

    def output_inputs(self, units: Units | None = None) -> int:
        """Inputs of the output projection."""
        return (units or self.units)["heads"] * self.head_dim

    def in_words(self) -> str:
        """Its size for messages, such as ``9 heads of size 64``."""
        return f"{self.heads} heads of size {self.head_dim}"

    def check_kept(self, kept: Kept) -> str | None:
        """What forbids these indices, in words: groups of different sizes, a query head without its KV head."""
        size = self.heads // self.kv_heads
        per_group = [sum(head // size == group for head in kept["heads"]) for group in range(self.kv_heads)]
        in_groups = {per_group[group] for group in kept["kv_heads"]}
        if kept["heads"] == kept["kv_heads"] == []:
            return None
        if len(in_groups) == 1 and 0 not in in_groups and sum(per_group[g] for g in kept["kv_heads"]) == len(kept["heads"]):
            return None
        return f"each of the kept KV heads must keep the same number of its {size} query heads, and no other head may stay"


@dataclass(frozen=True)
class MlpShape:
    """The feed-forward part of one layer: down(act(gate(x)) * up(x))."""

    kind: ClassVar[str] = "mlp"
    sorts: ClassVar[tuple[str, ...]] = ("channels",)
    title: ClassVar[str] = "feed-forward"
    fine: ClassVar[bool] = True

    hidden: int
    channels: int
    input_bias: bool = False
    output_bias: bool = False

    @classmethod
    def of(cls, config, row: PartRow, index: int) -> MlpShape:
        """That of layer ``index`` of a model, dense or pruned."""
        biases = _has_bias(config, row.input_bias), _has_output_bias(config, row, index)
        return cls(config.hidden_size, value_in_layer(config, row.sizes[0], index), *biases)

    @property
    def units(self) -> Units:
        """How many channels it has."""
        return {"channels": self.channels}

    def steps(self, head_unit: str = "query", divisor: int = 0) -> ChannelSteps:
        """The steps in which its channels can go; the arguments are of heads alone."""
        return ChannelSteps(self.channels)

    def parameters(self, units: Units | None = None, input_bias: bool | None = None, output_bias: bool | None = None) -> int:
        """Parameters of the part with these units; what is not mentioned is as in the model."""
        channels = (units or self.units)["channels"]
        biases = 2 * channels * (self.input_bias if input_bias is None else input_bias)
        return 3 * self.hidden * channels + biases + self.hidden * (self.output_bias if output_bias is None else output_bias)

    def matrices(self, units: Units) -> list[tuple[int, int]]:
        """(rows, columns) of its projections with these units."""
        channels = units["channels"]
        return [(channels, self.hidden), (channels, self.hidden), (self.hidden, channels)]

    def cache_numbers(self, units: Units | None = None) -> int:
        """Zero: the KV cache holds nothing of it."""
        return 0

    def pair_multiplications(self, units: Units | None = None) -> int:
        """Zero: it works on each token alone."""
        return 0

    def output_inputs(self, units: Units | None = None) -> int:
        """Inputs of the output projection."""
        return (units or self.units)["channels"]

    def unit_parameters(self, biased: bool = False) -> int:
        """Parameters that one channel holds; ``biased``: its inputs get a bias."""
        return 3 * self.hidden + 2 * (self.input_bias or biased)

    def in_words(self) -> str:
        """Its size for messages, such as ``1536 channels``."""
        return f"{self.channels} channels"

    def check_kept(self, kept: Kept) -> str | None:
        """None: any channels may stay."""
        return None


PartShape = AttentionShape | MlpShape
KINDS = {kind.kind: kind for kind in (AttentionShape, MlpShape)}
PRUNED_KINDS = {"both": tuple(KINDS), "heads": ("attention",), "channels": ("mlp",)}  # what ``--prune`` takes from
