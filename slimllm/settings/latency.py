"""Settings of ``slimllm latency``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_choices, check_range, drop_repeats, flag
from ..errors import UserError
from .common import DTYPES


@dataclass
class LatencyConfig:
    """Settings of a measurement. Raises UserError where a value makes no sense."""

    model: str | None = flag("model", "checkpoint folder, hub name or .gguf file", positional=True, nargs="?")
    baseline: str | None = flag("model", "the dense model to compare with")
    dtype: str = flag("model", "dtype of the weights; auto: bfloat16 on a GPU or a CPU fast in it, else float32", "auto", choices=DTYPES)
    device: str = flag("model", "auto takes a GPU if there is one", "auto")
    batch_size: tuple[int, ...] = flag("measurement", "sequences at once", (1, 8))
    length: tuple[int, ...] = flag("measurement", "tokens of the prompt", (128, 512))
    new_tokens: int = flag("measurement", "tokens decoded after it", 32)
    repeats: int = flag("measurement", "measurements of each kind", 7)
    json: str | None = flag("output", "write the measurements to this file as well")

    def __post_init__(self):
        if not self.model:
            raise UserError("name a model: slimllm latency prune_log/NAME")
        check_choices(self)
        check_range(self, "new_tokens", 1)
        check_range(self, "repeats", 1)
        drop_repeats(self, "batch_size", "length")
        for name in ("batch_size", "length"):
            for value in getattr(self, name):
                if value < 1:
                    raise UserError(f"--{name} {value}: must be at least 1")
