"""Latent attention (as DeepSeek has it) as llama.cpp's graphs want it in a GGUF file: the projection from the latent state to keys and
values as two, the first of which is multiplied with the queries, so that the cache holds the latent state alone; for MiniCPM3 as it is.
"""

from __future__ import annotations

import gguf
import torch

from ..models.shape import ALL_HEADS_CACHED

ARCH = "deepseek2"
ARCHITECTURES = (ARCH, *ALL_HEADS_CACHED)
MINICPM3 = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}  # the only scales that its graph computes
JOINED, KEYS, VALUES = "kv_b_proj", "k_b_proj.weight", "v_b_proj.weight"  # the projection, and what DeepSeek's graph wants of it
OF_JOINED = (KEYS, VALUES)
LITE = (26, 27)  # numbers of layers by which llama.cpp knows models whose queries come from no latent state


def difference(config, arch: str) -> str | None:
    """Why the graph of ``arch`` would compute something else than this model, in words; None where it would not."""
    if config.attention_bias:
        return f"attention_bias: llama.cpp's {arch} has none"
    if arch != ARCH:
        if config.q_lora_rank is None:
            return f"q_lora_rank null: llama.cpp's {arch} has a latent state of queries"
        for name, wanted in MINICPM3.items():
            if getattr(config, name) != wanted:
                return f"{name} {getattr(config, name)}: llama.cpp's {arch} computes {wanted} only"
        return None
    if not getattr(config, "rope_interleave", True):
        return f"rope_interleave False: llama.cpp's {ARCH} rotates neighbouring dimensions"
    if config.q_lora_rank is None and config.num_hidden_layers not in LITE:
        return f"q_lora_rank null: llama.cpp's {ARCH} computes that with {' or '.join(map(str, LITE))} layers only"
    if config.q_lora_rank is not None and config.num_hidden_layers in LITE:
        return f"q_lora_rank {config.q_lora_rank}: llama.cpp's {ARCH} has none in models of {config.num_hidden_layers} layers"
    if getattr(config, "topk_method", None) and config.n_group > 1:
        return f"n_group {config.n_group}: llama.cpp chooses groups of experts by the best two of each, and this model does not"
    return None


def add_settings(writer: gguf.GGUFWriter, config) -> None:
    """Adds what llama.cpp reads of it."""
    latent, rotary = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_head_count(config.num_attention_heads)
    if writer.arch == ARCH:
        writer.add_head_count_kv(1)
        writer.add_key_length(latent + rotary)
        writer.add_value_length(latent)
        writer.add_key_length_mla(config.qk_nope_head_dim + rotary)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(config.qk_nope_head_dim + rotary)
        writer.add_value_length(config.v_head_dim)
    writer.add_kv_lora_rank(latent)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)


def value(name: str, joined: torch.Tensor, config) -> torch.Tensor:
    """A tensor of the file, [heads, latent, key] or [heads, value, latent], of the projection to both, [heads * (key + value), latent]."""
    keys, values = joined.view(config.num_attention_heads, -1, joined.shape[-1]).split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return keys.transpose(1, 2) if name.endswith(KEYS) else values


def shape(name: str, config) -> list[int]:
    """The shape of a tensor of the file."""
    sizes = (config.kv_lora_rank, config.qk_nope_head_dim) if name.endswith(KEYS) else (config.v_head_dim, config.kv_lora_rank)
    return [config.num_attention_heads, *sizes]
