"""How samples are drawn."""

from __future__ import annotations

from dataclasses import dataclass

HUB = "hub:"  # what the name of any data set of the hub begins with


def is_sample_file(source: str | None) -> bool:
    """Whether ``--calibration`` names a file of samples, rather than text to draw them from."""
    return source is not None and source.endswith(".safetensors") and not source.startswith(HUB)


@dataclass(frozen=True)
class SampleSpec:
    """How many samples of how many tokens are drawn, and the seed of every random choice. ``or_fewer``: a short text gives what it has.

    ``chat_share``: of the samples that the model writes, how many it writes as conversations.
    """

    num_examples: int = 32
    seq_len: int = 128
    seed: int = 42
    or_fewer: bool = False
    chat_share: float = 0.0
