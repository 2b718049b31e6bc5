"""The weights of a checkpoint, written one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..models.families import family_of
from ..models.skeleton import in_float32
from ..models.source import stored_tensors
from ..models.stored_names import stored_pieces
from ..models.tensor_file import TensorFile
from ..models.weights import INDEX

SHARD_BYTES = 5_000_000_000  # of weights in one file, at most; a single tensor may be larger


def weight_bytes(folder: str | os.PathLike) -> int:
    """Bytes of the files of weights in a checkpoint folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))


def _written(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is written in where the weights are written in ``dtype``, or in their own."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _layout(model, dtype: torch.dtype | None) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """(dtype, shape) of what is written of a model; what transformers keeps in float32 it finds so."""
    exact = in_float32(model.config, dtype or model.dtype)
    tensors = stored_tensors(model).items()
    return {name: (_written(tensor, torch.float32 if name in exact else dtype), tensor.shape) for name, tensor in tensors}


class WeightFiles:
    """The weights of a checkpoint, written one tensor at a time: one file, or several where it is large, and their index.

    ``layout``: name -> (dtype, shape) of the tensors. ``pieces``: of those that are stored as several, the names of these, and the place
    of each in the whole.
    """

    def __init__(self, folder: Path, layout: dict[str, tuple[torch.dtype, torch.Size]], pieces: dict | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.layout, pieces = layout, pieces or {}
        self._pieces = {name: pieces.get(name, {name: ()}) for name in self.layout}
        shards, size, total = [{}], 0, 0
        for name, (dtype, shape) in self._stored():
            tensor_bytes = dtype.itemsize * shape.numel()
            if size and size + tensor_bytes > SHARD_BYTES:
                shards, size = [*shards, {}], 0
            shards[-1][name], size, total = (dtype, shape), size + tensor_bytes, total + tensor_bytes
        self._files, self._index = {}, {"metadata": {"total_size": total}, "weight_map": {}}
        for number, layout in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._files |= dict.fromkeys(layout, TensorFile(folder / name, layout))
            self._index["weight_map"] |= dict.fromkeys(layout, name)
        self._folder = folder

    @classmethod
    def of(cls, folder: Path, model, dtype: torch.dtype | None = None) -> WeightFiles:
        """Files for the tensors of ``model``, which may be without weights; of experts that it holds stacked a tensor for each is written.
        Those of mixtures and hybrids have the names that transformers gives them in files. ``dtype``: what they are written in, the
        model's by default.
        """
        family = family_of(model.config)
        return cls(folder, _layout(model, dtype), stored_pieces(model) if family.is_mixture or family.is_hybrid else {})

    def _stored(self) -> Iterator[tuple[str, tuple[torch.dtype, torch.Size]]]:
        """What the files hold: (name, (dtype, shape))."""
        for name, (dtype, shape) in self.layout.items():
            whole = torch.empty(shape, device="meta")
            for stored, place in self._pieces[name].items():
                yield stored, (dtype, whole[place].shape)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor of the model, whose values the dtype that it is written in can hold."""
        for stored, place in self._pieces[name].items():
            self._files[stored].write(stored, tensor[place].to(self.layout[name][0]))

    def sync(self) -> None:
        """Returns once all that was written is on the disk."""
        for file in set(self._files.values()):
            file.sync()

    def close(self) -> None:
        """Writes the index, without which vLLM would take every .safetensors file in the folder for weights."""
        for file in set(self._files.values()):
            file.close()
        (self._folder / INDEX).write_text(json.dumps(self._index, indent=1) + "\n")
