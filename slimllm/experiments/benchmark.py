"""How much faster the package prunes than a plain transcription of the paper's equations: ``slimllm benchmark``.

Two cases on the CPU, both opponents in the same process on the same model and tokens, run in turn: a whole small
model, and one layer of LLaMA-7B's shape with random weights. For orientation the floor is timed too: two forward passes, the
covariances and one eigendecomposition per layer.

Two more, where asked for, show what streaming takes: ``hf_prune.py`` itself, in a process of its own, on a whole LLaMA-7B and on one
layer of LLaMA-2-70B's shape, both with random bfloat16 weights on disk.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..data.calibration import Calibration
from ..deploy.weight_files import WeightFiles
from ..models import loading
from ..models.adapter import LayerAdapter, with_multi_head_attention
from ..models.shape import shape_of
from ..models.source import ModelSource
from ..pruning import pipeline
from ..reporting import record
from ..reporting.tables import aligned
from ..run import Run
from ..settings.benchmark import STREAMS, BenchmarkConfig
from ..settings.pruning import PruneConfig
from ..streaming.runner import TOKENS_PER_BATCH
from . import plain

log = logging.getLogger("slimllm")

SAMPLES, LENGTH = 32, 128
LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
STREAMED = {  # case -> the model's config; its head and embeddings are the real ones
    "LLaMA-7B whole": dict(LLAMA_7B, num_hidden_layers=32, vocab_size=32000),
    "one layer of LLaMA-2-70B": dict(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=1, vocab_size=32000
    ),
}


STREAM_NAMES = dict(zip(STREAMS, STREAMED))


def llama_7b_layer():
    """One decoder layer of LLaMA-7B's shape with random weights and a small vocabulary."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA_7B, num_hidden_layers=1, vocab_size=1000)).eval()


def settings(model_config) -> PruneConfig:
    """The paper's settings for 20 %: ratio 0.25, 26 of 32 layers, alpha 10."""
    return PruneConfig(base_model="benchmark", pruning_ratio=0.25).resolved(shape_of(model_config))


def seconds(run, *args) -> float:
    gc.collect()
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


