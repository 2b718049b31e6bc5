"""Linear attention (gated delta net, as Qwen3.5 has it) as llama.cpp's graph wants it in a GGUF file."""

from __future__ import annotations

import gguf
import torch

LINEAR = ".linear_attn."  # in the names of its tensors
OF_VALUE_HEADS = ("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias")  # whose rows belong to value heads
ALWAYS_FLOAT32 = ("conv1d.weight",)
IN_GROUPS = "qwen3_next"  # the family whose projections have the heads in groups, and whose graph has value heads so too
FUSED, OF_FUSED = "in_proj_qkvz", ("in_proj_qkv.weight", "in_proj_z.weight")  # its projection, and what its graph wants of it


def difference(config) -> str | None:
    """Why the graph would compute something else than this model, in words; None where it would not."""
    if config.linear_key_head_dim != config.linear_value_head_dim:
        return f"linear_value_head_dim {config.linear_value_head_dim}: llama.cpp wants that of the keys, {config.linear_key_head_dim}"
    kinds, interval = list(config.layer_types), _interval(config)
    if "full_attention" not in kinds or kinds != [
        "linear_attention" if (index + 1) % interval else "full_attention" for index in range(len(kinds))
    ]:
        return f"layer_types: llama.cpp wants full attention in each layer of a fixed number, and no other; this model has {kinds}"
    return None


def _interval(config) -> int:
    """After how many layers one with full attention comes."""
    kinds = list(config.layer_types)
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds)


def add_settings(writer: gguf.GGUFWriter, config, rotary: int) -> None:
    """Adds what llama.cpp reads of it. ``rotary``: dimensions of a head that rotary embeddings rotate."""
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    writer.add_full_attention_interval(_interval(config))
    if config.model_type == IN_GROUPS:
        return
    # frequencies go by turns to time, height and width, which are all the place in a text
    writer.add_rope_dimension_sections([*((rotary // 2 + 2 - axis) // 3 for axis in range(3)), 0])


def renamed(name: str) -> str:
    """The name by which the gguf package finds a tensor's place."""
    return name.removesuffix("dt_bias") + "dt_proj.bias" if name.endswith("dt_bias") else name


def value(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """A tensor as the file has it: value heads by turns of the key heads that they share, not one key head's after the other's, unless the
    graph is Qwen3-Next's; the decay itself in place of its logarithm.
    """
    keys, heads, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    if config.model_type == IN_GROUPS:
        order = torch.arange(heads)
        if name.endswith(OF_FUSED):
            tensor = _of_fused(name, tensor, config)
    else:
        order = torch.arange(heads).view(keys, -1).T.flatten()
    if name.endswith(OF_VALUE_HEADS):
        tensor = tensor.view(heads, -1)[order].view(tensor.shape)
    elif name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        first, values = tensor.split([2 * keys * config.linear_key_head_dim, heads * size])
        tensor = torch.cat([first, values.reshape(heads, -1)[order].view(values.shape)])
    elif name.endswith("out_proj.weight"):
        tensor = tensor.view(len(tensor), heads, size)[:, order].reshape(tensor.shape)
    if name.endswith("A_log"):
        return -tensor.exp()
    return tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor


def _of_fused(name: str, fused: torch.Tensor, config) -> torch.Tensor:
    """Queries, keys and values, or the gate, of a projection that has all four of one key head after the other's."""
    key, value = config.linear_key_head_dim, config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
    *qkv, gate = fused.view(config.linear_num_key_heads, -1, fused.shape[-1]).split([key, key, value, value], dim=1)
    return gate.flatten(0, 1) if name.endswith(OF_FUSED[1]) else torch.cat([part.flatten(0, 1) for part in qkv])


def shape(name: str, whole: list[int], config) -> list[int]:
    """The shape of a tensor as the file has it."""
    if name.endswith(OF_FUSED) and config.model_type == IN_GROUPS:
        values = config.linear_num_value_heads * config.linear_value_head_dim
        return [values if name.endswith(OF_FUSED[1]) else whole[0] - values, whole[1]]
    return [whole[0], whole[2]] if name.endswith("conv1d.weight") else whole
