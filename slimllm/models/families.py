"""The table of model families: one row says what a family's layer looks like. Nothing else in the package names its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ..errors import UserError

PRUNED = "slim_"  # what the model_type of a pruned model with widths per layer begins with
HOW_TO_ADD = "docs/add-a-family.md"


@dataclass(frozen=True)
class PartRow:
    """Where a layer keeps one of its parts, as attribute names, and what the model's config says about it.

    A part reads the residual stream and adds to it. ``kind``: what it is (:mod:`parts`), and its name in plans and records. ``module``:
    the part in the layer. ``inputs``: the projections whose rows belong to its units: queries, keys and values, or gate and up; one name
    where they are fused, in this order. ``output``: the projection whose columns belong to units. ``norm``: before the module, None where
    there is none; ``post_norm``: between the module and the residual stream.

    ``sizes``: config entries with the numbers of its units, each a number or a list with one for each layer. ``layers``: the entry,
    a list of true and false, that says which layers have the part, where not all do. ``input_bias``, ``output_bias``: the name of the
    config's flag for a bias of these projections, or the fixed answer. ``qk_norm``: ``head``: queries and keys are normed head by head;
    ``all``: over all heads together, so that no head can go.
    """

    kind: str
    module: str
    inputs: tuple[str, ...]
    output: str
    sizes: tuple[str, ...]
    norm: str | None
    post_norm: str | None = None
    layers: str | None = None
    input_bias: str | bool = False
    output_bias: str | bool = False
    qk_norm: str | None = None
    query_norm: str = "q_norm"


ATTENTION = PartRow(
    "attention",
    "self_attn",
    ("q_proj", "k_proj", "v_proj"),
    "o_proj",
    ("num_attention_heads", "num_key_value_heads"),
    norm="input_layernorm",
    input_bias="attention_bias",
    output_bias="attention_bias",
)
MLP = PartRow("mlp", "mlp", ("gate_proj", "up_proj"), "down_proj", ("intermediate_size",), norm="post_attention_layernorm")


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps what it is made of, as attribute names, and what its config says about it. The defaults are Llama's.

    ``steps``: the parts of a layer in the order in which they are computed; the parts of one step read the same state, side by side.
    ``norm_offset``: what is added to a norm's weights before they multiply.

    ``*_multiplier``, ``logits_divisor``, ``*_softcap``: names of config entries, where the family has them. ``attention_scalar``: of
    the entry whose root divides the attention scores in place of the head size's. ``sparse_rope``: of the entry that says which
    layers have rotary embeddings, where some have none. ``local_rope``: of the entry in which transformers 4 kept the rotary base of
    layers with a sliding window, where that is one of its own.

    ``begins_text``: it computes something else where a text does not begin with its first token (<bos>).

    ``gguf``: the llama.cpp architecture that holds it with layers of one width. ``gguf_free``: the one where layers may differ, if
    there is one. ``decilm``: vLLM's DeciLM computes it, once its layers differ.
    """

    model_type: str
    models: str  # the names that people know them by
    gguf: str
    gguf_free: str | None = None
    decilm: bool = False
    steps: tuple[tuple[PartRow, ...], ...] = ((ATTENTION,), (MLP,))
    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
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
    def parts(self) -> tuple[PartRow, ...]:
        """The parts of a layer, in the order of computation."""
        return tuple(row for step in self.steps for row in step)

    def part(self, kind: str) -> PartRow:
        """The row of one part."""
        return next(row for row in self.parts if row.kind == kind)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all prunable projections, in the order of computation."""
        return tuple(name for row in self.parts for name in (*row.inputs, row.output))

    @property
    def heads_fixed(self) -> bool:
        """Whether no head can go: a norm over all heads together is another one without some of them."""
        return any(row.qk_norm == "all" for row in self.parts)

    def is_norm(self, name: str) -> bool:
        """Whether a tensor of this name holds a norm's weights."""
        return name.endswith("norm.weight")


