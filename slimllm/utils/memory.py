"""How much memory a process took, giving back what it no longer needs, and a GPU that is full."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from ..errors import UserError, first_line
from . import processes

FREE_SHARE = 8  # what one run keeps at once is a few times its activations


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far (or since :func:`reset_peak`): resident memory, and GPU memory where one is in use."""
    peak = {"cpu_bytes": _peak_resident()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    try:  # getrusage counts the process that started this one, too
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> None:
    """Lets :func:`peak_since_reset` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux: the peak is then the process's so far


def peak_since_reset(device: torch.device) -> int:
    """Peak bytes since :func:`reset_peak`: allocated on the GPU, or resident in the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: on the GPU, or of the machine's memory, less what a container's limit forbids."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):  # no such limit
        return free


def activation_room(device: torch.device, least: int) -> int:
    """Bytes of activations that may stay in memory: ``least``, or where more is free a share of it, for each process of the machine."""
    return max(least, free_memory(device) // (FREE_SHARE * processes.on_this_machine()))


def return_free_memory() -> None:
    """Gives what the C allocator holds free back to the system: glibc would keep it resident."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library, which has no such function


@contextmanager
def memory_errors(advice: str):
    """Raises a UserError of one line, with ``advice``, where the GPU is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on the GPU ({first_line(error)}); {advice}") from None
