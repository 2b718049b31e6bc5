"""Files and folders that appear under their final name only when they are complete."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError

log = logging.getLogger("slimllm")

_REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EEXIST)
_REFUSALS += (errno.ENAMETOOLONG,)
_MKDTEMP = "????????"  # the random part of a name made by tempfile.mkdtemp


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(target: Path, way_out: str = ""):
    """Turns what the disk refuses while ``target`` is written (full, read-only, not permitted) into a UserError that names it."""
    try:
        yield
    except SafetensorError as error:  # its I/O errors are no OSError
        if any(sign in str(error) for sign in ("os error", "I/O error", "No space")):
            raise UserError(f"{target}: cannot be written ({error}){way_out}") from None
        raise
    except OSError as error:
        if error.errno is None and "written" in str(error):  # numpy, of a file that could not grow
            raise UserError(f"{target}: cannot be written (the disk is full){way_out}") from None
        if error.errno in _REFUSALS:
            raise UserError(f"{target}: cannot be written ({error.strerror}){way_out}") from None
        raise


@contextmanager
def atomic_file(path: Path):
    """A path to write to; the file takes its place at ``path`` when the block ends well, so what was there stays until then."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Writes a text file, and its folder; what it held before stays until the new content is complete, with ``sync`` on the disk."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    if sync:
        fsync_folder(Path(path).parent)


def fsync_folder(folder: str | os.PathLike) -> None:
    """Makes sure that the names of new files in ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_dir(
    target: Path,
    overwrite: bool,
    otherwise: str = "choose another name",
    resume: bool = False,
    worth_keeping: Callable[[Path], bool] = lambda folder: False,
):
    """A temporary folder beside ``target`` that takes its place when the block ends well, and is removed otherwise.

    What a killed run of the same name left behind is cleared first, or with ``resume`` gone on with. A folder that is
    ``worth_keeping`` stays for that when the block fails, and the error gets a note that says so. Raises UserError where ``target``
    exists (without ``overwrite``; ``otherwise`` is the other way out) or cannot be written: a full disk, a read-only folder.
    """
    target = Path(target)
    staging = lock = None
    try:
        with writing(target):
            if resume:
                staging, lock = _leftover(target)
            _clear_leftovers(target)
            if target.exists() and not overwrite:
                raise UserError(f"{target} exists: {otherwise}, or replace it with --overwrite")
            target.parent.mkdir(parents=True, exist_ok=True)
            if staging is None:
                staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
                lock = _lock(staging)
                staging.chmod(0o777 & ~_umask())
            yield staging
            for path in staging.rglob("*"):  # safetensors writes files that only their owner can read
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            _replace(staging, target)
    except BaseException as error:
        if staging is not None and worth_keeping(staging):
            error.add_note(f"what is finished is kept in {staging}: go on with the same command and --resume")
            staging = None
        raise
    finally:
        if lock is not None:
            os.close(lock)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _leftover(target: Path) -> tuple[Path, int]:
    """(staging folder of a stopped run, its lock), the newest. Raises UserError where there is none."""
    folders = target.parent.glob(f".{glob.escape(target.name)}.{_MKDTEMP}.partial")
    for folder in sorted(folders, key=lambda path: -path.stat().st_mtime):
        if (lock := _lock(folder)) is not None:
            return folder, lock
    raise UserError(f"--resume: no stopped run left anything for {target}; start without the flag")


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds the folder's lock as long as this process lives, or None where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _clear_leftovers(target: Path) -> None:
    """Removes staging folders of runs that were killed, and puts back a target that such a run had set aside. Says so."""
    name = glob.escape(target.name)
    for aside in target.parent.glob(f".{name}.{_MKDTEMP}.old"):
        if not target.exists() and (aside / target.name).exists():
            (aside / target.name).rename(target)
            log.info("%s: put back; a run was killed while it replaced it", target)
        shutil.rmtree(aside, ignore_errors=True)
    for folder in target.parent.glob(f".{name}.{_MKDTEMP}.partial"):
        lock = _lock(folder)
        if lock is None:
            continue  # a run that is alive
        log.info("%s: left by a run that was killed; removed", folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(staging: Path, target: Path) -> None:
    """Moves ``staging`` to ``target``; an existing target is set aside first and put back if the move fails."""
    if not target.exists():
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    old = target.rename(aside / target.name)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