def in_turn(attention: dict | None = None, mlp: dict | None = None) -> tuple[tuple[PartRow, ...], ...]:
    """The steps of a layer of attention, then feed-forward part, that differ from Llama's in these entries."""
    return (replace(ATTENTION, **attention or {}),), (replace(MLP, **mlp or {}),)


_NO_BIAS = {"input_bias": False, "output_bias": False}
_MLP_BIAS = {"input_bias": "mlp_bias", "output_bias": "mlp_bias"}
_DECI = {"gguf_free": "deci", "decilm": True}
_GEMMA = partial(
    Family,
    norm_offset=1.0,
    attention_scalar="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping",
    logits_softcap="final_logit_softcapping",
    begins_text=True,
    activation="gelu_pytorch_tanh",
    heads_divide_hidden=True,
)
_NORMS_AROUND = {
    "attention": {"post_norm": "post_attention_layernorm"},
    "mlp": {"norm": "pre_feedforward_layernorm", "post_norm": "post_feedforward_layernorm"},
}
_NORMS_AFTER = {
    "attention": {"norm": None, "post_norm": "post_attention_layernorm"},
    "mlp": {"norm": None, "post_norm": "post_feedforward_layernorm"},
}
_FUSED_MLP = {"inputs": ("gate_up_proj",)}


def _normed(norms: dict, **attention) -> tuple[tuple[PartRow, ...], ...]:
    return in_turn({**norms["attention"], **attention}, norms["mlp"])


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LLaMA 1 to 3, Vicuna, TinyLlama, SmolLM2", "llama", **_DECI, steps=in_turn(mlp=_MLP_BIAS), heads_divide_hidden=True
        ),
        Family("mistral", "Mistral 7B, Nemo, Small", "llama", **_DECI, steps=in_turn(_NO_BIAS)),
        Family("qwen2", "Qwen2, Qwen2.5", "qwen2", **_DECI, steps=in_turn({"input_bias": True, "output_bias": False})),
        Family("qwen3", "Qwen3, dense", "qwen3", gguf_free="openelm", steps=in_turn({"qk_norm": "head"})),
        _GEMMA("gemma2", "Gemma 2", "gemma2", steps=_normed(_NORMS_AROUND)),
        _GEMMA(
            "gemma3_text",
            "Gemma 3, without its vision part",
            "gemma3",
            steps=_normed(_NORMS_AROUND, qk_norm="head"),
            local_rope="rope_local_base_freq",
        ),
        Family("smollm3", "SmolLM3", "smollm3", steps=in_turn(mlp=_MLP_BIAS), sparse_rope="no_rope_layers"),
        Family("ministral3", "Ministral 3", "mistral3", steps=in_turn(_NO_BIAS)),
        Family(
            "granite",
            "Granite 3, dense",
            "granite",
            gguf_free="deci",
            steps=in_turn(mlp=_MLP_BIAS),
            embedding_multiplier="embedding_multiplier",
            attention_multiplier="attention_multiplier",
            residual_multiplier="residual_multiplier",
            logits_divisor="logits_scaling",
        ),
        Family("phi3", "Phi-3, Phi-4", "phi3", gguf_free="deci", steps=in_turn({"inputs": ("qkv_proj",), **_NO_BIAS}, _FUSED_MLP)),
        Family("glm", "GLM-4 9B of 2024", "chatglm", steps=in_turn({"output_bias": False}, _FUSED_MLP)),
        Family(
            "glm4",
            "GLM-4 of 2025",
            "glm4",
            steps=in_turn(
                {"output_bias": False, "post_norm": "post_self_attn_layernorm"}, {**_FUSED_MLP, "post_norm": "post_mlp_layernorm"}
            ),
        ),
        Family("olmo2", "OLMo 2", "olmo2", steps=_normed(_NORMS_AFTER, qk_norm="all")),
        Family("olmo3", "OLMo 3", "olmo2", steps=_normed(_NORMS_AFTER, qk_norm="all")),
        Family("exaone4", "EXAONE 4", "exaone4", steps=_normed(_NORMS_AFTER, qk_norm="head", **_NO_BIAS)),
    )
}

_PARALLEL = "its attention and feed-forward part work side by side on the same state, and no such family has been verified yet"
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
