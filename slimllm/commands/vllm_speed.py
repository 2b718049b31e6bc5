"""``python -m slimllm vllm-speed DENSE PRUNED ...``: how fast vLLM reads a prompt and generates with each model folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ..cli import check_range, flag
from ..deploy import vllm
from ..deploy.vllm import trust_flag
from ..deploy.weight_files import weight_bytes
from ..errors import UserError
from ..reporting.tables import speed_table

log = logging.getLogger("slimllm")


@dataclass
class VllmSpeedConfig:
    """Settings of a measurement. Raises UserError where a value makes no sense."""

    folders: tuple[str, ...] = flag("models", "model folders; the first is what the others are compared with", positional=True, nargs="*")
    vllm: str = flag("models", "interpreter of an environment with vLLM", vllm.PYTHON, metavar="PYTHON")
    trust_remote_code: bool = trust_flag("models")
    dtype: str = flag("measurement", "dtype of weights and compute", "bfloat16", choices=("float32", "float16", "bfloat16"))
    prompt_tokens: int = flag("measurement", "tokens of the prompt", 256)
    new_tokens: int = flag("measurement", "tokens generated", 64)
    repeats: int = flag("measurement", "runs of each model; the medians are shown", 5)

    def __post_init__(self):
        if not self.folders:
            raise UserError("name model folders: python -m slimllm vllm-speed DENSE PRUNED")
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            check_range(self, name, 1)
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise UserError(f"{folder}: no such folder")


def run(settings: VllmSpeedConfig) -> None:
    """Measures each model in a vLLM of its own, one after the other, and prints the table."""
    found = []
    for folder in settings.folders:
        wanted = (settings.prompt_tokens, settings.new_tokens, settings.repeats)
        answer = vllm.ask(settings.vllm, folder, sum(wanted[:2]) + 8, settings.dtype, settings.trust_remote_code, speed=wanted)
        size = weight_bytes(folder)
        found.append({"name": Path(folder).resolve().name, "bytes": size, "prompt": answer["speed"][0], "generation": answer["speed"][1]})
    log.info("%s", "\n".join(speed_table("model", found)))
