"""What a dense model predicts on rows of text, computed once and kept in few bytes: for a smaller model to learn from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..models.source import ModelSource
from ..streaming.activations import ActivationMemory, ActivationStore
from ..streaming.progress import Progress, no_progress
from ..streaming.runner import MIN_ACTIVATION_BYTES, LayerRunner
from ..utils import processes
from ..utils.device import distillation_dtype, resolved
from ..utils.memory import activation_room

GROUPS = 4  # of rows of similar length; the model's files are read once for each


class Teacher:
    """A dense model's last states after the final norm, one store item per row of tokens; its predictions follow from them.

    ``rows``: token ids [rows, length], or lists of ids of different lengths. Those of similar length run together, so the padding
    of shorter ones (behind their end, where none of their tokens attends) costs little. Of several processes each keeps its share of rows
    of one length: those whose number is its rank modulo the number of processes.
    """

    @torch.no_grad()
    def __init__(self, source, rows, device="cpu", progress: Progress = no_progress, tmp_dir: str | None = None):
        self.source, self.device, self.total = ModelSource.of(source), resolved(device), len(rows)
        self.dtype = distillation_dtype(self.source.dtype, self.device)
        self.states = ActivationStore(ActivationMemory(activation_room(self.device, MIN_ACTIVATION_BYTES), tmp_dir))
        self._at, self._head = {}, None
        norm = self.source.final_norm(self.device, self.dtype)
        for numbers, padded in _in_groups(rows):
            runner = LayerRunner(self.source, padded, self.device, progress, self.dtype, tmp_dir)
            self.ids = runner.ids
            hidden = runner.last_states("the dense model's states")
            lengths = iter([len(rows[number]) for number in numbers][: len(runner.ids)])
            for states, length in ((states, next(lengths)) for batch in hidden for states in norm(batch)):
                self.states.append(states if length == padded.shape[1] else states[:length].clone())
            hidden.close()
            self._at |= {number: len(self._at) + place for place, number in enumerate(numbers)}

    @property
    def shared(self) -> bool:
        """Whether each process has some of the rows, rather than all of them, as where there are fewer than processes."""
        return len(self.ids) < self.total

    def local_rows(self, numbers: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """Where the rows with the given ``numbers`` are among those of the process ``rank``, by default this one; others are left out."""
        count = processes.count() if self.shared else 1
        return numbers[numbers % count == (processes.rank() if rank is None else rank) % count] // count

    @torch.no_grad()
    def log_probabilities(self, row: int) -> torch.Tensor:
        """log p [tokens, V] of the token after each one of a row, by the dense model's own output head."""
        if self._head is None:
            self._head = self.source.head(self.device, self.dtype)
        return self.source.adapter.logits(self._head, self.states[self._at[row]]).log_softmax(-1)

    def close(self) -> None:
        """Forgets the states."""
        self.states.close()


def _in_groups(rows) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(numbers of some rows, their token ids [rows, length] padded at the end), those of similar length together."""
    if isinstance(rows, torch.Tensor):
        yield list(range(len(rows))), rows
        return
    order = torch.tensor(sorted(range(len(rows)), key=lambda i: len(rows[i])))
    for group in order.tensor_split(GROUPS):
        if len(group):
            length = len(rows[group[-1]])
            yield group.tolist(), torch.tensor([rows[i] + [0] * (length - len(rows[i])) for i in group.tolist()])
