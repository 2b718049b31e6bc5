"""The class and config that a runtime takes a pruned model in."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..modeling import PER_LAYER_SETTINGS, slim_models
from ..models.adapter import LayerAdapter
from ..models.families import family_of
from ..models.shape import irregular, limits_of, shape_of

_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # in the order of LayerAdapter.widths


def convert_for_runtime(model, runtime: str = "any"):
    """Turns a sliced model (in place) into the class and config that ``--runtime`` asks for. No weight is copied.

    ``transformers`` and models that must be regular elsewhere: the family's own class. ``vllm``: ours, with the entries
    that DeciLMForCausalLM reads. Otherwise ours. Raises UserError for a model whose layers are not alike enough.
    """
    limits = limits_of(runtime, shape_of(model.config))
    if limits.same_channels:
        return as_stock_model(model)
    return _as_deci_model(model) if limits.same_heads else as_slim_model(model)


def as_slim_model(model):
    """Turns a sliced model (in place) into the class that describes layers of different widths. No weight is copied.

    A model that is not sliced becomes one whose layers happen to be equal.
    """
    family, adapter = family_of(model.config), LayerAdapter(model.config)
    classes = slim_models(family.model_type)
    slim = classes["AutoModelForCausalLM"]
    biases = [tuple(block.output.bias is not None for block in blocks) for blocks in adapter.blocks(model)]
    per_layer = zip(*(width + bias for width, bias in zip(adapter.all_widths(model), biases)))
    config = model.config  # one object, shared by all modules
    config.__class__, model.__class__ = slim.config_class, slim
    config.head_dim = adapter.head_dim
    for name, values in zip(PER_LAYER_SETTINGS, per_layer, strict=True):
        setattr(config, name, list(values))
    config.auto_map = {auto: f"modeling.{made.__name__}" for auto, made in classes.items()}  # saving adds AutoConfig
    config.per_layer_config = {i: dict(zip(_WIDTHS, widths)) for i, widths in enumerate(adapter.all_widths(model))}
    config.allow_global_per_layer_attribute_access = True
    if family.logits_divisor:  # vLLM's transformers backend knows it by another name, and its inverse
        config.logit_scale = 1 / getattr(config, family.logits_divisor)
    return model


def as_stock_model(model):
    """Turns a model whose layers all have one width (in place) into its family's own class.

    Biases that a recovery gave are held by the config's flags, with zeros in the projections that have none.
    Raises UserError for layers that differ and for biases or a number of heads that the class does not take.
    """
    config, family, adapter = model.config, family_of(model.config), LayerAdapter(model.config)
    widths = adapter.all_widths(model)
    way = "prune with --runtime transformers"
    if irregular(widths):
        raise UserError(f"{type(model).__name__}: {irregular(widths)}; a stock model needs one width: {way}")
    heads, kv_heads, channels = widths[0]
    if family.heads_divide_hidden and config.hidden_size % heads:
        raise UserError(f"{heads} heads do not divide the hidden size {config.hidden_size}, which {family.model_type} asks for: {way}")
    slim = slim_models(family.model_type)["AutoModelForCausalLM"]
    if isinstance(model, slim):
        config.per_layer_config = None
        for name in (*PER_LAYER_SETTINGS, "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access", "logit_scale"):
            config.__dict__.pop(name, None)
        config.__class__, model.__class__ = slim.config_class.__bases__[-1], slim.__bases__[-1]
    config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = heads, kv_heads, channels
    config.head_dim = adapter.head_dim
    _fill_biases(model, way)
    return model


def _fill_biases(model, way: str) -> None:
    """Where an output projection has a bias that the family's class knows by a flag only: sets the flag, and zeros beside it."""
    family, blocks = family_of(model.config), LayerAdapter(model.config).blocks(model)
    for index, flag in ((0, family.o_bias), (1, family.mlp_bias)):
        parts = [block[index] for block in blocks]
        if all(part.output.bias is None for part in parts) or flag is True:
            continue
        if not isinstance(flag, str):
            raise UserError(f"{family.model_type} has no place for the biases that the recovery gave: {way}")
        setattr(model.config, flag, True)
        for part in parts:
            for linear in part.linears:
                if linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def _as_deci_model(model):
    """:func:`as_slim_model`, and what vLLM's DeciLMForCausalLM reads of a config: one number of heads, a block of settings per layer."""
    family = family_of(model.config)
    _fill_biases(model, "prune with --runtime vllm")
    config = as_slim_model(model).config
    widths = LayerAdapter(config).all_widths(model)
    heads, kv_heads, _ = widths[0]
    if family.qkv_bias is True:
        config.qkv_bias = True
    config.per_layer_config = None  # its DeciLM, not the transformers backend, shall take it
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.block_configs = [
        {
            "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": heads // kv_heads},
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": channels},
        }
        for _, _, channels in widths
    ]
    return model
