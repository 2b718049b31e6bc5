"""The sizes of a model, layer by layer and part by part, from its config alone, and what a runtime requires of those of a pruned one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..errors import Recurring, UserError
from .families import Family, family_of
from .parts import (
    KINDS,
    Cache,
    Counted,
    PartShape,
    Units,
    biases_of,
    has_bias,
    is_in_layer,
    is_missing,
    shared_numbers_of,
    token_inputs_of,
)

# architectures of llama.cpp that take no fewer heads
HEADS_FILL_HIDDEN = (
    *("qwen2", "qwen2moe", "phi3", "chatglm", "olmo", "olmo2", "olmoe", "exaone4", "starcoder2", "nemotron", "phi2"),
    *("command-r", "cohere2"),
)
# those whose layers may look back only so far
OWN_WINDOWS = ("gemma2", "gemma3", "gemma4", "olmo2", "exaone4", "exaone-moe", "cohere2", "gpt-oss")
ALL_HEADS_CACHED = ("minicpm3",)  # those that keep keys and values of all heads, where latent attention has one latent state for them
RUNTIMES = ("any", "transformers", "vllm", "gguf")
Staying = tuple[tuple[str, ...] | None, ...]  # of each layer the kinds of parts that stay; None: it is gone whole


@dataclass(frozen=True)
class LayerShape:
    """The parts of one layer that have units, in the order of computation. ``uncut_parameters``: of its norms of the residual stream, and
    of what is run and never cut; ``uncut_matrices``: (rows, columns) of the matrices among these; ``caches``: what it keeps of a text.
    ``norms``: of each kind of part, the parameters of the norms that it has alone, which go with it. ``mixes``: something of it is run and
    never cut. ``missing``: kinds of parts that it had and that are gone.
    """

    parts: tuple[PartShape, ...]
    uncut_parameters: int
    uncut_matrices: tuple[tuple[int, int], ...] = ()
    caches: tuple[Cache, ...] = ()
    norms: tuple[tuple[str, int], ...] = ()
    mixes: bool = False
    missing: tuple[str, ...] = ()

    def with_parts(self, kinds: Collection[str]) -> LayerShape:
        """That of the layer with its parts of these kinds alone."""
        parts = tuple(part for part in self.parts if part.kind in kinds)
        gone = [part.kind for part in self.parts if part.kind not in kinds]
        uncut = self.uncut_parameters - sum(count for kind, count in self.norms if kind in gone)
        return replace(self, parts=parts, uncut_parameters=uncut, missing=(*self.missing, *gone))

    @property
    def units(self) -> dict[str, Units]:
        """What each part has, by its kind."""
        return {part.kind: part.units for part in self.parts}

    @property
    def parameters(self) -> int:
        """Parameters of all that it holds."""
        return self.uncut_parameters + sum(part.parameters() for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Those that one token is computed with."""
        return self.uncut_parameters + sum(part.active_parameters() for part in self.parts)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what pruning can do, from a config alone."""

    layers: tuple[LayerShape, ...]
    hidden: int
    vocab: int
    tied: bool
    norm_parameters: int  # of the final norm, and of what makes the inputs of layers for each token besides their table
    head_bias: bool  # the output head has one
    heads_fixed: str | None  # why no head can go, where none can
    stock_bias: bool  # the family's own class can have biases in its output projections
    foreign_bias: bool  # it cannot have some that an earlier recovery gave this model
    heads_divide_hidden: bool
    heads_bound: bool  # its config class takes the length of the rope's factors from the number of heads, so takes no other
    gguf: str | None  # the llama.cpp architecture that holds it where its layers have one width, if there is one
    gguf_free: str | None  # the one in which they may differ
    vllm_free: bool  # vLLM computes it where they do
    shared: int = 0  # numbers of the keys and values that some layers leave of a token for others
    token_inputs: int = 0  # numbers that all layers together are given for a token besides the state, from a table
    regular: bool = False  # no class holds it with layers of different widths
    uncounted: str | None = None  # its model_type, where it is not known what its layers keep of a text
    tokens_gone: int = 0  # of the vocabulary that the model came with
    given: tuple[LayerShape, ...] = ()  # the layers that it came with, where some are gone or lack parts that they had
    staying: Staying | None = None  # what stays of these

    @property
    def decoder_parameters(self) -> int:
        """Parameters of all layers, which ``--target_sparsity`` is a share of."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def other_parameters(self) -> int:
        """Embeddings, final norm and (untied) output head."""
        return self._token_parameters * self.vocab + self.norm_parameters

    @property
    def _token_parameters(self) -> int:
        return self.hidden * (1 if self.tied else 2) + self.head_bias + self.token_inputs

    @property
    def token_matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of the matrices among ``norm_parameters``."""
        return [(self.token_inputs, self.hidden)] if self.token_inputs else []

    @property
    def streamed(self) -> int:
        """Numbers of a token that are kept while its states go from layer to layer."""
        return self.hidden + self.shared

    @property
    def token_parameters_gone(self) -> int:
        """Those of the tokens that are gone from the vocabulary."""
        return self._token_parameters * self.tokens_gone

    @property
    def all_staying(self) -> Staying:
        """What stays of the layers of the model that was given, also where that is all of them."""
        return self.staying or tuple(tuple(layer.units) for layer in self.layers)

    @property
    def layers_gone(self) -> int:
        """How many layers are gone whole."""
        return len(self.given_layers) - len(self.layers)

    @property
    def parts_gone(self) -> int:
        """How many parts are gone from layers that stay."""
        pairs = zip(self.given, self.staying or (), strict=True)
        return sum(len(layer.parts) - len(kinds) for layer, kinds in pairs if kinds is not None)

    @property
    def gone_in_words(self) -> list[str]:
        """What is gone whole: ``the tokens``, ``the layers``, ``the parts``."""
        counts = {"the tokens": self.tokens_gone, "the layers": self.layers_gone, "the parts": self.parts_gone}
        return [what for what, count in counts.items() if count]

    @property
    def layer_parameters_gone(self) -> int:
        """Those of the layers and parts that are gone whole."""
        return sum(layer.parameters for layer in self.given_layers) - self.decoder_parameters

    @property
    def parameters_gone(self) -> int:
        """Those of tokens, whole layers and whole parts that are gone."""
        return self.token_parameters_gone + self.layer_parameters_gone

    @property
    def dense_parameters(self) -> int:
        """All parameters of the model that was given, with those of the tokens, layers and parts that are gone."""
        return self.parameters + self.parameters_gone

    @property
    def given_layers(self) -> list[LayerShape]:
        """The layers of the model that was given, with those that are gone and all parts that they had, in their order."""
        return list(self.given or self.layers)

    def with_staying(self, staying: Collection[Collection[str] | None]) -> ModelShape:
        """That of the model that was given where this stays of its layers.

        Raises UserError where a table of the model holds something for every layer.
        """
        given = tuple(self.given_layers)
        if self.token_inputs and None in staying:
            raise UserError(
                "--drop_layers, --plan: no whole layer of this model can go, since all take inputs from one table; keep them all"
            )
        layers = [
            layer if kinds is not None and len(kinds) == len(layer.parts) else layer.with_parts(kinds)
            for layer, kinds in zip(given, staying, strict=True)
            if kinds is not None
        ]
        if layers == list(given):
            return replace(self, layers=given, given=(), staying=None)
        return replace(self, layers=tuple(layers), given=given, staying=tuple(None if kinds is None else tuple(kinds) for kinds in staying))

    def with_layers(self, kept: Collection[int]) -> ModelShape:
        """:meth:`with_staying` where these layers stay whole, by the numbers that they have in the model that was given."""
        return self.with_staying([tuple(layer.units) if index in kept else None for index, layer in enumerate(self.given_layers)])

    def without_parts(self, order: list[tuple[int, str]], count: int | None, parameters: float = 0.0, first: bool = False) -> ModelShape:
        """:meth:`with_staying` where whole parts go in this ``order``, (layer in the model that was given, kind): ``count`` of them, or
        where that is None as many as come nearest to ``parameters`` of the layers that are gone in all.

        One part of each kind stays, and one in a layer that holds something which is never cut; with ``first`` the attention of the first
        layer does too. A layer of which no part stays is gone whole. Raises UserError where there are no ``count`` such parts.
        """
        found, taken = self, 0
        for index, kind in order:
            if taken == count:
                break
            staying = list(found.all_staying)
            own = staying[index]
            if own is None or kind not in own or not self._may_go(staying, index, kind, first):
                continue
            staying[index] = tuple(other for other in own if other != kind) or None
            after = found.with_staying(staying)
            if count is None and abs(after.layer_parameters_gone - parameters) >= abs(found.layer_parameters_gone - parameters):
                break
            found, taken = after, taken + 1
        if count is not None and taken < count:
            why = "one of each kind has to stay, and one in each layer that holds something which is never cut"
            parts, way = ("no part", "leave it out") if not taken else ("1 part" if taken == 1 else f"{taken} parts", "lower it")
            raise UserError(f"--drop_parts {count}: {parts} of this model can go, since {why}; {way}")
        return found

    def _may_go(self, staying: list[Collection[str] | None], index: int, kind: str, first: bool) -> bool:
        """Whether a part may go where ``staying`` is what stays of the layers so far."""
        of_its_kind = sum(kind in kinds for kinds in staying if kinds is not None)
        leads = first and kind == "attention" and all(kinds is None for kinds in staying[:index])
        return of_its_kind > 1 and not leads and not (len(staying[index]) == 1 and self.given_layers[index].mixes)

    def with_tokens(self, kept: int) -> ModelShape:
        """That of the same model with so many tokens."""
        return replace(self, vocab=kept, tokens_gone=self.vocab + self.tokens_gone - kept)

    def with_fewer_layers(self, count: int) -> ModelShape:
        """:meth:`with_layers` where ``count`` go and it is not known which: of the deep ones but the last, which models miss least."""
        depth = len(self.given_layers)
        return self.with_layers([*range(depth - 1 - count), depth - 1])

    def likely_order(self) -> list[tuple[int, str]]:
        """The order in which whole parts go where it is not known: attention first, of the deep layers but the last before others."""
        deep_first = [*reversed(range(len(self.given_layers) - 1)), len(self.given_layers) - 1]
        kinds = dict.fromkeys(part.kind for layer in self.given_layers for part in layer.parts)
        return [(index, kind) for kind in kinds for index in deep_first]

    @property
    def parameters(self) -> int:
        """All parameters of the model: layers, embeddings, final norm and output head."""
        return self.decoder_parameters + self.other_parameters

    @property
    def is_mixture(self) -> bool:
        """Whether some of its layers have experts."""
        return any(part.kind == "experts" for layer in self.layers for part in layer.parts)

    def active_parameters(self, units: list[dict[str, Units]] | None = None) -> int:
        """Parameters that one token is computed with, the embeddings and the head among them, with these units or the model's own."""
        own = [layer.uncut_parameters for layer in self.layers]
        parts = [part.active_parameters(left[part.kind]) for layer, left in zip(self.layers, units or self.units) for part in layer.parts]
        return sum(own) + sum(parts) + self.other_parameters

    @property
    def units(self) -> list[dict[str, Units]]:
        """What each part of each layer has."""
        return [layer.units for layer in self.layers]

    def cache_numbers(self, units: list[dict[str, Units]] | None = None) -> int:
        """Numbers that the KV cache holds per token, of all layers, with these units or the model's own."""
        kept = sum(part.cache_numbers(left[part.kind]) for layer, left in zip(self.layers, units or self.units) for part in layer.parts)
        return kept + sum(cache.numbers for layer in self.layers for cache in layer.caches)

    def to_dict(self) -> dict:
        """What a record holds of it: the sizes, and what each part of each layer has."""
        return {
            "hidden": self.hidden,
            "vocab": self.vocab + self.tokens_gone,
            "tied": self.tied,
            "layers": [layer.units for layer in self.given_layers],
        }


