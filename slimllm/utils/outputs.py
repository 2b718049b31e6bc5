"""Where a run's results go: the name is taken at the start, and what stands there is replaced only if a run of this program wrote it.

A finished folder has a seal, :data:`SEAL`, with the SHA-256 of its files: it shows later that they are those that were written, and
what in the folder a run may replace.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

from ..errors import Interrupted, Recurring, Terminated, UserError
from .files import file_hash, state_of, writing

log = logging.getLogger("slimllm")

SEAL = "slimllm.json"
SEAL_FORMAT = 1
GGUF_MARK = "slimllm.version"  # a key near the start of every .gguf file that is exported
_UNSEALED = ("README.md", "log.txt", SEAL)  # a card is brought up to date by later programs, and edited by people
_MKDTEMP = "????????"  # the random part of a name made by tempfile.mkdtemp
_LEFTOVER = re.compile(r"\.journal|\.tmp[A-Za-z0-9]{6}|\..+\.(\d+\.partial|[a-z0-9_]{8}\.(partial|old))")  # .tmp: of safetensors
_HEAD = 4096  # bytes of a .gguf file in which its mark is looked for


# what a run wrote


def seal(folder: Path, names: Iterable[str] | None = None, folders: tuple[str, ...] = (), **more) -> dict[str, str]:
    """Writes the seal of ``folder``, the SHA-256 of its files, and returns these by path inside.

    ``names``: of the files, as far as they are there; by default all but hidden ones and those that change later. ``folders``: names of
    folders inside that are, or will be, sealed themselves. ``more``: further entries of the seal.
    """
    folder = Path(folder)
    if names is None:
        inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
        names = [path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts)]
    hashes = {name: file_hash(folder / name) for name in names if name not in _UNSEALED and (folder / name).is_file()}
    text = json.dumps({"format": SEAL_FORMAT, "program": "slimllm", "folders": folders, "files": hashes, **more}, indent=1, default=str)
    (folder / SEAL).write_text(text + "\n", encoding="utf-8")
    return hashes


def read_seal(folder: Path) -> dict | None:
    """The seal of a folder, or None where it has none. Raises UserError for one that cannot be read."""
    path = Path(folder) / SEAL
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == SEAL_FORMAT and isinstance(content["folders"], list) and isinstance(content["files"], dict):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: not readable as the list of what was written; restore the folder, or write it again")


def altered(folder: Path) -> list[str] | None:
    """The files of a sealed folder that are gone or no longer those that were written, by path; None where it has no seal."""
    sealed = read_seal(folder)
    if sealed is None:
        return None
    return [name for name, digest in sealed["files"].items() if not _holds(Path(folder) / name, digest)]


def _holds(path: Path, digest: str) -> bool:
    """Whether this is a file that can be read, with the SHA-256 ``digest``."""
    try:
        return path.is_file() and file_hash(path) == digest
    except OSError:
        return False


def unsealed(folder: Path) -> list[str]:
    """The files in a sealed folder that its seal does not cover, by path: neither its hashes, nor folders of their own, nor what
    programs of this package put beside a checkpoint.
    """
    sealed = read_seal(folder) or {"files": {}, "folders": []}
    listed = {*sealed["files"], *_UNSEALED}
    inside = [(path, path.relative_to(folder)) for path in sorted(Path(folder).rglob("*")) if not path.is_dir()]
    return [
        name.as_posix()
        for path, name in inside
        if name.as_posix() not in listed and name.parts[0] not in sealed["folders"] and not is_export(path) and not is_results(path)
    ]


def foreign(path: Path) -> Path | None:
    """The first thing at or in the folder ``path`` that no run of this program wrote; None where all of it may be replaced."""
    if path.is_symlink() or not path.is_dir():
        return path
    if not any(path.iterdir()):
        return None
    try:
        sealed = read_seal(path)
    except UserError:
        sealed = None
    if sealed is None:
        return path
    listed = {*sealed["files"], *_UNSEALED}
    for entry in sorted(path.iterdir()):
        if _is_leftover(entry):
            continue
        if entry.is_symlink() or not entry.is_dir():
            strange = None if _regular(entry) and (entry.name in listed or is_export(entry) or is_results(entry)) else entry
        elif entry.name in sealed["folders"]:
            strange = foreign(entry)
        elif sealed["folders"] and _is_training_state(entry):  # only a training of this program has folders of its own
            strange = None
        elif any(name.startswith(f"{entry.name}/") for name in listed):
            inside = (file for file in sorted(entry.rglob("*")) if file.is_symlink() or not file.is_dir())
            strange = next((file for file in inside if not _regular(file) or file.relative_to(path).as_posix() not in listed), None)
        else:
            strange = entry
        if strange:
            return strange
    return None


def is_export(path: Path) -> bool:
    """Whether this is a .gguf file that ``export-gguf`` wrote."""
    if path.suffix != ".gguf" or not _regular(path):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return head.startswith(b"GGUF") and GGUF_MARK.encode() in head


def is_results(path: Path) -> bool:
    """Whether this is a file of results that a program of this package wrote; the record of a run, which belongs to its folder, is none."""
    if path.suffix != ".json" or not _regular(path):
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return "slimllm" in content["environment"] and "config" not in content
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _regular(path: Path) -> bool:
    return not path.is_symlink() and path.is_file()


def _is_leftover(path: Path) -> bool:
    """What a run that was killed left inside a folder: its journal, the empty lock of a name, something that it had begun to write."""
    if path.suffix == ".lock":
        return path.name.startswith(".") and _regular(path) and not path.stat().st_size
    return not path.is_symlink() and bool(_LEFTOVER.fullmatch(path.name))


def _is_training_state(folder: Path) -> bool:
    """A finished checkpoint-N of transformers' Trainer."""
    return bool(re.fullmatch(r"checkpoint-\d+", folder.name)) and (folder / "trainer_state.json").is_file()


