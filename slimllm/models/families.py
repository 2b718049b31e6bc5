"""The table of model families: one row says what a family's layer looks like. Nothing else in the package names its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ..errors import UserError
from .refused import UNSUPPORTED, WRAPPERS

PRUNED = "slim_"  # what the model_type of a pruned model with widths per layer begins with
HOW_TO_ADD = "docs/add-a-family.md"


@dataclass(frozen=True)
class PartRow:
    """Where a layer keeps one of its parts, as attribute names, and what the model's config says about it.

    A part reads the residual stream and adds to it. ``kind``: what it is (:mod:`parts`), and its name in plans and records. ``module``:
    the part in the layer. ``inputs``: the projections whose rows belong to its units: queries, keys and values, or gate and up; one name
    where they are fused, in this order. ``gate``: whether the channels of a feed-forward part are scaled by a gate; without one its only
    input is up. ``output``: the projection whose columns belong to units. ``norm``: before the module, None where
    there is none; ``post_norm``: between the module and the residual stream.

    ``sizes``: config entries with the numbers of its units, each a number or a list with one for each layer. ``layers``: the entry,
    a list of true and false, that says which layers have the part, where not all do; or an entry and the value that it has for these.
    ``input_bias``, ``output_bias``: the name of the config's flag for a bias of these projections, or the fixed answer. ``qk_norm``:
    ``head``: queries and keys are normed head by head; ``all``: with weights for all heads, so that no head can go; ``qk_norm_flag``: the
    config's flag without which they are not normed, where there is one. ``output_gate``: the query projection holds, after the queries of
    each head, as many rows of a gate that its output is multiplied by. ``per_head``: parameters of the module with one number per query
    head; ``single``: with one number in all. ``fixed``: why its class takes no other number of units, where it takes none.

    ``beside_module``: what a layer has that holds the part as this row says, where other layers hold it under the same name otherwise.

    ``scale``: what its module calls the factor of what the output projection of a feed-forward part gives, or its experts together.

    A part without ``sizes`` has no units: it is run as it is (:func:`mixer`). ``kept``: the projections, by their places in the layer,
    whose outputs it keeps of each token; where a layer lacks one, it keeps what the one before gives once more, and nothing where it lacks
    the first, or the module that would hold it. What has a convolution keeps a state besides.

    Of experts, ``inputs`` names the router and ``output`` the module that holds them all; ``top_k``: the entry with the number of experts
    that a token is routed to; ``groups``: those with the numbers of groups that they lie in, and of groups that these are taken from;
    ``stacked``: the parameters of that module that hold the input projections of all experts, gate and up, and their output projections.
    ``transposed``: these have inputs before outputs, and the columns of gate and up take turns. ``fits``: their output projections can
    be refitted. Where ``sizes`` does not name their width, no channels of experts can go. ``beside``: a feed-forward part that stays whole
    and is added to them behind a norm of each, ``own_norm`` of the experts, and before ``post_norm``; the layer itself holds the router
    and them, ``module``, and the router reads the residual stream.

    ``doubled``: of a feed-forward part, whether a layer, by the config and its number, has twice as many channels as ``sizes`` says.
    """

    kind: str
    module: str
    inputs: tuple[str, ...]
    output: str
    sizes: tuple[str, ...]
    norm: str | None
    gate: bool = True
    post_norm: str | None = None
    layers: str | tuple[str, str] | None = None
    input_bias: str | bool = False
    output_bias: str | bool = False
    qk_norm: str | None = None
    qk_norm_flag: str | None = None
    query_norm: str = "q_norm"
    output_gate: bool = False
    per_head: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    fixed: str | None = None
    beside_module: str | None = None
    scale: str | None = None
    top_k: str = "num_experts_per_tok"
    stacked: tuple[str, str] = ("gate_up_proj", "down_proj")
    transposed: bool = False
    fits: bool = True
    groups: tuple[str, str] | None = None
    beside: PartRow | None = None
    own_norm: str | None = None
    doubled: Callable[[object, int], bool] | None = None
    kept: tuple[str, ...] = ()

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of the residual stream before and after the part, where it has some."""
        return tuple(name for name in (self.norm, self.post_norm) if name is not None)

    def is_in(self, layer) -> bool:
        """Whether a layer, the module, has the part: layers may hold experts or a feed-forward part under one name."""
        module = getattr(layer, self.module, None)
        form = self.beside_module is None or hasattr(layer, self.beside_module)
        return form and module is not None and (not self.output or hasattr(module, self.output))


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
# What a layer makes of the input that it is given for each token: down(act(gate(states)) * input), normed. It is run and never cut.
TOKEN_INPUT = PartRow("token_input", "per_layer_projection", ("per_layer_input_gate",), "", (), None, post_norm="post_per_layer_input_norm")
EXPERTS = PartRow("experts", "mlp", ("gate",), "experts", ("num_experts", "intermediate_size"), norm="post_attention_layernorm")


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps what it is made of, as attribute names, and what its config says about it. The defaults are Llama's.

    ``steps``: the parts of a layer in the order in which they are computed; the parts of one step read the same state, side by side.
    ``variant``: (config entry, a value of it, the steps of models that have this value), where they are others.
    ``norm_vectors``: how many vectors of the hidden size a norm of the residual stream has: its weights, and where there are two its
    biases. ``norm_offset``: what is added to the weights before they multiply. ``norm_epsilon``: the config entry of what is added to the
    variance, or the number itself; a norm whose entry is not ``rms_norm_eps`` subtracts the mean.

    ``*_multiplier``, ``logits_divisor``, ``*_softcap``: names of config entries, where the family has them. ``attention_scalar``: of
    the entry whose root divides the attention scores in place of the head size's. ``attention_clip``: of the largest size that queries,
    keys and values may have. ``sparse_rope``: of the entry that says which
    layers have rotary embeddings, where some have none. ``local_rope``: of the entry in which transformers 4 kept the rotary base of
    layers with a sliding window, where that is one of its own.

    ``begins_text``: it computes something else where a text does not begin with its first token (<bos>).

    ``token_inputs``: of the config entry with the size of what each layer is given for a token besides the state, and of the one with the
    rows of the table that holds this for all layers (``token_table``); its layers take it by the name ``token_input``. ``shared``: the
    argument of its layers in which some leave keys and values, by the layer's type, for later layers of that type that have none.

    ``pairs``: its layers give the states with something beside them, which its decoder takes apart.

    ``regular``: its config has settings of each layer where those of a pruned model with widths per layer would stand, so that a pruned
    one has one width.

    ``settle``: writes into a config the sizes that its class derives from others, so that they can be read and changed there.

    ``needs``: (config entry, the value that it must have, why), where models with another value are refused.

    ``gguf``: the llama.cpp architecture that holds it with layers of one width, ``gguf_free``: the one where layers may differ; None where
    none computes the same. ``decilm``: vLLM's DeciLM computes it, once its layers differ.
    """

    model_type: str
    models: str  # the names that people know them by
    gguf: str | None
    gguf_free: str | None = None
    decilm: bool = False
    steps: tuple[tuple[PartRow, ...], ...] = ((ATTENTION,), (MLP,))
    variant: tuple[str, object, tuple[tuple[PartRow, ...], ...]] | None = None
    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    head_bias: str | bool = False
    norm_vectors: int = 1
    norm_offset: float = 0.0
    norm_epsilon: str | float = "rms_norm_eps"
    embedding_multiplier: str | None = None
    attention_multiplier: str | None = None
    attention_scalar: str | None = None
    attention_softcap: str | None = None
    attention_clip: str | None = None
    residual_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_multiplier: str | None = None
    logits_softcap: str | None = None
    sparse_rope: str | None = None
    local_rope: str | None = None
    begins_text: bool = False
    token_inputs: tuple[str, str] | None = None
    token_table: str | None = None
    token_input: str | None = None
    shared: str | None = None
    activation: str = "silu"  # its feed-forward part's, as llama.cpp computes it
    heads_divide_hidden: bool = False  # its config class takes no other number of heads
    pairs: bool = False
    regular: bool = False
    settle: Callable[[object], None] = lambda config: None
    needs: tuple[tuple[str, object, str], ...] = ()

    @property
    def parts(self) -> tuple[PartRow, ...]:
        """The parts of a layer that have units, in the order of computation."""
        return tuple(row for step in self.steps for row in step if row.sizes)

    @property
    def is_hybrid(self) -> bool:
        """Whether its layers hold something that is run and never cut."""
        return any(not row.sizes for step in self.steps for row in step)

    @property
    def is_mixture(self) -> bool:
        """Whether its layers hold experts, of which each token is routed to some."""
        return any(row.kind == "experts" for row in self.parts)

    def part(self, kind: str) -> PartRow:
        """The row of one part."""
        return next(row for row in self.parts if row.kind == kind)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of all prunable projections, in the order of computation."""
        return tuple(dict.fromkeys(name for row in self.parts if row.kind != "experts" for name in (*row.inputs, row.output)))

    def heads_fixed(self, config=None) -> str | None:
        """Why no head of a model with this config can go, where none can; without a config, of any model of the family."""
        row = next((row for row in self.parts if row.kind == "attention"), None)
        if row is None:
            return "its attention is run as a whole"
        if row.qk_norm == "all" and (row.qk_norm_flag is None or getattr(config, row.qk_norm_flag, False)):
            return "queries and keys are normed over all heads together"
        return row.fixed

    def is_norm(self, name: str) -> bool:
        """Whether a tensor of this name holds a norm's weights."""
        return name.endswith("norm.weight")


