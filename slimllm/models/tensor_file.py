"""A safetensors file whose tensors are written one at a time."""

from __future__ import annotations

import errno
import json
import math
import os

import torch

DTYPES = {
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
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
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
        """Returns once all that was written is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Syncs and closes the file; it must not be written to afterwards."""
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
