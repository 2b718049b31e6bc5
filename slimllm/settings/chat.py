"""Settings of ``slimllm chat``."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ..cli import check_choices, check_range, flag
from ..errors import UserError
from .common import DTYPES


@dataclass
class ChatConfig:
    """Settings of a conversation. Raises UserError where a value makes no sense."""

    model: str | None = flag("model", "checkpoint folder, hub name or .gguf file", positional=True, nargs="?")
    beside: str | None = flag("model", "another model that answers the same, the dense one for example")
    dtype: str = flag(
        "model", "dtype of weights and compute; auto: the checkpoint's own, or bfloat16 for a .gguf file", "auto", choices=DTYPES
    )
    device: str = flag("model", "where it is computed; auto takes a GPU if there is one", "auto")
    browser: bool = flag("conversation", "a page in the browser, for this machine alone, in place of the terminal", False)
    port: int | None = flag("conversation", "with --browser: where it is served [the first free one from 7860 on]")
    system: str | None = flag("conversation", "what the model is told first, where its chat template has a place for that")
    new_tokens: int = flag("conversation", "tokens of an answer, at most", 256)
    temperature: float = flag("conversation", "0 is greedy", 0.0)
    seed: int = flag("conversation", "seed of what is sampled", 42)

    def __post_init__(self):
        if not self.model:
            raise UserError("name a model: slimllm chat prune_log/NAME")
        check_choices(self)
        check_range(self, "new_tokens", 1)
        check_range(self, "port", 1, 65535)
        if self.browser and importlib.util.find_spec("gradio") is None:
            raise UserError("--browser: the page needs gradio, which is not installed; pip install gradio")
        check_range(self, "temperature", 0)
