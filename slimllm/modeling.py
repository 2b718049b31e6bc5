"""Llama-family models whose layers differ in width. This file is copied beside every checkpoint, so it stands alone.

config.json holds, besides the dense model's own settings, one entry a layer in ``num_attention_heads_per_layer``,
``num_key_value_heads_per_layer``, ``intermediate_size_per_layer`` and (true where that projection has a bias)
``o_proj_bias_per_layer``, ``down_proj_bias_per_layer``. One that vLLM's DeciLM can hold also says its widths in
``block_configs``, which that class reads.
"""

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def _linear(old, in_features, out_features, bias):
    weight = old.weight
    return nn.Linear(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)


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
    """Builds the dense model, then gives each layer its own widths before any weight is loaded."""

    def __init__(self, config):
        super().__init__(config)
        hidden, head_dim = config.hidden_size, self.model.layers[0].self_attn.head_dim
        for index, layer in enumerate(self.model.layers):
            heads = config.num_attention_heads_per_layer[index]
            groups = config.num_key_value_heads_per_layer[index]
            channels = config.intermediate_size_per_layer[index]
            attention, mlp = layer.self_attn, layer.mlp
            attention.num_key_value_groups = heads // groups
            attention.q_proj = _linear(attention.q_proj, hidden, heads * head_dim, attention.q_proj.bias is not None)
            attention.k_proj = _linear(attention.k_proj, hidden, groups * head_dim, attention.k_proj.bias is not None)
            attention.v_proj = _linear(attention.v_proj, hidden, groups * head_dim, attention.v_proj.bias is not None)
            attention.o_proj = _linear(attention.o_proj, heads * head_dim, hidden, config.o_proj_bias_per_layer[index])
            mlp.intermediate_size = channels
            mlp.gate_proj = _linear(mlp.gate_proj, hidden, channels, mlp.gate_proj.bias is not None)
            mlp.up_proj = _linear(mlp.up_proj, hidden, channels, mlp.up_proj.bias is not None)
            mlp.down_proj = _linear(mlp.down_proj, channels, hidden, config.down_proj_bias_per_layer[index])


class SlimLlamaConfig(SlimConfigMixin, LlamaConfig):
    model_type = "slim_llama"


class SlimLlamaForCausalLM(SlimModelMixin, LlamaForCausalLM):
    config: SlimLlamaConfig
    config_class = SlimLlamaConfig


class SlimMistralConfig(SlimConfigMixin, MistralConfig):
    model_type = "slim_mistral"


class SlimMistralForCausalLM(SlimModelMixin, MistralForCausalLM):
    config: SlimMistralConfig
    config_class = SlimMistralConfig


class SlimQwen2Config(SlimConfigMixin, Qwen2Config):
    model_type = "slim_qwen2"


class SlimQwen2ForCausalLM(SlimModelMixin, Qwen2ForCausalLM):
    config: SlimQwen2Config
    config_class = SlimQwen2Config


class SlimQwen3Config(SlimConfigMixin, Qwen3Config):
    model_type = "slim_qwen3"


class SlimQwen3ForCausalLM(SlimModelMixin, Qwen3ForCausalLM):
    config: SlimQwen3Config
    config_class = SlimQwen3Config


SLIM_MODELS = {
    "llama": SlimLlamaForCausalLM,
    "mistral": SlimMistralForCausalLM,
    "qwen2": SlimQwen2ForCausalLM,
    "qwen3": SlimQwen3ForCausalLM,
}

for _model in SLIM_MODELS.values():  # so that save_pretrained writes this file and the auto_map again
    _model.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")
