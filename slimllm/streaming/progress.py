"""How far a run is, as a function of (what is being done, how many of it are done, of how many)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..utils import processes

Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


@contextmanager
def bar_on_terminal() -> Iterator[Progress]:
    """A bar on the terminal, where there is one, while something is being done; what the programs log goes above it."""
    from tqdm.auto import tqdm

    silent = None if processes.is_first() else True  # None: where there is no terminal
    bars = {}  # the one of the stage that is going on

    def close():
        for bar in bars.values():
            bar.close()
        bars.clear()

    def progress(stage, done, total):
        if stage not in bars:
            close()
            bars[stage] = tqdm(desc=stage, disable=silent, leave=False)
        bars[stage].n, bars[stage].total = done, total
        bars[stage].refresh()
        if done >= total:
            close()

    try:
        yield progress
    finally:
        close()
