"""The table of model families: one row says what a family's layer looks like. Nothing else in the package names its parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..errors import UserError

PRUNED = "slim_"  # what the model_type of a pruned model with widths per layer begins with
HOW_TO_ADD = "docs/add-a-family.md"


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps its parts, as attribute names, and what its config says about them. The defaults are Llama's.

    ``head_inputs``: the projections whose rows belong to heads: query, key and value, or one name where they are fused in this
    order. ``channel_inputs``: those whose rows belong to feed-forward channels: gate and up, or one name where they are fused.
    ``*_output``: the projection whose columns belong to heads or channels. ``*_norm``: the norm before a block, None where there is
    none. ``*_post_norm``: a norm between the block and the residual. ``norm_offset``: what is added to a norm's weights before they
    multiply. ``qk_norm``: ``head``: queries and keys are normed head by head; ``all``: over all heads together, so that no head can go.
    ``qkv_bias``, ``o_bias``, ``mlp_bias``: the name of the config's flag for that bias, or the fixed answer.

    ``*_multiplier``, ``logits_divisor``, ``*_softcap``: names of config entries, where the family has them. ``attention_scalar``: of
    the entry whose root divides the attention scores in place of the head size's. ``sparse_rope``: of the entry that says which
    layers have rotary embeddings, where some have none. ``local_rope``: of the entry in which transformers 4 kept the rotary base of
    layers with a sliding window, where that is one of its own.

    ``begins_text``: it computes something else where a text does not begin with its first token (<bos>).

    ``gguf``: the llama.cpp architecture that holds it with layers of one width. ``gguf_free``: the one where layers may differ, if
    there is one. ``decilm``: vLLM's DeciLM computes it, once its layers differ.
    """

    model_type: str
    models: str  # that people know
    gguf: str
    gguf_free: str | None = None
    decilm: bool = False
    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    head_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    query_norm: str = "q_norm"
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    channel_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_output: str = "down_proj"
    qkv_bias: str | bool = "attention_bias"
    o_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = False
    qk_norm: str | None = None
    norm_offset: float = 0.0
    embedding_multiplier: str | None = None
    attention_multiplier: str | None = None
    attention_scalar: str | None = None
    attention_softcap: str | None = None
    residual_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    sparse_rope: str | None = None
    local_rope: str | None = None
    begins_text: bool = False
    activation: str = "silu"  # its feed-forward part's, as llama.cpp computes it
    heads_divide_hidden: bool = False  # its config class takes no other number of heads

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all prunable projections, in the order of computation."""
        return (*self.head_inputs, self.attention_output, *self.channel_inputs, self.mlp_output)

    @property
    def norms_per_layer(self) -> int:
        """How many norms of the hidden size a layer has."""
        return sum(name is not None for name in (self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm))

    def is_norm(self, name: str) -> bool:
        """Whether a tensor of this name holds a norm's weights."""
        return name.endswith("norm.weight")


