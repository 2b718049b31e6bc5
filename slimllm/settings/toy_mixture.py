"""Settings of ``slimllm toy-mixture``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_range, flag
from ..errors import UserError


@dataclass
class ToyMixtureConfig:
    """Settings of the training. Raises UserError where a value makes no sense."""

    output: str | None = flag("output", "folder to write: the model, train.txt and held_out.txt (required)", leading=True)
    overwrite: bool = flag("output", "replace an existing folder", False)
    text: str = flag(
        "training", "what it learns: python_manual, which comes with Python, or a .txt or .jsonl file or a folder of them", "python_manual"
    )
    steps: int = flag("training", "steps, of 16 samples of 128 tokens each", 1000)
    seed: int = flag("training", "seed of the weights and of the order of the text", 42)

    def __post_init__(self):
        if not self.output:
            raise UserError("--output is required: the folder to write")
        check_range(self, "steps", 1)
