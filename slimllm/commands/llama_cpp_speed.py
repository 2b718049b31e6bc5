"""``python -m slimllm llama-cpp-speed DENSE.gguf PRUNED.gguf ...``: how fast llama.cpp reads a prompt and generates with each file."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path

from ..deploy.llama_cpp import LlamaCpp
from ..reporting.tables import speed_table
from ..settings.llama_cpp_speed import SpeedConfig

log = logging.getLogger("slimllm")


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
