"""The weights of a model's files, read one tensor at a time: safetensors, PyTorch's own files, GGUF.

All readers are alike: ``names``, ``shape(name)`` and ``read(name)``, by the names that transformers gives the tensors. A file is
open only while one of its tensors is read, so that no page of it stays in memory.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line
from ..utils.files import state_of
from ..utils.memory import return_free_memory
from .adapter import LayerAdapter
from .families import FAMILIES
from .shape import widths_of

INDEX = "model.safetensors.index.json"
# What may hold a model's weights, in the order in which transformers looks for it; nothing else in the folder counts.
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"  # where it lies beside a model, transformers applies the adapter whenever the model is read
TEXT_MODEL = "language_model."  # in the names of the text model's tensors, in a model of text and images
EMBEDDINGS = {f"{family.decoder}.{family.embedding}.weight" for family in FAMILIES.values()}
HEADS = tuple({f"{family.head}." for family in FAMILIES.values()})  # which such a model may keep without that mark
_ROPE_FACTORS = re.compile(r"rope_(freqs|factors_\w+)\.weight$")  # of a .gguf file, whose metadata says the same
PIECE = 16 << 20  # numbers of a tensor that are read at once
ROWS = 4096  # of a .gguf tensor that are dequantized at once
# GGUF architectures that turn neighbouring dimensions of a head where transformers turns its two halves
ROPE_IN_PAIRS = ("llama", "deci", "smollm3", "mistral3", "granite")


def weight_files(folder: str | os.PathLike, named: str | None = None) -> list[Path]:
    """The files of a model folder that hold its weights, by the rule of transformers: one file, or those that an index lists.

    ``named``: what the config names in place of :data:`WEIGHTS` (its ``transformers_weights``). Raises UserError where there is none,
    the index is broken, or a file that it lists is not there.
    """
    folder = Path(folder)
    found = next((folder / name for name in ((named,) if named else WEIGHTS) if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: cannot read the weights: it has none of {', '.join((named,) if named else WEIGHTS)}")
    if not found.name.endswith(".index.json"):
        return [found]
    names = listed_in(found)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]}: listed in {found.name}, and not there; copy or download it again")
    return [folder / name for name in names]


def listed_in(index: Path) -> list[str]:
    """The files, beside it, that an index of weights lists. Raises UserError where it is no such index."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it lists no files, or files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of weights ({first_line(error)}); copy or download it again") from None
    return names