def shape_of(config, family: Family | None = None) -> ModelShape:
    """The shape of a model, dense or pruned, from its config."""
    family, modules = family or family_of(config), [None] * config.num_hidden_layers
    if family.is_hybrid or family.is_mixture:
        from .skeleton import counted  # takes torch, which flags and their help do without

        modules = counted(config, family)
    own = token_inputs_of(config, family)
    token_inputs = own * config.num_hidden_layers
    return ModelShape(
        layers=tuple(_layer_shape(config, family, index, modules[index]) for index in range(config.num_hidden_layers)),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        norm_parameters=family.norm_vectors * config.hidden_size + token_inputs * config.hidden_size + own,
        shared=shared_numbers_of(config, family),
        token_inputs=token_inputs,
        head_bias=has_bias(config, family.head_bias),
        heads_fixed=family.heads_fixed(config),
        stock_bias=all(isinstance(row.output_bias, str) for row in family.parts),
        foreign_bias=any(row.output_bias is False and any(biases_of(config, row) or []) for row in family.parts),
        heads_divide_hidden=family.heads_divide_hidden,
        heads_bound=rope_of(config).get("rope_type") == "longrope",
        gguf=family.gguf,
        gguf_free=free_architecture_of(config, family),
        vllm_free=family.decilm and window_of(config) is None,
        regular=family.regular,
        uncounted=family.model_type if any(one and one.caches is None for one in modules) else None,
    )


