"""How many bytes numbers take on their way through a run: what each stage's estimate of its memory is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.shape import LayerShape
from .runner import MIN_ACTIVATION_BYTES


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number in the model's files, in computation, in evaluation and in the checkpoint; how many tokens a process works on.

    ``generates``: whether the model is needed whole, for text of its own; ``may_generate``: whether it would be, if it fits in what is
    ``free`` where it is evaluated; ``answers``: if it is small, too. ``room``: bytes of activations that may stay in memory, besides
    what a layer takes.
    """

    stored: int
    compute: int
    evaluation: int
    saved: int
    tokens: int
    evaluated_tokens: int = 0
    generates: bool = False
    may_generate: bool = False
    answers: bool = False
    free: int = 0
    room: int = 0
    gguf: bool = False
    on_gpu: bool = False

    def kept_in_memory(self, layer_bytes: int, activation_bytes: int) -> int:
        """Bytes of so many of activations that stay in memory, while a layer takes ``layer_bytes`` (LayerRunner)."""
        return min(max(MIN_ACTIVATION_BYTES, layer_bytes, self.room), activation_bytes)


def widest(layer: LayerShape) -> int:
    """The most inputs that an output projection of a layer has."""
    return max((part.output_inputs() for part in layer.parts), default=0)


@dataclass(frozen=True)
class Footprint:
    """Bytes: the peak of the process's memory and of the GPU's, of what lies in ``--tmp_dir``, of the checkpoint, and of what lies beside
    it until the run ends, for ``--resume``.
    """

    host: int
    device: int
    temporary: int
    result: int
    beside: int = 0