def in_turn(attention: dict | None = None, mlp: dict | None = None) -> tuple[tuple[PartRow, ...], ...]:
    """The steps of a layer of attention, then feed-forward part, that differ from Llama's in these entries."""
    return (replace(ATTENTION, **attention or {}),), (replace(MLP, **mlp or {}),)


def with_experts(
    attention: dict | PartRow | None = None, experts: dict | None = None, mlp: dict | None = None
) -> tuple[tuple[PartRow, ...], ...]:
    """The steps of a layer of attention, which may be a mixer, then experts, or in some layers a feed-forward part in their place."""
    first = attention if isinstance(attention, PartRow) else replace(ATTENTION, **attention or {})
    return (first,), (replace(EXPERTS, **experts or {}), replace(MLP, **mlp or {}))


def side_by_side(attention: dict | None = None, mlp: dict | None = None) -> tuple[tuple[PartRow, ...], ...]:
    """The one step of a layer whose attention and feed-forward part read the same state, through one norm unless the entries say
    otherwise.
    """
    return ((replace(ATTENTION, **attention or {}), replace(MLP, **{"norm": ATTENTION.norm, **(mlp or {})})),)


def mixer(
    module: str,
    layers: str | tuple[str, str] | None = None,
    norm: str = "input_layernorm",
    mark: str = "",
    kept: tuple[str, ...] = (),
) -> PartRow:
    """A part that is run and never cut: linear attention, a state space, a convolution, latent attention. ``mark``: what the module has
    where it is such a part, if other parts have its name. ``kept``: as PartRow has it.
    """
    return PartRow("mixer", module, (), mark, (), norm, layers=layers, kept=kept)


