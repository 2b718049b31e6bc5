"""How much memory and disk a run takes, from the model's shape and the settings alone."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..models.shape import ModelShape
from ..models.weights import PIECE
from ..settings.methods import RECOVERIES
from ..settings.pruning import PruneConfig
from ..streaming.activations import temporary_folder
from ..streaming.runner import LOGIT_ROWS, MIN_ACTIVATION_BYTES, TOKENS_PER_BATCH
from ..utils import processes
from ..utils.device import evaluation_dtype
from ..utils.memory import activation_room, free_memory
from .allocation.plan import LayerPlan, removed_parameters

log = logging.getLogger("slimllm")

PROGRAM = 490_000_000  # the interpreter with torch and transformers
CUDA_BUILD, GPU_CONTEXT = 460_000_000, 700_000_000  # what a torch with CUDA takes besides, and what it takes once a GPU is in use
GGUF_PROGRAM = 80_000_000  # what is left of a parsed .gguf file


TYPICAL_TEXTS = 450_000  # tokens of WikiText-2 and PTB together
DISTILLED_TOKENS, DISTILLED_ROWS = 512, 256  # of one forward pass of distillation, and of logits at a time


@dataclass(frozen=True)
class Footprint:
    """Bytes: the peak of the process's memory and of the GPU's, of what lies in ``--tmp_dir``, of the checkpoint, and of what lies beside
    it until the run ends, for ``--resume``.
    """

    host: int
    device: int
    temporary: int
    result: int
    beside: int = 0


def footprint(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig, sizes: Sizes) -> Footprint:
    """What a run with these plans takes; ``sizes`` says how many bytes each number has."""
    inner = _layer_peak(shape, plans, config, sizes)
    head = shape.vocab * shape.hidden
    logits = 3 * LOGIT_ROWS * shape.vocab * 4
    embedding = head * sizes.compute + PIECE * max(sizes.stored, sizes.compute)
    evaluation = 0
    if sizes.evaluated_tokens:
        layer = shape.layer_parameters(shape.heads, shape.kv_heads, shape.channels)
        states = min(_room(layer * sizes.evaluation, sizes), sizes.evaluated_tokens * shape.hidden * sizes.evaluation)
        batch = 4 * TOKENS_PER_BATCH * shape.channels * sizes.evaluation
        evaluation = states + max(layer * (sizes.evaluation + sizes.stored) + batch, head * sizes.evaluation + logits)
    speech = round(1.15 * (shape.decoder_parameters + shape.other_parameters) * sizes.evaluation)
    if not sizes.speaks and not (sizes.may_speak and speech < sizes.free):
        speech = 0
    peak = max(inner, embedding + logits, evaluation, speech, _distillation(shape, plans, config, sizes))
    program = PROGRAM + (GGUF_PROGRAM if sizes.gguf else 0) + (CUDA_BUILD if torch.version.cuda else 0)
    kept = shape.decoder_parameters + shape.other_parameters - removed_parameters(shape, plans, config)
    temporary = max(0, _activations(shape, sizes) - _room(_layer_bytes(shape, sizes), sizes))
    states = sizes.evaluated_tokens * shape.hidden * sizes.evaluation
    temporary = max(temporary, states - _room(_layer_bytes(shape, sizes) // sizes.compute * sizes.evaluation, sizes))
    journal = 0 if config.resume is False else 2 * sizes.tokens * shape.hidden * sizes.compute  # the states after a layer, and the next
    temporary, beside = (temporary, journal) if config.tmp_dir is None else (temporary + journal, 0)
    if sizes.on_gpu:
        layer = _layer_bytes(shape, sizes) * sizes.stored // sizes.compute
        return Footprint(program + GPU_CONTEXT + max(embedding, 3 * layer), peak, temporary, kept * sizes.saved, beside)
    return Footprint(program + peak, 0, temporary, kept * sizes.saved, beside)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number in the model's files, in computation, in evaluation and in the checkpoint; how many tokens a process works on.

    ``speaks``: whether the model is needed whole, for text of its own; ``may_speak``: whether it would be, if it fits in what is
    ``free`` where it is evaluated. ``room``: bytes of activations that may stay in memory, besides what a layer takes.
    """

    stored: int
    compute: int
    evaluation: int
    saved: int
    tokens: int
    evaluated_tokens: int = 0
    speaks: bool = False
    may_speak: bool = False
    free: int = 0
    room: int = 0
    gguf: bool = False
    on_gpu: bool = False