# what may be replaced


def check_target(
    target: Path,
    overwrite: bool,
    otherwise: str = "choose another name",
    inputs: Iterable = (),
    foreign: Callable[[Path], Path | None] = foreign,
) -> None:
    """Raises UserError where ``target`` is there and may not be replaced.

    Replaced, with ``overwrite``, are only files and folders that a run of this program wrote, to the last thing inside, and none that
    is or holds one of ``inputs``: paths that this run reads (those that do not exist are hub names). ``otherwise``: the way out.
    ``foreign``: finds what no run wrote in what is written here, a folder or (:func:`unless`) a kind of file.
    """
    target = Path(target)
    check_kind(target, otherwise)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UserError(f"{target} exists: {otherwise}, or replace it with --overwrite")
    for name in inputs:
        if name and os.path.exists(name) and _within(Path(name), target):
            holds = "is" if os.path.samefile(name, target) else "holds"
            raise UserError(f"{target} {holds} {name}, which this run reads; {otherwise}")
    if strange := foreign(target):
        raise UserError(f"no run of this program wrote {strange}, so it is not replaced; {otherwise}, or move it away")


def unless(ours: Callable[[Path], bool]) -> Callable[[Path], Path | None]:
    """The ``foreign`` of a program that writes files: what is none of them."""
    return lambda path: None if ours(path) else path


def check_kind(target: Path, otherwise: str = "choose another name") -> None:
    """Raises UserError where something other than a plain file or folder stands at ``target``."""
    target = Path(target)
    if target.name in ("", ".."):
        raise UserError(f"{target}: not the name of a file or folder; {otherwise}")
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); {otherwise}") from None
    if stat.S_ISLNK(mode):
        raise UserError(f"{target} is a symbolic link, which is never replaced: {otherwise}, or name what it leads to")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{target} is a device, pipe or socket: {otherwise}")


