"""The kinds of parts that a layer can have, as numbers: what of a part can go, in what steps, and what each unit costs.

A part reads the residual stream and adds to it. It has units of one or more sorts, which plans and records count by name:
``{"heads": 9, "kv_heads": 3}`` of an attention, ``{"channels": 1536}`` of a feed-forward part. :mod:`adapter` holds the other half of a
kind: its modules, and how they are sliced.

To add one: docs/architecture.md#parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .families import Family, PartRow

Units = dict[str, int]  # how many units of each sort
Kept = dict[str, list]  # which units of each sort, ascending; of the channels of experts a list for each expert, where these differ
EXPERT_CHANNELS = 8  # channels of experts come in multiples of this: transformers multiplies them in rows of whole 16 bytes
# Where layers have a window, llama.cpp keeps as many tokens more as it reads at once, in all a multiple of so many
WINDOW_BATCH, WINDOW_CELLS = 512, 256


def count_of(indices: list) -> int:
    """How many units of a sort these are: of channels of experts those of each expert."""
    return len(indices[0]) if indices and isinstance(indices[0], list) else len(indices)


def units_of_kept(kept: dict[str, Kept]) -> dict[str, Units]:
    """How many units of each sort each part keeps."""
    return {kind: {sort: count_of(indices) for sort, indices in by_sort.items()} for kind, by_sort in kept.items()}


def value_in_layer(config, name: str, index: int):
    """The config's entry ``name`` for one layer: of a pruned model, of one that has a list of them, or of all layers alike; or None."""
    value = getattr(config, f"{name}_per_layer", None)
    value = getattr(config, name, None) if value is None else value
    return value[index] if isinstance(value, list | tuple) else value


def is_missing(config, row: PartRow, index: int) -> bool:
    """Whether an earlier pruning took the part out of layer ``index``."""
    return row.module in (value_in_layer(config, "missing_modules", index) or ())


def is_in_layer(config, row: PartRow, index: int) -> bool:
    """Whether layer ``index`` has the part."""
    if is_missing(config, row, index):
        return False
    if row.layers is None:
        return True
    if isinstance(row.layers, str):
        return bool(value_in_layer(config, row.layers, index))
    name, value = row.layers
    return value_in_layer(config, name, index) == value


def head_dim_of(config) -> int:
    """The size of one head: the config's own, or hidden size / heads where it names none."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_inputs_of(config, family: Family) -> int:
    """How many numbers each layer is given for a token besides the state."""
    return (getattr(config, family.token_inputs[0], 0) or 0) if family.token_inputs else 0


def shared_numbers_of(config, family: Family) -> int:
    """Numbers of the keys and values that some layers leave of a token for layers that have none."""
    if family.shared is None:
        return 0
    own = [config.per_layer_config[index] for index, mode in enumerate(config.kv_sharing_modes) if mode == "store"]
    return sum(2 * layer.num_key_value_heads * layer.head_dim for layer in own)


def has_bias(config, bias: str | bool) -> bool:
    """What the config's flag for a bias says, or the fixed answer."""
    return bool(getattr(config, bias, False)) if isinstance(bias, str) else bias


def _flag(bias: str | bool) -> str | None:
    return bias if isinstance(bias, str) else None


def biases_of(config, row: PartRow) -> list[bool] | None:
    """Which layers' output projections have a bias, where the model is pruned and its config says so."""
    return getattr(config, f"{row.output}_bias_per_layer", None)


def _has_output_bias(config, row: PartRow, index: int) -> bool:
    """Whether the output projection has a bias, which pruned models say layer by layer."""
    listed = biases_of(config, row)
    return has_bias(config, row.output_bias) if listed is None else listed[index]


@dataclass(frozen=True)
class Cache:
    """What something that is never cut keeps of a text, for the tokens that follow. ``numbers``: of each token, such as keys and values, or
    the latent state that they are made of; ``window``: as in :func:`cached_tokens`; ``state``: of all tokens together, however many.
    """

    numbers: int = 0
    window: int | None = None
    state: int = 0

    def bytes(self, context: int) -> int:
        """Bytes for ``context`` tokens, as llama.cpp keeps them: 16 bits for each number of a token, 32 for each of a state."""
        return 2 * self.numbers * cached_tokens(context, self.window) + 4 * self.state


