"""A checkpoint, dense or pruned, as a GGUF file for an unmodified llama.cpp. Tensors are read and written one at a time."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import UserError
from ..models.adapter import LayerAdapter
from ..models.families import family_of
from ..models.loading import open_source
from ..models.skeleton import skeleton_of
from ..models.source import stored_tensors
from ..settings.common import OUTTYPES
from ..utils.files import atomic_file
from ..utils.outputs import GGUF_MARK
from . import checkpoint, gguf_experts, gguf_linear_attention, gguf_tokenizer
from .gguf_architecture import BIASES_ASKED, Arrangement, add_activation, add_settings, architecture_of, rope_factors

log = logging.getLogger("slimllm")

OF_A_TENSOR = 96  # bytes beside its name that a tensor takes at most: its entry in the list, and what fills its last 32 bytes
F16 = gguf.GGMLQuantizationType.F16
TYPES = (*OUTTYPES, "q4_0")  # the last for comparisons: other programs make better files of four bits
FILE_TYPES = {name: gguf.LlamaFileType[f"{'ALL' if name == 'f32' else 'MOSTLY'}_{name.upper()}"] for name in TYPES}


def export(folder: str | os.PathLike, target: Path, outtype: str = "f16", arch: str = "auto") -> Path:
    """Writes the checkpoint in ``folder`` to ``target``, which appears only when it is complete. Returns ``target``.

    Matrices get ``outtype`` (one whose rows do not fill blocks of 32 stays f16 in q8_0, which is logged); norms and biases are
    float32.
    Raises UserError for a folder that is no checkpoint, a model or tokenizer that llama.cpp has no form for, a full disk.
    """
    folder = Path(folder)
    source, arch = _described(folder, arch)
    with atomic_file(target) as partial:
        writer = _writer(partial, folder, source, arch, outtype)
        _write_tensors(writer, source, arch, gguf.GGMLQuantizationType[outtype.upper()])
        writer.close()
    return target


def metadata_bytes(tokenizer, base_model: str, config, kept: list[int] | None = None) -> int:
    """What a GGUF file of a model with this config holds besides its tensors, at most: vocabulary, and the list of the tensors.

    ``kept``: as for :func:`checkpoint.write_tokenizer`.
    Raises UserError where llama.cpp has no type for it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config.save_pretrained(folder)
        checkpoint.write_tokenizer(tokenizer, folder, base_model, config, kept)
        writer = gguf.GGUFWriter(folder / "metadata.gguf", "llama")
        try:
            gguf_tokenizer.add(writer, folder, config.vocab_size)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), base_model)) from None
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        names = stored_tensors(skeleton_of(config, torch.float32))
        return (folder / "metadata.gguf").stat().st_size + sum(len(name) + OF_A_TENSOR for name in names)


def check(folder: str | os.PathLike) -> None:
    """Raises UserError where :func:`export` would, for the checkpoint's config or tokenizer; writes nothing."""
    folder = Path(folder)
    source, arch = _described(folder, "auto")
    _writer(None, folder, source, arch, "f16")


def _described(folder: Path, arch: str):
    """(ModelSource of a checkpoint, architecture in the file)."""
    source = open_source(str(folder), "auto", "DIR")
    biased = any(source.adapter.is_output_bias(name) for name in source.weights.names)
    return source, architecture_of(source.config, biased, arch)


