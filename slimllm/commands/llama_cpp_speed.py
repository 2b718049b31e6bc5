"""``slimllm llama-cpp-speed DENSE.gguf PRUNED.gguf ...``: how fast llama.cpp reads a prompt and generates with each file."""

from __future__ import annotations

import logging
from pathlib import Path

from ..deploy.llama_cpp import speeds
from ..reporting import record
from ..reporting.tables import speed_table
from ..settings.llama_cpp_speed import SpeedConfig

log = logging.getLogger("slimllm")


def run(settings: SpeedConfig) -> None:
    """Measures and prints the table."""
    with record.results_at(settings.json, True, "name another --json"):
        found = speeds(settings.files, settings.prompt_tokens, settings.new_tokens, settings.repeats, settings.threads)
        log.info("%s", "\n".join(speed_table("file", found)))
        if settings.json:
            record.save_results({"format": record.FORMAT, "models": found}, Path(settings.json))
