"""The sizes of a model, from its config alone, and what a runtime asks of the sizes of a pruned one."""

from __future__ import annotations

from dataclasses import dataclass

from .families import Family, family_of, is_pruned

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
    qk_norm: bool
    window: bool  # attention of some layer looks back only so far
    stock_bias: bool  # the family's own class can have biases in its output projections
    heads_divide_hidden: bool
    norms_per_layer: int = 2

    def layer_parameters(self, heads: int, kv_heads: int, channels: int, o_bias: bool | None = None, down_bias: bool | None = None) -> int:
        """Parameters of one decoder layer of these widths; a bias that is not mentioned is as in the dense model."""
        o_bias = self.o_bias if o_bias is None else o_bias
        down_bias = self.mlp_bias if down_bias is None else down_bias
        wide, narrow = heads * self.head_dim, kv_heads * self.head_dim
        attention = self.hidden * (2 * wide + 2 * narrow) + self.qkv_bias * (wide + 2 * narrow) + o_bias * self.hidden
        mlp = channels * self.channel_parameters + down_bias * self.hidden
        return attention + mlp + self.norms_per_layer * self.hidden + self.qk_norm * 2 * self.head_dim

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
        window=window_of(config) is not None,
        stock_bias=isinstance(family.o_bias, str) and isinstance(family.mlp_bias, str),
        heads_divide_hidden=family.heads_divide_hidden,
        norms_per_layer=family.norms_per_layer,
    )


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config) -> int | None:
    """Tokens that attention looks back, where some layer's is limited."""
    return config.sliding_window if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) else None


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
    ``divisor``: the number of heads must divide it (0: any number).
    """

    same_heads: bool = False
    same_channels: bool = False
    new_bias: bool = True
    all_biases: bool = False
    divisor: int = 0


def limits_of(runtime: str, shape: ModelShape) -> Limits:
    """What ``--runtime`` asks of a model of this shape.

    ``vllm`` and ``gguf`` know layers of different widths for Llama's own layer only (DeciLM): not with query and key norms, and
    vLLM not with a sliding window. Other models must be regular there, as for ``transformers``.
    """
    regular = runtime == "transformers" or (shape.qk_norm and runtime != "any") or (shape.window and runtime == "vllm")
    if runtime == "any" or (runtime == "gguf" and not regular):
        return Limits()
    divisor = shape.hidden if regular and shape.heads_divide_hidden else 0
    return Limits(True, regular, new_bias=shape.stock_bias, all_biases=shape.stock_bias, divisor=divisor)
