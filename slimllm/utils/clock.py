"""Seconds of the phases of a run."""

from __future__ import annotations

import time
from contextlib import contextmanager


class Stopwatch:
    """Seconds of each named phase of a run."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        started = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - started, 3)
