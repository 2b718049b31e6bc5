"""Checks of a config.json: values that would end in a traceback further on, or in a model that makes no sense, are named here."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from transformers.activations import ACT2FN

from ..errors import UserError, nearest
from ..modeling import MISSING
from .families import family_of, is_pruned
from .parts import is_in_layer, is_missing

log = logging.getLogger("slimllm")

MOST_LAYERS = 10_000
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
_FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings")
_WEIGHTS = (".safetensors", ".safetensors.index.json")  # what transformers takes by a name of its own
_LAYER_TYPES = (
    *("full_attention", "sliding_attention", "indexed_attention", "minimax_m3_sparse", "linear_attention", "conv", "hybrid", "moe", "mlp"),
)

_ROPE_NUMBERS = (
    *("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "alpha", "llama_4_scaling_beta"),
)
_ROPE_LISTS = ("short_factor", "long_factor")
_ROPE_FLAGS = ("truncate", "mrope_interleaved")


def check_config(config, where: str) -> None:
    """Raises UserError, naming ``where``, for a value of a wrong type, one that is impossible, or two that contradict each other."""
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        value = getattr(config, name, None)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if name == "sliding_window" and value == 0 and not getattr(config, "use_sliding_window", True):
            continue  # as some families write that there is none
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {name} is {value!r}, not a whole number of at least 1")
    for name in _FLAGS:
        if not isinstance(value := getattr(config, name, False), bool):
            raise UserError(f"{where}: {name} is {value!r}, neither true nor false")
    named = isinstance(config.dtype, str) and isinstance(getattr(torch, config.dtype, None), torch.dtype)  # as save_pretrained leaves it
    if not named and not isinstance(config.dtype, torch.dtype | None):
        raise UserError(f"{where}: dtype is {config.dtype!r}, which torch does not know")
    if config.num_hidden_layers > MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {config.num_hidden_layers}, which no model has")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % kv_heads:
        raise UserError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise UserError(
            f"{where}: hidden_size {config.hidden_size} is no multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and (not isinstance(pad, int) or not -config.vocab_size <= pad < config.vocab_size):
        raise UserError(f"{where}: pad_token_id is {pad!r}, and the vocabulary has {config.vocab_size} tokens")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")  # where it names none, it has one
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise UserError(f"{where}: hidden_act is {activation!r}, which transformers does not know{nearest(str(activation), ACT2FN)}")
    _check_layer_types(config, where)
    _check_rope(config, where)
    family, layers = family_of(config), range(config.num_hidden_layers)
    attention = [row for row in family.parts if row.kind == "attention"]
    if family.is_hybrid and attention and not any(is_in_layer(config, row, index) for row in attention for index in layers):
        raise UserError(f"{where}: layer_types: none of its layers has attention, and transformers generates with no such model")
    if is_pruned(config):
        _check_per_layer(config, where)
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not (isinstance(weights, str) and weights == Path(weights).name and weights.endswith(_WEIGHTS)):
        raise UserError(f"{where}: transformers_weights is {weights!r}, not the name of a file of weights beside it (*.safetensors)")
    name = family_of(config).norm_epsilon
    epsilon = getattr(config, name, 0.0) if isinstance(name, str) else name
    if not _is_size(epsilon):
        raise UserError(f"{where}: {name} is {epsilon!r}, not a number of at least 0")


def _check_per_layer(config, where: str) -> None:
    """The lists with an entry for each layer, by which a pruned model is built."""
    family, layers = family_of(config), range(config.num_hidden_layers)
    modules = {name for row in family.parts for name in (row.module, *row.norms)}
    missing = getattr(config, MISSING, [[]] * len(layers))
    lists = isinstance(missing, list | tuple) and all(isinstance(names, list | tuple) for names in missing)
    if not lists or len(missing) != len(layers) or not modules.issuperset(name for names in missing for name in names):
        raise UserError(f"{where}: {MISSING} is no list of lists, one for each of {len(layers)} layers, of {', '.join(sorted(modules))}")
    for row in family.parts:
        sparse = row.layers is not None or (family.is_mixture and row.kind != "attention")  # not every layer has the part
        biases = () if row.kind == "experts" else ((f"{row.output}_bias_per_layer", bool, False),)
        for name, kind, least in (*((f"{size}_per_layer", int, 1) for size in row.sizes), *biases):
            values = getattr(config, name, None)
            if not isinstance(values, list | tuple) or len(values) != config.num_hidden_layers:
                raise UserError(f"{where}: {name} is no list with an entry for each of {config.num_hidden_layers} layers")
            may_be_none = [sparse or is_missing(config, row, index) for index in layers]
            values = [value for value, none in zip(values, may_be_none) if value is not None or not none]
            if odd := [value for value in values if type(value) is not kind or value < least]:
                raise UserError(
                    f"{where}: {name} holds {odd[0]!r}, not {'true or false' if kind is bool else 'a whole number of at least 1'}"
                )
    heads_per_layer = getattr(config, "num_attention_heads_per_layer", [])
    for index, (heads, kv_heads) in enumerate(zip(heads_per_layer, getattr(config, "num_key_value_heads_per_layer", []))):
        if heads % kv_heads:
            raise UserError(f"{where}: layer {index} has {heads} heads, no multiple of its {kv_heads} KV heads")


def warn_of_length(config, **lengths: int) -> None:
    """One line where ``lengths``, tokens by the names of their options, are beyond what the model was made for."""
    most = config.max_position_embeddings
    if beyond := [f"--{name} {length}" for name, length in lengths.items() if length > most]:
        log.warning("%s: the model was made for at most %d tokens at a time (max_position_embeddings)", " and ".join(beyond), most)


def _check_rope(config, where: str) -> None:
    """The settings of rotary embeddings, of all layers or for each type of them, of which transformers checks the names alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, not the settings of rotary embeddings")
    for settings in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        for name, value in settings.items():
            if value is not None and (expected := _expected_of_rope(name, value)):
                raise UserError(f"{where}: {name} of its rotary embeddings is {value!r}, not {expected}")


def _expected_of_rope(name: str, value) -> str | None:
    """What a setting of rotary embeddings has to be, in words, where ``value`` is no such thing."""
    listed = isinstance(value, list | tuple)
    if name == "mrope_section" and not (listed and len(value) == 3 and all(type(size) is int and size >= 0 for size in value)):
        return "a list of three whole numbers"
    if name in _ROPE_LISTS and not (listed and all(map(_is_size, value))):
        return "a list of numbers"
    if name in _ROPE_NUMBERS and not _is_size(value):
        return "a number of at least 0"
    return "true or false" if name in _ROPE_FLAGS and not isinstance(value, bool) else None


def _is_size(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _check_layer_types(config, where: str) -> None:
    types = getattr(config, "layer_types", None)
    if types is None:
        return
    if not isinstance(types, list | tuple) or len(types) != config.num_hidden_layers:
        shown = f"{len(types)} entries" if isinstance(types, list | tuple) else repr(types)
        raise UserError(f"{where}: layer_types is {shown}, and num_hidden_layers {config.num_hidden_layers}")
    unknown = [kind for kind in types if kind not in _LAYER_TYPES]
    if unknown:
        raise UserError(f"{where}: layer_types holds {unknown[0]!r}; known are {' and '.join(_LAYER_TYPES)}")
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if missing := sorted(set(types) - set(types[: max(0, len(types) - shared)])):
        raise UserError(
            f"{where}: the last {shared} layers (num_kv_shared_layers) read keys and values of earlier ones, and none is of {missing[0]}"
        )
