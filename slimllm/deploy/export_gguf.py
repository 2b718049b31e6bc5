"""A checkpoint, dense or pruned, as a GGUF file for an unmodified llama.cpp.

Layers of one width go out as the family's own architecture, others as ``deci``, which reads the number of heads, KV heads
and feed-forward channels of each layer, and takes biases where they are. Tensors are read and written one at a time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import UserError
from ..models.adapter import LayerAdapter
from ..models.families import family_of
from ..models.loading import load_config
from ..models.shape import head_dim_of, irregular, widths_of, window_of
from ..models.weights import ROPE_IN_PAIRS, Tensors, in_pairs
from ..utils.files import atomic_file
from . import gguf_tokenizer

OUTTYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # where all layers have one width
PER_LAYER = "deci"
ROPE_SETTINGS = {  # rope types, and what of each llama.cpp computes as transformers does
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def architecture_of(config, biased: bool, wanted: str = "auto") -> str:
    """The GGUF architecture that can hold a model with this transformers config.

    ``biased``: its output projections have biases. Raises UserError where none can, or not the ``wanted`` one: it names
    the layers that stand in the way and the flag that would have avoided it.
    """
    family, widths = family_of(config), widths_of(config)
    own = ARCHITECTURES[family.model_type]
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config.hidden_act}: llama.cpp computes silu for these models")
    if wanted == "auto":
        # llama.cpp's qwen2 and qwen3 have no such biases, and qwen2 a query bias of the hidden size only
        whole = widths[0][0] * head_dim_of(config) == config.hidden_size
        if len(set(widths)) == 1 and (own == "llama" or (not biased and (whole or own != "qwen2"))):
            return own
        wanted = PER_LAYER
    if wanted == PER_LAYER and family.qk_norm:
        raise UserError(
            f"{irregular(widths) or 'biases of the output projections'}: llama.cpp holds {family.model_type} with one "
            "width and no such biases only; prune with --runtime gguf"
        )
    if wanted == "llama":
        if irregular(widths):
            raise UserError(f"--arch llama: {irregular(widths)}; prune with --runtime transformers, or export with --arch deci")
        if own != "llama":
            raise UserError(f"--arch llama: the model is a {family.model_type}; leave --arch away")
    return wanted


def export(folder: str | os.PathLike, target: Path, outtype: str = "f16", arch: str = "auto") -> Path:
    """Writes the checkpoint in ``folder`` to ``target``, which appears only when it is complete. Returns ``target``.

    Matrices get ``outtype`` (one whose rows do not fill blocks of 32 stays f16 in q8_0); norms and biases are float32.
    Raises UserError for a folder that is no checkpoint, a model or tokenizer that llama.cpp has no form for, a full disk.
    """
    folder = Path(folder)
    config = load_config(str(folder), "DIR", pruned=True)
    tensors = Tensors(folder)
    biased = any(LayerAdapter(config).is_output_bias(name) for name in tensors.names)
    arch = architecture_of(config, biased, arch)
    with atomic_file(target) as partial:
        writer = gguf.GGUFWriter(partial, arch)
        _add_metadata(writer, config, folder, OUTTYPES[outtype][1])
        gguf_tokenizer.add(writer, folder, config.vocab_size)
        _write_tensors(writer, tensors, config, arch, OUTTYPES[outtype][0])
        writer.close()
    return target


def _add_metadata(writer, config, folder: Path, file_type) -> None:
    widths = widths_of(config)
    heads, kv_heads, channels = (list(column) for column in zip(*widths))
    if len(set(widths)) == 1 and writer.arch != PER_LAYER:
        heads, kv_heads, channels = heads[0], kv_heads[0], channels[0]
    head_dim = head_dim_of(config)
    window = window_of(config)
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # llama.cpp has no sliding window for these architectures; within the window it is the same model
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(channels)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, config)


def _add_rope(writer, config) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_SETTINGS:
        raise UserError(f"rope_type {kind}: cannot be written to GGUF; {', '.join(ROPE_SETTINGS)} can")
    strange = sorted(key for key in rope if rope[key] is not None and key not in ("rope_type", "type", "rope_theta", *ROPE_SETTINGS[kind]))
    if strange:
        raise UserError(f"rope_type {kind} with {', '.join(strange)}: cannot be written to GGUF")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def _rope_factors(config) -> np.ndarray | None:
    """What llama.cpp divides each rotary frequency by, [head size / 2], for llama3 scaling (rope_freqs.weight)."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = head_dim_of(config)
    frequency = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float().numpy()


def _write_tensors(writer, tensors, config, arch: str, quantization) -> None:
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    places = gguf.get_tensor_name_map(by_name[arch], config.num_hidden_layers)
    adapter, widths, factors = LayerAdapter(config), widths_of(config), _rope_factors(config)
    listed = []
    for name in tensors.names:
        stem, _, suffix = name.rpartition(".")
        if (stem == adapter.family.head and config.tie_word_embeddings) or (suffix == "bias" and not tensors[name].any()):
            continue  # the embedding serves; a bias of zeros is none
        place, shape = places.get_name(stem), tensors.shape(name)
        if place is None:
            raise UserError(f"tensor {name}: the architecture {arch} has no place for it")
        kind = _kind(shape, quantization)
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(f"{place}.{suffix}", shape, np.dtype(np.float32), size, kind)
        listed.append((name, kind))
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in tqdm(listed, desc="writing", unit="tensor", leave=False, disable=None):
        tensor, rotary_heads = tensors[name].float(), adapter.rotary_heads(name, widths)
        if arch in ROPE_IN_PAIRS and rotary_heads:
            tensor = in_pairs(tensor, rotary_heads)
        writer.write_tensor_data(gguf.quantize(tensor.numpy(), kind))
    if factors is not None:
        writer.write_tensor_data(factors)


def quantized_bytes(model, outtype: str) -> int:
    """Rounds the weights of ``model``, in place, to what a GGUF file of type ``outtype`` would hold; returns their bytes in it."""
    total = 0
    for parameter in model.parameters():
        kind = _kind(list(parameter.shape), gguf.GGMLQuantizationType[outtype.upper()])
        held = gguf.quantize(parameter.detach().float().cpu().numpy(), kind)
        total += held.nbytes
        parameter.data.copy_(torch.from_numpy(gguf.dequantize(held, kind)))
    return total


def _kind(shape: list[int], quantization) -> gguf.GGMLQuantizationType:
    """The type of a tensor: vectors are float32; a matrix whose rows do not fill the blocks of ``quantization`` is float16."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    return quantization if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16
