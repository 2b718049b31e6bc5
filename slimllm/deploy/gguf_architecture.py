"""Which architecture of llama.cpp computes a model, the settings that it reads, and the values that the model's tensors have in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import torch

from ..errors import UserError
from ..models.adapter import LayerAdapter
from ..models.families import FAMILIES, MLP, family_of
from ..models.gguf_settings import SCALAR_OF_HIDDEN, llama3_factors
from ..models.gguf_tensors import ROPE_IN_PAIRS, in_pairs
from ..models.parts import Units, has_bias, head_dim_of
from ..models.shape import (
    HEADS_FILL_HIDDEN,
    OWN_WINDOWS,
    alike,
    check_missing,
    free_architecture_of,
    irregular,
    rope_of,
    shape_of,
    units_of,
    window_of,
)
from . import gguf_experts, gguf_gemma4, gguf_latent_attention, gguf_linear_attention

PER_LAYER = ("deci", "openelm")  # architectures that read the widths of each layer
# those that have biases in the output projections
OUTPUT_BIASES = ("llama", "deci", "granite", "granitemoe", "starcoder2", "jais2", "nemotron", "apertus", "phi2", "gpt-oss")
BIASES_ASKED = ("starcoder2", "jais2", "phi2", "gpt-oss")  # those that take no projection without one
WINDOWS_ASKED = ("exaone-moe", "gpt-oss")  # of OWN_WINDOWS, those that take no model without a window
LINEAR_ATTENTION = ("qwen35", "qwen35moe", "qwen3next")
EXAONE_WINDOWS = (64, 4)  # layers of the one model to which exaone4's graph gives windows, and their period
FIXED_ALPHA = ("hunyuan-dense", "hunyuan-moe")  # those whose dynamic rope is another base for all lengths
SPARSE_ROPE = 4  # smollm3's graph leaves out the rotary embeddings of every fourth layer, and exaone4's of layers without a window
XIELU, XIELU_MODULE = ("alpha_n", "alpha_p", "beta", "eps"), "act_fn"  # the numbers that apertus' graph reads as settings
ROPE_SETTINGS = {  # rope types, and what of each llama.cpp computes as transformers does
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
}
# settings that every type may have; in a text all axes of an image's places are the same
NEUTRAL = {"partial_rotary_factor", "rope_theta", "rope_type", "type", "mrope_section", "mrope_interleaved"}


def architecture_of(config, biased: bool, requested: str = "auto") -> str:
    """The GGUF architecture that can hold a model with this transformers config.

    ``biased``: its output projections have biases. Raises UserError where none can, or not the ``requested`` one, naming
    the layers in question and the flag that would have avoided it.
    """
    family, shape = family_of(config), shape_of(config)
    if reason := difference(config):
        raise UserError(reason)
    check_missing(shape, "gguf", "prune with --runtime gguf")
    units, stock, free = alike(shape, shape.units), family.gguf, free_architecture_of(config)
    odd = irregular(units) or ", ".join(f"layer {index} lacks a part" for index, layer in enumerate(shape.layers) if layer.missing)
    if requested == "llama":
        if odd:
            raise UserError(f"--arch llama: {odd}; prune with --runtime transformers, or export with --arch deci")
        if stock != "llama":
            raise UserError(f"--arch llama: the model is a {family.model_type}; leave out --arch")
        return requested
    if requested == "deci" and free != "deci":
        raise UserError(f"--arch deci: llama.cpp has nothing that holds a {family.model_type} with a width per layer; leave out --arch")
    fits = not odd and (stock in OUTPUT_BIASES or not biased)
    strange_heads = _strange_heads(config)
    if requested == "auto" and fits and not strange_heads:
        return stock
    if free in OUTPUT_BIASES or (free and not biased):
        return free
    unbiased = (free or stock) not in OUTPUT_BIASES
    what = odd or ("biases of the output projections" if biased and unbiased else strange_heads)
    needs = ["one width for all layers"] * (not free) + ["no biases of the output projections"] * unbiased
    needs += ["heads that fill the hidden size"] * (stock in HEADS_FILL_HIDDEN and not free)
    raise UserError(f"{what}: llama.cpp's {free or stock} takes {', '.join(needs)} only; prune with --runtime gguf")


def _strange_heads(config) -> str | None:
    """What of a model's heads its own architecture of llama.cpp does not take, in words."""
    if family_of(config).gguf not in HEADS_FILL_HIDDEN:
        return None
    shape, size = shape_of(config), head_dim_of(config)
    heads = next((layer["attention"]["heads"] for layer in alike(shape, shape.units) if "attention" in layer), 0)
    return f"{heads} heads of size {size}" if heads * size != config.hidden_size else None


