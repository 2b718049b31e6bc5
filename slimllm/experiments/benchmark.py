"""How much faster the package prunes than a plain transcription of the paper's equations: ``python -m slimllm benchmark``.

Two cases on the CPU, both opponents in the same process on the same model and tokens, run in turn: a whole small
model, and one layer of LLaMA-7B's shape with random weights. For orientation the floor is timed too: two forward passes, the
covariances and one eigendecomposition per layer.
"""

from __future__ import annotations

import copy
import gc
import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..cli import check_range, flag
from ..models import loading
from ..models.adapter import LayerAdapter, with_multi_head_attention
from ..models.shape import shape_of
from ..pruning import pipeline
from ..pruning.config import PruneConfig
from ..pruning.runner import TOKENS_PER_BATCH
from ..reporting import record
from ..reporting.tables import aligned
from . import plain

log = logging.getLogger("slimllm")

SAMPLES, LENGTH = 32, 128
LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)


@dataclass
class BenchmarkConfig:
    """Settings of a benchmark. Raises UserError where a value makes no sense."""

    base_model: str | None = flag(
        "cases", "the small Llama model, multi-head or grouped-query; without it only the single layer is measured"
    )
    skip_layer: bool = flag("cases", "leave the layer of LLaMA-7B's shape out", False)
    repeats: int = flag("measurement", "runs of the package in each case", 3)
    plain_repeats: int = flag("measurement", "runs of the plain transcription of the large layer; the small model has --repeats", 1)
    json: str | None = flag("output", "write the measurements to this file as well")

    def __post_init__(self):
        check_range(self, "repeats", 1)
        check_range(self, "plain_repeats", 1)


def llama_7b_layer():
    """One decoder layer of LLaMA-7B's shape with random weights and a small vocabulary."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_7B, num_hidden_layers=1, vocab_size=1000)).eval()


def settings(model) -> PruneConfig:
    """The paper's settings for 20 %: ratio 0.25, 26 of 32 layers, alpha 10."""
    config = PruneConfig(base_model="benchmark", pruning_ratio=0.25)
    config.resolve(shape_of(model.config))
    return config


def seconds(run, *args) -> float:
    gc.collect()
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


@torch.no_grad()
def floor(model, ids: torch.Tensor, pruned_layers: int) -> float:
    """Seconds for two forward passes through the layers and, for each pruned layer, two covariances and one eigh."""
    adapter = LayerAdapter(model.config)
    (attention, _), *_ = adapter.blocks(model)
    hidden, heads = model.config.hidden_size, attention.output.in_features
    x, y = torch.randn(ids.numel(), heads), torch.randn(ids.numel(), hidden)

    def least():
        for _ in range(2):
            for batch in ids.split(TOKENS_PER_BATCH // ids.shape[1]):
                adapter.decoder(model)(input_ids=batch, use_cache=False)
        for _ in range(pruned_layers):
            x.T @ x
            torch.linalg.eigh(y.T @ y)

    return seconds(least)


def compare(name: str, make_model, ids: torch.Tensor, repeats: int, opponent_repeats: int) -> dict:
    """Medians of both opponents on copies of one model; the package's run comes before and after the opponent's."""
    model = make_model()
    config = settings(model)
    pipeline.prune(copy.deepcopy(model), ids[:2], config)  # warm up
    ours, opponent = [], []
    for turn in range(max(repeats, opponent_repeats)):
        if turn < repeats:
            ours.append(seconds(pipeline.prune, copy.deepcopy(model), ids, config))
        if turn < opponent_repeats:
            opponent.append(seconds(plain.prune, copy.deepcopy(model), ids, config.pruning_ratio, config.pruned_layers, config.alpha))
    least = floor(model, ids, config.pruned_layers)
    ratio = statistics.median(opponent) / statistics.median(ours)
    return {"case": name, "plain": opponent, "slimllm": ours, "floor": least, "speedup": ratio}


def run(config: BenchmarkConfig) -> None:
    """Runs the cases and prints their table."""
    results = []
    if config.base_model:
        model = with_multi_head_attention(loading.load_model(config.base_model, torch.float32))
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (SAMPLES, LENGTH))
        results.append(compare("whole model", lambda: model, ids, config.repeats, config.repeats))
        del model
    if not config.skip_layer:
        ids = torch.randint(1000, (SAMPLES, LENGTH))
        results.append(compare("one LLaMA-7B layer", llama_7b_layer, ids, config.repeats, config.plain_repeats))
    rows = [["case", "plain, median s", "slimllm, median s", "speed-up", "floor, s"]]
    for r in results:
        medians = [f"{statistics.median(r[who]):.1f} (n={len(r[who])})" for who in ("plain", "slimllm")]
        rows.append([r["case"], *medians, f"{r['speedup']:.1f} x", f"{r['floor']:.1f}"])
    log.info("%s", "\n".join(aligned(rows)))
    if config.json:
        record.save_results({"format": record.FORMAT, "results": results}, Path(config.json))
