"""The class and config that a runtime takes a pruned model in."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..modeling import PER_LAYER_SETTINGS, slim_models
from ..models.adapter import LayerAdapter
from ..models.families import family_of
from ..models.parts import KINDS, Units
from ..models.shape import irregular, limits_of, shape_of


def check_buildable(units: list[dict[str, Units]]) -> None:
    """Raises UserError for a layer, by what each of its parts keeps, that no class can be made of."""
    kinds = {kind for layer in units for kind in layer}
    for index, layer in enumerate(units):
        if missing := kinds - set(layer):
            raise UserError(
                f"layer {index}: it has no {KINDS[min(missing)].title} part as other layers do, and no such model can be built yet"
            )
        for kind, counts in layer.items():
            if not all(counts.values()):
                raise UserError(
                    f"layer {index}: nothing of its {KINDS[kind].title} part stays, and no model without it can be built yet; keep some"
                )


def convert_for_runtime(model, runtime: str = "any"):
    """Converts a sliced model (in place) to the class and config that ``--runtime`` asks for. No weight is copied.

    ``transformers`` and models that must be regular elsewhere: the family's own class. ``vllm``: ours, with the entries
    that DeciLMForCausalLM reads. Otherwise ours. Raises UserError for a model whose layers are not alike enough.
    """
    check_buildable(LayerAdapter(model.config).units(model))
    limits = limits_of(runtime, shape_of(model.config))
    if limits.same_channels:
        return as_stock_model(model)
    return _as_deci_model(model) if limits.same_heads else as_slim_model(model)


def as_slim_model(model):
    """Converts a sliced model (in place) to the class that describes layers of different widths. No weight is copied.

    A model that is not sliced becomes one whose layers happen to be equal.
    """
    family, adapter = family_of(model.config), LayerAdapter(model.config)
    classes = slim_models(family.model_type)
    slim = classes["AutoModelForCausalLM"]
    layers = [adapter.parts(layer) for layer in adapter.layers(model)]
    config = model.config  # one object, shared by all modules
    config.__class__, model.__class__ = slim.config_class, slim
    config.head_dim = adapter.head_dim
    config.__dict__.pop("block_configs", None)
    widths = [{name: count for part in parts for name, count in zip(part.row.sizes, part.units.values())} for parts in layers]
    for name in widths[0]:
        setattr(config, f"{name}_per_layer", [counts[name] for counts in widths])
    for row in family.parts:
        biases = [part.output.bias is not None for parts in layers for part in parts if part.kind == row.kind]
        setattr(config, f"{row.output}_bias_per_layer", biases)
    config.auto_map = {auto: f"modeling.{made.__name__}" for auto, made in classes.items()}  # saving adds AutoConfig
    config.per_layer_config = dict(enumerate(widths))
    config.allow_global_per_layer_attribute_access = True
    if family.logits_divisor:  # vLLM's transformers backend has it by another name, inverted
        config.logit_scale = 1 / getattr(config, family.logits_divisor)
    return model


def as_stock_model(model):
    """Converts a model whose layers all have one width (in place) to its family's own class.

    Biases that a recovery gave are held by the config's flags, with zeros in the projections that have none.
    Raises UserError for layers that differ and for biases or a number of heads that the class does not take.
    """
    config, family, adapter = model.config, family_of(model.config), LayerAdapter(model.config)
    way = "prune with --runtime transformers"
    if odd := irregular(adapter.units(model)):
        raise UserError(f"{type(model).__name__}: {odd}; a stock model needs one width: {way}")
    first = adapter.parts(adapter.layers(model)[0])
    heads = next((part.units["heads"] for part in first if "heads" in part.units), 1)
    if family.heads_divide_hidden and config.hidden_size % heads:
        raise UserError(f"{heads} heads do not divide the hidden size {config.hidden_size}, which {family.model_type} asks for: {way}")
    slim = slim_models(family.model_type)["AutoModelForCausalLM"]
    if isinstance(model, slim):
        config.per_layer_config = None
        for name in (
            *PER_LAYER_SETTINGS,
            "auto_map",
            "per_layer_config",
            "allow_global_per_layer_attribute_access",
            "logit_scale",
            "block_configs",
        ):
            config.__dict__.pop(name, None)
        config.__class__, model.__class__ = slim.config_class.__bases__[-1], slim.__bases__[-1]
    for part in first:
        for name, count in zip(part.row.sizes, part.units.values()):
            setattr(config, name, count)
    config.head_dim = adapter.head_dim
    _fill_biases(model, way)
    return model


def _fill_biases(model, way: str) -> None:
    """Where an output projection has a bias that the family's class has by a flag only: sets the flag, and zeros where there is none."""
    family, parts = family_of(model.config), LayerAdapter(model.config).all_parts(model)
    for row in family.parts:
        of_kind, flag = [part for part in parts if part.kind == row.kind], row.output_bias
        if all(part.output.bias is None for part in of_kind) or flag is True:
            continue
        if not isinstance(flag, str):
            raise UserError(f"{family.model_type} has no place for the biases that the recovery gave: {way}")
        setattr(model.config, flag, True)
        for linear in (linear for part in of_kind for linear in part.linears if linear.bias is None):
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def _as_deci_model(model):
    """:func:`as_slim_model`, and what vLLM's DeciLMForCausalLM reads of a config: one number of heads, a block of settings per layer."""
    family = family_of(model.config)
    _fill_biases(model, "prune with --runtime vllm")
    config = as_slim_model(model).config
    layers = LayerAdapter(config).units(model)
    heads, kv_heads = layers[0]["attention"].values()
    if family.part("attention").input_bias is True:
        config.qkv_bias = True
    config.per_layer_config = None  # its DeciLM, not the transformers backend, shall take it
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.block_configs = [
        {
            "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": heads // kv_heads},
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": units["mlp"]["channels"]},
        }
        for units in layers
    ]
    return model