_BIASED = {"input_bias": True, "output_bias": True}


def _settle_lfm2(config) -> None:
    if config.block_auto_adjust_ff_dim:
        width = int(2 * config.intermediate_size / 3)
        if config.block_ffn_dim_multiplier is not None:
            multiple = config.block_multiple_of
            width = multiple * -(-int(config.block_ffn_dim_multiplier * width) // multiple)
        config.intermediate_size, config.block_auto_adjust_ff_dim = width, False


def _settle_gemma4(config) -> None:
    config.allow_global_per_layer_attribute_access = True  # head sizes, which differ by kind of layer, and which nothing here goes by
    own, rows = (getattr(config, f"{name}_size_per_layer_input", 0) for name in ("hidden", "vocab"))
    if own and rows != config.vocab_size:
        raise UserError(f"vocab_size_per_layer_input {rows} is not vocab_size {config.vocab_size}: no such model has been verified")
    if config.model_type == "gemma4_text" and config.num_kv_shared_layers and not own:
        raise UserError("num_kv_shared_layers without hidden_size_per_layer_input: transformers cannot run such a model either")


def _doubled(config, index: int) -> bool:
    return config.use_double_wide_mlp and config.kv_sharing_modes[index] == "reuse"


_LFM2_MLP = replace(MLP, module="feed_forward", inputs=("w1", "w3"), output="w2", norm="ffn_norm")
_LFM2_ATTENTION = replace(
    ATTENTION,
    layers=("layer_types", "full_attention"),
    output="out_proj",
    norm="operator_norm",
    qk_norm="head",
    query_norm="q_layernorm",
    input_bias=False,
    output_bias=False,
)
_LFM2_FIRST = (mixer("conv", layers=("layer_types", "conv"), norm="operator_norm"),), (_LFM2_ATTENTION,)
_MAMBA = (mixer("mamba", layers=("layer_types", "linear_attention")),)
_SHARED_MLP = replace(MLP, module="shared_mlp", inputs=("input_linear",), output="output_linear", sizes=("shared_intermediate_size",))
_NO_BIAS = {"input_bias": False, "output_bias": False}
_MLP_BIAS = {"input_bias": "mlp_bias", "output_bias": "mlp_bias"}
_DECI = {"gguf_free": "deci", "decilm": True}
_SCALED = {name: name for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier")}  # entries called alike
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
_USE_BIAS = {"input_bias": "use_bias", "output_bias": "use_bias"}
_AFMOE_NORMS = {"norm": "pre_mlp_layernorm", "post_norm": "post_mlp_layernorm"}
_ARIA = {"inputs": ("router",), "sizes": ("moe_num_experts",), "top_k": "moe_topk", "transposed": True, "fits": False}
_NEMOTRON_H = {"module": "mixer", "norm": "norm"}  # each layer has one part
_SQUARE = "the output projection of its attention has as many inputs as the hidden size has numbers, whatever the heads"
_STABLELM = {"input_bias": "use_qkv_bias", "output_bias": False, "qk_norm": "all", "qk_norm_flag": "qk_layernorm", "fixed": _SQUARE}
_LINEAR_ATTENTION = mixer("linear_attn", layers=("layer_types", "linear_attention"))
_GATED_ATTENTION = replace(ATTENTION, layers=("layer_types", "full_attention"), qk_norm="head", output_gate=True)
_LATENT_STATE = "self_attn.kv_a_proj_with_mqa"
_LATENT = mixer("self_attn", kept=(_LATENT_STATE,))  # latent attention: keys and values of all heads come from one shared projection
_KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj")
_WHOLE = mixer("self_attn", kept=_KEYS_AND_VALUES)  # attention whose heads have a gate, or sizes, of a form that has not been verified yet
_GROUPS = ("n_group", "topk_group")
_ROUTED = {"sizes": ("n_routed_experts",), "groups": _GROUPS}
_UNGATED = {"inputs": ("up_proj",), "gate": False}
_FUSED_MLP = {"inputs": ("gate_up_proj",)}
_MOE_SIZES = {"sizes": ("num_experts", "moe_intermediate_size")}
_WHOLE_EXPERTS = {"sizes": ("num_experts",)}  # their width is another part's too, so that no channels can go
_LOCAL_EXPERTS = {"sizes": ("num_local_experts",)}
_BY_ROUTER = {"inputs": ("router",), **_WHOLE_EXPERTS}
_JAMBA_EXPERTS = replace(EXPERTS, **_BY_ROUTER)
_ROUTED_SIZES = {"sizes": ("n_routed_experts", "moe_intermediate_size")}
_LOCAL_SIZES = {"sizes": ("num_local_experts", "intermediate_size")}


_GEMMA4_MLP = replace(MLP, **_NORMS_AROUND["mlp"], doubled=_doubled)
_GEMMA4_EXPERTS = replace(
    EXPERTS,
    module="experts",
    inputs=("router",),
    output="",
    norm="pre_feedforward_layernorm_2",
    own_norm="post_feedforward_layernorm_2",
    post_norm="post_feedforward_layernorm",
    beside=replace(_GEMMA4_MLP, post_norm="post_feedforward_layernorm_1"),
    top_k="top_k_experts",
    **_MOE_SIZES,
)
_GEMMA4_LAST = (TOKEN_INPUT,), (mixer("layer_scalar"),)
_GEMMA4_DENSE = ((_WHOLE,), (_GEMMA4_MLP,), *_GEMMA4_LAST)
_GEMMA4 = partial(
    Family,
    gguf="gemma4",
    steps=_GEMMA4_DENSE,
    logits_softcap="final_logit_softcapping",
    begins_text=True,
    shared="shared_kv_states",
    activation="gelu_pytorch_tanh",
    regular=True,
    settle=_settle_gemma4,
)


def _with_shared_mlp(attention: dict | None = None) -> tuple[tuple[PartRow, ...], ...]:
    """Granite's: experts, and beside them a feed-forward part for all tokens, where the model has them."""
    experts = {"module": "block_sparse_moe", "inputs": ("router",), **_LOCAL_SIZES}
    return (replace(ATTENTION, **attention or {}),), (replace(EXPERTS, **experts), _SHARED_MLP)


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
            **_SCALED,
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
        Family(
            "olmo_hybrid",
            "OLMo Hybrid",
            None,
            steps=(
                (_LINEAR_ATTENTION,),
                (replace(ATTENTION, **_NORMS_AFTER["attention"], qk_norm="all", layers=("layer_types", "full_attention")),),
                (
                    replace(MLP, beside_module="linear_attn", layers=("layer_types", "linear_attention")),
                    replace(MLP, **_NORMS_AFTER["mlp"], beside_module="self_attn", layers=("layer_types", "full_attention")),
                ),
            ),
        ),
        Family(
            "qwen3_5_text",
            "Qwen3.5 and 3.6, dense, without their vision part",
            "qwen35",
            steps=((_LINEAR_ATTENTION,), (_GATED_ATTENTION,), (MLP,)),
            norm_offset=1.0,
        ),
        Family(
            "lfm2",
            "LFM2, dense",
            None,
            steps=(
                *_LFM2_FIRST,
                (_LFM2_MLP,),
            ),
            final_norm="embedding_norm",
            norm_epsilon="norm_eps",
            settle=_settle_lfm2,
        ),
        Family(
            "lfm3",
            "LFM3",
            None,
            steps=(
                (mixer("conv", layers=("layer_types", "conv"), norm="operator_norm"),),
                (mixer("self_attn", norm="operator_norm", kept=_KEYS_AND_VALUES),),
                (replace(_LFM2_MLP, post_norm="post_ffn_norm"),),
            ),
            final_norm="embedding_norm",
            norm_epsilon="norm_eps",
            needs=(("use_sandwich_norm", True, "the form without norms after the parts has not been verified"),),
        ),
        Family(
            "granitemoehybrid",
            "Granite 4, with or without experts and Mamba layers",
            None,
            steps=(_MAMBA, *_with_shared_mlp({"layers": ("layer_types", "full_attention")})),
            variant=("num_local_experts", 0, (_MAMBA, (replace(ATTENTION, layers=("layer_types", "full_attention")),), (_SHARED_MLP,))),
            **_SCALED,
            logits_divisor="logits_scaling",
        ),
        Family("ernie4_5", "ERNIE 4.5, dense", "ernie4_5", steps=in_turn(_USE_BIAS, _USE_BIAS)),
        Family("seed_oss", "Seed-OSS", "seed_oss", steps=in_turn({"output_bias": "attention_out_bias"}, _MLP_BIAS)),
        Family("hunyuan_v1_dense", "Hunyuan, dense", "hunyuan-dense", steps=in_turn({"qk_norm": "head", "query_norm": "query_layernorm"})),
        Family("cwm", "CWM", "llama", gguf_free="deci", steps=in_turn(_NO_BIAS, _MLP_BIAS), heads_divide_hidden=True),
        Family("ministral", "Ministral 8B", "llama", gguf_free="deci", steps=in_turn(_NO_BIAS)),
        Family("internlm3", "InternLM3", "llama", **_DECI, steps=in_turn(mlp=_MLP_BIAS), heads_divide_hidden=True),
        Family("iquestcoder", "IQuest-Coder", "llama", **_DECI, steps=in_turn(mlp=_MLP_BIAS), heads_divide_hidden=True),
        Family("gemma", "Gemma 1", "gemma", norm_offset=1.0, begins_text=True, activation="gelu_pytorch_tanh"),
        _GEMMA("vaultgemma", "VaultGemma", None, steps=in_turn(mlp={"norm": "pre_feedforward_layernorm"})),
        Family(
            "hyperclovax",
            "HyperCLOVA X",
            None,
            steps=in_turn({"post_norm": "post_norm1"}, {"post_norm": "post_norm2", **_MLP_BIAS}),
            **_SCALED,
            logits_multiplier="logits_scaling",
            heads_divide_hidden=True,
            needs=(("use_post_norm", True, "the form without norms after the parts has not been verified"),),
        ),
        Family(
            "granite_swa",
            "Granite with sliding windows",
            None,
            steps=in_turn({"per_head": ("sinks",)}, _MLP_BIAS),
            **_SCALED,
            logits_divisor="logits_scaling",
        ),
        Family("helium", "Helium", None, steps=in_turn({"output_bias": False, "fixed": _SQUARE}, _MLP_BIAS)),
        Family("olmo", "OLMo 1", "olmo", norm_vectors=0, norm_epsilon=1e-5, attention_clip="clip_qkv"),
        Family(
            "stablelm",
            "StableLM",
            "stablelm",
            steps=in_turn(_STABLELM),
            variant=("use_parallel_residual", True, side_by_side(_STABLELM)),
            norm_vectors=2,
            norm_epsilon="layer_norm_eps",
        ),
        Family("arcee", "Arcee AFM", "arcee", steps=in_turn(mlp={**_UNGATED, **_MLP_BIAS}), activation="relu2", heads_divide_hidden=True),
        Family(
            "apertus",
            "Apertus",
            "apertus",
            steps=in_turn(
                {"norm": "attention_layernorm", "qk_norm": "head"},
                {**_UNGATED, "norm": "feedforward_layernorm", "single": ("act_fn.alpha_p", "act_fn.alpha_n")},
            ),
            activation="xielu",
        ),
        Family(
            "nanochat",
            "nanochat",
            None,
            steps=in_turn(mlp={"inputs": ("fc1",), "gate": False, "output": "fc2"}),
            norm_vectors=0,
            logits_softcap="final_logit_softcapping",
        ),
        Family(
            "jais2",
            "Jais 2",
            "jais2",
            steps=in_turn(mlp={**_UNGATED, **_MLP_BIAS}),
            norm_vectors=2,
            norm_epsilon="layer_norm_eps",
            activation="relu2",
            heads_divide_hidden=True,
        ),
        Family(
            "starcoder2",
            "StarCoder2",
            "starcoder2",
            steps=in_turn(_USE_BIAS, {"inputs": ("c_fc",), "gate": False, "output": "c_proj", **_USE_BIAS}),
            norm_vectors=2,
            norm_epsilon="norm_epsilon",
            activation="gelu_pytorch_tanh",
        ),
        Family(
            "nemotron",
            "Nemotron 3 and 4, Minitron",
            "nemotron",
            steps=in_turn(mlp={**_UNGATED, **_MLP_BIAS}),
            norm_vectors=2,
            norm_offset=1.0,
            norm_epsilon="norm_eps",
            activation="relu2",
        ),
        Family(
            "cohere",
            "Command R, Aya 23 and Expanse",
            "command-r",
            steps=side_by_side({"qk_norm": "all", "qk_norm_flag": "use_qk_norm"}),
            norm_epsilon="layer_norm_eps",
            logits_multiplier="logit_scale",
        ),
        Family(
            "cohere2",
            "Command R7B, Command A",
            "cohere2",
            steps=side_by_side(),
            norm_epsilon="layer_norm_eps",
            logits_multiplier="logit_scale",
        ),
        Family(
            "cohere_compass_text",
            "North, without its vision part",
            None,
            steps=side_by_side(),
            norm_epsilon="layer_norm_eps",
            logits_multiplier="logit_scale",
        ),
        Family(
            "phi",
            "Phi-1, Phi-1.5, Phi-2",
            "phi2",
            steps=side_by_side({"output": "dense", **_BIASED}, {"inputs": ("fc1",), "gate": False, "output": "fc2", **_BIASED}),
            final_norm="final_layernorm",
            head_bias=True,
            norm_vectors=2,
            norm_epsilon="layer_norm_eps",
            activation="gelu_new",
            needs=(("qk_layernorm", False, "its class makes the norms of queries and keys as large as fits the dense model's heads"),),
        ),
        Family("qwen3_moe", "Qwen3, mixtures of experts", "qwen3moe", steps=with_experts({"qk_norm": "head"}, _MOE_SIZES)),
        Family("mixtral", "Mixtral", "llama", steps=with_experts(_NO_BIAS)),
        Family("olmoe", "OLMoE", "olmoe", steps=with_experts({"qk_norm": "all"})),
        Family("flex_olmo", "FlexOlmo", None, steps=with_experts({**_NORMS_AFTER["attention"], "qk_norm": "all"}, _NORMS_AFTER["mlp"])),
        Family("minimax_m2", "MiniMax-M2", "minimax-m2", steps=with_experts({**_NO_BIAS, "qk_norm": "all"})),
        Family(
            "minimax_m3_vl_text",
            "MiniMax-M3, without its vision part",
            None,
            steps=with_experts(
                mixer("self_attn", kept=(*_KEYS_AND_VALUES, "self_attn.indexer.k_proj")),
                {"scale": "routed_scaling_factor"},
                {**_FUSED_MLP, "sizes": ("dense_intermediate_size",)},
            ),
            norm_offset=1.0,
        ),
        Family(
            "qwen2_moe",
            "Qwen1.5 and 2, mixtures of experts",
            "qwen2moe",
            steps=with_experts({"input_bias": "qkv_bias", "output_bias": False}, _MOE_SIZES),
        ),
        Family(
            "qwen3_5_moe_text",
            "Qwen3.5 and 3.6, mixtures of experts, without their vision part",
            "qwen35moe",
            steps=((_LINEAR_ATTENTION,), (_GATED_ATTENTION,), (replace(EXPERTS, **_MOE_SIZES),)),
            norm_offset=1.0,
        ),
        Family(
            "granitemoe",
            "Granite 3, mixtures of experts",
            "granitemoe",
            steps=with_experts(experts={"module": "block_sparse_moe", "inputs": ("router",), **_LOCAL_SIZES}),
            **_SCALED,
            logits_divisor="logits_scaling",
        ),
        Family(
            "phimoe",
            "Phi-3.5-MoE",
            None,
            steps=with_experts(experts={"inputs": ("router",), **_LOCAL_SIZES}),
            head_bias="lm_head_bias",
            norm_vectors=2,
        ),
        Family(
            "gpt_oss",
            "gpt-oss",
            "gpt-oss",
            steps=with_experts({"per_head": ("sinks",)}, {"inputs": ("router",), "transposed": True}),
        ),
        Family(
            "qwen3_next",
            "Qwen3-Next, Qwen3-Coder-Next",
            "qwen3next",
            steps=((_LINEAR_ATTENTION,), (_GATED_ATTENTION,), (replace(EXPERTS, **_MOE_SIZES), MLP)),
            norm_offset=1.0,
        ),
        Family(
            "glm4_moe",
            "GLM-4.5 to 4.7",
            "glm4moe",
            steps=with_experts({"qk_norm": "head", "qk_norm_flag": "use_qk_norm", "output_bias": False}, _ROUTED),
        ),
        Family("dots1", "dots.llm1", "dots1", steps=with_experts({"qk_norm": "head"}, _ROUTED)),
        Family(
            "ernie4_5_moe",
            "ERNIE 4.5, mixtures of experts",
            "ernie4_5-moe",
            steps=with_experts(_USE_BIAS, {"sizes": ("moe_num_experts",)}, _USE_BIAS),
            head_bias="use_bias",
        ),
        Family(
            "exaone_moe",
            "K-EXAONE",
            "exaone-moe",
            steps=with_experts({"qk_norm": "head", **_NO_BIAS}, {**_WHOLE_EXPERTS, "groups": _GROUPS}),
        ),
        Family(
            "hunyuan_v1_moe",
            "Hunyuan, mixtures of experts",
            "hunyuan-moe",
            steps=with_experts({"qk_norm": "head", "query_norm": "query_layernorm"}, _WHOLE_EXPERTS),
        ),
        Family("solar_open", "Solar Open", "glm4moe", steps=with_experts(_NO_BIAS, _ROUTED)),
        Family("mellum", "Mellum 2", None, steps=with_experts({"qk_norm": "head"}, _MOE_SIZES)),
        Family("hy_v3", "Hunyuan 3", None, steps=with_experts({"qk_norm": "head", **_NO_BIAS}, _WHOLE_EXPERTS)),
        Family(
            "kolibri1",
            "Kolibri 1",
            None,
            steps=with_experts(
                {"qk_norm": "head", "post_norm": "post_self_attn_layernorm"}, {"post_norm": "post_mlp_layernorm", **_MOE_SIZES}
            ),
        ),
        Family("flint", "Flint", None, steps=with_experts({"qk_norm": "head", "per_head": ("sinks",)}, _MOE_SIZES)),
        Family("aria_text", "Aria, without its vision part", None, steps=with_experts(_NO_BIAS, _ARIA)),
        Family(
            "granitemoeshared",
            "Granite 3, mixtures with a shared part",
            "granitemoe",
            steps=_with_shared_mlp(),
            **_SCALED,
            logits_divisor="logits_scaling",
        ),
        Family(
            "granitemoe_swa",
            "Granite with sliding windows, mixtures of experts",
            None,
            steps=_with_shared_mlp({"per_head": ("sinks",)}),
            **_SCALED,
            logits_divisor="logits_scaling",
        ),
        Family(
            "lfm2_moe",
            "LFM2, mixtures of experts",
            None,
            steps=(
                *_LFM2_FIRST,
                (replace(EXPERTS, module="feed_forward", norm="ffn_norm", **_MOE_SIZES), _LFM2_MLP),
            ),
            final_norm="embedding_norm",
            norm_epsilon="norm_eps",
        ),
        Family(
            "jamba",
            "Jamba",
            None,
            steps=(
                (mixer("mamba"),),
                (replace(ATTENTION, **_NO_BIAS),),
                tuple(
                    replace(row, module="feed_forward", norm="pre_ff_layernorm")
                    for row in (replace(EXPERTS, inputs=("router",), **_WHOLE_EXPERTS), MLP)
                ),
            ),
            final_norm="final_layernorm",
        ),
        Family("afmoe", "Trinity", None, steps=with_experts(_WHOLE, *[_AFMOE_NORMS | _BY_ROUTER, _AFMOE_NORMS])),
        Family(
            "mimo_v2_flash",
            "MiMo-V2-Flash",
            None,
            steps=with_experts(_WHOLE, _ROUTED | {"sizes": ("n_routed_experts", "moe_intermediate_size")}),
        ),
        Family("glm4_moe_lite", "GLM-4.7-Flash", "deepseek2", steps=with_experts(_LATENT, _ROUTED)),
        Family("deepseek_v2", "DeepSeek-V2", "deepseek2", steps=with_experts(_LATENT, _ROUTED)),
        Family("deepseek_v3", "DeepSeek-V3, DeepSeek-R1, Moonlight, Kimi K2", "deepseek2", steps=with_experts(_LATENT, _ROUTED)),
        Family(
            "deepseek_v32",
            "DeepSeek-V3.2",
            None,
            steps=with_experts(mixer("self_attn", kept=(_LATENT_STATE, "self_attn.indexer.wk")), _ROUTED),
        ),
        Family("axk1", "A.X K1", None, steps=with_experts(_LATENT, _ROUTED)),
        Family("kimi_linear", "Kimi Linear", None, steps=with_experts(_LATENT, {**_WHOLE_EXPERTS, "groups": _GROUPS})),
        Family("bailing_hybrid", "Ling 3", None, steps=with_experts(_LATENT, {**_LOCAL_EXPERTS, "groups": _GROUPS})),
        Family("youtu", "Youtu-LLM", None, steps=((_LATENT,), (MLP,))),
        Family(
            "minicpm3",
            "MiniCPM3",
            "minicpm3",
            steps=((_LATENT,), (MLP,)),
            residual_multiplier="residual_scale",
            logits_divisor="logits_scaling",
        ),
        Family(
            "bamba",
            "Bamba",
            None,
            steps=(
                (mixer("mamba", layers=("layer_types", "linear_attention")),),
                (replace(ATTENTION, layers=("layer_types", "full_attention")),),
                (replace(MLP, module="feed_forward", norm="pre_ff_layernorm", **_MLP_BIAS),),
            ),
            final_norm="final_layernorm",
            pairs=True,
        ),
        Family(
            "falcon_h1",
            "Falcon-H1",
            None,
            steps=(
                (mixer("mamba", kept=_KEYS_AND_VALUES),),  # and the attention beside it
                (replace(MLP, module="feed_forward", norm="pre_ff_layernorm", scale="down_multiplier", **_MLP_BIAS),),
            ),
            final_norm="final_layernorm",
            embedding_multiplier="embedding_multiplier",
            logits_multiplier="lm_head_multiplier",
            pairs=True,
        ),
        Family(
            "nemotron_h",
            "Nemotron-H, Nemotron Nano 2 and 3",
            None,
            steps=(
                (mixer("mixer", layers=("layer_types", "linear_attention"), norm="norm", mark="conv1d"),),
                (replace(ATTENTION, **_NEMOTRON_H, layers=("layer_types", "full_attention")),),
                (replace(EXPERTS, **_NEMOTRON_H, **_ROUTED, stacked=("up_proj", "down_proj"), fits=False, layers=("layer_types", "moe")),),
                (replace(MLP, **_NEMOTRON_H, **_UNGATED, **_MLP_BIAS, layers=("layer_types", "mlp")),),
            ),
            final_norm="norm_f",
            embedding="embeddings",
            norm_epsilon="layer_norm_epsilon",
            activation="relu2",
        ),
        Family(
            "cohere2_moe",
            "Command A, mixtures of experts",
            None,
            steps=((ATTENTION, replace(EXPERTS, norm=ATTENTION.norm, **_WHOLE_EXPERTS), replace(MLP, norm=ATTENTION.norm)),),
            norm_epsilon="layer_norm_eps",
            logits_multiplier="logit_scale",
        ),
        _GEMMA4("gemma4_unified_text", "Gemma 4 12B, without images and sound"),
        _GEMMA4(
            "gemma4_text",
            "Gemma 4, without images and sound",
            steps=((_WHOLE,), (_GEMMA4_EXPERTS,), *_GEMMA4_LAST),
            variant=("enable_moe_block", False, _GEMMA4_DENSE),
            token_inputs=("hidden_size_per_layer_input", "vocab_size_per_layer_input"),
            token_table="embed_tokens_per_layer",
            token_input="per_layer_input",
        ),
        Family("exaone4", "EXAONE 4", "exaone4", steps=_normed(_NORMS_AFTER, qk_norm="head", **_NO_BIAS)),
    )
}

