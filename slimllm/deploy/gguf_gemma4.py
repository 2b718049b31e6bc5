"""Gemma 4 as llama.cpp's graph wants it in a GGUF file: heads of two sizes, windows in some layers, and last layers that read the keys and
values of earlier ones.
"""

from __future__ import annotations

import gguf
import numpy as np

ARCH = "gemma4"
SCALAR = "layer_scalar"  # by which a layer multiplies the state; llama.cpp has it as a tensor of weights
NEVER = 1e30  # what the frequency of dimensions that are not rotated is divided by


def difference(config) -> str | None:
    """Why the graph would compute something else than this model, in words; None where it would not."""
    if getattr(config, "enable_moe_block", False):
        return f"enable_moe_block: experts beside the feed-forward part are not written to GGUF as llama.cpp's {ARCH} has them"
    if config.attention_bias:
        return f"attention_bias: llama.cpp's {ARCH} has none"
    if config.use_bidirectional_attention == "all":
        return "use_bidirectional_attention: llama.cpp reads from left to right"
    own = config.num_hidden_layers - config.num_kv_shared_layers
    read = [index for index, mode in enumerate(config.kv_sharing_modes) if mode == "store"]
    if read not in ([], [own - 2, own - 1]) or (read and _windows(config)[own - 2 : own] != [True, False]):
        return f"num_kv_shared_layers: llama.cpp's {ARCH} reads keys and values of one layer with a window and the layer behind it"
    full, sliding = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    kinds = full.get("rope_type", "default"), sliding.get("rope_type", "default")
    if kinds[0] not in ("default", "proportional") or kinds[1] != "default" or full.get("factor", 1.0) != 1.0:
        return f"rope_type {' and '.join(kinds)}: llama.cpp's {ARCH} computes proportional and default, without a factor"
    return None


def _windows(config) -> list[bool]:
    """Which layers have a window."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def _head_dim(config, windowed: bool) -> int:
    """The size of heads in layers with or without a window; where there are no such layers, of all."""
    sizes = {kind: config.per_layer_config[index].head_dim for index, kind in enumerate(_windows(config))}
    return sizes.get(windowed, max(sizes.values()))


def add_settings(writer: gguf.GGUFWriter, config) -> None:
    """Adds what llama.cpp reads of its attention and of its inputs for each token."""
    layers, windows = config.per_layer_config, _windows(config)
    full, sliding = (_head_dim(config, windowed) for windowed in (False, True))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([layers[index].num_key_value_heads for index in range(len(windows))])
    writer.add_key_length(full)
    writer.add_value_length(full)
    writer.add_key_length_swa(sliding)
    writer.add_value_length_swa(sliding)
    writer.add_rope_dimension_count(full)
    writer.add_rope_dimension_count_swa(sliding)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(windows)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(getattr(config, "hidden_size_per_layer_input", 0) or 0)


def rope_factors(config) -> np.ndarray:
    """What llama.cpp divides each frequency of layers without a window by, [head size / 2]: those that are not rotated by NEVER."""
    rope = config.rope_parameters["full_attention"]
    half = _head_dim(config, False) // 2
    rotated = int(rope.get("partial_rotary_factor", 1.0) * half)
    return np.array([1.0] * rotated + [NEVER] * (half - rotated), dtype=np.float32)
