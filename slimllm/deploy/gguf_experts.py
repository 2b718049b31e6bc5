"""Mixtures of experts as llama.cpp's graphs want them in a GGUF file: how tokens are routed, and the weights of all experts of a layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

import gguf
import torch

from ..models.families import MLP, family_of
from ..models.parts import ExpertsShape
from ..models.shape import rope_of, shape_of

# the routers, which would send tokens to other experts if they were rounded
ALWAYS_FLOAT32 = (".gate.weight", ".router.weight", ".wg.weight")
ONE_ROW = (".shared_expert_gate.weight", ".moe_statics.e_score_correction_bias")  # matrices of one row here, and vectors there
RENAMED = (  # what ends so is found by the gguf package under another name
    (".gate.moe_statics.e_score_correction_bias", ".moe_statics.e_score_correction.bias"),
    ("e_score_correction_bias", "e_score_correction.bias"),
    (".router.weight", ".gate.weight"),
    (".sinks", ".sinks.weight"),
)
SHARED = re.compile(rf"\.shared_\w+\.{MLP.inputs[-1]}\.weight$")  # of a part beside the experts that is no part of its own here
HEAD_BY_HEAD = ("olmoe", "dots1")  # those in which each query head has a KV head of its own
OWN_FREQUENCIES = ("llama", "granitemoe", "exaone-moe")  # those that have a factor for each frequency of the rotary embeddings
HEAD_ASKED = ("olmoe", "qwen2moe", "gpt-oss", "dots1", "minimax-m2", "exaone-moe")  # those that want an output head beside the embeddings
CLAMPED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # what gpt-oss' graph has for these


@dataclass(frozen=True)
class Graph:
    """How a graph of llama.cpp routes tokens.

    ``normed``: whether the weights of a token's experts are divided by their sum; None: as the file says. ``sigmoid``: the scores of
    experts are one, not a softmax. ``dense_first``: the first layers may have no experts.
    """

    normed: bool | None = True
    sigmoid: bool = False
    dense_first: bool = False


GRAPHS = {  # those that differ from the others
    "olmoe": Graph(normed=False),
    "qwen2moe": Graph(normed=False),
    "ernie4_5-moe": Graph(dense_first=True),
    "minimax-m2": Graph(sigmoid=True),
    **dict.fromkeys(("glm4moe", "dots1", "exaone-moe", "deepseek2"), Graph(None, sigmoid=True, dense_first=True)),
    "deepseek_v2": Graph(normed=False, dense_first=True),  # a family, of whose architecture the other families are as above
}


def _graph(config) -> Graph:
    family = family_of(config)
    return GRAPHS.get(family.model_type) or GRAPHS.get(family.gguf, Graph())


def _experts(config) -> list[ExpertsShape]:
    return [part for layer in shape_of(config).layers for part in layer.parts if part.kind == "experts"]


def _dense_layers(config) -> list[int]:
    """Layers without experts."""
    return [index for index, layer in enumerate(shape_of(config).units) if "experts" not in layer]


def difference(config) -> str | None:
    """Why the graph would compute something else than this mixture, in words; None where it would not."""
    arch, dense, experts, graph = family_of(config).gguf, _dense_layers(config), _experts(config), _graph(config)
    if not experts:
        return f"no layer has experts: llama.cpp's {arch} has some"
    if dense and not graph.dense_first:
        return f"layers {', '.join(map(str, dense))} have no experts: llama.cpp's {arch} has some in every layer"
    if dense != list(range(len(dense))):
        return f"layers {', '.join(map(str, dense))} have no experts: llama.cpp's {arch} has the layers without experts first"
    normed = getattr(config, "norm_topk_prob", None)
    if None not in (normed, graph.normed) and normed != graph.normed:
        return f"norm_topk_prob {normed}: llama.cpp's {arch} computes {graph.normed}"
    if len({part.top_k for part in experts}) > 1:
        return f"{family_of(config).part('experts').top_k}: llama.cpp's {arch} has one number of experts per token for all layers"
    if arch in HEAD_BY_HEAD and config.num_key_value_heads != config.num_attention_heads:
        return f"num_key_value_heads {config.num_key_value_heads}: llama.cpp's {arch} wants as many as {config.num_attention_heads} heads"
    if arch in HEAD_ASKED and config.tie_word_embeddings:
        return f"tie_word_embeddings: llama.cpp's {arch} wants an output head of its own"
    rope = rope_of(config).get("rope_type")
    if rope == "longrope" or (rope == "llama3" and arch not in OWN_FREQUENCIES):
        return f"rope_type {rope}: llama.cpp's {arch} does not scale single frequencies"
    if getattr(config, "clip_qkv", None) is not None:
        return f"clip_qkv {config.clip_qkv}: llama.cpp's {arch} does not compute it"
    for name, value in CLAMPED.items() if arch == "gpt-oss" else ():
        if getattr(config, name) != value:
            return f"{name} {getattr(config, name)}: llama.cpp's {arch} computes {value}"
    return None


def add_settings(writer: gguf.GGUFWriter, source) -> None:
    """Adds what llama.cpp reads of a mixture. ``source``: a ModelSource."""
    config, graph = source.config, _graph(source.config)
    experts, dense = _experts(config)[0], _dense_layers(config)
    writer.add_expert_count(experts.experts)
    writer.add_expert_used_count(experts.top_k)
    writer.add_expert_feed_forward_length(experts.channels)
    if experts.groups > 1:
        writer.add_expert_group_count(experts.groups)
        writer.add_expert_group_used_count(experts.top_groups)
    if graph.dense_first:
        writer.add_leading_dense_block_count(len(dense))
        writer.add_interleave_moe_layer_step(1)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if graph.sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if graph.normed is None:
        writer.add_expert_weights_norm(config.norm_topk_prob)
    if scale := getattr(config, "routed_scaling_factor", None):
        writer.add_expert_weights_scale(scale)
    if shared := _shared_width(source):
        writer.add_expert_shared_feed_forward_length(shared)
        if shared % experts.channels == 0:
            writer.add_expert_shared_count(shared // experts.channels)


def _shared_width(source) -> int:
    """Channels of the part beside the experts that all tokens go through; 0 where there is none."""
    both = (layer["mlp"]["channels"] for layer in shape_of(source.config).units if layer.keys() >= {"experts", "mlp"})
    inside = (source.weights.shape(name)[0] for name in source.weights.names if SHARED.search(name))
    return next(both, next(inside, 0))


def renamed(name: str) -> str:
    """The name by which the gguf package finds a tensor's place."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return next((name.removesuffix(old) + new for old, new in RENAMED if name.endswith(old)), name)


