"""The tensors of .gguf files."""

from __future__ import annotations

import functools
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch

from ..errors import UserError, first_line
from ..utils.files import state_of
from ..utils.memory import return_free_memory
from .adapter import LayerAdapter
from .shape import units_of
from .weights import TensorReader

_ROPE_FACTORS = re.compile(r"rope_(freqs|factors_\w+)\.weight$")  # of a .gguf file, whose metadata says the same
ROWS = 4096  # of a .gguf tensor that are dequantized at once
# GGUF architectures that rotate neighbouring dimensions of a head where transformers rotates its two halves
ROPE_IN_PAIRS = ("llama", "deci", "smollm3", "mistral3", "granite", "granitemoe", "olmo", "arcee")


class GgufTensors(TensorReader):
    """The tensors of a .gguf file, each dequantized when it is read.

    ``config`` is what transformers makes of the file, ``names`` what it calls the tensors of such a model. Raises UserError for a
    file that is cut short, and for one of several that hold a model together.
    """

    def __init__(self, path: str | os.PathLike, config, names: list[str]):
        super().__init__()
        self.files = [Path(path)]
        reader = gguf_reader(path)
        self._arch = reader.fields["general.architecture"].contents()
        self.origin = origin_in(reader)
        by_gguf_name = {
            tensor.name: (
                int(tensor.data_offset),
                tensor.data.shape,
                [*map(int, tensor.shape[::-1])],
                tensor.data.dtype,
                tensor.tensor_type,
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
            if place in by_gguf_name:
                self._at[name] = by_gguf_name.pop(place)
        # What is left the config has no place for.
        self._at |= {place: value for place, value in by_gguf_name.items() if not _ROPE_FACTORS.match(place)}
        self._adapter, self._units = LayerAdapter(config), units_of(config)

    def is_number(self, name: str) -> bool:
        """Whether a tensor holds numbers with a fraction, as quantized ones do once they are dequantized."""
        return self._at[name][4].name not in ("I8", "I16", "I32", "I64")

    def dtype_name(self, name: str) -> str:
        """The type of a tensor as GGUF names it, such as Q4_K."""
        return self._at[name][4].name

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor as transformers would hold it, dequantized, in ``dtype`` or float32."""
        offset, stored, shape, kind, quantization = self._at[name]
        raw = np.fromfile(self.files[0], dtype=kind, count=math.prod(stored), offset=offset).reshape(stored)
        family, heads = self._adapter.family, self._adapter.rotary_heads(name, self._units)
        from_one = bool(family.norm_offset) and family.is_norm(name)  # the file holds what multiplies, which has fewer digits left of it
        tensor = torch.empty(shape, dtype=torch.float32 if from_one or dtype is None else dtype)
        for start in range(0, len(raw), ROWS):  # what it is unpacked into on the way takes several times its room
            tensor[start : start + ROWS] = torch.from_numpy(gguf.dequantize(raw[start : start + ROWS], quantization))
        if from_one:
            tensor = (tensor - family.norm_offset).to(dtype or torch.float32)
        return from_pairs(tensor, heads) if self._arch in ROPE_IN_PAIRS and heads else tensor


def origin_in(reader: gguf.GGUFReader) -> dict:
    """Where a .gguf file comes from by its metadata, as a model card names it: licence, languages, the hub name of its base model."""

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


class _Reader(_GgufReader):
    """gguf's reader, three times as fast: of its file as a plain array, of which each of a vocabulary's strings is a cheap slice."""

    def __setattr__(self, name, value):
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


@functools.lru_cache(maxsize=1)
def _parsed(path: str, state: tuple) -> gguf.GGUFReader:
    try:
        reader = _Reader(path)
    except OSError:
        raise
    except Exception as error:  # whatever a header that ends too soon, or is none, makes of the parser
        raise UserError(f"{path}: not a whole .gguf file ({first_line(error)}); copy or download it again") from None
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise UserError(
            f"{path}: one of {parts.contents()} files that hold the model together; join them with llama.cpp's "
            "llama-gguf-split --merge FIRST OUT.gguf and name the result"
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
