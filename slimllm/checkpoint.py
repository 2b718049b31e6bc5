"""Saves a pruned model as an ordinary Hugging Face folder, loads it again, and proves that it is the same model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from . import gguf_tokenizer
from .cli import UserError
from .families import base_family_of, irregular, limits_of, shape_of
from .modeling import SLIM_MODELS
from .record import return_free_memory, writing

REFERENCE = "reference.safetensors"  # beside each checkpoint: what its model gave in memory
PER_LAYER_SETTINGS = (
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "intermediate_size_per_layer",
    "o_proj_bias_per_layer",
    "down_proj_bias_per_layer",
)


def in_runtime_form(model, runtime: str = "any"):
    """Turns a sliced model (in place) into the class and config that ``--runtime`` asks for. No weight is copied.

    ``transformers`` and models that must be regular elsewhere: the family's own class. ``vllm``: ours, with the entries
    that DeciLMForCausalLM reads. Otherwise ours. Raises UserError for a model whose layers are not alike enough.
    """
    family = base_family_of(model.config)
    limits = limits_of(runtime, shape_of(model.config, family))
    if limits.same_channels:
        return as_stock_model(model)
    return _as_deci_model(model, family) if limits.same_heads else as_slim_model(model)


def _blocks(model) -> list[tuple]:
    """(attention, feed-forward part) of each layer."""
    family = base_family_of(model.config)
    return [(getattr(layer, family.attention), getattr(layer, family.mlp)) for layer in model.model.layers]


def _widths(model) -> list[tuple[int, int, int]]:
    """(query heads, KV heads, channels) of each layer, from its modules."""
    return [(a.q_proj.out_features // a.head_dim, a.k_proj.out_features // a.head_dim, m.down_proj.in_features) for a, m in _blocks(model)]


def as_slim_model(model):
    """Turns a sliced model (in place) into the class that describes layers of different widths. No weight is copied.

    A model that is not sliced becomes one whose layers happen to be equal.
    """
    slim = SLIM_MODELS[base_family_of(model.config).model_type]
    blocks, widths = _blocks(model), _widths(model)
    config = model.config  # one object, shared by all modules
    config.__class__ = slim.config_class
    config.head_dim = blocks[0][0].head_dim
    config.num_attention_heads_per_layer, config.num_key_value_heads_per_layer, config.intermediate_size_per_layer = (
        list(column) for column in zip(*widths)
    )
    config.o_proj_bias_per_layer = [a.o_proj.bias is not None for a, _ in blocks]
    config.down_proj_bias_per_layer = [m.down_proj.bias is not None for _, m in blocks]
    model.__class__ = slim
    return model


def as_stock_model(model):
    """Turns a model whose layers all have one width (in place) into its family's own class.

    Biases that a recovery gave are held by the config's flags, with zeros in the projections that have none.
    Raises UserError for layers that differ and for biases or a number of heads that the class does not take.
    """
    config, family, widths = model.config, base_family_of(model.config), _widths(model)
    way = "prune with --runtime transformers"
    if irregular(widths):
        raise UserError(f"{type(model).__name__}: {irregular(widths)}; a stock model needs one width: {way}")
    heads, kv_heads, channels = widths[0]
    if family.heads_divide_hidden and config.hidden_size % heads:
        raise UserError(f"{heads} heads do not divide the hidden size {config.hidden_size}, which {family.model_type} asks for: {way}")
    slim = SLIM_MODELS[family.model_type]
    if isinstance(model, slim):
        for name in PER_LAYER_SETTINGS:
            delattr(config, name)
        config.__dict__.pop("auto_map", None)
        config.__class__, model.__class__ = slim.config_class.__bases__[-1], slim.__bases__[-1]
    config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = heads, kv_heads, channels
    config.head_dim = _blocks(model)[0][0].head_dim
    _fill_biases(model, family, way)
    return model


def _fill_biases(model, family, way: str) -> None:
    """Where an output projection has a bias that the family's class knows by a flag only: sets the flag, and zeros beside it."""
    for index, flag in ((0, family.o_bias), (1, family.mlp_bias)):
        parts = [block[index] for block in _blocks(model)]
        outputs = [part.o_proj if index == 0 else part.down_proj for part in parts]
        if all(output.bias is None for output in outputs) or flag is True:
            continue
        if not isinstance(flag, str):
            raise UserError(f"{family.model_type} has no place for the biases that the recovery gave: {way}")
        setattr(model.config, flag, True)
        for part in parts:
            for linear in part.children():
                if isinstance(linear, nn.Linear) and linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def _as_deci_model(model, family):
    """:func:`as_slim_model`, and what vLLM's DeciLMForCausalLM reads of a config: one number of heads, a block of settings a layer."""
    _fill_biases(model, family, "prune with --runtime vllm")
    config, widths = as_slim_model(model).config, _widths(model)
    heads, kv_heads, _ = widths[0]
    if family.qkv_bias is True:
        config.qkv_bias = True
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.block_configs = [
        {
            "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": heads // kv_heads},
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": channels},
        }
        for _, _, channels in widths
    ]
    return model


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
