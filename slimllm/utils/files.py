"""Files that appear under their final name only when they are complete; whole folders are in :mod:`outputs`."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError

_REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EEXIST)
_REFUSALS += (errno.ENAMETOOLONG,)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_plain(path: str | os.PathLike, option: str = "") -> None:
    """Raises UserError, beginning with ``option``, for what is no file that can be read: never opened, since a pipe would wait for ever."""
    if os.path.isdir(path):
        raise UserError(f"{option}{path}: a folder, not a file")
    if not os.path.exists(path):
        why = "the link leads nowhere" if os.path.islink(path) else "no such file"
        raise UserError(f"{option}{path}: {why}")
    if not os.path.isfile(path):
        raise UserError(f"{option}{path}: a pipe or device, not a plain file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{option}{path}: {os.strerror(errno.EACCES)}")


def state_of(path: Path) -> tuple | None:
    """What tells whether a file or folder was replaced or changed; None where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


@contextmanager
def writing(target: Path, way_out: str = ""):
    """Converts what the disk refuses while ``target`` is written (full, read-only, not permitted) to a UserError that names it."""
    try:
        yield
    except SafetensorError as error:  # its I/O errors are no OSError
        if any(sign in str(error) for sign in ("os error", "I/O error", "No space")):
            raise UserError(f"{target}: cannot be written ({error}){way_out}") from None
        raise
    except RuntimeError as error:  # torch.save's
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise UserError(f"{target}: cannot be written (the disk is full, or takes no more){way_out}") from None
        raise
    except OSError as error:
        if error.errno is None and "written" in str(error):  # numpy, of a file that could not grow
            raise UserError(f"{target}: cannot be written (the disk is full){way_out}") from None
        if error.errno in _REFUSALS:
            raise UserError(f"{target}: cannot be written ({error.strerror}){way_out}") from None
        raise


@contextmanager
def atomic_file(path: Path):
    """A path to write to; the file takes its place at ``path`` when the block ends well and all of it is on the disk, so what was there
    stays until then, whatever happens to the machine.

    Raises UserError where something else than a plain file stands there, or where it changed while the block ran.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise UserError(f"{path}: not a plain file, and nothing else is replaced; name another")
        before = state_of(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            yield partial
            if state_of(path) != before:
                raise UserError(f"{path} was made or changed by something else meanwhile; name another")
            fsync(partial)
            partial.replace(path)
            fsync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, and its folder; what it held before stays until the new content is complete."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def fsync(path: str | os.PathLike) -> None:
    """Makes sure that the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
