"""How far a run is, as a function of (what is being done, how many of it are done, of how many)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how many layers are done, of how many


def no_progress(stage: str, done: int, total: int) -> None:
    pass
