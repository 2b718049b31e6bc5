"""Settings of ``slimllm vllm-speed``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..cli import check_range, flag
from ..errors import UserError
from .common import VLLM_PYTHON, trust_flag


@dataclass
class VllmSpeedConfig:
    """Settings of a measurement. Raises UserError where a value makes no sense."""

    folders: tuple[str, ...] = flag("models", "model folders; the first is what the others are compared with", positional=True, nargs="*")
    vllm: str = flag("models", "interpreter of an environment with vLLM", VLLM_PYTHON, metavar="PYTHON")
    trust_remote_code: bool = trust_flag("models")
    dtype: str = flag("measurement", "dtype of weights and compute", "bfloat16", choices=("float32", "float16", "bfloat16"))
    prompt_tokens: int = flag("measurement", "tokens of the prompt", 256)
    new_tokens: int = flag("measurement", "tokens generated", 64)
    repeats: int = flag("measurement", "runs of each model; the medians are shown", 5)
    json: str | None = flag("output", "write the speeds to this file as well")

    def __post_init__(self):
        if not self.folders:
            raise UserError("name model folders: slimllm vllm-speed DENSE PRUNED")
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            check_range(self, name, 1)
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise UserError(f"{folder}: no such folder")
