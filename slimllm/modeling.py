"""Decoder-only models whose layers differ in width. This file is copied beside every checkpoint, so it stands alone.

Each family's classes are made from its stock ones in transformers when they are first asked for: ``SlimLlamaForCausalLM`` is
LlamaForCausalLM, built layer by layer from the same layer class, each with its own widths.

config.json holds, besides the dense model's own settings, one entry per layer in each of PER_LAYER_SETTINGS: the numbers of query
heads, KV heads and feed-forward channels, and whether the output projections have a bias. It says the widths once more for vLLM:
in ``per_layer_config``, which its transformers backend reads, or in ``block_configs``, which its DeciLM reads.
"""

import functools
import threading

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"a model whose layers differ in width needs transformers 5 or newer, and this is {transformers.__version__}")

PER_LAYER_SETTINGS = (
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "intermediate_size_per_layer",
    "o_proj_bias_per_layer",
    "down_proj_bias_per_layer",
)

AUTO_CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "AutoModel": modeling_auto.MODEL_MAPPING,  # last: its name is the beginning of all
}


class LayerConfig:
    """What the modules of one layer see of the model's config: that layer's own widths, and everything else as it is."""

    def __init__(self, config, index):
        self._config = config
        self.num_attention_heads = config.num_attention_heads_per_layer[index]
        self.num_key_value_heads = config.num_key_value_heads_per_layer[index]
        self.intermediate_size = config.intermediate_size_per_layer[index]

    def __getattr__(self, name):
        if name.startswith("__") or name == "_config":  # looked up before there is one, by copy and pickle
            raise AttributeError(name)
        return getattr(self._config, name)


def _set_bias(linear, wanted):
    if wanted and linear.bias is None:
        weight = linear.weight
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, device=weight.device, dtype=weight.dtype))
    elif not wanted:
        linear.bias = None


class Block(dict):
    """An entry of ``block_configs``: a dict in config.json, attributes to the class that reads it."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class SlimConfigMixin:
    def __post_init__(self, **settings):
        for name in PER_LAYER_SETTINGS:
            if len(settings.get(name, ())) not in (0, self.num_hidden_layers):
                raise ValueError(
                    f"config.json: {name} has {len(settings[name])} entries, and num_hidden_layers is {self.num_hidden_layers}; "
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
            layers[index] = type(layer)(LayerConfig(config, index), index)
            _set_bias(layers[index].self_attn.o_proj, config.o_proj_bias_per_layer[index])
            _set_bias(layers[index].mlp.down_proj, config.down_proj_bias_per_layer[index])


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