def sizes_of(
    config: PruneConfig,
    stored: torch.dtype | None,
    dtype: torch.dtype,
    device: torch.device,
    eval_device: torch.device,
    saved: torch.dtype,
) -> Sizes:
    """The sizes of a run: weights ``stored`` in this dtype (None: a .gguf file's), computed in ``dtype`` on ``device``, then ``saved``."""
    evaluated = 0 if config.eval_data and "none" in config.eval_data else TYPICAL_TEXTS
    if evaluated and config.eval_limit:
        evaluated = config.eval_limit * config.max_seq_len * (len(config.eval_data) if config.eval_data else 2)
    from_file = (config.calibration or "").endswith(".safetensors")
    return Sizes(
        stored=4 if stored is None else stored.itemsize,
        compute=dtype.itemsize,
        evaluation=evaluation_dtype(dtype, eval_device).itemsize,
        saved=saved.itemsize,
        tokens=-(-config.num_examples // processes.expected()) * config.seq_len,
        evaluated_tokens=-(-evaluated // processes.expected()),
        speaks=config.test_after_train or config.calibration in (None, "self") or (config.needs_probe_ids and not from_file),
        may_speak=config.distill != "none" or (config.self_share > 0 and not from_file),
        free=free_memory(eval_device),
        room=activation_room(device, 0),
        gguf=stored is None,
        on_gpu=device.type == "cuda",
    )


def _room(layer_bytes: int, sizes: Sizes) -> int:
    """Activations that stay in memory (LayerRunner)."""
    return max(MIN_ACTIVATION_BYTES, layer_bytes, sizes.room)


def _layer_bytes(shape: ModelShape, sizes: Sizes) -> int:
    return shape.layer_parameters(shape.heads, shape.kv_heads, shape.channels) * sizes.compute


def _activations(shape: ModelShape, sizes: Sizes) -> int:
    """Of the feed-forward part: the states, the inputs and outputs of its output projection, and its pruned outputs in float32."""
    return sizes.tokens * (shape.hidden * (2 * sizes.compute + 4) + shape.channels * sizes.compute)


def _layer_peak(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig, sizes: Sizes) -> int:
    """While a layer is pruned: itself, the next one as it is stored, activations, and the largest step of its feed-forward part."""
    layer = _layer_bytes(shape, sizes)
    hidden, channels = shape.hidden, shape.channels
    fits = "input_covariance" in RECOVERIES[config.recovery].needs and any(p.channels < channels for p in plans)
    batch = min(TOKENS_PER_BATCH, sizes.tokens)
    cast = sizes.compute != 4  # a copy in float32
    covariance = 4 * channels**2 if fits else 0
    running = batch * channels * (2 * sizes.compute + 4 * (2 + cast))
    choosing = 4 * hidden * channels * (3 * cast + 2) + 4 * 4 * hidden**2
    fitting = 4 * channels * (channels + 4 * hidden if fits else hidden)  # the layer that matters most keeps nearly all of them
    recovering = 4 * hidden * channels * (1 + cast) + fitting
    step = covariance + 4 * hidden**2 + max(running, choosing, recovering)
    return layer + layer // sizes.compute * sizes.stored + min(_room(layer, sizes), _activations(shape, sizes)) + step


def _distillation(shape: ModelShape, plans: list[LayerPlan], config: PruneConfig, sizes: Sizes) -> int:
    """The pruned model whole, what is trained with its gradients and moments, what one forward pass keeps for the backward one."""
    if config.distill == "none":
        return 0
    decoder = shape.decoder_parameters - removed_parameters(shape, plans, config)
    trained = decoder if config.distill == "all" else shape.layers * (4 * shape.hidden + shape.channels)
    weights = (decoder + shape.other_parameters) * sizes.compute  # trained in float32, with a gradient and two moments, and as they were
    weights += trained * (4 * (3 + (sizes.compute != 4)) + sizes.compute)
    if sizes.evaluation != sizes.compute:
        weights += decoder * sizes.evaluation
    kept = sum(10 * shape.hidden + 5 * p.channels + 4 * p.heads * shape.head_dim for p in plans) * DISTILLED_TOKENS * 6
    head = shape.vocab * shape.hidden * sizes.evaluation
    return weights + kept + head + 5 * DISTILLED_ROWS * shape.vocab * 4


def check_room(takes: Footprint, tmp_dir: str | None, device: torch.device) -> None:
    """Says, in one line, where a run takes more memory than there is. Raises UserError where its activations do not fit on the disk."""
    folder, several = temporary_folder(tmp_dir), processes.on_this_machine()
    free = shutil.disk_usage(folder).free
    if several * takes.temporary > free:
        raise UserError(
            f"the temporary folder {folder} has {free / 1e9:.1f} GB free, and {several * takes.temporary / 1e9:.1f} GB of activations go "
            "there; make room, name another folder with --tmp_dir, or lower --num_examples, --seq_len or --eval_limit"
        )
    for needed, place, way in (
        (several * takes.host, torch.device("cpu"), "--dtype bfloat16, --recovery linear and a calibration file lower it"),
        (takes.device, device, "--dtype bfloat16 and --device cpu lower it"),
    ):
        if needed and needed > (room := free_memory(place)):
            log.warning("this run takes about %.1f GB of memory on %s, and %.1f GB are free: %s", needed / 1e9, place, room / 1e9, way)