def _within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it, whatever links lead there."""
    real = path.resolve()
    return any(os.path.samefile(part, folder) for part in (real, *real.parents))


@contextmanager
def taken(target: Path, otherwise: str = "choose another name"):
    """Holds the name ``target`` while the block runs: no other run of this machine, or of another on the same disk, gets it.

    Raises UserError where another run has it, and where nothing can be written beside it.
    """
    target = Path(target)
    made = []
    try:
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _name_lock(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}){_hint(error)}; {otherwise}") from None
    if lock is None:
        raise UserError(f"{target}: another run is writing it; wait for that one, or {otherwise}")
    descriptor, path = lock
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held
        os.close(descriptor)
        with contextlib.suppress(OSError):  # folders that were made for it go where nothing came
            for folder in made:
                folder.rmdir()


def _hint(error: OSError) -> str:
    return f": {error.filename} is no folder" if error.errno in (errno.EEXIST, errno.ENOTDIR) and error.filename else ""


def _name_lock(target: Path) -> tuple[int, Path] | None:
    """(open descriptor, path) of the locked file that stands for the name, or None where another run holds it."""
    path = target.with_name(f".{target.name}.lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            os.close(descriptor)
            raise UserError(f"{path}: no run of this program wrote it, and the name is needed for a while; move it away")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            pass  # a disk without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, path
        os.close(descriptor)  # its run ended in between and took the file away


# folders that appear whole


@contextmanager
def atomic_dir(
    target: Path,
    overwrite: bool,
    otherwise: str = "choose another name",
    resume: bool = False,
    worth_keeping: Callable[[Path], bool] = lambda folder: False,
    inputs: Iterable = (),
    transient: str | None = None,
):
    """A temporary folder beside ``target`` that takes its place, sealed, when the block ends well, and is removed otherwise.

    What a killed run of the same name left behind is cleared first, or with ``resume`` continued. A folder that is
    ``worth_keeping`` stays for that when the block fails, and the error gets a note of where it is. ``transient``: what in it is needed
    for that only, and goes once the folder is in its place. Raises UserError where ``target`` exists and may not be replaced
    (:func:`check_target`), changed while the block ran, or cannot be written: a full disk, a read-only folder.
    """
    target = Path(target)
    staging = lock = None
    check_kind(target, otherwise)
    with taken(target, otherwise):
        try:
            with writing(target):
                if resume:
                    staging, lock = _leftover(target)
                    (staging / SEAL).unlink(missing_ok=True)
                _put_back(target)
                check_target(target, overwrite, otherwise, inputs)
                _clear_leftovers(target)
                before = state_of(target)
                if staging is None:
                    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
                    lock = _lock(staging)
                    staging.chmod(0o777 & ~_umask())
                yield staging
                for path in staging.rglob("*"):  # safetensors writes files that only their owner can read
                    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
                if not (staging / SEAL).is_file():
                    seal(staging)
                if state_of(target) != before:
                    raise UserError(f"{target} was made or changed by something else while this run went on; {otherwise}")
                if before is not None:
                    check_target(target, True, otherwise, inputs)  # what came deeper inside
                with _undisturbed(f"everything lies in {target}/"):
                    _replace(staging, target)
                    if transient:
                        shutil.rmtree(target / transient, ignore_errors=True)
        except BaseException as error:
            if staging is not None and staging.exists() and worth_keeping(staging):
                way = "" if isinstance(error, Recurring) else ": go on with the same command and --resume"
                error.add_note(f"what is finished is kept in {staging}{way}")
                staging = None
            raise
        finally:
            if lock is not None:
                os.close(lock)
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _undisturbed(then: str):
    """Ctrl-C and SIGTERM wait until the block has ended; then they interrupt as ever, with the note ``then``."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    came = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        error = Terminated() if signal.SIGTERM in came else Interrupted()
        error.add_note(then)
        raise error


@contextmanager
def complete(what: str):
    """Around what follows once everything is written: an interruption there gets the note ``what``."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        error.add_note(what)
        raise


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


def _put_back(target: Path) -> None:
    """Puts a target back that a run had set aside when it was killed, and logs that."""
    for aside in target.parent.glob(f".{glob.escape(target.name)}.{_MKDTEMP}.old"):
        if not aside.is_dir() or any(entry.name != target.name for entry in aside.iterdir()):
            continue  # none of ours, which hold nothing else
        if not target.exists() and (aside / target.name).exists():
            (aside / target.name).rename(target)
            log.info("%s: put back; a run was killed while it replaced it", target)
        shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """Removes staging folders of runs that were killed, and logs each."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.{_MKDTEMP}.partial"):
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
