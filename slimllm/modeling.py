"""Decoder-only models whose layers differ in width. This file is copied beside every checkpoint, so it stands alone.

Each family's classes are made from its stock ones in transformers when they are first asked for: ``SlimLlamaForCausalLM`` is
LlamaForCausalLM, built layer by layer from the same layer class, each with its own widths.

config.json holds, besides the dense model's own settings, lists with one entry per layer. NAME_per_layer, where NAME is a setting of the
dense model, holds its value in each layer: the numbers of query heads, KV heads and feed-forward channels. NAME_bias_per_layer, where
NAME is a layer's output projection, holds whether it has a bias. missing_modules_per_layer, where some layers lack an attention or a
feed-forward part that the dense model has there, holds the names of the modules that each of them lacks. The config says the widths once
more for vLLM: in ``per_layer_config``, which its transformers backend reads, or in ``block_configs``, which its DeciLM reads.
"""

import functools
import inspect
import threading

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"a model whose layers differ in width needs transformers 5 or newer, and this is {transformers.__version__}")

PER_LAYER, BIAS_PER_LAYER = "_per_layer", "_bias_per_layer"
MISSING = "missing_modules_per_layer"

AUTO_CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "AutoModel": modeling_auto.MODEL_MAPPING,  # last: its name is the beginning of all
}


def per_layer_settings(config):
    """The lists of a config that have one entry per layer, by name."""
    return {name: values for name, values in vars(config).items() if name.endswith(PER_LAYER) and isinstance(values, (list, tuple))}


class LayerConfig:
    """What the modules of one layer see of the model's config: that layer's own widths, and everything else as it is."""

    def __init__(self, config, index):
        self._config = config
        aliases = config.attribute_map  # another name of a setting -> its own; a class may read it by either
        for name, values in per_layer_settings(config).items():
            if not name.endswith(BIAS_PER_LAYER):
                own = aliases.get(name.removesuffix(PER_LAYER), name.removesuffix(PER_LAYER))
                for alias in (own, *(alias for alias, of in aliases.items() if of == own)):
                    setattr(self, alias, values[index])

    def __getattr__(self, name):
        if name.startswith("__") or name == "_config":  # looked up before there is one, by copy and pickle
            raise AttributeError(name)
        return getattr(self._config, name)


def _set_bias(layer, name, wanted):
    """Gives the layer's projection of this name a bias, or none."""
    linear = next(module for path, module in layer.named_modules() if path.endswith(f".{name}"))
    if wanted and linear.bias is None:
        weight = linear.weight
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, device=weight.device, dtype=weight.dtype))
    elif not wanted:
        linear.bias = None


def _layer(layer_class, config, index):
    """A layer with its own widths; some classes are told of what kind it is."""
    kind = {"layer_type": config.layer_types[index]} if "layer_type" in inspect.signature(layer_class).parameters else {}
    return layer_class(LayerConfig(config, index), index, **kind)


class Missing(nn.Module):
    """Stands in a layer for a part that is gone, or for a norm of its own, and gives zeros, which add nothing to the residual stream.

    In the place of an attention, it keeps two numbers per token in the cache, for the cache may be asked of any layer, and is of the first
    one, how many tokens it holds.
    """

    def __init__(self, stock):
        super().__init__()
        self.layer_idx = getattr(stock, "layer_idx", None)
        self._attends = "past_key_values" in inspect.signature(stock.forward).parameters

    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        nothing = torch.zeros_like(hidden_states)
        if not self._attends:
            return nothing
        if past_key_values is not None:
            number = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            past_key_values.update(number, number, self.layer_idx)
        return nothing, None


def missing_modules(layer):
    """The names of the modules that a layer lacks; a copy of this file has another class of the same name for them."""
    return [name for name, module in layer.named_children() if type(module).__name__ == Missing.__name__]


def take_out(layer, names):
    """Puts a :class:`Missing` in the place of each module of these names, and so leaves the layer without their weights."""
    for name in sorted(set(names) - set(missing_modules(layer))):
        setattr(layer, name, Missing(getattr(layer, name)))


def _keep_buffers(layer, dense):
    """Gives a layer the buffers that the model, and not the layer's class, gave the dense one: settings that no file holds."""
    there = dict(layer.named_buffers())
    for path, buffer in dense.named_buffers():
        if path not in there:
            module, _, name = path.rpartition(".")
            layer.get_submodule(module).register_buffer(name, buffer, persistent=False)


