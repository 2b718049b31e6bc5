"""Checks of a model in memory that people hand in: what cannot be pruned is refused by name, before anything is done to it."""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import UserError
from ..utils.device import name_of
from .checked import check_config
from .families import family_of
from .skeleton import in_float32, skeleton_of
from .source import all_finite, stored_tensors

_AGAIN = "load it again with from_pretrained"


def check_model(model) -> transformers.PreTrainedModel:
    """The causal LM that ``model`` is, or that torch.compile, DataParallel or DistributedDataParallel is wrapped around.

    Raises UserError where it is something else, or one whose weights are not those that its config describes: an adapter on it,
    quantized, not in memory, on several devices, of several dtypes, without a head, with numbers that are not finite.
    """
    if isinstance(model, str | os.PathLike):
        raise UserError(f"model: {os.fspath(model)!r} is a name; give the model, as from_pretrained does, or name it to hf_prune.py")
    while (inner := _wrapped(model)) is not None:
        model = inner
    _check_kind(model)
    family_of(model.config).settle(model.config)
    _check_place(model)
    _check_weights(model)
    check_config(model.config, "model: its config")
    _check_against_config(model)
    for name, tensor in stored_tensors(model).items():
        if tensor.is_floating_point() and not all_finite(tensor):
            large = tensor.dtype == torch.float16 and not tensor.isnan().any()
            way = "they are too large for float16: load it in bfloat16 or float32" if large else "load or train it again"
            raise UserError(f"model: some of the numbers of {name} are not finite; {way}")
    return model


@contextmanager
def in_eval_mode(model: nn.Module):
    """The model with dropout and the like switched off; afterwards each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def _wrapped(model) -> nn.Module | None:
    """What a wrapper that computes the same is wrapped around; None for anything else."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return model.module
    return getattr(model, "_orig_mod", None) if isinstance(model, nn.Module) else None  # torch.compile's


def _is_peft(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _check_kind(model) -> None:
    """Raises UserError for what is no causal LM of transformers, or one with an adapter."""
    if isinstance(model, nn.Module) and any(map(_is_peft, model.modules())):
        raise UserError("model: an adapter of peft is on it; merge it into the weights first (merge_and_unload)")
    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(f"model: a {type(model).__name__}, not a causal LM of transformers (AutoModelForCausalLM.from_pretrained)")
    family = family_of(model.config)
    if not all(hasattr(model, name) for name in (family.head, family.decoder.partition(".")[0])):
        raise UserError(f"model: a {type(model).__name__} has no output head ({family.head}); load it with AutoModelForCausalLM")


def _check_place(model) -> None:
    """Raises UserError where the weights are not all in memory, on one device."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UserError(f"model: accelerate moves its weights as they are needed (device_map); {_AGAIN} without device_map")
    devices = sorted({str(tensor.device) for tensor in stored_tensors(model).values()})
    if "meta" in devices:
        raise UserError(f"model: some of its weights are on the meta device, where nothing is kept; {_AGAIN}")
    if len(devices) > 1:
        raise UserError(f"model: its weights are on {' and '.join(devices)}; move it to one of them (model.to)")


def _check_weights(model) -> None:
    """Raises UserError where the weights are not plain numbers of one dtype."""
    way = f"{_AGAIN} without quantization_config"
    stored = getattr(model.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if getattr(model, "is_quantized", False) or (stored is not None and method != "gguf"):  # those of a .gguf file are dequantized
        raise UserError(f"model: its weights are quantized; {way}, from the unquantized model it was made from")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise UserError(f"model: {name} is a {kind}, not a plain Linear, as in quantized models; {way}")
    parameters = dict(model.named_parameters())
    for name, tensor in parameters.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise UserError(f"model: {name} is {name_of(tensor.dtype)}, as in quantized models; {way}")
        if type(tensor) is not nn.Parameter:
            raise UserError(f"model: {name} is a {type(tensor).__name__}, not a plain parameter; {_AGAIN}")
    exact = in_float32(model.config, model.dtype)
    dtypes = sorted({name_of(tensor.dtype) for name, tensor in parameters.items() if name not in exact})
    if len(dtypes) > 1:
        raise UserError(f"model: its weights are {' and '.join(dtypes)}; {_AGAIN} in one dtype (dtype=torch.{dtypes[0]})")


def _check_against_config(model) -> None:
    """Raises UserError where the tensors are not those that transformers makes for the config: layers taken out, widths changed."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # an implementation that needs a GPU would refuse a skeleton
    expected, actual = (
        {name: list(tensor.shape) for name, tensor in stored_tensors(one).items()} for one in (skeleton_of(config, model.dtype), model)
    )
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            by_config, in_model = (f"{shapes[name]}" if name in shapes else "none" for shapes in (expected, actual))
            raise UserError(f"model: {name} is {in_model} in the model and {by_config} by its config; {_AGAIN}, and prune that")
