"""How much faster the package prunes than a plain transcription of the paper's equations: ``python -m slimllm.benchmark``.

Two cases on the CPU, both opponents in the same process on the same model and tokens, run in turn: a whole small
model, and one layer of LLaMA-7B's shape with random weights. Run from a clone of the repository (the opponent is
``tests/plain.py``). For orientation the floor is timed too: two forward passes, the covariances and one
eigendecomposition a layer.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from . import families, pipeline, runner
from .cli import UserError
from .config import PruneConfig
from .report import aligned

SAMPLES, LENGTH = 32, 128
LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)


def llama_7b_layer():
    """One decoder layer of LLaMA-7B's shape with random weights and a small vocabulary."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_7B, num_hidden_layers=1, vocab_size=1000)).eval()


def settings(model) -> PruneConfig:
    """The paper's settings for 20 %: ratio 0.25, 26 of 32 layers, alpha 10."""
    config = PruneConfig(base_model="benchmark", pruning_ratio=0.25)
    config.resolve(families.shape_of(model.config, families.family_of(model.config)))
    return config


def seconds(run, *args) -> float:
    gc.collect()
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


@torch.no_grad()
def floor(model, ids: torch.Tensor, pruned_layers: int) -> float:
    """Seconds for two forward passes through the layers and, for each pruned layer, two covariances and one eigh."""
    hidden, heads = model.config.hidden_size, model.model.layers[0].self_attn.o_proj.in_features
    x, y = torch.randn(ids.numel(), heads), torch.randn(ids.numel(), hidden)

    def least():
        for _ in range(2):
            for batch in ids.split(runner.TOKENS_PER_BATCH // ids.shape[1]):
                model.model(input_ids=batch, use_cache=False)
        for _ in range(pruned_layers):
            x.T @ x
            torch.linalg.eigh(y.T @ y)

    return seconds(least)


def compare(name: str, make_model, ids: torch.Tensor, repeats: int, opponent_repeats: int) -> dict:
    """Medians of both opponents on copies of one model; the package's run comes before and after the opponent's."""
    from tests import plain

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


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slimllm.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base_model", help="the small multi-head or grouped-query Llama model; without it only the single layer is measured"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of the package in each case [3]")
    parser.add_argument(
        "--plain_repeats", type=int, default=1, help="runs of the plain transcription of the large layer; the small model has --repeats [1]"
    )
    parser.add_argument("--skip_layer", action="store_true", help="leave the layer of LLaMA-7B's shape out")
    parser.add_argument("--json", help="write the measurements to this file as well")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = []
    try:
        if args.base_model:
            model = families.with_multi_head_attention(families.load_model(args.base_model, torch.float32))
            torch.manual_seed(0)
            ids = torch.randint(model.config.vocab_size, (SAMPLES, LENGTH))
            results.append(compare("whole model", lambda: model, ids, args.repeats, args.repeats))
            del model
    except UserError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    if not args.skip_layer:
        ids = torch.randint(1000, (SAMPLES, LENGTH))
        results.append(compare("one LLaMA-7B layer", llama_7b_layer, ids, args.repeats, args.plain_repeats))
    rows = [["case", "plain, median s", "slimllm, median s", "speed-up", "floor, s"]]
    for r in results:
        rows.append(
            [
                r["case"],
                f"{statistics.median(r['plain']):.1f} (n={len(r['plain'])})",
                f"{statistics.median(r['slimllm']):.1f} (n={len(r['slimllm'])})",
                f"{r['speedup']:.1f} x",
                f"{r['floor']:.1f}",
            ]
        )
    print("\n".join(aligned(rows)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"threads": torch.get_num_threads(), "results": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
