"""A model of a config without its weights: what its modules are called, and how large they are."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from operator import attrgetter

import torch
from torch import nn

from .adapter import part_of
from .families import PRUNED, Family, PartRow, family_of
from .parts import Cache, Counted, ExpertsShape, value_in_layer
from .shape import ALL_HEADS_CACHED, cached_window


def skeleton_of(config, dtype: torch.dtype):
    """The model of a config, without its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    skeleton.tie_weights()
    return skeleton


def whole_skeleton_of(config):
    """The model of text and more of a config, without its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForMultimodalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForMultimodalLM.from_config(config, trust_remote_code=False).eval()


def counted(config, family: Family) -> tuple[Counted, ...]:
    """What the modules of each layer say, where the config alone does not say it: of hybrids and mixtures of experts."""
    return _counted(_settings_of(config), family)


def in_float32(config, dtype: torch.dtype) -> frozenset[str]:
    """The names of the tensors that stay in float32 where a model of this config is in ``dtype``, by the rule of transformers: what its
    class makes in float32, or names. Some mixtures keep their routers so.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not family_of(config).is_mixture:
        return frozenset()
    return _in_float32(_settings_of(config), dtype)


def _settings_of(config) -> str:
    """The settings of the dense model of a config, as text, by which what is found of its skeleton is kept."""
    settings = config.to_dict() | {"model_type": config.model_type.removeprefix(PRUNED)}
    if config.model_type.startswith(PRUNED):
        settings.pop("per_layer_config", None)
    return json.dumps(settings, sort_keys=True, default=str)


def _stock_config(settings: str):
    from transformers import AutoConfig

    settings = {name: value for name, value in json.loads(settings).items() if not name.endswith("_per_layer")}
    for name in ("dtype", "auto_map"):
        settings.pop(name, None)
    return AutoConfig.for_model(**settings)


@functools.lru_cache(maxsize=8)
def _counted(settings: str, family: Family) -> tuple[Counted, ...]:
    config = _stock_config(settings)
    skeleton = skeleton_of(config, torch.float32)
    layers = getattr(getattr(skeleton, family.decoder), family.layers)
    return tuple(_of_layer(layer, index, config, family) for index, layer in enumerate(layers))


@functools.lru_cache(maxsize=8)
def _in_float32(settings: str, dtype: torch.dtype) -> frozenset[str]:
    skeleton = skeleton_of(_stock_config(settings), dtype)
    named = [*skeleton._keep_in_fp32_modules_strict, *(skeleton._keep_in_fp32_modules if dtype == torch.float16 else [])]
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in named]
    tensors = [*skeleton.named_parameters(), *skeleton.named_buffers()]
    return frozenset(name for name, own in tensors if own.dtype == torch.float32 or any(pattern.search(name) for pattern in patterns))


def _of_layer(layer: nn.Module, index: int, config, family: Family) -> Counted:
    rows = [row for row in family.parts if row.is_in(layer)]
    cut = {name for row in rows for name in (row.module, *(row.inputs if row.beside else ()))}
    mixers = [row for step in family.steps for row in step if row.kind == "mixer" and row.is_in(layer)]
    mixers = [row for row in mixers if isinstance(getattr(layer, row.module), nn.Module)]  # one may be a number
    caches = [_cache_of(layer, row, config, family) for row in mixers]
    window = cached_window(config, family, index)
    kept = None if None in caches else tuple(replace(cache, window=window) for cache in caches)
    uncut = sum(p.numel() for name, p in layer.named_parameters() if name.partition(".")[0] not in cut)
    matrices = _matrices([module for name, module in layer.named_modules() if name.partition(".")[0] not in cut])
    experts = next((row for row in rows if row.kind == "experts"), None)
    return Counted(uncut, matrices, tuple(rows), kept, experts and _experts(layer, index, config, experts))


def _cache_of(layer: nn.Module, row: PartRow, config, family: Family) -> Cache | None:
    """What a part that is never cut keeps of a text; None where its row does not say it and it is of no known form.

    Linear attention, state spaces and convolutions keep the last inputs of their convolution, and all but the last of these a state.
    """
    module = getattr(layer, row.module)
    convolution = next((one for one in module.children() if isinstance(one, nn.Conv1d)), None)
    if convolution is None and not row.kept:
        return None
    numbers = state = last = 0
    for place in row.kept:
        holder, _, name = place.rpartition(".")
        if (owner := attrgetter(holder)(layer)) is None:
            continue
        projection = getattr(owner, name, None)
        last = last if projection is None else projection.out_features
        numbers += last
    if family.gguf in ALL_HEADS_CACHED:
        numbers = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    if convolution is not None:
        state = convolution.in_channels * (convolution.kernel_size[0] - 1)
    if hasattr(module, "ssm_state_size"):
        state += module.intermediate_size * module.ssm_state_size
    elif hasattr(module, "head_k_dim"):
        state += module.num_v_heads * module.head_k_dim * module.head_v_dim
    elif convolution is not None and hasattr(module, "num_heads"):
        state += module.num_heads * module.head_dim**2
    return Cache(numbers, state=state)


def _matrices(modules: list[nn.Module]) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of those that files hold in the type that is asked for: of Linear modules, where these are no single row."""
    return tuple(tuple(module.weight.shape) for module in modules if isinstance(module, nn.Linear) and module.out_features > 1)


def _experts(layer: nn.Module, index: int, config, row: PartRow) -> ExpertsShape:
    part = part_of(row, layer, 0, 1.0)
    count, channels = part.units.values()
    inside, outside = list(part.experts.modules()), []
    numbers = {"expert": 0, "router": 0, "fixed": 0}
    for module, name, tensor, axis in part.tensors():
        if isinstance(tensor, nn.Parameter):
            what = "fixed" if axis is None else "expert" if any(module is one for one in inside) else "router"
            numbers[what] += tensor.numel() if axis is None else tensor.numel() // count
            if what == "fixed" and name == "weight":
                outside.append(module)
    _, *sides = getattr(part.experts, row.stacked[0]).shape
    rows, width = reversed(sides) if row.transposed else sides
    numbers |= {"width": width, "inputs": rows // channels, "fixed_matrices": _matrices(outside)}
    groups = {} if row.groups is None else dict(zip(("groups", "top_groups"), (getattr(config, name) or 1 for name in row.groups)))
    numbers |= {"channel": part.channel_parameters, "channels_fixed": len(row.sizes) == 1, "fits": row.fits}
    return ExpertsShape(config.hidden_size, count, channels, value_in_layer(config, row.top_k, index), **numbers, **groups)
