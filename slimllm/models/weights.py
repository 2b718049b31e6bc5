"""The weights of a model's files, read one tensor at a time: safetensors, PyTorch's own files, GGUF.

All readers are alike: ``names``, ``shape(name)`` and ``read(name)``, by the names that transformers gives the tensors. A file is
open only while one of its tensors is read, so that no page of it stays in memory.
"""

from __future__ import annotations

import functools
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..utils.memory import return_free_memory
from .adapter import LayerAdapter
from .shape import widths_of

INDEX = "model.safetensors.index.json"
TEXT_MODEL = "language_model."  # in the names of the text model's tensors, in a model of text and images
PIECE = 16 << 20  # numbers of a tensor that are read at once
ROWS = 4096  # of a .gguf tensor that are dequantized at once
# GGUF architectures that turn neighbouring dimensions of a head where transformers turns its two halves
ROPE_IN_PAIRS = ("llama", "deci", "smollm3", "mistral3", "granite")


class Tensors:
    """The safetensors files of a model folder, or those in a list. Raises UserError for a folder without them, or with a broken one."""

    def __init__(self, folder: str | os.PathLike | list[Path]):
        if isinstance(folder, list):
            files = folder
        elif (index := Path(folder) / INDEX).is_file():
            files = [index.with_name(name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            files = sorted(Path(folder).glob("model*.safetensors"))
        self._at: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    for stored in file.keys():
                        name = stored.replace(TEXT_MODEL, "", 1)
                        self._at[name], self._shapes[name] = (path, stored), file.get_slice(stored).get_shape()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: the file is broken ({error}); copy or download it again") from None
        if not self._at:
            raise UserError(f"{folder}: it has no model*.safetensors")

    @property
    def names(self) -> list[str]:
        return list(self._at)

    @property
    def files(self) -> list[Path]:
        return sorted({path for path, _ in self._at.values()})

    def shape(self, name: str) -> list[int]:
        return self._shapes[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in ``dtype`` or its own, in memory of its own; a large one in pieces, since what is read of a file stays mapped."""
        shape, (path, name) = self._shapes[name], self._at[name]
        with safe_open(path, "pt") as file:
            if math.prod(shape) <= PIECE:
                return file.get_tensor(name).to(dtype=dtype, copy=True)
            tensor = torch.empty(shape, dtype=dtype or file.get_slice(name)[:1].dtype)
        rows = max(1, PIECE * shape[0] // math.prod(shape))
        for start in range(0, shape[0], rows):
            with safe_open(path, "pt") as file:
                tensor[start : start + rows] = file.get_slice(name)[start : start + rows]
        return tensor

    __getitem__ = read


_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class TensorFile:
    """A safetensors file whose tensors are written one at a time, in any order.

    ``layout``: name -> (dtype, shape) of all of them. Its room is taken when it is opened, so that a disk too small is found at
    once. A file of this layout that is there already keeps what was written to it. On leaving, all of it is on the disk.
    """

    def __init__(self, path: str | os.PathLike, layout: dict[str, tuple[torch.dtype, torch.Size]]):
        entries, self._offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            start, end = end, end + dtype.itemsize * math.prod(shape)
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._offsets[name] = start
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._layout, self._start = layout, 8 + len(header)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if end:
                os.posix_fallocate(self._file, 0, self._start + end)
            os.ftruncate(self._file, self._start + end)
            self._put(len(header).to_bytes(8, "little") + header, 0)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor. Raises ValueError where the layout says another dtype or shape."""
        dtype, shape = self._layout[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}, laid out as {dtype} {list(shape)}")
        self._put(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, self._start + self._offsets[name])

    def _put(self, data, offset: int) -> None:
        data = memoryview(data)
        while len(data):
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class PickledTensors:
    """The pytorch_model*.bin files of a model folder, mapped into memory and never run as code."""

    def __init__(self, folder: str | os.PathLike):
        self.files = sorted(Path(folder).glob("pytorch_model*.bin"))
        self._at = {name: (path, list(tensor.shape)) for path in self.files for name, tensor in self._open(path).items()}
        if not self._at:
            raise UserError(f"{folder}: cannot read the weights: it has neither model*.safetensors nor pytorch_model*.bin")

    @staticmethod
    def _open(path: Path) -> dict[str, torch.Tensor]:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a zip file, a pickle and a tensor each break in their own way
            raise UserError(f"{path}: not a readable file of weights ({type(error).__name__}); copy or download it again") from None

    @property
    def names(self) -> list[str]:
        return list(self._at)

    def shape(self, name: str) -> list[int]:
        return self._at[name][1]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._open(self._at[name][0])[name].to(dtype=dtype, copy=True)


class Rounded:
    """The tensors of another reader with the values that ``dtype`` can hold. Raises UserError for one that is too large for it."""

    def __init__(self, tensors, dtype: torch.dtype):
        self._tensors, self.dtype, self.files = tensors, dtype, tensors.files

    @property
    def names(self) -> list[str]:
        return self._tensors.names

    def shape(self, name: str) -> list[int]:
        return self._tensors.shape(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self._tensors.read(name, dtype)
        round_to(self.dtype, tensor, name)
        return tensor


def round_to(dtype: torch.dtype, tensor: torch.Tensor, name: str) -> None:
    """Gives ``tensor``, in place, the values that ``dtype`` can hold. Raises UserError, by its ``name``, where one is too large for it."""
    tensor = torch.atleast_1d(tensor)
    for rows in tensor.split(max(1, PIECE * len(tensor) // max(1, tensor.numel()))):
        held = rows.to(dtype)
        if dtype == torch.float16 and held.isinf().any():
            raise UserError(f"{name}: a value is beyond float16, which ends at 65504; save in another dtype with --save_dtype bfloat16")
        rows.copy_(held)


class GgufTensors:
    """The tensors of a .gguf file, each dequantized when it is read.

    ``config`` is what transformers makes of the file, ``names`` what it calls the tensors of such a model.
    """

    def __init__(self, path: str | os.PathLike, config, names: list[str]):
        self.files = [Path(path)]
        reader = gguf_reader(path)
        self._arch = reader.fields["general.architecture"].contents()
        self.origin = origin_of(reader)
        found = {
            tensor.name: (
                int(tensor.data_offset),
                tensor.data.shape,
                tensor.data.dtype,
                tensor.tensor_type,
                [*map(int, tensor.shape[::-1])],
            )
            for tensor in reader.tensors
        }
        del reader
        _parsed.cache_clear()  # it holds every token of the vocabulary as an object
        return_free_memory()
        by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        places = gguf.get_tensor_name_map(by_name[self._arch], config.num_hidden_layers)
        self._at = {}
        for name in names:
            stem, _, suffix = name.rpartition(".")
            place = f"{places.get_name(stem)}.{suffix}"
            if place in found:
                self._at[name] = found[place]
        self._adapter, self._widths = LayerAdapter(config), widths_of(config)

    @property
    def names(self) -> list[str]:
        return list(self._at)

    def shape(self, name: str) -> list[int]:
        return self._at[name][4]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        offset, stored, kind, quantization, shape = self._at[name]
        raw = np.fromfile(self.files[0], dtype=kind, count=math.prod(stored), offset=offset).reshape(stored)
        tensor = torch.empty(shape, dtype=dtype or torch.float32)
        for start in range(0, len(raw), ROWS):  # what it is unpacked into on the way takes several times its room
            tensor[start : start + ROWS] = torch.from_numpy(gguf.dequantize(raw[start : start + ROWS], quantization))
        family, heads = self._adapter.family, self._adapter.rotary_heads(name, self._widths)
        if family.norm_offset and family.is_norm(name):
            tensor -= family.norm_offset  # the file holds what multiplies
        return from_pairs(tensor, heads) if self._arch in ROPE_IN_PAIRS and heads else tensor


def origin_of(reader: gguf.GGUFReader) -> dict:
    """What a .gguf file says of where it comes from, as a model card names it: licence, languages, the hub name of its base model."""

    def value(name: str):
        field = reader.fields.get(f"general.{name}")
        return field and field.contents()

    address = value("base_model.0.repo_url") or value("repo_url") or value("source.url") or ""
    on_hub = address.partition("huggingface.co/")[2].strip("/")
    return {
        "license": value("license"),
        "license_name": value("license.name"),
        "license_link": value("license.link"),
        "language": value("languages"),
        "base_model": on_hub if on_hub.count("/") == 1 else None,
    }


def in_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key projection, weight [heads * size, D] or bias [heads * size], from halves to neighbouring pairs."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def from_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`in_pairs`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


_Reader = gguf.GGUFReader


@functools.lru_cache(maxsize=1)
def _parsed(path: str) -> gguf.GGUFReader:
    return _Reader(path)


def gguf_reader(path: str | os.PathLike) -> gguf.GGUFReader:
    """The parsed file, seconds of work that is kept until another file is read or the weights of this one are opened."""
    return _parsed(os.path.realpath(path))


@contextmanager
def parsed_once():
    """transformers parses a .gguf file for the config and again for the tokenizer: inside, it gets :func:`gguf_reader`'s."""
    gguf.GGUFReader = lambda path, *_: gguf_reader(path)
    try:
        yield
    finally:
        gguf.GGUFReader = _Reader