def _layer_shape(config, family: Family, index: int, modules: Counted | None) -> LayerShape:
    norm = family.norm_vectors * config.hidden_size
    mixers = [row for step in family.steps for row in step if not row.sizes and is_in_layer(config, row, index)]
    caches = ()
    if modules is None:  # first all that the layer had in the dense model
        rows = [row for row in family.parts if is_in_layer(config, row, index) or is_missing(config, row, index)]
        uncut, matrices = len({name for row in rows for name in row.norms}) * norm, ()
    else:
        rows, uncut, matrices = modules.rows, modules.uncut, modules.matrices
        caches = modules.caches or ()
    of_others = {row.kind: {name for other in (*rows, *mixers) if other is not row for name in other.norms} for row in rows}
    norms = tuple((row.kind, len(set(row.norms) - of_others[row.kind]) * norm) for row in rows)
    window = cached_window(config, family, index)
    parts = (
        modules.experts.in_layer(config, row, index) if row.kind == "experts" else KINDS[row.kind].of(config, row, index, window)
        for row in rows
    )
    dense = LayerShape(tuple(parts), uncut, matrices, caches, norms, bool(mixers))
    return dense.with_parts([row.kind for row in rows if not is_missing(config, row, index)])


def alike(shape: ModelShape, units: list[dict[str, Units]]) -> list[dict[str, Units]]:
    """``units`` of the layers of a model of this shape, as they are compared: a part that its class makes twice as wide counts as half."""
    parts = [{part.kind: part for part in layer.parts} for layer in shape.layers]
    return [
        {kind: {sort: count // own[kind].times for sort, count in counts.items()} for kind, counts in left.items()}
        for own, left in zip(parts, units, strict=True)
    ]


def window_of(config) -> int | None:
    """Tokens that attention looks back, where some layer's is limited."""
    types = getattr(config, "layer_types", None)
    if (types and "sliding_attention" not in types) or not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None) or None


def cached_window(config, family: Family, index: int) -> int | None:
    """Tokens that attention in layer ``index`` looks back, where that is limited and its cache goes by it; None where the cache holds all,
    as in architectures of llama.cpp that know no windows.
    """
    types = getattr(config, "layer_types", None)
    if family.gguf not in (None, *OWN_WINDOWS) or (types and types[index] != "sliding_attention"):
        return None
    return window_of(config)


def rope_of(config, layer_type: str = "full_attention") -> dict:
    """The settings of its rotary embeddings; of layers of ``layer_type``, where kinds of layers have settings of their own."""
    rope = getattr(config, "rope_parameters", None) or {}  # some have no rotary embeddings
    return rope.get(layer_type) or next((settings for settings in rope.values() if isinstance(settings, dict)), rope)


def free_architecture_of(config, family: Family | None = None) -> str | None:
    """The llama.cpp architecture in which layers of such a model may differ in width; None where it has none."""
    family, rope = family or family_of(config), rope_of(config)
    if family.gguf_free == "openelm" and not (config.tie_word_embeddings and rope.get("rope_type", "default") == "default"):
        return None  # its graph shares the embeddings with the head, and knows no factors of the rotary frequencies
    return family.gguf_free if rope.get("partial_rotary_factor", 1.0) == 1.0 else None


def units_of(config) -> list[dict[str, Units]]:
    """What each part of each layer has, of a pruned or a dense model's config."""
    return shape_of(config).units


def irregular(units: list[dict[str, Units]]) -> str:
    """Which layers differ in width from most of the others, part by part, in words; empty where all are equal. A layer may lack a part."""
    keys = [tuple((kind, *counts.items()) for kind, counts in layer.items()) for layer in units]
    most = dict(units[keys.index(max(sorted(set(keys), reverse=True), key=lambda key: (len(key), keys.count(key))))])
    for layer in units:  # what the most frequent has not
        most |= {kind: counts for kind, counts in layer.items() if kind not in most}
    others = [str(index) for index, layer in enumerate(units) if any(most[kind] != counts for kind, counts in layer.items())]
    if not others:
        return ""
    shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return f"layers {shown} differ from the {in_words(most)} of the others"


def in_words(units: dict[str, Units]) -> str:
    """What a layer has: ``9 heads, 3 KV heads and 1536 channels``."""
    *first, last = [f"{count} {sort.replace('kv_', 'KV ')}" for counts in units.values() for sort, count in counts.items()]
    return f"{', '.join(first)} and {last}" if first else last


@dataclass(frozen=True)
class Limits:
    """What a runtime requires of a pruned model.

    ``same_heads``, ``same_channels``: one number in all layers. ``new_bias``: a recovery may add biases. ``all_biases``: where an output
    projection has one, the config's flag gives all projections of such parts a bias in every layer, of zeros where there is none.
    ``divisor``: the number of heads must divide it (0: any number). ``whole_heads``: no head can go. ``lacking``: kinds of parts that a
    layer may lack; ``first_attends``: not the first layer's attention.
    """

    same_heads: bool = False
    same_channels: bool = False
    new_bias: bool = True
    all_biases: bool = False
    divisor: int = 0
    whole_heads: bool = False
    lacking: tuple[str, ...] = ()
    first_attends: bool = False


def limits_of(runtime: str, shape: ModelShape) -> Limits:
    """What ``--runtime`` requires of a model of this shape.

    ``vllm`` and ``gguf`` have layers of different widths for some families only, no mixtures of experts among them; others must be regular
    there, as for ``transformers``. What is a llama to ``gguf`` may have biases, which other architectures of
    llama.cpp have no place for.
    Raises UserError for ``gguf`` where llama.cpp has no architecture for it.
    """
    if runtime == "gguf" and shape.gguf is None:
        raise UserError("--runtime gguf: llama.cpp has no architecture that computes this model; leave it out, or name another runtime")
    free = {"any": True, "gguf": shape.gguf_free is not None, "vllm": shape.vllm_free, "transformers": False}[runtime]
    free = free and not shape.regular and (runtime == "any" or not shape.is_mixture)
    divisor = shape.hidden if not free and shape.heads_divide_hidden else 0
    bound = shape.gguf in HEADS_FILL_HIDDEN if runtime == "gguf" else shape.heads_bound
    whole_heads = bool(shape.heads_fixed) or (not free and bound)
    lacking = () if not free or shape.is_mixture or (runtime == "gguf" and shape.gguf_free != "deci") else ("attention", "mlp")
    lacks = {"lacking": lacking[:1] if runtime == "gguf" else lacking, "first_attends": runtime != "any"}
    if runtime == "gguf" or (runtime == "any" and free and not shape.is_mixture):
        new_bias = runtime == "any" or shape.gguf_free == "deci"
        all_biases = shape.stock_bias and not free
        return Limits(not free, not free, new_bias=new_bias, all_biases=all_biases, divisor=divisor, whole_heads=whole_heads, **lacks)
    same_heads, biases = not (free and shape.is_mixture), shape.stock_bias
    return Limits(same_heads, not free, new_bias=biases, all_biases=biases, divisor=divisor, whole_heads=whole_heads, **lacks)


def check_missing(shape: ModelShape, runtime: str, way: str | None = None) -> None:
    """Raises Recurring for a model some of whose layers lack a part that ``runtime`` computes no layer without. ``way``: the way out, where
    it is not that of :func:`why_not_missing`.
    """
    for index, layer in enumerate(shape.layers):
        for kind in layer.missing:
            if found := why_not_missing(shape, runtime, kind, index):
                raise Recurring(f"layer {index} has no {KINDS[kind].title} part: {found[0]}; {way or found[1]}")


def why_not_missing(shape: ModelShape, runtime: str, kind: str, index: int | None = None) -> tuple[str, str] | None:
    """(why a layer of such a model, or layer ``index`` of it, cannot lack its part of this kind; the way out, when it is pruned), or
    None.
    """
    limits = limits_of(runtime, shape)
    if kind in limits.lacking:
        if not (limits.first_attends and kind == "attention" and index == 0):
            return None
        who = {"gguf": "llama.cpp", "vllm": "vLLM"}[runtime]
        return f"{who} takes no first layer without one", "keep it, or --runtime any"
    if shape.is_mixture or shape.regular:
        why = "no class holds such a model with a layer that lacks a part"
        return why, "keep its parts, or let whole layers go (--drop_layers)"
    if runtime == "gguf" and limits.lacking:
        why = "llama.cpp leaves the attention of such a layer out as well"
        return why, "let attention alone go (--prune heads), or --runtime any"
    where = {"gguf": "no architecture of llama.cpp", "vllm": "no class of vLLM", "transformers": "no class of transformers"}[runtime]
    return f"{where} holds this model with a layer that lacks a part", "--runtime any, or let whole layers go (--drop_layers)"
