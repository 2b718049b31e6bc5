"""Which models can be pruned, where a family keeps its parts, and how a model is read from disk or the hub."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import hub
from .cli import UserError, nearest


@dataclass(frozen=True)
class Family:
    """Attribute names of a decoder; another family is another entry in FAMILIES and in modeling.SLIM_MODELS.

    ``qkv_bias``, ``o_bias``, ``mlp_bias``: the name of the config flag for that bias, or the fixed answer.
    """

    model_type: str
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    qkv_bias: str | bool = "attention_bias"
    o_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = False
    qk_norm: bool = False
    heads_divide_hidden: bool = False  # its config class takes no other number of heads


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", mlp_bias="mlp_bias", heads_divide_hidden=True),
        Family("mistral", qkv_bias=False, o_bias=False),
        Family("qwen2", qkv_bias=True, o_bias=False),
        Family("qwen3", qk_norm=True),
    )
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what pruning can do, from a config alone."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocab: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    window: bool  # attention of some layer looks back only so far
    stock_bias: bool  # the family's own class can have biases in o_proj and down_proj
    heads_divide_hidden: bool

    def layer_parameters(self, heads, kv_heads, channels, o_bias=None, down_bias=None) -> int:
        """Parameters of one decoder layer of these widths; a bias that is not mentioned is as in the dense model."""
        o_bias = self.o_bias if o_bias is None else o_bias
        down_bias = self.mlp_bias if down_bias is None else down_bias
        wide, narrow = heads * self.head_dim, kv_heads * self.head_dim
        attention = self.hidden * (2 * wide + 2 * narrow) + self.qkv_bias * (wide + 2 * narrow) + o_bias * self.hidden
        mlp = channels * self.channel_parameters + down_bias * self.hidden
        return attention + mlp + 2 * self.hidden + self.qk_norm * 2 * self.head_dim

    @property
    def channel_parameters(self) -> int:
        """Parameters that one feed-forward channel holds."""
        return 3 * self.hidden + 2 * self.mlp_bias

    @property
    def decoder_parameters(self) -> int:
        return self.layers * self.layer_parameters(self.heads, self.kv_heads, self.channels)

    @property
    def other_parameters(self) -> int:
        """Embeddings, final norm and (untied) output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden


def family_of(config) -> Family:
    """The family of a transformers config. Raises UserError naming the supported model_types."""
    model_type = config.model_type
    if model_type.startswith("slim_") and model_type[5:] in FAMILIES:
        raise UserError(f"model_type {model_type}: this model is pruned already; prune the dense model it came from")
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type}: supported are {', '.join(FAMILIES)}{nearest(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def base_family_of(config) -> Family:
    """The family of a config, pruned or not: slim_llama is a llama. Raises UserError naming the supported model_types."""
    pruned = config.model_type.removeprefix("slim_")
    return FAMILIES[pruned] if pruned in FAMILIES else family_of(config)


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config) -> int | None:
    """Tokens that attention looks back, where some layer's is limited."""
    return config.sliding_window if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) else None


def widths_of(config) -> list[tuple[int, int, int]]:
    """(query heads, KV heads, channels) of each layer, of a pruned or a dense model's config."""
    if config.model_type.startswith("slim_"):
        lists = config.num_attention_heads_per_layer, config.num_key_value_heads_per_layer, config.intermediate_size_per_layer
        return list(zip(*lists))
    heads = config.num_attention_heads
    return [(heads, getattr(config, "num_key_value_heads", None) or heads, config.intermediate_size)] * config.num_hidden_layers


def irregular(widths: list[tuple[int, int, int]]) -> str:
    """Which layers differ in width from most of the others, in words; empty where all are equal."""
    most = max(sorted(set(widths), reverse=True), key=widths.count)
    others = [str(index) for index, width in enumerate(widths) if width != most]
    if not others:
        return ""
    shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return f"layers {shown} differ from the {most[0]} heads, {most[1]} KV heads and {most[2]} channels of the others"


def shape_of(config, family: Family) -> ModelShape:
    def flag(value):
        return bool(getattr(config, value, False)) if isinstance(value, str) else value

    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim_of(config),
        channels=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        qkv_bias=flag(family.qkv_bias),
        o_bias=flag(family.o_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        window=window_of(config) is not None,
        stock_bias=isinstance(family.o_bias, str) and isinstance(family.mlp_bias, str),
        heads_divide_hidden=family.heads_divide_hidden,
    )


@dataclass(frozen=True)
class Limits:
    """What a runtime asks of a pruned model.

    ``same_heads``, ``same_channels``: one number in all layers. ``new_bias``: a recovery may add biases. ``all_biases``:
    where it does, the config's flags give every projection of every layer a bias, of zeros where there is none.
    ``divisor``: the number of heads must divide it (0: any number).
    """

    same_heads: bool = False
    same_channels: bool = False
    new_bias: bool = True
    all_biases: bool = False
    divisor: int = 0


