"""Whether a model that was read again is the one that was saved: its outputs in memory, kept beside it, and the comparison."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from ..models.loading import open_source
from ..models.source import ModelSource
from ..streaming.activations import ActivationStore
from ..streaming.runner import LayerRunner
from ..utils.device import name_of

REFERENCE = "reference.safetensors"  # beside each checkpoint: what its model gave in memory


def reload_and_compare(folder: str | os.PathLike, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Reads the model in ``folder`` again, layer by layer, and compares it with what was written of its outputs in memory.

    Raises RuntimeError where they differ by more than :func:`tolerance`.
    """
    difference, limit = compare_with_reference(open_source(str(folder), dtype, "DIR"), folder, device)
    if not agrees(difference, limit):
        raise RuntimeError(f"the checkpoint does not load as the model that was saved: logits differ by {difference:.3g}")


def agrees(difference: float, limit: float) -> bool:
    """Whether a difference is allowed; where one of the two is no finite number, it proves nothing and is not."""
    return math.isfinite(difference) and math.isfinite(limit) and difference <= limit


def tolerance(dtype: torch.dtype, same_device: bool = True) -> float:
    """How much two runs of one model may differ, as a share of the largest logit.

    Kernels may choose another order of sums for memory that is aligned differently: 10^-5, or for half precision 10^-2; those of another
    kind of device do, and ten times as much is allowed.
    """
    return (1e-5 if dtype == torch.float32 else 1e-2) * (1 if same_device else 10)


def log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p(ids[:, t] | before) in nats, [samples, length - 1], from logits [samples, length, vocabulary] of ids [samples, length]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def _outputs(runner: LayerRunner, states: ActivationStore) -> dict[str, torch.Tensor]:
    """Log-probability of each next token, and the logits after the last: what tells one model from another in few bytes.

    ``states``: of the runner's token ids, after the last layer.
    """
    norm, head = runner.output_modules()
    rows = torch.cat(list(states))
    return _of_logits(runner.ids, (runner.adapter.logits(head, norm(row)) for row in rows))


def _of_logits(samples: torch.Tensor, logits_of: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those outputs for ``samples`` [samples, length], from each one's logits [length, vocabulary]."""
    outputs = {"log_probabilities": [], "last_logits": []}
    for ids, logits in zip(samples, logits_of):
        logits = logits.cpu()
        outputs["log_probabilities"].append(log_probabilities(logits[None], ids[None])[0])
        outputs["last_logits"].append(logits[-1])
    return {name: torch.stack(values) for name, values in outputs.items()}


def _reference(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], str, str]:
    """(what stands in :data:`REFERENCE`, the dtype and the kind of device that it was computed in and on).

    The dtype of older ones is "auto", that of the weights. Raises UserError for a folder without it.
    """
    try:
        with safe_open(Path(folder) / REFERENCE, "pt") as file:
            dtype, _, device = (file.metadata() or {}).get("computed", "auto on cpu").partition(" on ")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        (samples, length), (rows, vocabulary) = tensors["ids"].shape, tensors["last_logits"].shape
        if rows != samples or tensors["log_probabilities"].shape != (samples, length - 1) or not tensors["ids"].numel():
            raise ValueError("its shapes do not belong together")
        if not 0 <= int(tensors["ids"].min()) <= int(tensors["ids"].max()) < vocabulary:
            raise ValueError("its token ids are outside its vocabulary")
        return tensors, dtype, device
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable {REFERENCE} ({error}); checkpoints of hf_prune.py and post_training.py have one") from None


@torch.no_grad()
def compare_with_reference(model, folder: str | os.PathLike, device: torch.device | str | None = None) -> tuple[float, float]:
    """(largest difference, how much is allowed) between ``model``'s outputs and those that the saved model gave in memory.

    ``model`` may be a ModelSource; it is computed on ``device``, by default where it is. Raises UserError for a folder without
    :data:`REFERENCE`.
    """
    (reference, _, computed_on), source = _reference(folder), ModelSource.of(model)
    if reference["last_logits"].shape[1] != source.config.vocab_size:
        raise UserError(f"{folder}: {REFERENCE} is of a model with another vocabulary; restore the folder, or write it again")
    runner = LayerRunner(source, reference["ids"], device or source.home, split=False)
    outputs = _outputs(runner, runner.last_states())
    return _difference(outputs, reference, tolerance(runner.dtype, computed_on == runner.device.type))


@torch.no_grad()
def compare_stock_with_reference(model, folder: str | os.PathLike) -> tuple[float, float]:
    """:func:`compare_with_reference` of a model of any class of transformers, whole in the machine's memory."""
    reference, _, computed_on = _reference(folder)
    ids = reference["ids"]
    outputs = _of_logits(ids, (model(input_ids=row[None], use_cache=False).logits[0].float() for row in ids))
    return _difference(outputs, reference, tolerance(model.dtype, computed_on == "cpu"))


def _difference(outputs: dict, reference: dict, share: float) -> tuple[float, float]:
    difference = float(torch.stack([(outputs[name] - reference[name]).abs().max() for name in outputs]).max())  # not a number stays none
    return difference, share * float(reference["last_logits"].abs().max())


def covered_rows(source: ModelSource, folder: str | os.PathLike) -> tuple[int, int]:
    """(how many rows of the embeddings the outputs in :data:`REFERENCE` follow from, how many there are)."""
    embeddings, head = source.model.get_input_embeddings().weight, source.adapter.head(source.model).weight
    rows = len(embeddings)
    if embeddings is head:
        return rows, rows  # each is a row of the output head
    return len(_reference(folder)[0]["ids"].unique()), rows


def reference_dtype(folder: str | os.PathLike) -> torch.dtype | str:
    """What the outputs in ``folder`` were computed in, which a comparison has to do too; "auto" is what its weights are saved in."""
    named = _reference(folder)[1]
    return named if named == "auto" else getattr(torch, named)


def write_reference(folder: Path, runner: LayerRunner, states: ActivationStore) -> None:
    """What the model in memory gives for the runner's token ids; ``states``: of these, after the last layer."""
    tensors = {"ids": runner.ids.contiguous(), **_outputs(runner, states)}
    how = f"{name_of(runner.dtype)} on {runner.device.type}"
    save_file(tensors, folder / REFERENCE, {"computed": how})  # one entry: several would come in any order
