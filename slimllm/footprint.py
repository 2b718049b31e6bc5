"""How much memory and disk a run takes, from the model's shape and the settings alone: from what each stage estimates for itself."""

from __future__ import annotations

import logging
import shutil

import torch

from .data import calibration
from .data.texts import TOKENIZING
from .errors import UserError
from .evaluation import perplexity
from .models.loading import WholeModel
from .models.weights import PIECE
from .plan import LayerPlan, removed_parameters
from .pruning import depth, layer
from .pruning.allocation import prices
from .run import Run
from .settings.samples import is_sample_file
from .streaming.activations import temporary_folder
from .streaming.runner import LOGIT_ROWS
from .streaming.sizes import Footprint, Sizes
from .training import distillation
from .utils import processes
from .utils.device import evaluation_dtype
from .utils.memory import activation_room, free_memory

log = logging.getLogger("slimllm")

PROGRAM = 490_000_000  # the interpreter with torch and transformers
CUDA_BUILD, GPU_CONTEXT = 460_000_000, 700_000_000  # what a torch with CUDA takes besides, and what it takes once a GPU is in use
GGUF_PROGRAM = 80_000_000  # what is left of a parsed .gguf file
TYPICAL_TEXTS = 450_000  # tokens of WikiText-2 and PTB together


def footprint(run: Run, plans: list[LayerPlan], stored: torch.dtype | None, saved: torch.dtype) -> Footprint:
    """What a run with these plans takes; weights are ``stored`` (None: in a .gguf file), computed, then ``saved`` in these."""
    shape, config, sizes = run.shape, run.config, sizes_of(run, stored, saved)
    rows = shape.vocab + shape.tokens_gone
    embedding = rows * (shape.hidden + shape.token_inputs) * sizes.compute + PIECE * max(sizes.stored, sizes.compute)
    distilling, distilling_host = distillation.peak_bytes(run, plans, sizes)
    peak = max(
        depth.peak_bytes(run, sizes),
        layer.peak_bytes(run, plans, sizes),
        prices.peak_bytes(run, sizes),
        embedding + 3 * LOGIT_ROWS * shape.vocab * 4,
        perplexity.peak_bytes(shape, sizes),
        WholeModel.peak_bytes(shape.parameters, sizes),
        distilling,
    )
    named = [config.calibration, *(config.vocab_text or ())]
    tokenizing = TOKENIZING * max(map(calibration.characters_of, named), default=0)
    program = PROGRAM + (GGUF_PROGRAM if sizes.gguf else 0) + (CUDA_BUILD if torch.version.cuda else 0)
    kept = shape.parameters - removed_parameters(shape, plans, config)
    largest = max(one.parameters for one in shape.layers)
    temporary = max(
        _beyond_memory(largest * sizes.compute, depth.activation_bytes(run, sizes), sizes),
        _beyond_memory(largest * sizes.compute, layer.activation_bytes(run, sizes), sizes),
        _beyond_memory(largest * sizes.evaluation, prices.activation_bytes(run, sizes), sizes),
        _evaluated(run, largest, sizes),
    )
    journal = 0  # the states after a layer, and after the next
    if config.resume is not False:
        journal = 2 * sizes.tokens * shape.streamed * sizes.compute * (2 if config.look_back else 1)
    temporary, beside = (temporary, journal) if config.tmp_dir is None else (temporary + journal, 0)
    beside = max(beside, distillation.kept_bytes(run, plans))
    if sizes.on_gpu:
        return Footprint(
            program + GPU_CONTEXT + max(embedding, 3 * largest * sizes.stored, distilling_host, tokenizing),
            peak,
            temporary,
            kept * sizes.saved,
            beside,
        )
    return Footprint(program + max(peak, tokenizing), 0, temporary, kept * sizes.saved, beside)


def _beyond_memory(layer_bytes: int, activation_bytes: int, sizes: Sizes) -> int:
    """Bytes of activations that go to the disk."""
    return activation_bytes - sizes.kept_in_memory(layer_bytes, activation_bytes)


def _evaluated(run: Run, largest: int, sizes: Sizes) -> int:
    """Bytes of the states of the texts measured on that go to the disk; ``largest``: parameters of a layer."""
    states = sizes.evaluated_tokens * (run.shape.streamed + run.shape.token_inputs) * sizes.evaluation
    return _beyond_memory(largest * sizes.evaluation, states, sizes)


def sizes_of(run: Run, stored: torch.dtype | None, saved: torch.dtype) -> Sizes:
    """The sizes of a run: weights ``stored`` in this dtype (None: a .gguf file's), then ``saved`` in that."""
    config = run.config
    evaluated = TYPICAL_TEXTS if config.measures_texts else 0
    if evaluated and config.eval_limit:
        evaluated = config.eval_limit * config.max_seq_len * (len(config.eval_data) if config.eval_data else 2)
    from_file = is_sample_file(config.calibration)
    return Sizes(
        stored=4 if stored is None else stored.itemsize,
        compute=run.dtype.itemsize,
        evaluation=evaluation_dtype(run.dtype, run.eval_device).itemsize,
        saved=saved.itemsize,
        tokens=-(-config.num_examples // processes.expected()) * config.seq_len,
        evaluated_tokens=-(-evaluated // processes.expected()),
        generates=config.test_after_train or config.calibration in (None, "self"),
        may_generate=config.distill != "none" or (config.self_share > 0 and not from_file),
        answers=config.asks,
        free=free_memory(run.eval_device),
        room=activation_room(run.device, 0),
        gguf=stored is None,
        on_gpu=run.device.type == "cuda",
    )


def check_room(takes: Footprint, run: Run) -> None:
    """Warns, in one line, where a run takes more memory than there is. Raises UserError where its activations do not fit on the disk."""
    folder, several = temporary_folder(run.config.tmp_dir), processes.on_this_machine()
    free = shutil.disk_usage(folder).free
    if several * takes.temporary > free:
        raise UserError(
            f"the temporary folder {folder} has {free / 1e9:.1f} GB free, and {several * takes.temporary / 1e9:.1f} GB of activations go "
            "there; make room, name another folder with --tmp_dir, or lower --num_examples, --seq_len or --eval_limit"
        )
    for needed, place, way in (
        (several * takes.host, torch.device("cpu"), "--dtype bfloat16, --recovery linear and a calibration file lower it"),
        (takes.device, run.device, "--dtype bfloat16 and --device cpu lower it"),
    ):
        if needed and needed > (room := free_memory(place)):
            log.warning("this run takes about %.1f GB of memory on %s, and %.1f GB are free: %s", needed / 1e9, place, room / 1e9, way)
