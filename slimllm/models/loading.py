"""Reads models, configs and tokenizers from folders, .gguf files and the hub; what goes wrong is one line that names the model."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import UserError, first_line
from ..utils.device import evaluation_dtype
from ..utils.memory import return_free_memory
from . import hub
from .families import dense_family_of, family_of


def is_gguf(base_model: str) -> bool:
    return str(base_model).endswith(".gguf")


def own_dtype(base_model: str, config) -> torch.dtype | None:
    """What the weights are stored in, by the model's config; None for a .gguf file, whose weights are dequantized as they are read."""
    return None if is_gguf(base_model) else getattr(config, "dtype", None)


def _source(base_model: str, option_name: str) -> tuple[str, dict]:
    """(folder or hub name, keyword arguments) for from_pretrained. Raises UserError for a path that is no model."""
    if is_gguf(base_model):
        if not os.path.isfile(base_model):
            raise UserError(f"{option_name} {base_model}: no such file")
        folder, name = os.path.split(os.path.abspath(base_model))
        return folder, {"gguf_file": name}
    if os.path.isdir(base_model):
        if not os.path.isfile(os.path.join(base_model, "config.json")):
            raise UserError(f"{option_name} {base_model}: the folder has no config.json")
    elif os.path.exists(base_model):
        raise UserError(f"{option_name} {base_model}: not a model folder, a hub name or a .gguf file")
    elif base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise UserError(f"{option_name} {base_model}: no such folder")
    else:
        hub.reachable()  # without a network, look in the cache at once
    return base_model, {}


def _read(what: str, base_model: str, option_name: str, read):
    """Runs ``read``; what goes wrong inside the libraries becomes one line that names the model."""
    try:
        return read()
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{option_name} {base_model}: a safetensors file is broken ({error}); copy or download it again") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        if "gated repo" in str(error):
            raise UserError(
                f"{option_name} {base_model}: the model is gated; accept its terms on its page of the hub, then log in with: hf auth login"
            ) from None
        raise UserError(f"{option_name} {base_model}: cannot read the {what}: {first_line(error)}") from None


def load_config(base_model: str, option_name: str = "--base_model", pruned: bool = False):
    """The model's transformers config; ``option_name`` is what errors name it by.

    Raises UserError for a missing, unsupported or quantized model, and for one that is pruned already unless ``pruned`` allows it.
    """
    source, kwargs = _source(base_model, option_name)
    config = _read("config", base_model, option_name, lambda: AutoConfig.from_pretrained(source, **kwargs))
    (family_of if pruned else dense_family_of)(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not kwargs:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise UserError(
            f"{option_name} {base_model}: its weights are quantized ({settings.get('quant_method', 'unknown method')}); "
            "name the unquantized model it was made from"
        )
    return config


def load_tokenizer(base_model: str, option_name: str = "--base_model"):
    source, kwargs = _source(base_model, option_name)
    return _read("tokenizer", base_model, option_name, lambda: AutoTokenizer.from_pretrained(source, **kwargs))


def load_model(base_model: str, dtype: torch.dtype | str, option_name: str = "--base_model"):
    """The model, dense or pruned, in ``dtype`` ("auto": its own) on the CPU.

    Raises UserError where weights are missing, broken, of another shape than the config says, or unsupported; ``option_name`` is
    what it names the model by.
    """
    source, kwargs = _source(base_model, option_name)
    if not kwargs:  # a .gguf file's config takes seconds to read
        load_config(base_model, option_name, pruned=True)

    def read():
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if info["mismatched_keys"]:
            name, found, wanted = min(info["mismatched_keys"])
            more = f", and {len(info['mismatched_keys']) - 1} more" if len(info["mismatched_keys"]) > 1 else ""
            raise UserError(
                f"{option_name} {base_model}: {name} is {list(found)} in the weights and {list(wanted)} by config.json{more}; "
                "the two do not belong together"
            )
        if info["missing_keys"]:
            raise UserError(
                f"{option_name} {base_model}: {len(info['missing_keys'])} weights are missing, the first {min(info['missing_keys'])}"
            )
        return model

    # transformers lists missing weights in a table of its own; the one line above says it
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    model = _read("weights", base_model, option_name, read).eval()
    if getattr(model.config, "quantization_config", None) is not None:
        # a .gguf file's weights are dequantized as they are read; only the labels remain, and they forbid saving
        del model.config.quantization_config
        for label in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(label, None)
    return model


@contextmanager
def placed_for_evaluation(model, device: torch.device):
    """The model with its weights on ``device`` in the dtype that evaluation uses; afterwards they are as before.

    Only parameters are cast: position frequencies stay float32, as from_pretrained leaves them.
    """
    dtype = evaluation_dtype(model.dtype, device)
    originals = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device=device, dtype=dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device=device)
        yield model
    finally:
        for tensor, data in originals:
            tensor.data = data
        return_free_memory()