class Block(dict):
    """An entry of ``block_configs``: a dict in config.json, attributes to the class that reads it."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class SlimConfigMixin:
    def __post_init__(self, **settings):
        for name, values in settings.items():
            if name.endswith(PER_LAYER) and len(values) not in (0, self.num_hidden_layers):
                raise ValueError(
                    f"config.json: {name} has {len(values)} entries, and num_hidden_layers is {self.num_hidden_layers}; "
                    "what takes layers away or adds some has to do so in every list that has an entry per layer"
                )
        super().__post_init__(**settings)

    def __setattr__(self, name, value):
        if name == "block_configs":
            value = [Block({part: Block(settings) for part, settings in block.items()}) for block in value]
        super().__setattr__(name, value)

    def validate(self):
        """The stock checks, but the number of heads need not divide the hidden size."""
        for check in getattr(self, "__class_validators__", ()):
            if check.__name__ != "validate_architecture":
                check(self)


class SlimModelMixin:
    """Builds the dense model, then each layer anew with its own widths, before any weight is loaded."""

    def __init__(self, config):
        widths = config.__dict__.pop("_heterogeneity_spec", None)  # transformers warns of each width that the dense model reads
        super().__init__(config)
        if widths is not None:
            config._heterogeneity_spec = widths
        layers = self.base_model.layers
        for index, layer in enumerate(layers):
            layers[index] = _layer(type(layer), config, index)
            _keep_buffers(layers[index], layer)
            for name, wanted in per_layer_settings(config).items():
                if name.endswith(BIAS_PER_LAYER) and wanted[index] is not None:  # not every layer of a hybrid has each part
                    _set_bias(layers[index], name.removesuffix(BIAS_PER_LAYER), wanted[index])
            if missing := getattr(config, MISSING, None):
                take_out(layers[index], missing[index])

    @classmethod
    def is_custom_code(cls):
        """No: its modules are those of transformers, which would not set what no file holds (settings in buffers) in another's."""
        return False


_lock = threading.RLock()  # two threads that load models of one family get the same classes


def __getattr__(name):
    """The class ``name``; where this file is part of the package, its family is known to the auto classes from then on."""
    with _lock:
        made = _class(name)
        if __package__ == "slimllm":
            slim_models(getattr(made, "config_class", made).model_type.removeprefix("slim_"))
        return made


@functools.cache
def _class(name):
    """The class ``name``, made from the stock one that is called the same without "Slim"."""
    stock = getattr(transformers, name.removeprefix("Slim"), None) if name.startswith("Slim") else None
    if not isinstance(stock, type) or not issubclass(stock, (transformers.PreTrainedConfig, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(stock, transformers.PreTrainedConfig):
        return type(name, (SlimConfigMixin, stock), {"__module__": __name__, "model_type": f"slim_{stock.model_type}"})
    config, body = _class(f"Slim{stock.config_class.__name__}"), modeling_auto.MODEL_MAPPING[stock.config_class]
    # one name for the body in all classes: a stock one for answers to questions has another, and finds none of a causal LM's weights
    members = {"__module__": __name__, "config_class": config, "base_model_prefix": body.base_model_prefix}
    made = type(name, (SlimModelMixin, stock), members)
    if stock is not body and not name.endswith("ForCausalLM"):  # it asks AutoModel for its body: this file's, without asking anybody
        transformers.AutoModel.register(config, _class(f"Slim{body.__name__}"), exist_ok=True)
    config.register_for_auto_class()  # so that save_pretrained writes this file and the auto_map again
    made.register_for_auto_class(next((auto for auto in AUTO_CLASSES if name.endswith(auto.removeprefix("AutoModel"))), "AutoModel"))
    return made


@functools.cache
def slim_models(model_type):
    """Name of an auto class -> its class with widths per layer, of the family that transformers calls ``model_type``.

    The auto classes know them from then on, and load such checkpoints without the file beside them.
    """
    with _lock:
        config = CONFIG_MAPPING[model_type]
        found = {auto: _class(f"Slim{mapping[config].__name__}") for auto, mapping in AUTO_CLASSES.items() if config in mapping}
        for auto, made in found.items():
            transformers.AutoConfig.register(made.config_class.model_type, made.config_class, exist_ok=True)
            getattr(transformers, auto).register(made.config_class, made, exist_ok=True)
        return found