_DECI = {"gguf_free": "deci", "decilm": True}
_GEMMA = partial(
    Family,
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm_offset=1.0,
    attention_scalar="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping",
    logits_softcap="final_logit_softcapping",
    begins_text=True,
    activation="gelu_pytorch_tanh",
    heads_divide_hidden=True,
)
_GLM = partial(Family, channel_inputs=("gate_up_proj",), o_bias=False)
_NORMS_AFTER = {
    "attention_norm": None,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": None,
    "mlp_post_norm": "post_feedforward_layernorm",
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LLaMA 1 to 3, Vicuna, TinyLlama, SmolLM2", "llama", **_DECI, mlp_bias="mlp_bias", heads_divide_hidden=True),
        Family("mistral", "Mistral 7B, Nemo, Small", "llama", **_DECI, qkv_bias=False, o_bias=False),
        Family("qwen2", "Qwen2, Qwen2.5", "qwen2", **_DECI, qkv_bias=True, o_bias=False),
        Family("qwen3", "Qwen3, dense", "qwen3", gguf_free="openelm", qk_norm="head"),
        _GEMMA("gemma2", "Gemma 2", "gemma2"),
        _GEMMA("gemma3_text", "Gemma 3, without its vision part", "gemma3", qk_norm="head", local_rope="rope_local_base_freq"),
        Family("smollm3", "SmolLM3", "smollm3", mlp_bias="mlp_bias", sparse_rope="no_rope_layers"),
        Family("ministral3", "Ministral 3", "mistral3", qkv_bias=False, o_bias=False),
        Family(
            "granite",
            "Granite 3, dense",
            "granite",
            gguf_free="deci",
            mlp_bias="mlp_bias",
            embedding_multiplier="embedding_multiplier",
            attention_multiplier="attention_multiplier",
            residual_multiplier="residual_multiplier",
            logits_divisor="logits_scaling",
        ),
        Family(
            "phi3",
            "Phi-3, Phi-4",
            "phi3",
            gguf_free="deci",
            head_inputs=("qkv_proj",),
            channel_inputs=("gate_up_proj",),
            qkv_bias=False,
            o_bias=False,
        ),
        _GLM("glm", "GLM-4 9B of 2024", "chatglm"),
        _GLM("glm4", "GLM-4 of 2025", "glm4", attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
        Family("olmo2", "OLMo 2", "olmo2", **_NORMS_AFTER, qk_norm="all"),
        Family("olmo3", "OLMo 3", "olmo2", **_NORMS_AFTER, qk_norm="all"),
        Family("exaone4", "EXAONE 4", "exaone4", **_NORMS_AFTER, qk_norm="head", qkv_bias=False, o_bias=False),
    )
}

_PARALLEL = "its attention and feed-forward part work side by side on the same input, and pruning takes one after the other"
_NO_GATE = "its feed-forward part has no gate, by which channels are scored"
_LATENT = "its attention is latent: keys and values of all heads come from one shared projection"
_EXPERTS = "a mixture of experts, which needs whole experts pruned"
_LINEAR = "some of its layers have linear attention or convolutions in place of attention heads"
_PER_LAYER = "its layers share keys and values or take embeddings of their own, besides what the layer before gives"
UNSUPPORTED = {  # model_type -> why
    **dict.fromkeys(("cohere", "cohere2", "gpt_neox", "gptj", "phi", "falcon", "stablelm"), _PARALLEL),
    **dict.fromkeys(("opt", "gpt2", "gpt_bigcode", "starcoder2", "bloom", "mpt", "nemotron"), _NO_GATE),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), _LATENT),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text", "olmoe", "granitemoe", "glm4_moe", "phimoe"), _EXPERTS),
    **dict.fromkeys(("lfm2", "qwen3_5_text", "qwen3_next", "mamba", "mamba2", "jamba", "zamba2", "falcon_h1", "bamba"), _LINEAR),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), _PER_LAYER),
}


def is_pruned(config) -> bool:
    """Whether this is the config of a pruned model with widths per layer."""
    return config.model_type.startswith(PRUNED)


def family_of(config) -> Family:
    """The family of a transformers config, pruned or not: slim_llama is a llama. Raises UserError for another, with the way out."""
    model_type = config.model_type.removeprefix(PRUNED)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in UNSUPPORTED:
        raise UserError(f"model_type {model_type}: {UNSUPPORTED[model_type]}")
    raise UserError(f"model_type {model_type}: supported are {', '.join(FAMILIES)}; {HOW_TO_ADD} says how to add one")


def dense_family_of(config) -> Family:
    """The family of a model that is to be pruned. Raises UserError as :func:`family_of` does, and for one that is pruned already."""
    family = family_of(config)
    if is_pruned(config):
        raise UserError(f"model_type {config.model_type}: this model is pruned already; prune the dense model it came from")
    return family
