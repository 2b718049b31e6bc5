"""Saves a pruned model as an ordinary Hugging Face folder, loads it again, and proves that it is the same model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..errors import UserError
from ..utils.memory import return_free_memory
from . import gguf_tokenizer

REFERENCE = "reference.safetensors"  # beside each checkpoint: what its model gave in memory


class Tensors:
    """The weights of a checkpoint folder, read one at a time: ``names`` in the order of the file, ``shape(name)``, ``[name]``.

    Raises UserError for a folder without safetensors files, or with a broken one.
    """

    def __init__(self, folder: str | os.PathLike):
        self._at = {}
        for path in sorted(Path(folder).glob("model*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: the file is broken ({error}); copy or save it again") from None
            self._at |= dict.fromkeys(file.keys(), file)
        if not self._at:
            raise UserError(f"{folder}: it has no model*.safetensors")

    @property
    def names(self) -> list[str]:
        return list(self._at)

    def shape(self, name: str) -> list[int]:
        return self._at[name].get_slice(name).get_shape()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._at[name].get_tensor(name)


def load(folder: str | os.PathLike, dtype: torch.dtype | str = "auto", **kwargs):
    """The model of a checkpoint folder, through the class registered by ``import slimllm``."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


def reload_and_compare(model, folder: str | os.PathLike):
    """The model loaded again from ``folder``, after it was compared with what :func:`save` wrote of ``model``'s outputs.

    ``model`` loses its weights on the way, so that the two are never in memory together.
    Raises RuntimeError where they differ by more than :func:`tolerance`.
    """
    dtype = model.dtype
    model.to("meta")
    return_free_memory()
    reloaded = load(folder, dtype)
    difference, limit = compare_with_reference(reloaded, folder)
    if not difference <= limit:
        raise RuntimeError(f"the checkpoint does not load as the model that was saved: logits differ by {difference:.3g}")
    return reloaded


def tolerance(dtype: torch.dtype) -> float:
    """How much two runs of one model may differ, as a share of the largest logit.

    Kernels may choose another order of sums for memory that is aligned differently: 10^-5, or for half precision 10^-2.
    """
    return 1e-5 if dtype == torch.float32 else 1e-2


def log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p(ids[:, t] | before) in nats, [samples, length - 1], from logits [samples, length, vocabulary] of ids [samples, length]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def _outputs(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log-probability of each next token, and the logits after the last: what tells one model from another in few bytes."""
    logits = model(ids.to(model.device), use_cache=False).logits.float().cpu()
    return {"log_probabilities": log_probabilities(logits, ids), "last_logits": logits[:, -1].clone()}


def compare_with_reference(model, folder: str | os.PathLike) -> tuple[float, float]:
    """(largest difference, how much is allowed) between ``model``'s outputs and those that the saved model gave in memory.

    Raises UserError for a folder without :data:`REFERENCE`.
    """
    try:
        reference = load_file(Path(folder) / REFERENCE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable {REFERENCE} ({error}); checkpoints of hf_prune.py and post_training.py have one") from None
    found = _outputs(model, reference["ids"])
    difference = max(float((found[name] - reference[name]).abs().max()) for name in found)
    return difference, tolerance(model.dtype) * float(reference["last_logits"].abs().max())


def save(model, tokenizer, folder: Path, ids: torch.Tensor, base_model: str) -> None:
    """Writes a checkpoint: weights (safetensors, sharded when large), config, modeling file, generation config, tokenizer.

    Besides, for :func:`compare_with_reference`, what the model in memory gives for ``ids`` [samples, length], and the tokenizer
    metadata of ``base_model`` where that is a .gguf file (or came from one).
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf_tokenizer.carry(base_model, folder)
    save_file({"ids": ids.contiguous(), **_outputs(model, ids)}, folder / REFERENCE)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():  # vLLM would take every .safetensors file in the folder for weights
        (weights,) = folder.glob("model*.safetensors")
        names = dict.fromkeys(Tensors(folder).names, weights.name)
        index.write_text(json.dumps({"metadata": {"total_size": weights.stat().st_size}, "weight_map": names}, indent=1) + "\n")
    if hasattr(model.config, "block_configs"):  # transformers goes by auto_map, vLLM by this
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"architectures": ["DeciLMForCausalLM"]}, indent=2) + "\n")
