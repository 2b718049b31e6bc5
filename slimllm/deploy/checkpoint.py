"""Saves a pruned model as an ordinary Hugging Face folder, and writes beside it what shows that it loads as the same model."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..models.skeleton import in_float32
from ..models.source import ModelSource, stored_tensors
from ..models.weights import round_to
from ..streaming.runner import LayerRunner
from . import gguf_tokenizer
from .config_files import complete_config, complete_tokenizer_config
from .reference import write_reference
from .weight_files import WeightFiles


def load(folder: str | os.PathLike, dtype: torch.dtype | str = "auto", **kwargs):
    """The model of a checkpoint folder, through the class registered by ``import slimllm``."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **kwargs).eval()


def round_module(module: nn.Module, dtype: torch.dtype, exact: frozenset[str], prefix: str = "") -> None:
    """Gives what a checkpoint holds of ``module``, in place, the values that ``dtype`` can hold, but for the tensors named in ``exact``."""
    for name, tensor in stored_tensors(module).items():
        if tensor.is_floating_point() and prefix + name not in exact:
            round_to(dtype, tensor.data, prefix + name)


@torch.no_grad()
def save(model, tokenizer, folder: Path, ids: torch.Tensor, base_model: str, dtype: torch.dtype | None = None) -> None:
    """Writes a checkpoint of a model in memory: weights (safetensors, sharded when large) and what stands beside them.

    Besides, for :func:`compare_with_reference`, what the model in memory gives for ``ids`` [samples, length]; where ``dtype`` is another
    than the model's, what it gives with weights of that dtype.
    """
    if dtype not in (None, model.dtype):
        model = copy.deepcopy(model)
        round_module(model, dtype, in_float32(model.config, dtype))
    write_config(model, folder, dtype)
    files = WeightFiles.of(folder, model, dtype)
    for name, tensor in stored_tensors(model).items():
        files.write(name, tensor)
    files.close()
    write_tokenizer(tokenizer, folder, base_model, model.config)
    runner = LayerRunner(model, ids, ModelSource.of(model).home, split=False)
    write_reference(folder, runner, runner.last_states())


def write_tokenizer(tokenizer, folder: Path, base_model: str, config, kept: list[int] | None = None) -> None:
    """Writes the tokenizer of a model with this config, where there is one, and the tokenizer metadata of ``base_model`` if that is a
    .gguf file (or came from one), of its tokens those that were ``kept``.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        complete_tokenizer_config(folder, config.max_position_embeddings)
    gguf_tokenizer.carry(base_model, folder, kept)


def write_config(model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Config, modeling file and generation config of a model that may be without weights. Before the weights: it clears older ones."""
    before = model.config.dtype
    model.save_pretrained(folder, state_dict={}, save_original_format=False)
    model.config.dtype = before  # which transformers leaves as a name
    complete_config(folder, model.config, dtype or model.dtype)