def shape(name: str, whole: list[int]) -> list[int]:
    """The shape of a tensor as the file has it."""
    return whole[1:] if name.endswith(ONE_ROW) else whole


def inputs_first(name: str, family) -> bool:
    """Whether the model has this tensor of experts with inputs before outputs, which the file has the other way round."""
    return family.is_mixture and (row := family.part("experts")).transposed and name.endswith(row.stacked)


@dataclass(frozen=True)
class OfExperts:
    """Where a tensor of the file lies that holds one projection of all experts of a layer: in ``source``, a tensor of the checkpoint, those
    ``rows`` of each expert's part of it. ``transposed``: inputs come before outputs there.
    """

    source: str
    rows: slice
    transposed: bool

    def shape(self, whole: list[int]) -> list[int]:
        """The shape of the tensor of the file; ``whole``: that of the source."""
        experts, *one = whole
        one = one[::-1] if self.transposed else one
        return [experts, len(range(*self.rows.indices(one[0]))), *one[1:]]

    def value(self, expert: torch.Tensor) -> torch.Tensor:
        """One expert's part of the tensor of the file, of its part of the source."""
        return (expert.T if self.transposed else expert)[self.rows]


def pieces(name: str, shape: list[int], row) -> dict[str, OfExperts]:
    """The tensors of the file that a tensor of the checkpoint becomes, where it holds weights of the experts that ``row`` describes."""
    before, found, stem = name.rpartition(f".{row.module}.{row.output}.")
    if not found:
        return {}
    _, down = row.stacked
    projection, suffix = (stem.removesuffix("_bias"), "bias") if stem.endswith("_bias") else (stem, "weight")
    transposed = row.transposed and suffix == "weight"
    place = f"{before}.mlp.experts."
    if projection == down:
        return {f"{place}{MLP.output}.{suffix}": OfExperts(name, slice(None), transposed)}
    outputs = shape[2 if transposed else 1]
    halves = (slice(0, None, 2), slice(1, None, 2)) if row.transposed else (slice(0, outputs // 2), slice(outputs // 2, None))
    return {f"{place}{one}.{suffix}": OfExperts(name, half, transposed) for one, half in zip(MLP.inputs, halves)}
