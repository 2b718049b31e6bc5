"""Activations in memory while there is room for them, and on disk beyond it."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import torch

from ..errors import UserError
from ..utils.files import writing


class ActivationMemory:
    """Bytes of activations that may still stay in memory, shared by several stores, and the folder for those that may not."""

    def __init__(self, limit: int, folder: str | None = None):
        self.left, self.folder = limit, temporary_folder(folder)


def temporary_folder(tmp_dir: str | None) -> str:
    """The folder that ``--tmp_dir`` names, or the system's. Raises UserError where there is no such folder."""
    if tmp_dir is not None and not os.path.isdir(tmp_dir):
        raise UserError(f"--tmp_dir {tmp_dir}: no such folder")
    return tmp_dir or tempfile.gettempdir()


class ActivationStore:
    """A list of activation batches: in memory while there is room for them, beyond it in an unnamed temporary file.

    So memory does not grow with the number of samples, and nothing is left behind when a run is killed. Numbers are kept exactly:
    what comes out does not depend on how much memory was free.

    ``beside``: what some layers leave of these batches for later layers, by name.
    """

    def __init__(self, memory: ActivationMemory):
        self._memory = memory
        self.beside: dict[str, ActivationStore] = {}
        self._items: list = []  # a tensor, or (offset, shape, dtype, device) of one in the file
        self._file = None
        self._end = 0
        self._reserved = 0

    def append(self, tensor: torch.Tensor) -> None:
        """Adds a batch at the end. Raises UserError where it has to go to the temporary folder and there is no room there."""
        size = tensor.nbytes
        if size <= self._memory.left:
            self._memory.left -= size
            self._reserved += size
            self._items.append(tensor)
            return
        self._items.append((self._end, tensor.shape, tensor.dtype, tensor.device))
        self._end += tensor.nbytes
        self[len(self._items) - 1] = tensor

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> torch.Tensor:
        item = self._items[index]
        if isinstance(item, torch.Tensor):
            return item
        offset, shape, dtype, device = item
        self._file.seek(offset)
        raw = np.fromfile(self._file, dtype=np.uint8, count=shape.numel() * dtype.itemsize)
        return torch.from_numpy(raw).view(dtype).view(shape).to(device)

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        item = self._items[index]
        if isinstance(item, torch.Tensor):
            self._items[index] = tensor
            return
        with writing(f"the temporary folder {self._memory.folder}", "; make room there, or name another folder with --tmp_dir"):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="slimllm-", dir=self._memory.folder)
            self._file.seek(item[0])
            tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tofile(self._file)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def store_beside(self, name: str) -> ActivationStore:
        """The store of this name in ``beside``; an empty one at first."""
        return self.beside.setdefault(name, ActivationStore(self._memory))

    def copy(self) -> ActivationStore:
        """Another store of the same batches; replacing one in either leaves the other as it is."""
        twin = ActivationStore(self._memory)
        for tensor in self:
            twin.append(tensor)
        twin.beside = {name: store.copy() for name, store in self.beside.items()}
        return twin

    def close(self) -> None:
        """Forgets all batches, and what is beside them: gives their memory back to the other stores, and removes the temporary file."""
        self._memory.left += self._reserved
        self._reserved, self._items = 0, []
        if self._file is not None:
            self._file.close()
            self._file = None
        for store in self.beside.values():
            store.close()
        self.beside = {}
