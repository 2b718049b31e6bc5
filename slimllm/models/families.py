"""The table of model families: one row says what a family's layer looks like. Nothing else in the package names its parts."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError

PRUNED = "slim_"  # what the model_type of a pruned model with widths per layer begins with


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps its parts, as attribute names, and what its config says about them.

    Another family is another entry in FAMILIES and one in modeling.SLIM_MODELS.

    ``head_inputs``: the projections whose rows belong to heads: query, key and value, or one name where they are fused in this
    order. ``channel_inputs``: those whose rows belong to feed-forward channels: gate and up, or one name where they are fused.
    ``*_output``: the projection whose columns belong to heads or channels. ``*_post_norm``: a norm between that and the residual.
    ``qkv_bias``, ``o_bias``, ``mlp_bias``: the name of the config's flag for that bias, or the fixed answer.
    ``residual_multiplier``, ``logits_divisor``, ``logits_softcap``: names of config entries, where the family has them.
    """

    model_type: str
    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    head_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    channel_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_output: str = "down_proj"
    qkv_bias: str | bool = "attention_bias"
    o_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = False
    qk_norm: bool = False
    residual_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    heads_divide_hidden: bool = False  # its config class takes no other number of heads

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all prunable projections, in the order of computation."""
        return (*self.head_inputs, self.attention_output, *self.channel_inputs, self.mlp_output)

    @property
    def norms_per_layer(self) -> int:
        """How many norms of the hidden size a layer has."""
        return sum(name is not None for name in (self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm))


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", mlp_bias="mlp_bias", heads_divide_hidden=True),
        Family("mistral", qkv_bias=False, o_bias=False),
        Family("qwen2", qkv_bias=True, o_bias=False),
        Family("qwen3", qk_norm=True),
    )
}


def is_pruned(config) -> bool:
    """Whether this is the config of a pruned model with widths per layer."""
    return config.model_type.startswith(PRUNED)


def family_of(config) -> Family:
    """The family of a transformers config, pruned or not: slim_llama is a llama. Raises UserError naming the supported model_types."""
    model_type = config.model_type.removeprefix(PRUNED)
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type}: supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def dense_family_of(config) -> Family:
    """The family of a model that is to be pruned. Raises UserError as :func:`family_of` does, and for one that is pruned already."""
    family = family_of(config)
    if is_pruned(config):
        raise UserError(f"model_type {config.model_type}: this model is pruned already; prune the dense model it came from")
    return family
