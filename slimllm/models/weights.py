"""The weights of a model's files, read one tensor at a time: safetensors, PyTorch's own files, GGUF.

All readers are alike: ``names``, ``shape(name)`` and ``read(name)``, by the names that transformers gives the tensors. A file is
open only while one of its tensors is read, so that no page of it stays in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line
from .families import FAMILIES

INDEX = "model.safetensors.index.json"
# What may hold a model's weights, in the order in which transformers looks for it; nothing else in the folder counts.
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"  # where it lies beside a model, transformers applies the adapter whenever the model is read
TEXT_MODELS = ("language_model.", "text_model.")  # in the names of the text model's tensors, in a model of text and images
# What names of the other tensors begin with, where those of the text model have no mark (Qwen2-VL, PaddleOCR-VL, HunyuanOCR)
IMAGES = ("visual.", "mlp_AR.", "vit.")
EMBEDDINGS = {f"{family.decoder}.{family.embedding}.weight" for family in FAMILIES.values()}
HEADS = tuple({f"{family.head}." for family in FAMILIES.values()})  # which such a model may keep without that mark
PIECE = 16 << 20  # numbers of a tensor that are read at once


def weight_files(folder: str | os.PathLike, named: str | None = None) -> list[Path]:
    """The files of a model folder that hold its weights, by the rule of transformers: one file, or those that an index lists.

    ``named``: what the config names in place of :data:`WEIGHTS` (its ``transformers_weights``). Raises UserError where there is none,
    the index is broken, or a file that it lists is not there.
    """
    folder = Path(folder)
    path = next((folder / name for name in ((named,) if named else WEIGHTS) if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: cannot read the weights: it has none of {', '.join((named,) if named else WEIGHTS)}")
    if not path.name.endswith(".index.json"):
        return [path]
    names = listed_in(path)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]}: listed in {path.name}, and not there; copy or download it again")
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


class TensorReader:
    """What the readers have in common: ``_at`` holds where each tensor is, its shape third, by the name that transformers gives it."""

    def __init__(self):
        self._at: dict = {}

    @property
    def names(self) -> list[str]:
        """The names that transformers gives the tensors of these files."""
        return list(self._at)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        return self._at[name][2]

    def call(self, name: str, stored: str) -> None:
        """Gives the tensor ``stored`` the name ``name`` as well."""
        self._at[name] = self._at[stored]

    def rename(self, name_of: Callable[[str], str | None]) -> None:
        """Calls each tensor what ``name_of`` makes of its name in the files; leaves those out of whose name it makes None."""
        self._at = {name: place for place in self._at.values() if (name := name_of(place[1])) is not None}

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, of which a piece at a time is read."""
        shape = self.shape(one)
        if list(shape) != list(self.shape(other)):
            return False
        if not shape or not math.prod(shape):
            return True  # nothing to compare; that they have no rows is another mistake
        return all(torch.equal(self.rows(one, piece), self.rows(other, piece)) for piece in _pieces(shape))


class Tensors(TensorReader):
    """Safetensors files. A tensor that several hold counts as in the last one. Raises UserError for a broken file, or without tensors.

    ``text_alone``: of a model of text and images only the text model's tensors, by their names in that; else all by the files' names.
    """

    def __init__(self, files: list[Path], text_alone: bool = True):
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
        self._at = _of_text_model(self._at) if text_alone else self._at

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in the order of their names."""
        return sorted({path for path, *_ in self._at.values()})

    def is_number(self, name: str) -> bool:
        """Whether a tensor is of a plain floating-point type; integers and quantized weights are not."""
        return self._at[name][3] in ("F64", "F32", "F16", "BF16")

    def stored_name(self, name: str) -> str:
        """What the files call a tensor."""
        return self._at[name][1]

    def dtype_name(self, name: str) -> str:
        """The type of a tensor as safetensors names it, such as BF16."""
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


def _of_text_model(at: dict) -> dict:
    """The tensors of the text model by their names in it, where they are marked as such among others; else all.

    Files that hold embeddings without the mark are a text model's own, whatever else they hold.
    """
    mark = next((mark for mark in TEXT_MODELS if any(mark in name and name.replace(mark, "", 1) in EMBEDDINGS for name in at)), None)
    if mark is None or not EMBEDDINGS.isdisjoint(at):
        return {name: place for name, place in at.items() if not name.startswith(IMAGES)}
    return {name.replace(mark, "", 1): place for name, place in at.items() if mark in name or name.startswith(HEADS)}


class PickledTensors(TensorReader):
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

    def is_number(self, name: str) -> bool:
        """Whether a tensor is of a plain floating-point type; integers and quantized weights are not."""
        return self._at[name][3] in (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def dtype_name(self, name: str) -> str:
        """The type of a tensor as torch names it, such as bfloat16."""
        return str(self._at[name][3]).removeprefix("torch.")

    def rows(self, name: str, piece: slice) -> torch.Tensor:
        """Some rows of a tensor, in its own dtype; they stay mapped."""
        path, stored, *_ = self._at[name]
        return self._open(path)[stored][piece]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in ``dtype`` or its own, in memory of its own."""
        path, stored, *_ = self._at[name]
        return self._open(path)[stored].to(dtype=dtype, copy=True)


class OfAnother(TensorReader):
    """What readers have in common that hand out another reader's tensors, changed."""

    def __init__(self, tensors):
        self._tensors, self.files = tensors, tensors.files

    @property
    def names(self) -> list[str]:
        """Those of the other reader."""
        return self._tensors.names

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        return self._tensors.shape(name)

    def is_number(self, name: str) -> bool:
        """Whether a tensor is of a plain floating-point type."""
        return self._tensors.is_number(name)


class Selected(OfAnother):
    """The tensors of another reader; of those with these ``names`` only some ``rows``, in ascending order."""

    def __init__(self, tensors, names: list[str], rows: torch.Tensor):
        super().__init__(tensors)
        self._selected, self._rows = set(names), rows

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        shape = self._tensors.shape(name)
        return [len(self._rows), *shape[1:]] if name in self._selected else shape

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, or its rows, in ``dtype`` or its own."""
        tensor = self._tensors.read(name, dtype)
        return tensor[self._rows] if name in self._selected else tensor


class Rounded(OfAnother):
    """The tensors of another reader with the values that ``dtype`` can hold, but for those named in ``exact``. Raises UserError for one
    that is too large for it.
    """

    def __init__(self, tensors, dtype: torch.dtype, exact: frozenset[str] = frozenset()):
        super().__init__(tensors)
        self.dtype, self._exact = dtype, exact

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor in ``dtype`` or its own, with values that the dtype of rounding can hold."""
        tensor = self._tensors.read(name, dtype)
        if tensor.is_floating_point() and name not in self._exact:
            round_to(self.dtype, tensor, name)
        return tensor


def round_to(dtype: torch.dtype, tensor: torch.Tensor, name: str) -> None:
    """Gives ``tensor``, in place, the values that ``dtype`` can hold. Raises UserError, by its ``name``, where one is too large for it."""
    tensor = torch.atleast_1d(tensor)
    for piece in _pieces(tensor.shape):
        rows = tensor[piece]
        rounded = rows.to(dtype)
        if dtype == torch.float16 and rounded.isinf().any():
            raise UserError(f"{name}: a value is beyond float16, which ends at 65504; save in another dtype with --save_dtype bfloat16")
        rows.copy_(rounded)
