"""The sizes of a model, from its config alone, and what a runtime asks of the sizes of a pruned one."""

from __future__ import annotations

from dataclasses import dataclass

from .families import Family, family_of, is_pruned

HEADS_FILL_HIDDEN = ("qwen2", "phi3", "chatglm", "olmo2", "exaone4")  # architectures of llama.cpp that take no fewer heads
RUNTIMES = ("any", "transformers", "vllm", "gguf")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what pruning can do, from a config alone."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocab: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: str | None  # as Family has it
    stock_bias: bool  # the family's own class can have biases in its output projections
    heads_divide_hidden: bool
    heads_bound: bool  # its config class takes the length of the rope's factors from the number of heads, so takes no other
    gguf: str  # the llama.cpp architecture that holds it where its layers have one width
    gguf_free: str | None  # the one in which they may differ
    vllm_free: bool  # vLLM computes it where they do
    norms_per_layer: int = 2

    def layer_parameters(self, heads: int, kv_heads: int, channels: int, o_bias: bool | None = None, down_bias: bool | None = None) -> int:
        """Parameters of one decoder layer of these widths; a bias that is not mentioned is as in the dense model."""
        o_bias = self.o_bias if o_bias is None else o_bias
        down_bias = self.mlp_bias if down_bias is None else down_bias
        wide, narrow = heads * self.head_dim, kv_heads * self.head_dim
        attention = self.hidden * (2 * wide + 2 * narrow) + self.qkv_bias * (wide + 2 * narrow) + o_bias * self.hidden
        mlp = channels * self.channel_parameters + down_bias * self.hidden
        norms = {None: 0, "head": 2 * self.head_dim, "all": wide + narrow}[self.qk_norm]
        return attention + mlp + self.norms_per_layer * self.hidden + norms

    @property
    def channel_parameters(self) -> int:
        """Parameters that one feed-forward channel holds."""
        return 3 * self.hidden + 2 * self.mlp_bias

    @property
    def decoder_parameters(self) -> int:
        return self.layers * self.layer_parameters(self.heads, self.kv_heads, self.channels)

    @property
    def other_parameters(self) -> int:
        """Embeddings, final norm and (untied) output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden


def shape_of(config, family: Family | None = None) -> ModelShape:
    """The shape of a dense model's config."""
    family = family or family_of(config)

    def has(bias: str | bool) -> bool:
        return bool(getattr(config, bias, False)) if isinstance(bias, str) else bias

    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim_of(config),
        channels=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        qkv_bias=has(family.qkv_bias),
        o_bias=has(family.o_bias),
        mlp_bias=has(family.mlp_bias),
        qk_norm=family.qk_norm,
        stock_bias=isinstance(family.o_bias, str) and isinstance(family.mlp_bias, str),
        heads_divide_hidden=family.heads_divide_hidden,
        heads_bound=rope_of(config).get("rope_type") == "longrope",
        gguf=family.gguf,
        gguf_free=free_architecture_of(config, family),
        vllm_free=family.decilm and window_of(config) is None,
        norms_per_layer=family.norms_per_layer,
    )


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config) -> int | None:
    """Tokens that attention looks back, where some layer's is limited."""
    types = getattr(config, "layer_types", None)
    if (types and "sliding_attention" not in types) or not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None) or None


def rope_of(config, layer_type: str = "full_attention") -> dict:
    """The settings of its rotary embeddings; of layers of ``layer_type``, where kinds of layers have settings of their own."""
    rope = config.rope_parameters
    return rope.get(layer_type) or next((own for own in rope.values() if isinstance(own, dict)), rope)


def free_architecture_of(config, family: Family | None = None) -> str | None:
    """The llama.cpp architecture in which layers of such a model may differ in width; None where it has none."""
    family, rope = family or family_of(config), rope_of(config)
    if family.gguf_free == "openelm" and not (config.tie_word_embeddings and rope.get("rope_type", "default") == "default"):
        return None  # its graph shares the embeddings with the head, and knows no factors of the rotary frequencies
    return family.gguf_free if rope.get("partial_rotary_factor", 1.0) == 1.0 else None


def widths_of(config) -> list[tuple[int, int, int]]:
    """(query heads, KV heads, channels) of each layer, of a pruned or a dense model's config."""
    if is_pruned(config):
        lists = config.num_attention_heads_per_layer, config.num_key_value_heads_per_layer, config.intermediate_size_per_layer
        return list(zip(*lists))
    heads = config.num_attention_heads
    return [(heads, getattr(config, "num_key_value_heads", None) or heads, config.intermediate_size)] * config.num_hidden_layers


def irregular(widths: list[tuple[int, int, int]]) -> str:
    """Which layers differ in width from most of the others, in words; empty where all are equal."""
    most = max(sorted(set(widths), reverse=True), key=widths.count)
    others = [str(index) for index, width in enumerate(widths) if width != most]
    if not others:
        return ""
    shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return f"layers {shown} differ from the {most[0]} heads, {most[1]} KV heads and {most[2]} channels of the others"


@dataclass(frozen=True)
class Limits:
    """What a runtime asks of a pruned model.

    ``same_heads``, ``same_channels``: one number in all layers. ``new_bias``: a recovery may add biases. ``all_biases``:
    where it does, the config's flags give every projection of every layer a bias, of zeros where there is none.
    ``divisor``: the number of heads must divide it (0: any number). ``whole_heads``: no head can go.
    """

    same_heads: bool = False
    same_channels: bool = False
    new_bias: bool = True
    all_biases: bool = False
    divisor: int = 0
    whole_heads: bool = False


def limits_of(runtime: str, shape: ModelShape) -> Limits:
    """What ``--runtime`` asks of a model of this shape.

    ``vllm`` and ``gguf`` know layers of different widths for some families only; others must be regular there, as for
    ``transformers``. What is a llama to ``gguf`` may have biases, which other architectures of llama.cpp have no place for.
    """
    together = shape.qk_norm == "all"  # a norm over all heads is another one without some of them
    free = {"any": True, "gguf": shape.gguf_free is not None, "vllm": shape.vllm_free, "transformers": False}[runtime]
    divisor = shape.hidden if not free and shape.heads_divide_hidden else 0
    bound = shape.gguf in HEADS_FILL_HIDDEN if runtime == "gguf" else shape.heads_bound
    whole_heads = together or (not free and bound)
    if runtime in ("any", "gguf"):
        new_bias = runtime == "any" or shape.gguf_free == "deci"
        return Limits(not free, not free, new_bias=new_bias, divisor=divisor, whole_heads=whole_heads)
    return Limits(True, not free, new_bias=shape.stock_bias, all_biases=shape.stock_bias, divisor=divisor, whole_heads=whole_heads)