def _pieces(shape) -> Iterator[slice]:
    """The rows of a tensor of this shape, PIECE numbers at a time."""
    rows = max(1, PIECE * shape[0] // max(1, math.prod(shape)))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


class _Reader:
    """What the readers have in common: ``_at`` holds where each tensor is, by the name that transformers gives it."""

    def __init__(self):
        self._at: dict = {}

    @property
    def names(self) -> list[str]:
        return list(self._at)

    def call(self, name: str, known: str) -> None:
        """Gives the tensor ``known`` the name ``name`` as well."""
        self._at[name] = self._at[known]

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, of which a piece at a time is read."""
        shape = self.shape(one)
        if list(shape) != list(self.shape(other)):
            return False
        if not shape or not math.prod(shape):
            return True  # nothing to compare; that they have no rows is another mistake
        return all(torch.equal(self.rows(one, piece), self.rows(other, piece)) for piece in _pieces(shape))


class Tensors(_Reader):
    """Safetensors files. A tensor that several hold counts as in the last one. Raises UserError for a broken file, or without tensors."""

    def __init__(self, files: list[Path]):
        super().__init__()  # name -> (file, its name there, shape, dtype)
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    for stored in file.keys():
                        part = file.get_slice(stored)
                        self._at[stored] = path, stored, part.get_shape(), part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: the file is broken ({error}); copy or download it again") from None
        if not self._at:
            raise UserError(f"{files[0]}: it holds no tensors; copy or download it again")
        self._at = _of_text_model(self._at)

    @property
    def files(self) -> list[Path]:
        return sorted({path for path, *_ in self._at.values()})

    def shape(self, name: str) -> list[int]:
        return self._at[name][2]

    def is_number(self, name: str) -> bool:
        return self._at[name][3] in ("F64", "F32", "F16", "BF16")

    def dtype_name(self, name: str) -> str:
        return self._at[name][3]

    def rows(self, name: str, piece: slice) -> torch.Tensor:
        """Some rows of a tensor, in its own dtype; they stay mapped."""
        path, stored, *_ = self._at[name]
        with safe_open(path, "pt") as file:
            return file.get_slice(stored)[piece]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in ``dtype`` or its own, in memory of its own; a large one in pieces, since what is read of a file stays mapped."""
        path, stored, shape, _ = self._at[name]
        with safe_open(path, "pt") as file:
            if math.prod(shape) <= PIECE:
                return file.get_tensor(stored).to(dtype=dtype, copy=True)
            tensor = torch.empty(shape, dtype=dtype or file.get_slice(stored)[:1].dtype)
        for piece in _pieces(shape):
            tensor[piece] = self.rows(name, piece)
        return tensor

    __getitem__ = read


def _of_text_model(at: dict) -> dict:
    """The tensors of the text model by their names in it, where they are marked as such among others; else all.

    Files that hold embeddings without the mark are a text model's own, whatever else they hold.
    """
    if not any(TEXT_MODEL in name for name in at) or not EMBEDDINGS.isdisjoint(at):
        return at
    return {name.replace(TEXT_MODEL, "", 1): place for name, place in at.items() if TEXT_MODEL in name or name.startswith(HEADS)}


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


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
            _take_room(self._file, self._start + end)
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


def _take_room(file: int, size: int) -> None:
    """Takes room on the disk for ``size`` bytes, where the system and the file system can: elsewhere it is found to be full later."""
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:
        pass  # macOS
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


class PickledTensors(_Reader):
    """PyTorch's own files, mapped into memory and never run as code; they are otherwise like :class:`Tensors`."""

    def __init__(self, files: list[Path]):
        super().__init__()  # name -> (file, its name there, shape, dtype)
        self.files = files
        for path in files:
            for name, tensor in self._open(path).items():
                if not isinstance(tensor, torch.Tensor):
                    raise UserError(f"{path}: {name} is no tensor; save the model's state_dict alone")
                self._at[name] = path, name, list(tensor.shape), tensor.dtype
        self._at = _of_text_model(self._at)

    @staticmethod
    def _open(path: Path) -> dict[str, torch.Tensor]:
        try:
            return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        except Exception as error:  # a zip file, a pickle and a tensor each break in their own way
            raise UserError(f"{path}: not a readable file of weights ({type(error).__name__}); copy or download it again") from None

    def shape(self, name: str) -> list[int]:
        return self._at[name][2]

    def is_number(self, name: str) -> bool:
        return self._at[name][3] in (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def dtype_name(self, name: str) -> str:
        return str(self._at[name][3]).removeprefix("torch.")

    def rows(self, name: str, piece: slice) -> torch.Tensor:
        path, stored, *_ = self._at[name]
        return self._open(path)[stored][piece]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        path, stored, *_ = self._at[name]
        return self._open(path)[stored].to(dtype=dtype, copy=True)


class Rounded(_Reader):
    """The tensors of another reader with the values that ``dtype`` can hold. Raises UserError for one that is too large for it."""

    def __init__(self, tensors, dtype: torch.dtype):
        self._tensors, self.dtype, self.files = tensors, dtype, tensors.files

    @property
    def names(self) -> list[str]:
        return self._tensors.names

    def shape(self, name: str) -> list[int]:
        return self._tensors.shape(name)

    def is_number(self, name: str) -> bool:
        return self._tensors.is_number(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self._tensors.read(name, dtype)
        if tensor.is_floating_point():
            round_to(self.dtype, tensor, name)
        return tensor


def round_to(dtype: torch.dtype, tensor: torch.Tensor, name: str) -> None:
    """Gives ``tensor``, in place, the values that ``dtype`` can hold. Raises UserError, by its ``name``, where one is too large for it."""
    tensor = torch.atleast_1d(tensor)
    for piece in _pieces(tensor.shape):
        rows = tensor[piece]
        held = rows.to(dtype)
        if dtype == torch.float16 and held.isinf().any():
            raise UserError(f"{name}: a value is beyond float16, which ends at 65504; save in another dtype with --save_dtype bfloat16")
        rows.copy_(held)


class GgufTensors(_Reader):
    """The tensors of a .gguf file, each dequantized when it is read.

    ``config`` is what transformers makes of the file, ``names`` what it calls the tensors of such a model. Raises UserError for a
    file that is cut short, and for one of several that hold a model together.
    """

    def __init__(self, path: str | os.PathLike, config, names: list[str]):
        super().__init__()
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
        for name in names:
            stem, _, suffix = name.rpartition(".")
            place = f"{places.get_name(stem)}.{suffix}"
            if place in found:
                self._at[name] = found.pop(place)
        self._at |= {place: value for place, value in found.items() if not _ROPE_FACTORS.match(place)}  # what the config has no place for
        self._adapter, self._widths = LayerAdapter(config), widths_of(config)

    def shape(self, name: str) -> list[int]:
        return self._at[name][4]

    def is_number(self, name: str) -> bool:
        return self._at[name][3].name not in ("I8", "I16", "I32", "I64")

    def dtype_name(self, name: str) -> str:
        return self._at[name][3].name

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


_GgufReader = gguf.GGUFReader


@functools.lru_cache(maxsize=1)
def _parsed(path: str, state: tuple) -> gguf.GGUFReader:
    try:
        reader = _GgufReader(path)
    except OSError:
        raise
    except Exception as error:  # whatever a header that ends too soon, or is none, makes of the parser
        raise UserError(f"{path}: not a whole .gguf file ({first_line(error)}); copy or download it again") from None
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise UserError(
            f"{path}: one of {parts.contents()} files that hold the model together; join them with llama.cpp's "
            "llama-gguf-split --merge FIRST OUT.gguf and name the outcome"
        )
    return reader


def gguf_reader(path: str | os.PathLike) -> gguf.GGUFReader:
    """The parsed file, seconds of work that is kept until another file is read or the weights of this one are opened.

    Raises UserError for one that is cut short or is part of a model.
    """
    return _parsed(os.path.realpath(path), state_of(os.path.realpath(path)))  # not what lay there before


@contextmanager
def parsed_once():
    """transformers parses a .gguf file for the config and again for the tokenizer: inside, it gets :func:`gguf_reader`'s."""
    gguf.GGUFReader = lambda path, *_: gguf_reader(path)
    try:
        yield
    finally:
        gguf.GGUFReader = _GgufReader
