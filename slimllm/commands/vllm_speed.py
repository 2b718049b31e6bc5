"""``slimllm vllm-speed DENSE PRUNED ...``: how fast vLLM reads a prompt and generates with each model folder."""

from __future__ import annotations

import logging
from pathlib import Path

from ..deploy import vllm
from ..deploy.weight_files import weight_bytes
from ..reporting import record
from ..reporting.tables import speed_table
from ..settings.vllm_speed import VllmSpeedConfig

log = logging.getLogger("slimllm")


def run(settings: VllmSpeedConfig) -> None:
    """Measures each model in a vLLM of its own, one after the other, and prints the table."""
    with record.results_at(settings.json, True, "name another --json"):
        found = [_measured(folder, settings) for folder in settings.folders]
        log.info("%s", "\n".join(speed_table("model", found)))
        if settings.json:
            record.save_results({"format": record.FORMAT, "models": found}, Path(settings.json))


def _measured(folder: str, settings: VllmSpeedConfig) -> dict:
    wanted = (settings.prompt_tokens, settings.new_tokens, settings.repeats)
    answer = vllm.ask(settings.vllm, folder, sum(wanted[:2]) + 8, settings.dtype, settings.trust_remote_code, speed=wanted)
    prompt, generation = answer["speed"]
    return {"name": Path(folder).resolve().name, "bytes": weight_bytes(folder), "prompt": prompt, "generation": generation}