def cached_tokens(context: int, window: int | None) -> int:
    """How many of ``context`` tokens a layer's cache holds. ``window``: tokens that the layer looks back, where its cache goes by that."""
    return context if window is None else min(context, -(-(window + WINDOW_BATCH) // WINDOW_CELLS) * WINDOW_CELLS)


class HeadSteps:
    """The steps in which the heads of one layer can go, so that it keeps regular groups: each KV head with the same number of query heads.

    ``group``: a step is a KV head with all its query heads (a plain head where there is no grouping). ``query``: a step is one query head
    of each KV head's group.

    SmolLM2 has 9 query heads on 3 KV heads, so 0 1 2, 3 4 5 and 6 7 8 are groups. ``group`` has 3 steps, and the search chooses one of 3
    units, a whole group: without one step 6 query and 2 KV heads are left. ``query`` has 3 steps too, and the search chooses among 9
    units, which form 3 runs that each lose one: without one step 6 query and 3 KV heads are left, such as 0 2, 3 4 and 7 8.
    """

    sort, fine, least = "heads", False, 1

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


class ExpertSteps:
    """Experts go one by one, or one out of each of ``groups``, as long as ``least`` experts stay, which a token is routed to."""

    sort, fine = "experts", False

    def __init__(self, experts: int, least: int, groups: int = 1):
        self.count, self.least, self._groups = experts // groups, least // groups, groups

    def units(self, kept: int) -> Units:
        """What a layer with so many steps has: each step is one expert of each group."""
        return {"experts": kept * self._groups}

    def kept(self, ratio: float, round_to: int) -> int:
        """Steps kept at ``ratio``: count - round(ratio * count), as many at least as a token is routed to; ``round_to`` is of widths."""
        return max(self.least, self.count - round(ratio * self.count))

    def allowed(self, round_to: int) -> list[int]:
        """How many steps a layer can keep."""
        return list(range(self.least, self.count + 1))

    def of(self, units: Units) -> int:
        """The steps of a layer that has these units."""
        return units["experts"] // self._groups


class ChannelSteps:
    """Feed-forward channels go one by one, or in multiples of ``round_to``; ``at_once`` of them where the part's class makes it so many
    times as wide as the config says.
    """

    sort, fine, least = "channels", True, 1

    def __init__(self, channels: int, at_once: int = 1):
        self.count, self._at_once = channels // at_once, at_once

    def units(self, kept: int) -> Units:
        """What a layer with so many steps has."""
        return {"channels": kept * self._at_once}

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
        return units["channels"] // self._at_once

    def of_columns(self, scores):
        """Scores of the steps [count], from those of the output projection's columns: the same, or means of the next lowest."""
        return scores if self._at_once == 1 else scores.sort().values.view(self.count, -1).mean(1)


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer: query heads that share KV heads in equal groups."""

    kind: ClassVar[str] = "attention"
    sorts: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")
    title: ClassVar[str] = "attention"
    fine: ClassVar[bool] = False  # its steps are few: where a size is to be met, finer ones make up for it
    times: ClassVar[int] = 1  # how many times as large as the config says its class makes it

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    input_bias: bool = False
    output_bias: bool = False
    input_flag: str | None = None  # the config's flag for such a bias, where there is one
    output_flag: str | None = None
    qk_norm: str | None = None  # as PartRow has it
    per_head: int = 0  # parameters besides, per query head
    output_gate: bool = False  # as PartRow has it
    window: int | None = None  # as Cache has it

    @classmethod
    def of(cls, config, row: PartRow, index: int, window: int | None = None) -> AttentionShape:
        """That of layer ``index`` of a model, dense or pruned. ``window``: as :class:`Cache` has it."""
        heads, kv_heads = (value_in_layer(config, name, index) for name in row.sizes)
        biases = has_bias(config, row.input_bias), _has_output_bias(config, row, index)
        flags = _flag(row.input_bias), _flag(row.output_bias)
        qk_norm = row.qk_norm if row.qk_norm_flag is None or getattr(config, row.qk_norm_flag) else None
        sizes = config.hidden_size, heads, kv_heads or heads, head_dim_of(config)
        return cls(*sizes, *biases, *flags, qk_norm, len(row.per_head), row.output_gate, window)

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
        rows = self._query_rows(units) + 2 * narrow
        biases = rows * (self.input_bias if input_bias is None else input_bias)
        biases += self.hidden * (self.output_bias if output_bias is None else output_bias)
        norms = {None: 0, "head": 2 * self.head_dim, "all": wide + narrow}[self.qk_norm]
        return self.hidden * (rows + wide) + biases + norms + self.per_head * units["heads"]

    def active_parameters(self, units: Units | None = None) -> int:
        """Those that one token is computed with: all."""
        return self.parameters(units)

    def matrices(self, units: Units) -> list[tuple[int, int]]:
        """(rows, columns) of its projections with these units."""
        wide, narrow = units["heads"] * self.head_dim, units["kv_heads"] * self.head_dim
        return [(self._query_rows(units), self.hidden), (narrow, self.hidden), (narrow, self.hidden), (self.hidden, wide)]

    def _query_rows(self, units: Units) -> int:
        """Rows of the query projection: the queries, and the gate where it holds one."""
        return units["heads"] * self.head_dim * (2 if self.output_gate else 1)

    def cache_numbers(self, units: Units | None = None) -> int:
        """Numbers that the KV cache holds per token."""
        return 2 * (units or self.units)["kv_heads"] * self.head_dim

    def cache_bytes(self, context: int, units: Units | None = None) -> int:
        """Bytes of the KV cache for ``context`` tokens."""
        return Cache(self.cache_numbers(units), self.window).bytes(context)

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


class OfEachToken:
    """What holds for parts that work on each token alone."""

    def cache_numbers(self, units: Units | None = None) -> int:
        """Zero: the KV cache holds nothing of it."""
        return 0

    def cache_bytes(self, context: int, units: Units | None = None) -> int:
        """Zero, too."""
        return 0

    def pair_multiplications(self, units: Units | None = None) -> int:
        """Zero: it works on each token alone."""
        return 0


@dataclass(frozen=True)
class MlpShape(OfEachToken):
    """The feed-forward part of one layer: down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    kind: ClassVar[str] = "mlp"
    sorts: ClassVar[tuple[str, ...]] = ("channels",)
    title: ClassVar[str] = "feed-forward"
    fine: ClassVar[bool] = True

    hidden: int
    channels: int
    input_bias: bool = False
    output_bias: bool = False
    input_flag: str | None = None  # the config's flag for such a bias, where there is one
    output_flag: str | None = None
    gate: bool = True
    single: int = 0  # parameters besides
    times: int = 1

    @classmethod
    def of(cls, config, row: PartRow, index: int, window: int | None = None) -> MlpShape:
        """That of layer ``index`` of a model, dense or pruned; the ``window`` is of attention alone."""
        biases = has_bias(config, row.input_bias), _has_output_bias(config, row, index)
        flags = _flag(row.input_bias), _flag(row.output_bias)
        times = 2 if row.doubled and row.doubled(config, index) else 1
        channels = times * value_in_layer(config, row.sizes[0], index)
        return cls(config.hidden_size, channels, *biases, *flags, row.gate, len(row.single), times)

    @property
    def units(self) -> Units:
        """How many channels it has."""
        return {"channels": self.channels}

    @property
    def inputs(self) -> int:
        """How many rows of input projections a channel has: of gate and up, or of up alone."""
        return 2 if self.gate else 1

    def steps(self, head_unit: str = "query", divisor: int = 0) -> ChannelSteps:
        """The steps in which its channels can go; the arguments are of heads alone."""
        return ChannelSteps(self.channels, self.times)

    def parameters(self, units: Units | None = None, input_bias: bool | None = None, output_bias: bool | None = None) -> int:
        """Parameters of the part with these units; what is not mentioned is as in the model."""
        channels = (units or self.units)["channels"]
        biases = self.inputs * channels * (self.input_bias if input_bias is None else input_bias)
        biases += self.hidden * (self.output_bias if output_bias is None else output_bias)
        return (self.inputs + 1) * self.hidden * channels + biases + self.single

    def active_parameters(self, units: Units | None = None) -> int:
        """Those that one token is computed with: all."""
        return self.parameters(units)

    def matrices(self, units: Units) -> list[tuple[int, int]]:
        """(rows, columns) of its projections with these units."""
        channels = units["channels"]
        return [(channels, self.hidden)] * self.inputs + [(self.hidden, channels)]

    def output_inputs(self, units: Units | None = None) -> int:
        """Inputs of the output projection."""
        return (units or self.units)["channels"]

    def unit_parameters(self, biased: bool = False, units: Units | None = None) -> int:
        """Parameters that one channel holds, whatever the ``units``; ``biased``: its inputs get a bias."""
        return (self.inputs + 1) * self.hidden + self.inputs * (self.input_bias or biased)

    def in_words(self) -> str:
        """Its size for messages, such as ``1536 channels``."""
        return f"{self.channels} channels"

    def check_kept(self, kept: Kept) -> str | None:
        """What forbids these indices, in words: a number of channels that its class cannot have."""
        return f"the number of its channels must be a multiple of {self.times}" if len(kept["channels"]) % self.times else None


@dataclass(frozen=True)
class ExpertsShape(OfEachToken):
    """The experts of one layer and their router, which sends each token to ``top_k`` of them, or of those in ``top_groups`` of their equal
    ``groups``: the two best experts decide how good a group is, so that each keeps two.

    All experts of a layer have as many ``channels``. ``expert``: parameters of one expert; ``channel``: of one of its channels; ``router``:
    of the router that belong to one expert; ``width``: numbers that an expert reads; ``inputs``: its input projections, gate and up or up
    alone; ``fixed``: parameters of what stays whole beside them, such as shared experts; ``fixed_matrices``: (rows, columns) of the
    matrices among these. :func:`skeleton.counted` counts them. ``channels_fixed``: no channels can go, since their number is another part's
    too. ``fits``: the output projections can be refitted.
    """

    kind: ClassVar[str] = "experts"
    sorts: ClassVar[tuple[str, ...]] = ("experts", "channels")
    title: ClassVar[str] = "experts"
    fine: ClassVar[bool] = False
    times: ClassVar[int] = 1
    input_bias: ClassVar[bool] = False
    output_bias: ClassVar[bool] = False
    input_flag: ClassVar[None] = None
    output_flag: ClassVar[None] = None

    hidden: int
    experts: int
    channels: int
    top_k: int
    expert: int
    channel: int
    router: int
    width: int
    inputs: int
    fixed: int = 0
    fixed_matrices: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    top_groups: int = 1
    channels_fixed: bool = False
    fits: bool = True

    @property
    def units(self) -> Units:
        """How many experts it has, and how many channels each of them has."""
        return {"experts": self.experts, "channels": self.channels}

    def in_layer(self, config, row: PartRow, index: int) -> ExpertsShape:
        """That of layer ``index`` of a pruned model, whose config says what is left there; this is the dense model's."""
        counts = [value_in_layer(config, name, index) for name in row.sizes]
        units = self.units | dict(zip(self.sorts, counts))
        return replace(self, **units, expert=self._expert(units))

    def steps(self, head_unit: str = "query", divisor: int = 0) -> ExpertSteps:
        """The steps in which its experts can go; the arguments are of heads alone."""
        return ExpertSteps(self.experts, self.least, self.groups)

    @property
    def least(self) -> int:
        """The fewest experts that it can keep."""
        return self.top_k if self.groups == 1 else self.groups * max(2, -(-self.top_k // self.top_groups))

    def channel_steps(self) -> ChannelSteps:
        """The steps in which the channels of all its experts can go."""
        return ChannelSteps(self.channels)

    def unit_parameters(self, biased: bool = False, units: Units | None = None) -> int:
        """Parameters that one channel of all experts holds, with these units."""
        return (units or self.units)["experts"] * self.channel

    def _expert(self, units: Units) -> int:
        """Parameters of one expert with these units."""
        return self.expert - (self.channels - units["channels"]) * self.channel

    def parameters(self, units: Units | None = None, input_bias: bool | None = None, output_bias: bool | None = None) -> int:
        """Parameters of the part with these units, which never get biases."""
        units = units or self.units
        return units["experts"] * (self._expert(units) + self.router) + self.fixed

    def active_parameters(self, units: Units | None = None) -> int:
        """Those that one token is computed with."""
        units = units or self.units
        return self.top_k * self._expert(units) + units["experts"] * self.router + self.fixed

    def matrices(self, units: Units) -> list[tuple[int, int]]:
        """(rows, columns) of its projections with these units, those of all experts one below the other, and of what stays whole. The
        router is none of them: files keep it in float32.
        """
        rows, outputs = units["experts"] * units["channels"], units["experts"] * self.width
        return [(rows, self.width)] * self.inputs + [(outputs, units["channels"]), *self.fixed_matrices]

    def output_inputs(self, units: Units | None = None) -> int:
        """Numbers that the experts of one token hold between their input and their output."""
        return self.top_k * (units or self.units)["channels"]

    def in_words(self) -> str:
        """Its size for messages, such as ``64 experts of 768 channels``."""
        return f"{self.experts} experts of {self.channels} channels"

    def check_kept(self, kept: Kept) -> str | None:
        """What forbids these indices, in words: fewer experts than a token is routed to, groups of different sizes, channels that
        transformers cannot compute.
        """
        experts, channels, size = kept["experts"], kept["channels"], self.experts // self.groups
        if len(experts) < self.least:
            return f"at least {self.least} of the {self.experts} experts must stay, as each token is routed to {self.top_k}"
        if len({sum(expert // size == group for expert in experts) for group in range(self.groups)}) > 1:
            return f"each of the {self.groups} groups of experts must keep the same number of them"
        if self.channels_fixed and count_of(channels) != self.channels:
            return "no channels of these experts can go"
        if count_of(channels) % EXPERT_CHANNELS and count_of(channels) != self.channels:
            return f"channels of experts come in multiples of {EXPERT_CHANNELS}, as transformers multiplies them"
        own = channels if channels and isinstance(channels[0], list) else [channels] * len(experts)
        if not channels or len({len(each) for each in own}) > 1 or len(own) != len(experts):
            return "all experts that stay must keep as many channels: one list for all of them, or one for each"
        return None


@dataclass(frozen=True)
class Counted:
    """What the modules of one layer say. ``uncut``: parameters outside the parts that can lose units: its norms, and what is run and never
    cut; ``matrices``: (rows, columns) of the matrices among these. ``rows``: those of its parts. ``caches``: what is never cut keeps
    of a text; None where that is not known. ``experts``: the numbers of its experts, where it has some.
    """

    uncut: int
    matrices: tuple[tuple[int, int], ...]
    rows: tuple[PartRow, ...]
    caches: tuple[Cache, ...] | None = ()
    experts: ExpertsShape | None = None


PartShape = AttentionShape | MlpShape | ExpertsShape


def all_steps(part: PartShape, head_unit: str, divisor: int = 0) -> list[HeadSteps | ChannelSteps | ExpertSteps]:
    """The steps of each sort of units of a part that can go by itself."""
    first = part.steps(head_unit, divisor)
    return [first, part.channel_steps()] if isinstance(part, ExpertsShape) else [first]


KINDS = {kind.kind: kind for kind in (AttentionShape, MlpShape, ExpertsShape)}
PRUNED_KINDS = {  # what ``--prune`` takes from, of models that are no mixtures
    "both": ("attention", "mlp"),
    "heads": ("attention",),
    "channels": ("mlp",),
    "experts": ("experts",),
}


def goes(prune: str, part: PartShape, sort: str, mixture: bool) -> bool:
    """Whether ``--prune`` takes such units of a part. Of a ``mixture`` of experts ``channels`` are those of its experts, and ``both`` these
    and whole experts.
    """
    if part.kind == "experts":
        return prune == "both" or prune == sort
    return part.kind in PRUNED_KINDS[prune] and (not mixture or prune == "heads")
