"""The class and config that a runtime takes a pruned model in."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..modeling import MISSING, missing_modules, per_layer_settings, slim_models
from ..models.adapter import LayerAdapter
from ..models.families import family_of, is_pruned
from ..models.parts import has_bias, value_in_layer
from ..models.shape import alike, irregular, limits_of, shape_of, units_of


def convert_for_runtime(model, runtime: str = "any"):
    """Converts a sliced model (in place) to the class and config that ``--runtime`` asks for. No weight is copied.

    ``transformers``, models that must be regular elsewhere, and mixtures of experts whose layers are alike: the family's own class.
    ``vllm``: ours, with the entries that DeciLMForCausalLM reads. Otherwise ours. Raises UserError for a model whose layers are not alike
    enough.
    """
    if runtime == "any" and _is_stock(model):
        return model
    shape = shape_of(model.config)
    limits = limits_of(runtime, shape)
    alike_now = shape.is_mixture and not irregular(alike(shape, LayerAdapter(model.config).units(model)))
    if limits.same_channels or alike_now:
        return as_stock_model(model)
    return _as_deci_model(model) if limits.same_heads else as_slim_model(model)


def _is_stock(model) -> bool:
    """Whether a model of its family's own class is as its config says: whole layers may have gone, and nothing of those that stay."""
    if is_pruned(model.config):
        return False
    adapter = LayerAdapter(model.config)
    biased = [part.row for part in adapter.projected_parts(model) if part.output.bias is not None]
    foreign = not all(has_bias(model.config, row.output_bias) for row in biased)
    return not foreign and adapter.units(model) == units_of(model.config)


def as_slim_model(model):
    """Converts a sliced model (in place) to the class that describes layers of different widths. No weight is copied.

    A model that is not sliced becomes one whose layers happen to be equal.
    """
    family, adapter = family_of(model.config), LayerAdapter(model.config)
    try:
        classes = slim_models(family.model_type)
    except AttributeError:
        raise UserError(
            f"model_type {family.model_type}: its class is not one of transformers, and no class with widths per layer can be made of it"
        ) from None
    slim = classes["AutoModelForCausalLM"]
    layers = [adapter.parts(layer) for layer in adapter.layers(model)]
    config = model.config  # one object, shared by all modules
    config.__class__, model.__class__ = slim.config_class, slim
    config.head_dim = adapter.head_dim
    config.__dict__.pop("block_configs", None)
    config.__dict__.pop("model_type", None)  # that of the class counts, which some configs read from a file repeat
    widths = [{name: count for part in parts for name, count in zip(part.row.sizes, part.units.values())} for parts in layers]
    for row in family.parts:
        for name in row.sizes:  # a layer without the part is built from the dense model's number
            setattr(config, f"{name}_per_layer", [counts.get(name, value_in_layer(config, name, i)) for i, counts in enumerate(widths)])
        if row.kind == "experts":  # which get no biases
            continue
        own = [next((part for part in parts if part.kind == row.kind), None) for parts in layers]
        setattr(config, f"{row.output}_bias_per_layer", [part and part.output.bias is not None for part in own])  # None: it has none
    missing = [missing_modules(layer) for layer in adapter.layers(model)]
    if any(missing):
        setattr(config, MISSING, missing)
    config.auto_map = {auto: f"modeling.{made.__name__}" for auto, made in classes.items()}  # saving adds AutoConfig
    config.per_layer_config = dict(enumerate(widths))
    config.allow_global_per_layer_attribute_access = True
    if family.logits_divisor:  # vLLM's transformers backend has it by another name, inverted
        config.logit_scale = 1 / getattr(config, family.logits_divisor)
    if family.logits_multiplier:
        config.logit_scale = getattr(config, family.logits_multiplier)
    return model


def as_stock_model(model):
    """Converts a model whose layers all have one width (in place) to its family's own class.

    Biases that a recovery gave are held by the config's flags, with zeros in the projections that have none.
    Raises UserError for layers that differ and for biases or a number of heads that the class does not take.
    """
    config, family, adapter = model.config, family_of(model.config), LayerAdapter(model.config)
    way = "prune with --runtime transformers"
    if lacking := [str(index) for index, layer in enumerate(adapter.layers(model)) if missing_modules(layer)]:
        layers = f"layers {', '.join(lacking)} lack" if len(lacking) > 1 else f"layer {lacking[0]} lacks"
        raise UserError(f"{type(model).__name__}: {layers} a part that all layers of a stock model have; {way}, where no part goes whole")
    if odd := irregular(alike(shape_of(config), adapter.units(model))):
        raise UserError(f"{type(model).__name__}: {odd}; a stock model needs one width: {way}")
    first = list({part.kind: part for part in reversed(adapter.all_parts(model))}.values())
    heads = next((part.units["heads"] for part in first if "heads" in part.units), 1)
    if family.heads_divide_hidden and config.hidden_size % heads:
        raise UserError(f"{heads} heads do not divide the hidden size {config.hidden_size}, which {family.model_type} asks for: {way}")
    slim = slim_models(family.model_type)["AutoModelForCausalLM"]
    if isinstance(model, slim):
        config.per_layer_config = None
        for name in (
            *per_layer_settings(config),
            "auto_map",
            "per_layer_config",
            "allow_global_per_layer_attribute_access",
            "block_configs",
            *(["logit_scale"] if family.logits_multiplier != "logit_scale" else []),
        ):
            config.__dict__.pop(name, None)
        config.__class__, model.__class__ = slim.config_class.__bases__[-1], slim.__bases__[-1]
    for part in first:
        for name, count in zip(part.row.sizes, part.units.values()):
            setattr(config, name, count)
            if name in vars(model):  # by which a mixture balances its experts in training
                setattr(model, name, count)
    config.head_dim = adapter.head_dim
    config.__class__ = type(model).config_class  # some families have a config of their own and no class: theirs is Llama's
    _fill_biases(model, way)
    return model


def _fill_biases(model, way: str) -> None:
    """Where an output projection has a bias that the family's class has by a flag only: sets the flag, and zeros where there is none."""
    family, parts = family_of(model.config), LayerAdapter(model.config).projected_parts(model)
    flags = {part.row.output_bias for part in parts if part.output.bias is not None}
    if False in flags:
        raise UserError(f"{family.model_type} has no place for the biases that the recovery gave: {way}")
    for flag in flags - {True}:
        setattr(model.config, flag, True)
    for part in parts:
        for linear in part.linears:
            flag = part.row.output_bias if linear is part.output else part.row.input_bias
            if linear.bias is None and isinstance(flag, str) and flag in flags:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def _as_deci_model(model):
    """:func:`as_slim_model`, and what vLLM's DeciLMForCausalLM reads of a config: one number of heads, a block of settings per layer."""
    family = family_of(model.config)
    _fill_biases(model, "prune with --runtime vllm")
    config = as_slim_model(model).config
    layers = LayerAdapter(config).units(model)
    heads, kv_heads = next(units["attention"] for units in layers if "attention" in units).values()
    if family.part("attention").input_bias is True:
        config.qkv_bias = True
    config.per_layer_config = None  # its DeciLM, not the transformers backend, shall take it
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.block_configs = [
        {
            "attention": _block("attention" in units, n_heads_in_group=heads // kv_heads),
            "ffn": _block("mlp" in units, intermediate_size=units.get("mlp", {}).get("channels")),
        }
        for units in layers
    ]
    return model


def _block(there: bool, **size: int) -> dict:
    """What DeciLM reads of one part of a layer: its ``size``, or that it is not ``there``."""
    return {"no_op": not there, "replace_with_linear": False} | {name: value if there else None for name, value in size.items()}
