"""``python -m slimllm llama-cpp-speed DENSE.gguf PRUNED.gguf ...``: how fast llama.cpp reads a prompt and generates with each file."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..cli import check_range, flag
from ..deploy.llama_cpp import LlamaCpp
from ..errors import UserError
from ..reporting.tables import speed_table

log = logging.getLogger("slimllm")


@dataclass
class SpeedConfig:
    """Settings of a measurement. Raises UserError where a value makes no sense."""

    files: tuple[str, ...] = flag("files", ".gguf files; the first is what the others are compared with", positional=True, nargs="*")
    prompt_tokens: int = flag("measurement", "tokens of the prompt", 256)
    new_tokens: int = flag("measurement", "tokens generated", 64)
    repeats: int = flag("measurement", "runs of each file, in turns; the medians are shown", 5)
    threads: int | None = flag("measurement", "threads of the computation [llama.cpp's choice]")

    def __post_init__(self):
        if not self.files:
            raise UserError("name .gguf files: python -m slimllm llama-cpp-speed DENSE.gguf PRUNED.gguf")
        for name in ("prompt_tokens", "new_tokens", "repeats", "threads"):
            check_range(self, name, 1)


def speeds(settings: SpeedConfig) -> list[dict]:
    """For each file its name, size in bytes and the medians of prompt and generation speed in tokens per second."""

    def once(path):
        with LlamaCpp(path, settings.prompt_tokens + settings.new_tokens + 8, settings.threads, exact=False) as server:
            server.speed(settings.prompt_tokens, settings.new_tokens)  # warms up
            return server.speed(settings.prompt_tokens, settings.new_tokens)

    # in turns, so that all see the same machine, and one server at a time: idle ones would take part of it
    runs = [[once(path) for path in settings.files] for _ in range(settings.repeats)]
    medians = [[statistics.median(values) for values in zip(*of_file)] for of_file in zip(*runs)]
    return [
        {"name": Path(path).name, "bytes": Path(path).stat().st_size, "prompt": prompt, "generation": generation}
        for path, (prompt, generation) in zip(settings.files, medians)
    ]


def run(settings: SpeedConfig) -> None:
    """Measures and prints the table."""
    log.info("%s", "\n".join(speed_table("file", speeds(settings))))
