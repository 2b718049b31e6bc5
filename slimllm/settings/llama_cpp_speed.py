"""Settings of ``slimllm llama-cpp-speed``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_range, flag
from ..errors import UserError


@dataclass
class SpeedConfig:
    """Settings of a measurement. Raises UserError where a value makes no sense."""

    files: tuple[str, ...] = flag("files", ".gguf files; the first is what the others are compared with", positional=True, nargs="*")
    prompt_tokens: int = flag("measurement", "tokens of the prompt", 256)
    new_tokens: int = flag("measurement", "tokens generated", 64)
    repeats: int = flag("measurement", "runs of each file, in turns; the medians are shown", 5)
    threads: int | None = flag("measurement", "threads of the computation [llama.cpp's choice]")
    json: str | None = flag("output", "write the speeds to this file as well")

    def __post_init__(self):
        if not self.files:
            raise UserError("name .gguf files: slimllm llama-cpp-speed DENSE.gguf PRUNED.gguf")
        for name in ("prompt_tokens", "new_tokens", "repeats", "threads"):
            check_range(self, name, 1)
