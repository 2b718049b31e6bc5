"""The processes of one run that torchrun started: samples are split over them, and what the first decides is sent to all.

Without torchrun there is one process, and everything here does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UserError, first_line

PATIENCE = timedelta(hours=2)  # how long one process waits for another that reads or decides


class ProcessEnded(UserError):
    """Another process of the run is gone, or has not answered for PATIENCE."""


_joined = False  # inside group(); the Trainer of post-training joins processes of its own accord, for itself


def count() -> int:
    """How many processes the run has; 1 until they have joined (:func:`group`)."""
    return dist.get_world_size() if _joined else 1


def expected() -> int:
    """How many processes there will be once all have joined (:func:`group`)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_this_machine() -> int:
    """How many of them run on this machine, and share its memory and disk."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if _joined else int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this process is the one that writes files and decides for all."""
    return rank() == 0


@contextmanager
def group(device: torch.device):
    """Joins the processes that torchrun started, if it did, with gloo for what lies on CPUs and NCCL for what lies on GPUs.

    Raises ProcessEnded where another one is gone.
    """
    global _joined
    if expected() == 1:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with in_step():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    _joined = True
    try:
        yield
        dist.destroy_process_group()  # not after an error: it would wait for a process that hangs
    finally:
        _joined = False


@contextmanager
def other():
    """Around the work of a process that is not the first: prints a UserError of its own, but not that another process is gone."""
    try:
        yield
    except ProcessEnded:
        raise
    except UserError as error:
        print(f"process {rank()}: error: {error}", file=sys.stderr)
        raise


@contextmanager
def in_step():
    """Around work in which the processes wait for each other: raises ProcessEnded, in one line, for what torch.distributed raises when
    another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        of_gloo = "gloo" in str(error)  # whose errors have no class of their own, but name its files
        if not isinstance(error, dist.DistError) and not of_gloo:
            raise
        what = "has not answered" if "imed out" in str(error) else "ended"
        raise ProcessEnded(f"another process of this run {what} ({first_line(error)})") from None


def share(rows: torch.Tensor) -> torch.Tensor:
    """Every ``count``-th of the rows, from this process's on. All of them, in each process, where there are fewer than processes."""
    return rows[rank() :: count()] if len(rows) >= count() > 1 else rows


def add(*tensors: torch.Tensor) -> None:
    """Replaces each tensor by the sum of what the processes hold."""
    if count() > 1:
        with in_step():
            for tensor in tensors:
                dist.all_reduce(tensor)


def total(*values: float) -> list[float]:
    """The sums of numbers over the processes, in float64."""
    if count() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    add(sums)
    return sums.tolist()


def from_first(make: Callable[[], object], device: torch.device | str = "cpu"):
    """What ``make()`` gives in the first process, in all of them; what can be moved (a tensor, or one of a tuple) is on ``device``."""
    if count() == 1:
        return make()
    box = [_moved(make(), "cpu") if is_first() else None]
    with in_step():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return _moved(box[0], device)


def _moved(value, device):
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") else value


def from_all(value) -> list:
    """What each process holds, in the order of the processes."""
    if count() == 1:
        return [value]
    values = [None] * count()
    with in_step():
        dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until every process has come here."""
    total(0.0)