TEXT_MODELS = {  # model_type of the text model inside one of text and images -> the family that it is, where text alone is read
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm_ocr_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "granite4_vision_text": "granite",
    "granite_docling_text": "granite",
    "hunyuan_vl_text": "hunyuan_v1_dense",
    "paddleocr_vl_text": "mistral",
}
UNSAID = {  # what the class of such a text model does, and its config does not say
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "glm_ocr_text": {"attention_bias": False},
    "glm4v_moe_text": {"use_qk_norm": False},
    "paddleocr_vl_text": {"sliding_window": None},
}
OF_IMAGES = ("mrope_section", "mrope_interleaved")  # settings of rope that say how places in an image are rotated


def is_pruned(config) -> bool:
    """Whether this is the config of a pruned model with widths per layer."""
    return config.model_type.startswith(PRUNED)


def family_of(config) -> Family:
    """The family of a transformers config, pruned or not: slim_llama is a llama. Raises UserError for another, with the way out, and for a
    form of one that does not fit.
    """
    model_type = config.model_type.removeprefix(PRUNED)
    if model_type in FAMILIES:
        family = FAMILIES[model_type]
        for name, value, why in family.needs:
            if (found := getattr(config, name, value)) != value:
                raise UserError(f"model_type {model_type} with {name} {found}: {why}")
        if family.variant is not None and getattr(config, family.variant[0], None) == family.variant[1]:
            return replace(family, steps=family.variant[2])
        return family
    if model_type in UNSUPPORTED:
        raise UserError(f"model_type {model_type}: {UNSUPPORTED[model_type]}")
    if model_type in WRAPPERS:
        raise UserError(f"model_type {model_type}: its config names no text model (text_config)")
    raise UserError(
        f"model_type {model_type}: not known: of a newer transformers, or with code of its own on the hub; {HOW_TO_ADD} says how to add one"
    )