def obstacle(config) -> str | None:
    """Why llama.cpp computes no model that is pruned for it from one of this config, in words; None where it does."""
    if reason := difference(config):
        return reason
    strange = None if free_architecture_of(config) else _strange_heads(config)  # pruning for it leaves the heads as they are
    return strange and f"{strange}: llama.cpp's {family_of(config).gguf} takes heads that fill the hidden size {config.hidden_size} only"


def difference(config) -> str | None:
    """Why llama.cpp computes no such model, whatever its widths, in words; None where it does."""
    family = family_of(config)
    if family.gguf is None:
        return f"model_type {family.model_type}: llama.cpp has no architecture that computes it"
    if (activation := getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", family.activation)) != family.activation:
        return f"hidden_act {activation}: llama.cpp computes {family.activation} for {family.model_type}"
    return _difference_of_graph(config)


def _difference_of_graph(config) -> str | None:
    """What llama.cpp's graph of this family computes otherwise than this model, in words; None where it is the same."""
    family = family_of(config)
    if family.gguf == gguf_gemma4.ARCH:
        return gguf_gemma4.difference(config)
    if family.sparse_rope:
        without = [index for index, rotary in enumerate(getattr(config, family.sparse_rope)) if not rotary]
        if without != list(range(SPARSE_ROPE - 1, config.num_hidden_layers, SPARSE_ROPE)):
            return f"{family.sparse_rope}: llama.cpp leaves the rotary embeddings of every fourth layer out, this model those of {without}"
    if family.gguf in OWN_WINDOWS and window_of(config) and _period(config) is None:
        return "layer_types: the layers with a sliding window follow no period, as llama.cpp has it"
    if family.gguf in WINDOWS_ASKED and not window_of(config):
        return f"layer_types: llama.cpp's {family.gguf} has layers with a sliding window, and this model has none"
    if family.gguf == "exaone4" and window_of(config) and (config.num_hidden_layers, _period(config)) != EXAONE_WINDOWS:
        return "sliding_window: llama.cpp's exaone4 has windows in models of 64 layers only, three layers of four"
    if family.gguf == "gemma2" and None in (getattr(config, family.attention_softcap), getattr(config, family.logits_softcap)):
        return "attn_logit_softcapping, final_logit_softcapping: llama.cpp's gemma2 computes both, and this model has one or none"
    if family.gguf == "gemma3" and getattr(config, family.logits_softcap):
        return "final_logit_softcapping: llama.cpp's gemma3 does not compute it"
    if family.gguf in LINEAR_ATTENTION and (reason := gguf_linear_attention.difference(config)):
        return reason
    if family.gguf in gguf_latent_attention.ARCHITECTURES and (reason := gguf_latent_attention.difference(config, family.gguf)):
        return reason
    if family.is_mixture and (reason := gguf_experts.difference(config)):
        return reason
    if family.is_mixture and family.gguf not in OUTPUT_BIASES and any(has_bias(config, row.output_bias) for row in family.parts):
        return f"biases of the output projections: llama.cpp's {family.gguf} has none"
    without = [row.output_bias for row in family.parts if isinstance(row.output_bias, str) and not getattr(config, row.output_bias)]
    if family.gguf in BIASES_ASKED and without:
        return f"{' and '.join(dict.fromkeys(without))}: llama.cpp's {family.gguf} takes no projection without a bias"
    attention = next((row for row in family.parts if row.kind == "attention"), None)
    if attention and attention.qk_norm == "all" and (flag := attention.qk_norm_flag) and getattr(config, flag):
        return f"{flag}: the norms of queries and keys have weights for each head, which are not written to GGUF"
    if getattr(config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention: llama.cpp reads from left to right"
    return _strange_rope(rope_of(config), family.gguf)


def _period(config) -> int | None:
    """After how many layers one without a sliding window comes; 0: none does, None: at no fixed distance."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    layers = range(len(sliding))
    return next((n for n in range(len(sliding) + 1) if sliding == [n == 0 or (i + 1) % n != 0 for i in layers]), None)


def add_settings(writer: gguf.GGUFWriter, config) -> None:
    """Adds what llama.cpp reads of a config besides the tokenizer and the tensors."""
    units, family, arch = units_of(config), family_of(config), writer.arch
    channels = [layer.get("experts", layer.get("mlp", {"channels": 0}))["channels"] for layer in units]
    writer.add_feed_forward_length(channels if arch in (*PER_LAYER, gguf_gemma4.ARCH) else channels[0])
    window, rope = window_of(config), rope_of(config)
    context = config.max_position_embeddings
    if arch == gguf_gemma4.ARCH:
        gguf_gemma4.add_settings(writer, config)
    elif arch in OWN_WINDOWS and (window or arch.startswith("gemma")):  # without one, it would take the published models'
        writer.add_sliding_window(window or context)
        writer.add_sliding_window_pattern(_period(config))
        writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])
    elif window:
        context = min(context, window)  # within it, it is the same model
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if arch != gguf_gemma4.ARCH:
        rotary = _add_heads(writer, config, units)
        writer.add_rope_dimension_count(rotary)
        _add_rope(writer, config, rope)
    if arch in LINEAR_ATTENTION:
        gguf_linear_attention.add_settings(writer, config, rotary)
    _add_norm_epsilon(writer, config, family.norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    if arch != family.gguf:
        return
    for name, add in (
        (family.embedding_multiplier, writer.add_embedding_scale),
        (family.attention_multiplier, writer.add_attention_scale),
        (family.residual_multiplier, writer.add_residual_scale),
        (family.logits_divisor, writer.add_logit_scale),
        (family.logits_multiplier, writer.add_logit_scale),
        (family.attention_clip, writer.add_clamp_kqv),
        (family.attention_softcap, writer.add_attn_logit_softcapping),
        (family.logits_softcap, writer.add_final_logit_softcapping),
    ):
        if name and getattr(config, name, None) is not None:  # some classes derive it from other settings
            add(float(getattr(config, name)))


def _add_heads(writer: gguf.GGUFWriter, config, units: list[dict[str, Units]]) -> int:
    """Adds the numbers and sizes of heads; returns how many dimensions of a head rotary embeddings rotate."""
    if writer.arch in gguf_latent_attention.ARCHITECTURES:
        gguf_latent_attention.add_settings(writer, config)
        return config.qk_rope_head_dim
    heads, kv_heads = ([layer.get("attention", {}).get(sort, 0) for layer in units] for sort in ("heads", "kv_heads"))
    writer.add_head_count(heads if writer.arch in PER_LAYER else max(heads))
    writer.add_head_count_kv(kv_heads if writer.arch in PER_LAYER else max(kv_heads))
    head_dim = head_dim_of(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    return int(head_dim * rope_of(config).get("partial_rotary_factor", 1.0))


def add_activation(writer, source) -> None:
    """Adds the numbers of an activation that has some of its own, one of each for every layer. ``source``: a ModelSource."""
    if writer.arch != "apertus":
        return
    module, adapter, layers = source.adapter.family.part("mlp").module, source.adapter, range(len(source))
    for number in XIELU:
        values = [float(source.weights.read(f"{adapter.layer_name(index)}{module}.{XIELU_MODULE}.{number}")) for index in layers]
        getattr(writer, f"add_xielu_{number}")(values)


def _add_norm_epsilon(writer, config, epsilon: str | float) -> None:
    value = getattr(config, epsilon) if isinstance(epsilon, str) else epsilon
    (writer.add_layer_norm_rms_eps if epsilon == "rms_norm_eps" else writer.add_layer_norm_eps)(value)


def _strange_rope(rope: dict, arch: str) -> str | None:
    """What of the settings of rotary embeddings llama.cpp has no form for, in words."""
    kind = rope.get("rope_type", "default")
    if arch in FIXED_ALPHA and kind == "dynamic" and rope.get("alpha"):
        return None
    if kind not in ROPE_SETTINGS:
        return f"rope_type {kind}: cannot be written to GGUF; {', '.join(ROPE_SETTINGS)} can"
    if kind == "yarn" and not rope.get("truncate", True):
        return "rope_type yarn with truncate false: llama.cpp rounds to whole dimensions where the scaling begins and ends"
    if arch == gguf_latent_attention.ARCH and kind == "yarn" and not rope.get("mscale") == rope.get("mscale_all_dim") is not None:
        return f"rope_type yarn: llama.cpp's {arch} has one number for mscale and mscale_all_dim"
    supported = {*NEUTRAL, *ROPE_SETTINGS[kind]}
    if arch in ("mistral3", gguf_latent_attention.ARCH):
        supported |= {"mscale", "mscale_all_dim", "llama_4_scaling_beta", "max_position_embeddings"}
    if kind == "yarn" and rope.get("attention_factor") and math.isclose(rope["attention_factor"], 1 + 0.1 * math.log(rope["factor"])):
        supported |= {"attention_factor"}  # what it is without being named
    strange = sorted(key for key in rope if rope[key] is not None and key not in supported)
    return f"rope_type {kind} with {', '.join(strange)}: cannot be written to GGUF" if strange else None


def _add_rope(writer, config, rope: dict) -> None:
    kind, arch = rope.get("rope_type", "default"), writer.arch
    base = rope["rope_theta"]
    if kind == "dynamic":  # with a fixed factor of the base
        dimensions = head_dim_of(config)
        base *= rope["alpha"] ** (dimensions / (dimensions - 2))
    writer.add_rope_freq_base(base)
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = original or config.max_position_embeddings
    if kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    if kind == "longrope":
        factor = rope.get("factor") or config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)))
    if arch == gguf_latent_attention.ARCH and kind == "yarn":  # llama.cpp divides by 0.1 what it finds
        writer.add_rope_scaling_yarn_log_mul(0.1 * (rope.get("mscale_all_dim") or 0.0))
    if arch == "mistral3" and kind == "yarn":
        writer.add_rope_scaling_yarn_log_mul(rope.get("mscale_all_dim") or 0.0)
    if arch == "mistral3" and rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        writer.add_attn_temperature_length(original)


def rope_factors(config) -> dict[str, np.ndarray]:
    """What llama.cpp divides each rotary frequency by, [rotary dimensions / 2], as tensors of a file: for llama3 and longrope."""
    rope = rope_of(config)
    if family_of(config).gguf == gguf_gemma4.ARCH:
        return {"rope_freqs.weight": gguf_gemma4.rope_factors(config)}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], dtype=np.float32) for length in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(rope, head_dim_of(config)).numpy()}


@dataclass(frozen=True)
class Piece:
    """Where the rows of one tensor of the file lie: those from ``start`` to ``stop`` of ``sources``, tensors of the checkpoint, joined."""

    sources: tuple[str, ...]
    start: int = 0
    stop: int | None = None


class Arrangement:
    """The tensors of a checkpoint as ``arch`` has them: other projections joined or split, scales of the config in the weights.

    ``shapes``: name -> shape of the checkpoint's tensors. ``pieces``: the name that transformers would give each tensor of the file
    -> where it lies.
    """

    def __init__(self, config, arch: str, shapes: dict[str, list[int]]):
        self.config, self.arch, self.family = config, arch, family_of(config)
        self.units, self._shapes = units_of(config), shapes
        self._split = LayerAdapter(config, FAMILIES["llama"])
        self.pieces: dict[str, Piece | gguf_experts.OfExperts] = {}
        for name in shapes:
            self.pieces |= self._pieces_of(name)
        self._factors = _factors(config, arch)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor of the file."""
        piece = self.pieces[name]
        if isinstance(piece, gguf_experts.OfExperts):
            return piece.shape(self._shapes[piece.source])
        rows = sum(self._shapes[source][0] for source in piece.sources)
        stop = rows if piece.stop is None else piece.stop
        shape = [stop - piece.start, *self._shapes[piece.sources[0]][1:]]
        if gguf_linear_attention.LINEAR in name:
            return gguf_linear_attention.shape(name, shape, self.config)
        if self._splits(piece):
            return gguf_latent_attention.shape(name, self.config)
        return gguf_experts.shape(name, shape)

    def values(self, name: str, tensors) -> Iterator[torch.Tensor]:
        """A tensor of the file, float32, in pieces that follow one another in it: one for each expert. ``tensors``: the checkpoint's."""
        piece = self.pieces[name]
        if isinstance(piece, gguf_experts.OfExperts):
            for expert in range(self._shapes[piece.source][0]):
                yield piece.value(tensors.expert(piece.source, expert, torch.float32)).contiguous()
        else:
            yield self._value(name, piece, tensors)

    def _value(self, name: str, piece: Piece, tensors) -> torch.Tensor:
        parts = [tensors.read(source, torch.float32) for source in piece.sources]
        tensor = (parts[0] if len(parts) == 1 else torch.cat(parts))[piece.start : piece.stop]
        if gguf_linear_attention.LINEAR in name:
            return gguf_linear_attention.value(name, tensor, self.config)
        if self._splits(piece):
            return gguf_latent_attention.value(name, tensor, self.config).contiguous()
        if self.arch in ROPE_IN_PAIRS and (heads := self._split.rotary_heads(name, self.units)):
            tensor = in_pairs(tensor, heads)
        if self.family.is_norm(name):
            tensor = tensor + self.family.norm_offset
        stem = name.rpartition(".")[0].rpartition(".")[2]
        return (tensor * self._factors.get(stem, 1.0)).view(self.shape(name))

    def _splits(self, piece: Piece) -> bool:
        """Whether this is one of the two that the projection from the latent state to keys and values becomes."""
        return self.arch == gguf_latent_attention.ARCH and gguf_latent_attention.JOINED in piece.sources[0]

    def _pieces_of(self, name: str) -> dict[str, Piece]:
        if self.family.is_mixture and (found := gguf_experts.pieces(name, self._shapes[name], self.family.part("experts"))):
            return found
        stem, _, suffix = name.rpartition(".")
        block, _, part = stem.rpartition(".")
        if part == XIELU_MODULE:
            return {}
        if suffix == gguf_gemma4.SCALAR:
            return {f"{name}.weight": Piece((name,))}
        if part == gguf_linear_attention.FUSED:
            return {f"{block}.{one}": Piece((name,)) for one in gguf_linear_attention.OF_FUSED}
        if part == gguf_latent_attention.JOINED and self.arch == gguf_latent_attention.ARCH:
            return {f"{block}.{one}": Piece((name,)) for one in gguf_latent_attention.OF_JOINED}
        if self.family.is_mixture and (found := self._pieces_of_shared(name)):
            return found
        split, fused = ({row.kind: row.inputs for row in FAMILIES[name].parts} for name in ("llama", "phi3"))
        if self.arch == "openelm" and part in split["attention"]:
            sources = tuple(f"{block}.{one}.{suffix}" for one in split["attention"])
            return {f"{block}.{fused['attention'][0]}.{suffix}": Piece(sources)}
        kind = next((kind for kind, inputs in fused.items() if part in inputs), None)
        if self.arch == "deci" and kind:
            units, size = self.units[int(name.split(".")[2])][kind], head_dim_of(self.config)
            counts = [units[sort] * size for sort in ("heads", "kv_heads", "kv_heads")] if kind == "attention" else [units["channels"]] * 2
            ends = [sum(counts[: i + 1]) for i in range(len(counts))]
            return {f"{block}.{one}.{suffix}": Piece((name,), end - n, end) for one, n, end in zip(split[kind], counts, ends)}
        return {name: Piece((name,))}

    def _pieces_of_shared(self, name: str) -> dict[str, Piece]:
        """The same of a part beside the experts whose inputs are fused, which llama.cpp has split."""
        row = next((row for row in self.family.parts if row.kind == "mlp" and len(row.inputs) == 1), None)
        if row is None or f".{row.module}." not in name:
            return {}
        block = f"{name.partition(f'.{row.module}.')[0]}.{MLP.module}.{row.module}"
        if f".{row.output}." in name:
            return {f"{block}.{MLP.output}.weight": Piece((name,))}
        half, (gate, up) = self._shapes[name][0] // 2, MLP.inputs
        return {f"{block}.{gate}.weight": Piece((name,), 0, half), f"{block}.{up}.weight": Piece((name,), half)}


def _factors(config, arch: str) -> dict[str, float]:
    """Projection, norm or embedding -> what its weights are multiplied by, so that ``arch`` need not have the scales of the config."""
    family, root = family_of(config), math.sqrt(head_dim_of(config))
    if family.attention_scalar:
        heads = units_of(config)[0]["attention"]["heads"]
        of_hidden = SCALAR_OF_HIDDEN[arch] == config.num_hidden_layers
        divided = config.hidden_size // heads if of_hidden else head_dim_of(config)
        row = family.part("attention")
        query = row.query_norm if row.qk_norm else row.inputs[0]
        return {query: math.sqrt(divided / getattr(config, family.attention_scalar))}
    if arch == family.gguf or not family.residual_multiplier:
        return {}
    embedding, residual = getattr(config, family.embedding_multiplier), getattr(config, family.residual_multiplier)
    before_head = 1 / getattr(config, family.logits_divisor) / (embedding if config.tie_word_embeddings else 1)
    return {
        family.embedding: embedding,
        family.part("attention").inputs[0]: getattr(config, family.attention_multiplier) * root,
        **{row.output: residual for row in family.parts},
        family.final_norm: before_head,
    }
