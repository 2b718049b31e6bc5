"""What a run did: everything that is needed to get its figures again, as JSON."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from .cli import UserError

FORMAT = 1
PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy", "peft", "lm_eval")


def environment() -> dict:
    """Versions of the interpreter and the packages, the commit of this code, the machine's compute."""
    import slimllm

    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "slimllm": slimllm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return None
    return found.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def command() -> str:
    return " ".join(["python", *sys.argv])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_run(config) -> dict:
    """The part of a record that says how to repeat the run. ``config`` is its PruneConfig."""
    return {"format": FORMAT, "command": command(), "environment": environment(), "config": config.to_dict()}


def parameters(dense: int, pruned: int, dense_decoder: int) -> dict:
    """Counts, and the shares of the decoder layers' and of all parameters that were removed."""
    removed = dense - pruned
    return {
        "dense": dense,
        "pruned": pruned,
        "dense_decoder": dense_decoder,
        "decoder_removed": removed / dense_decoder,
        "removed": removed / dense,
    }


def peak_memory() -> dict:
    """Peak bytes of this process so far: resident memory, and GPU memory where one is in use."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def return_free_memory() -> None:
    """Gives what the C allocator holds free back to the system: glibc would keep it resident."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library: it does as it sees fit


class Stopwatch:
    """Seconds of each named phase of a run."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        started = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - started, 3)


def dumps(record: dict) -> str:
    """JSON with one line for each short list, so that lists of indices do not fill the page."""
    text = json.dumps(record, indent=1, allow_nan=False, default=str)
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m.group()), text) + "\n"


def read_json(path: str | os.PathLike) -> dict:
    """A record's file. Raises FileNotFoundError, or ValueError for what is not a record of this format."""
    record = json.loads(Path(path).read_text())
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: not a record of format {FORMAT}")
    return record


def read(folder: str | os.PathLike) -> dict:
    """The record of a pruning run: pruning.json in its folder. Raises as :func:`read_json` does."""
    return read_json(Path(folder) / "pruning.json")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(target: Path):
    """Turns what the disk refuses while ``target`` is written (full, read-only, not permitted) into a UserError that names it."""
    try:
        yield
    except SafetensorError as error:  # its I/O errors are no OSError
        if any(sign in str(error) for sign in ("os error", "I/O error", "No space")):
            raise UserError(f"{target}: cannot be written ({error})") from None
        raise
    except OSError as error:
        if error.errno is None and "written" in str(error):  # numpy, of a file that could not grow
            raise UserError(f"{target}: cannot be written (the disk is full)") from None
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{target}: cannot be written ({error.strerror})") from None
        raise


@contextmanager
def writing_file(path: Path):
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


def write(path: Path, text: str) -> None:
    """Writes a text file, and its folder; what it held before stays until the new content is complete."""
    with writing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def keep(results: dict, path: Path) -> None:
    """Writes results with the command, the environment and the peak memory so far."""
    results |= {"command": command(), "environment": environment(), "peak_memory": peak_memory()}
    write(path, dumps(results))


def continued(path: Path, of: dict, overwrite: bool) -> dict:
    """The results that ``path`` holds, to be completed, or a new dict of them. ``of`` says what they are results of.

    Raises UserError where the file is no such record or holds results of something else.
    """
    of = json.loads(json.dumps(of))
    if not path.exists() or overwrite:
        return {"format": FORMAT, "of": of}
    way = "name another --output, or replace it with --overwrite"
    try:
        found = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not a file of results ({error}); {way}") from None
    if found.get("of") != of:
        different = sorted(key for key in of if found.get("of", {}).get(key) != of[key])
        raise UserError(f"{path} holds results of another {', '.join(different)}: {way}")
    return found