@torch.no_grad()
def floor(model, ids: torch.Tensor, pruned_layers: int) -> float:
    """Seconds for two forward passes through the layers and, for each pruned layer, two covariances and one eigh."""
    adapter = LayerAdapter(model.config)
    hidden, heads = model.config.hidden_size, adapter.all_parts(model)[0].output.in_features
    x, y = torch.randn(ids.numel(), heads), torch.randn(ids.numel(), hidden)

    def least():
        for _ in range(2):
            for batch in ids.split(TOKENS_PER_BATCH // ids.shape[1]):
                adapter.decoder(model)(input_ids=batch, use_cache=False)
        for _ in range(pruned_layers):
            x.T @ x
            torch.linalg.eigh(y.T @ y)

    return seconds(least)


def prune(model, ids: torch.Tensor, config: PruneConfig) -> None:
    """Both passes, in place."""
    run = Run(config, model.config, ModelSource.of(model), samples=Calibration(ids, "random"))
    pipeline.prune(run, pipeline.allocate(run))


def compare(name: str, make_model, ids: torch.Tensor, repeats: int, opponent_repeats: int) -> dict:
    """Medians of both opponents on copies of one model; the package's run comes before and after the opponent's."""
    model = make_model()
    config = settings(model.config)
    prune(copy.deepcopy(model), ids[:2], config)  # warm up
    ours, opponent = [], []
    for turn in range(max(repeats, opponent_repeats)):
        if turn < repeats:
            ours.append(seconds(prune, copy.deepcopy(model), ids, config))
        if turn < opponent_repeats:
            opponent.append(seconds(plain.prune, copy.deepcopy(model), ids, config.pruning_ratio, config.pruned_layers, config.alpha))
    least = floor(model, ids, config.pruned_layers)
    ratio = statistics.median(opponent) / statistics.median(ours)
    return {"case": name, "plain": opponent, "slimllm": ours, "floor": least, "speedup": ratio}


def write_random_model(folder: Path, sizes: dict, model_type: str = "llama", device="cpu") -> None:
    """A model of this config with random bfloat16 weights, written one tensor at a time, with a tokenizer and calibration tokens.

    The tokenizer has a token for each byte. ``device``: where the random numbers are drawn.
    """
    config = AutoConfig.for_model(model_type, **sizes, dtype="bfloat16")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    files = WeightFiles.of(folder, model)
    for name, (dtype, shape) in tqdm(files.layout.items(), desc="random weights", unit="tensor", leave=False, disable=None):
        tensor = torch.ones(shape) if len(shape) == 1 else torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
        files.write(name, tensor.to(dtype))
    files.close()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (SAMPLES, LENGTH), generator=generator)
    Calibration(ids, "random").save(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    symbols = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *symbols])}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def stream(name: str, recipes: tuple[str, ...], work_dir: str | None) -> list[dict]:
    """What ``hf_prune.py`` takes on the case ``name`` of STREAMED, in seconds and bytes, with each recipe; and the floor."""
    sizes = STREAMED[name]
    found = []
    with tempfile.TemporaryDirectory(prefix="slimllm-", dir=work_dir) as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        write_random_model(model, sizes)
        for recipe in recipes:
            command = [
                sys.executable,
                str(Path(__file__).parents[2] / "hf_prune.py"),
                "--base_model",
                str(model),
                "--pruning_ratio",
                "0.25",
            ]
            command += ["--dtype", "bfloat16", "--calibration", str(model / "calibration.safetensors"), "--eval_data", "none"]
            command += ["--recipe", recipe, "--save_ckpt_log_name", recipe]
            elapsed = seconds(functools.partial(subprocess.run, command, cwd=scratch, check=True))
            result = record.PruningRecord.read(Path(scratch) / "prune_log" / recipe)
            layers = sorted(layer["seconds"] for layer in result.layers)
            found.append(
                {
                    "case": name,
                    "recipe": recipe,
                    "seconds": elapsed,
                    "pruning": result.seconds["pruning"],
                    "layer": statistics.median(layers),
                    "peak_bytes": result.peak_memory["cpu_bytes"],
                }
            )
            log.info("%s, %s: %.0f s, %.2f GB", name, recipe, elapsed, result.peak_memory["cpu_bytes"] / 1e9)
            shutil.rmtree(Path(scratch) / "prune_log" / recipe)
    one = LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 1, "vocab_size": 1000})).eval().to(torch.bfloat16)
    ids, config = torch.randint(1000, (SAMPLES, LENGTH)), settings(LlamaConfig(**sizes))
    whole, pruned = floor(one, ids, 0), floor(one, ids, 1)
    least = config.pruned_layers * pruned + (sizes["num_hidden_layers"] - config.pruned_layers) * whole
    return [entry | {"floor": least} for entry in found]


def run(config: BenchmarkConfig) -> None:
    """Runs the cases and prints their tables."""
    with record.results_at(config.json, True, "name another --json"):
        _run(config)


def _run(config: BenchmarkConfig) -> None:
    streamed = [entry for case in config.stream for entry in stream(STREAM_NAMES[case], config.recipe, config.work_dir)]
    results = compared(config)
    rows = [["case", "recipe", "in all, s", "pruning, s", "a pruned layer, s", "floor, s", "peak memory, GB"]]
    for r in streamed:
        cells = [f"{r[what]:.1f}" for what in ("seconds", "pruning", "layer", "floor")]
        rows.append([r["case"], r["recipe"], *cells, f"{r['peak_bytes'] / 1e9:.2f}"])
    if streamed:
        log.info("%s", "\n".join(aligned(rows)))
    if config.json:
        record.save_results({"format": record.FORMAT, "results": results, "streamed": streamed}, Path(config.json))


def compared(config: BenchmarkConfig) -> list[dict]:
    """The cases beside the plain transcription, and their table."""
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
    if results:
        log.info("%s", "\n".join(aligned(rows)))
    return results