def limits_of(runtime: str, shape: ModelShape) -> Limits:
    """What ``--runtime`` asks of a model of this shape.

    ``vllm`` and ``gguf`` know layers of different widths for Llama's own layer only (DeciLM): not with query and key norms, and
    vLLM not with a sliding window. Other models must be regular there, as for ``transformers``.
    """
    regular = runtime == "transformers" or (shape.qk_norm and runtime != "any") or (shape.window and runtime == "vllm")
    if runtime == "any" or (runtime == "gguf" and not regular):
        return Limits()
    divisor = shape.hidden if regular and shape.heads_divide_hidden else 0
    return Limits(True, regular, new_bias=shape.stock_bias, all_biases=shape.stock_bias, divisor=divisor)


def _source(base_model: str, flag: str) -> tuple[str, dict]:
    """(folder or hub name, keyword arguments) for from_pretrained. Raises UserError for a path that is no model."""
    if base_model.endswith(".gguf"):
        if not os.path.isfile(base_model):
            raise UserError(f"{flag} {base_model}: no such file")
        folder, name = os.path.split(os.path.abspath(base_model))
        return folder, {"gguf_file": name}
    if os.path.isdir(base_model):
        if not os.path.isfile(os.path.join(base_model, "config.json")):
            raise UserError(f"{flag} {base_model}: the folder has no config.json")
    elif os.path.exists(base_model):
        raise UserError(f"{flag} {base_model}: not a model folder, a hub name or a .gguf file")
    elif base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise UserError(f"{flag} {base_model}: no such folder")
    else:
        hub.reachable()  # without a network, look in the cache at once
    return base_model, {}


def _read(what: str, base_model: str, flag: str, read):
    """Runs ``read``; what goes wrong inside the libraries becomes one line that names the model."""
    try:
        return read()
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{flag} {base_model}: a safetensors file is broken ({error}); copy or download it again") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{flag} {base_model}: cannot read the {what}: {first}") from None


def load_config(base_model: str, flag: str = "--base_model", pruned: bool = False):
    """The model's transformers config; ``flag`` is what errors name it by.

    Raises UserError for a missing or unsupported model, and for one that is pruned already unless ``pruned`` allows it.
    """
    source, kwargs = _source(base_model, flag)
    config = _read("config", base_model, flag, lambda: AutoConfig.from_pretrained(source, **kwargs))
    if not (pruned and config.model_type.startswith("slim_")):
        family_of(config)
    return config


def pruning_dtype(name: str, device: torch.device, config) -> torch.dtype:
    """What the weights are loaded, computed and saved in for ``--dtype NAME``; auto: float32 on a CPU, the checkpoint's own on a GPU."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return getattr(config, "dtype", None) or torch.float16


def load_tokenizer(base_model: str, flag: str = "--base_model"):
    source, kwargs = _source(base_model, flag)
    return _read("tokenizer", base_model, flag, lambda: AutoTokenizer.from_pretrained(source, **kwargs))


def load_model(base_model: str, dtype: torch.dtype | str, flag: str = "--base_model"):
    """The model, dense or pruned, in ``dtype`` ("auto": its own) on the CPU.

    Raises UserError where weights are missing, broken or unsupported; ``flag`` is what it names the model by.
    """
    source, kwargs = _source(base_model, flag)

    def read():
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **kwargs)
        if info["missing_keys"] or info["mismatched_keys"]:
            wrong = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
            raise UserError(f"{flag} {base_model}: {len(wrong)} weights are missing or of the wrong shape, the first {wrong[0]}")
        return model

    # transformers lists missing weights in a table of its own; the one line above says it
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    model = _read("weights", base_model, flag, read).eval()
    if getattr(model.config, "quantization_config", None) is not None:
        if not kwargs:
            raise UserError(f"{flag} {base_model}: the weights are quantized; prune the unquantized model")
        # a .gguf file's weights are dequantized as they are read; only the labels remain, and they forbid saving
        del model.config.quantization_config
        for label in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(label, None)
    return model


def with_multi_head_attention(model):
    """The same model with each key/value head repeated for every query head that uses it (in place).

    For comparison with implementations that know multi-head attention only; the outputs stay the same.
    """
    attention_of = FAMILIES[model.config.model_type].attention
    for layer in model.model.layers:
        attention = getattr(layer, attention_of)
        for name in ("k_proj", "v_proj"):
            linear = getattr(attention, name)
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    blocks = parameter.data.unflatten(0, (-1, attention.head_dim))
                    parameter.data = blocks.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)
            linear.out_features = linear.weight.shape[0]
        attention.num_key_value_groups = 1
    model.config.num_key_value_heads = model.config.num_attention_heads
    return model
