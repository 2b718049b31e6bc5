"""Llama-family models whose layers differ in width. This file is copied beside every checkpoint, so it stands alone.

config.json holds, besides the dense model's own settings, one entry per layer in each of PER_LAYER_SETTINGS: the numbers of query
heads, KV heads and feed-forward channels, and whether the output projections have a bias. It says the widths once more for vLLM:
in ``per_layer_config``, which its transformers backend reads, or in ``block_configs``, which its DeciLM reads.
"""

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

PER_LAYER_SETTINGS = (
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "intermediate_size_per_layer",
    "o_proj_bias_per_layer",
    "down_proj_bias_per_layer",
)


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


class SlimLlamaConfig(SlimConfigMixin, LlamaConfig):
    model_type = "slim_llama"


class SlimLlamaModel(SlimModelMixin, LlamaModel):
    config: SlimLlamaConfig
    config_class = SlimLlamaConfig


class SlimLlamaForCausalLM(SlimModelMixin, LlamaForCausalLM):
    config: SlimLlamaConfig
    config_class = SlimLlamaConfig


class SlimMistralConfig(SlimConfigMixin, MistralConfig):
    model_type = "slim_mistral"


class SlimMistralModel(SlimModelMixin, MistralModel):
    config: SlimMistralConfig
    config_class = SlimMistralConfig


class SlimMistralForCausalLM(SlimModelMixin, MistralForCausalLM):
    config: SlimMistralConfig
    config_class = SlimMistralConfig


class SlimQwen2Config(SlimConfigMixin, Qwen2Config):
    model_type = "slim_qwen2"


class SlimQwen2Model(SlimModelMixin, Qwen2Model):
    config: SlimQwen2Config
    config_class = SlimQwen2Config


class SlimQwen2ForCausalLM(SlimModelMixin, Qwen2ForCausalLM):
    config: SlimQwen2Config
    config_class = SlimQwen2Config


class SlimQwen3Config(SlimConfigMixin, Qwen3Config):
    model_type = "slim_qwen3"


class SlimQwen3Model(SlimModelMixin, Qwen3Model):
    config: SlimQwen3Config
    config_class = SlimQwen3Config


class SlimQwen3ForCausalLM(SlimModelMixin, Qwen3ForCausalLM):
    config: SlimQwen3Config
    config_class = SlimQwen3Config


# family -> (its model without a head, its causal LM)
SLIM_MODELS = {
    "llama": (SlimLlamaModel, SlimLlamaForCausalLM),
    "mistral": (SlimMistralModel, SlimMistralForCausalLM),
    "qwen2": (SlimQwen2Model, SlimQwen2ForCausalLM),
    "qwen3": (SlimQwen3Model, SlimQwen3ForCausalLM),
}

for _model, _causal_lm in SLIM_MODELS.values():  # so that save_pretrained writes this file and the auto_map again
    _causal_lm.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
