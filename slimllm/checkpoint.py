"""Saves a pruned model as an ordinary Hugging Face folder, loads it again, and proves that it is the same model."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from .cli import UserError
from .families import family_of
from .modeling import SLIM_MODELS
from .record import return_free_memory, writing


def as_slim_model(model):
    """Turns a sliced model (in place) into the class that describes layers of different widths. No weight is copied.

    A model that is not sliced becomes one whose layers happen to be equal.
    """
    family = family_of(model.config)
    slim = SLIM_MODELS[family.model_type]
    blocks = [(getattr(layer, family.attention), getattr(layer, family.mlp)) for layer in model.model.layers]
    config = model.config  # one object, shared by all modules
    config.__class__ = slim.config_class
    config.head_dim = blocks[0][0].head_dim
    config.num_attention_heads_per_layer = [a.q_proj.out_features // a.head_dim for a, _ in blocks]
    config.num_key_value_heads_per_layer = [a.k_proj.out_features // a.head_dim for a, _ in blocks]
    config.intermediate_size_per_layer = [m.down_proj.in_features for _, m in blocks]
    config.o_proj_bias_per_layer = [a.o_proj.bias is not None for a, _ in blocks]
    config.down_proj_bias_per_layer = [m.down_proj.bias is not None for _, m in blocks]
    model.__class__ = slim
    return model


def load(folder: str | os.PathLike, dtype: torch.dtype | str = "auto", **kwargs):
    """The model of a checkpoint folder, through the class registered by ``import slimllm``."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


@torch.no_grad()
def reload_and_compare(model, folder: str | os.PathLike, ids: torch.Tensor):
    """The model loaded again from ``folder``, after its logits on ``ids`` [samples, length] were compared with ``model``'s.

    ``model`` loses its weights on the way, so that the two are never in memory together.
    Raises RuntimeError where the logits differ by more than one part in 10^5 of the largest (kernels may choose
    another order of sums for memory that is aligned differently), or for half precision in 10^2.
    """
    dtype, expected = model.dtype, model(ids, use_cache=False).logits.float()
    model.to("meta")
    return_free_memory()
    reloaded = load(folder, dtype)
    difference = float((expected - reloaded(ids, use_cache=False).logits.float()).abs().max())
    if not difference <= (1e-5 if dtype == torch.float32 else 1e-2) * float(expected.abs().max()):
        raise RuntimeError(f"the checkpoint does not load as the model that was saved: logits differ by {difference:.3g}")
    return reloaded


@contextmanager
def staged(target: Path, overwrite: bool, otherwise: str = "choose another name"):
    """A temporary folder beside ``target`` that takes its place when the block ends well, and is removed otherwise.

    Raises UserError where ``target`` exists (without ``overwrite``; ``otherwise`` is the other way out) or cannot be
    written: a full disk, a read-only folder.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: {otherwise}, or replace it with --overwrite")
    staging = None
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
            staging.chmod(0o777 & ~_umask())
            yield staging
            for path in staging.rglob("*"):  # safetensors writes files that only their owner can read
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            _replace(staging, target)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(staging: Path, target: Path) -> None:
    """Moves ``staging`` to ``target``; an existing target is set aside first and put back if the move fails."""
    if not target.exists():
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    old = target.rename(aside / target.name)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save(model, tokenizer, folder: Path) -> None:
    """Writes weights (safetensors, sharded when large), config with auto_map, modeling file, generation config, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