def _writer(path: Path | None, folder: Path, source, arch: str, outtype: str) -> gguf.GGUFWriter:
    """A writer that has all but the tensors."""
    import slimllm

    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(GGUF_MARK, slimllm.__version__)  # first, where it is looked for
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_size_label(gguf.size_label(sum(math.prod(source.weights.shape(name)) for name in stored_tensors(source.model)), 0, 0, 0))
    gguf_tokenizer.add_origin(writer, folder)
    writer.add_file_type(FILE_TYPES[outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, source.config)
    add_activation(writer, source)
    if source.adapter.family.is_mixture:
        gguf_experts.add_settings(writer, source)
    gguf_tokenizer.add(writer, folder, source.config.vocab_size)
    return writer


def _write_tensors(writer, source, arch: str, quantization) -> None:
    config, tensors = source.config, source.weights
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    places = gguf.get_tensor_name_map(by_name[arch], config.num_hidden_layers)
    factors, listed = rope_factors(config), []
    stored = list(stored_tensors(source.model))
    arrangement = Arrangement(config, arch, {name: tensors.shape(name) for name in stored})
    for name in arrangement.pieces:
        of_norm = source.adapter.family.is_norm(name.replace(".bias", ".weight"))
        optional = name.endswith(".bias") and arch not in BIASES_ASKED and not of_norm
        if optional and not any(piece.any() for piece in arrangement.values(name, tensors)):
            continue  # a bias of zeros is none
        place, shape = _place(places, name), arrangement.shape(name)
        if place is None:
            raise UserError(f"tensor {name}: the architecture {arch} has no place for it")
        kind = _kind_of(name, shape, quantization)
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(place, shape, np.dtype(np.float32), size, kind)
        listed.append((name, kind, size))
    _log_what_stayed([name for name, kind, _ in listed if kind == F16 != quantization], source.adapter, arrangement, quantization)
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind, size in tqdm(listed, desc="writing", unit="tensor", leave=False, disable=None):
        _write_tensor(writer, arrangement.values(name, tensors), kind, size)
    for values in factors.values():
        _write_tensor(writer, [torch.from_numpy(values)], gguf.GGMLQuantizationType.F32, values.nbytes)


def _place(places: gguf.TensorNameMap, name: str) -> str | None:
    """What llama.cpp calls a tensor; None where it has no place for it."""
    return places.get_name(gguf_experts.renamed(gguf_linear_attention.renamed(name)), (".weight", ".bias"))


def _write_tensor(writer: gguf.GGUFWriter, pieces: Iterable[torch.Tensor], kind: gguf.GGMLQuantizationType, size: int) -> None:
    """Writes the next tensor, of ``size`` bytes, a piece at a time, where the writer itself would want it whole."""
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    end = file.tell() + size
    for piece in pieces:
        gguf.quantize(piece.numpy(), kind).tofile(file)
    assert file.tell() == end, "a tensor has another size than its entry in the list says"
    writer.write_padding(file, end)


def _log_what_stayed(names: list[str], adapter: LayerAdapter, arrangement: Arrangement, quantization) -> None:
    """Logs the matrices that stayed f16, and of output projections, whose rows are what pruning cuts, what it would save if they filled the
    blocks of ``quantization``.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    for cut in (True, False):
        if not (these := [name for name in names if adapter.is_output(name) == cut]):
            continue
        shown = ", ".join(these[:4]) + (f" and {len(these) - 4} more" if len(these) > 4 else "")
        saved = sum(math.prod(arrangement.shape(name)) for name in these) * (2 - block_bytes / block)
        way = f"; with --runtime gguf they would be {quantization.name.lower()} too, about {saved / 1e6:.2f} MB less" if cut else ""
        log.warning("stayed f16, since their rows are no multiple of %d: %s%s", block, shown, way)


def quantized_bytes(model, outtype: str) -> int:
    """Rounds the weights of ``model``, in place, to what a GGUF file of type ``outtype`` would hold; returns their bytes in it."""
    total, family = 0, family_of(model.config)
    for name, parameter in model.named_parameters():
        weights = parameter.detach().float().cpu()
        swapped = gguf_experts.inputs_first(name, family)
        weights = (weights.transpose(1, 2) if swapped else weights).contiguous()
        kind = _kind_of(name, gguf_experts.shape(name, list(weights.shape)), gguf.GGMLQuantizationType[outtype.upper()])
        quantized = gguf.quantize(weights.numpy(), kind)
        total += quantized.nbytes
        rounded = torch.from_numpy(gguf.dequantize(quantized, kind))
        parameter.data.copy_(rounded.transpose(1, 2) if swapped else rounded)
    return total


def _kind_of(name: str, shape: list[int], quantization) -> gguf.GGMLQuantizationType:
    """The type of a tensor: vectors are float32, and so are biases of experts, routers and kernels of convolutions; a matrix whose rows do
    not fill the blocks of ``quantization`` is float16.
    """
    always = ("bias", *gguf_linear_attention.ALWAYS_FLOAT32, *gguf_experts.ALWAYS_FLOAT32)
    if len(shape) == 1 or name.endswith(always):
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    return quantization if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16
