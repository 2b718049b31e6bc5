"""Everything that a GPU changes, once, on random models made on the spot: ``slimllm gpu``, which script/gpu.sh starts.

Each step is a program as a user runs it, in a process of its own; what it took is read from the record that it wrote, beside what
was predicted before it began. The table is kept as one JSON file, written anew after each step.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from .. import api
from ..errors import UserError
from ..models import loading
from ..reporting import record
from ..reporting.record import PruningRecord, TrainingRecord
from ..reporting.tables import aligned
from ..settings.gpu import GpuConfig
from ..utils.device import device_of, name_of
from .benchmark import LLAMA_7B, write_random_model

log = logging.getLogger("slimllm")

ROOT = Path(__file__).parents[2]
_QWEN3 = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
# size -> model -> (model_type, what its config says); "small" is for decisions to compare, the others have the shape of a known model
MODELS = {
    "full": {
        "small": ("llama", dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_hidden_layers=6, vocab_size=2000)),
        "LLaMA-7B": ("llama", dict(LLAMA_7B, num_hidden_layers=32, vocab_size=32000)),
        "Qwen3-0.6B": ("qwen3", dict(_QWEN3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, vocab_size=151936)),
    },
    "tiny": {
        "small": ("llama", dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=300)),
        "LLaMA-7B": ("llama", dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=300)),
        "Qwen3-0.6B": (
            "qwen3",
            dict(_QWEN3, head_dim=8, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=300),
        ),
    },
}
TRAINING_ROWS = 256
ROUND_TO = {"full": "64", "tiny": "8"}  # widths that a GPU computes fast


@dataclass(frozen=True)
class Step:
    """One program: what it shows, of which model, and in which dtype; its command line; and what is read from what it wrote.

    ``outcome(folder)``: a dict of ``seconds``, ``peak_memory``, ``predicted_memory`` and ``said``, as far as the program tells.
    """

    name: str
    model: str
    dtype: str
    argv: list[str]
    outcome: Callable[[Path], dict]


def _run_of(step: str, model: str, dtype: str) -> str:
    """The name of the pruning run of a step."""
    return f"{model}_{step}_{dtype}".replace(", ", "_").replace(" ", "_")


def _pruning(name: str, model: str, dtype: str, device: str, *flags: str, said: Callable[[PruningRecord], str] = lambda run: "") -> Step:
    argv = [str(ROOT / "hf_prune.py"), "--base_model", model, "--dtype", dtype, "--device", device, "--eval_device", device]
    folder = f"prune_log/{_run_of(name, model, dtype)}"

    def outcome(scratch: Path) -> dict:
        run = PruningRecord.read(scratch / folder)
        found = {"seconds": run.seconds, "peak_memory": run.peak_memory, "predicted_memory": run.predicted_memory}
        return found | {"said": said(run), "folder": folder}

    return Step(name, model, dtype, [*argv, "--target_sparsity", "0.2", *flags, "--save_ckpt_log_name", Path(folder).name], outcome)


def steps(device: str, size: str) -> list[Step]:
    """All of them, in order; each finds what those before it wrote."""
    text, measured = ("--calibration", "text.txt"), ("--eval_data", "python_manual", "--eval_limit", "16")
    few = ("--num_examples", "8" if size == "tiny" else "64")
    more = ("--num_examples", "8" if size == "tiny" else "128")
    paper = ("--recipe", "paper", *text, *measured)
    whole_blocks = ("--recipe", "best", "--round_to", ROUND_TO[size], *more, *text, *measured)
    found = [
        _pruning("paper", "LLaMA-7B", "bfloat16", device, *paper, said=_perplexity),
        _pruning("best", "LLaMA-7B", "bfloat16", device, *whole_blocks, said=_perplexity),
        _timing("best", device, size),
    ]
    for dtype in ("bfloat16", "float16"):
        flags = ("--recipe", "distilled", "--distill_examples", "16" if size == "tiny" else "128", *few, *text, *measured)
        found.append(_pruning("distilled", "Qwen3-0.6B", dtype, device, *flags, said=_divergence))
    argv = [str(ROOT / "post_training.py"), "--prune_model", f"prune_log/{_run_of('distilled', 'Qwen3-0.6B', 'bfloat16')}"]
    argv += ["--data_path", "rows.json", "--num_epochs", "1", "--device", device, "--output_dir", "tuned", "--merge"]
    argv += ["--extra_val_dataset", "python_manual", "--eval_limit", "16", "--val_set_size", "16", "--batch_size", "16"]
    found += [Step("LoRA, merged", "Qwen3-0.6B", "bfloat16", argv, _training), _timing("paper", device, size)]
    return [*found, _pruning("paper", "LLaMA-7B", "float16", device, *paper, said=_perplexity)]


def _timing(recipe: str, device: str, size: str) -> Step:
    """How fast the pruned LLaMA-7B is beside the dense one."""
    folder, output = f"prune_log/{_run_of(recipe, 'LLaMA-7B', 'bfloat16')}", f"latency_{recipe}.json"
    shape = ("--batch_size", "1", "8", "--length", *(("32", "--repeats", "2") if size == "tiny" else ("512", "--repeats", "5")))
    argv = ["-m", "slimllm", "latency", folder, "--baseline", "LLaMA-7B", "--device", device, "--new_tokens", "8", *shape, "--json", output]
    return Step(f"latency, {recipe}", "LLaMA-7B", "bfloat16", argv, functools.partial(_latency, output))


def decisions(folder: Path, device: torch.device, dtype: torch.dtype, recipe: str) -> dict:
    """How many of the heads and channels of the small model that the GPU keeps are those that the CPU keeps in float32."""
    samples, kept = load_file(folder / "calibration.safetensors")["calibration_ids"], []
    begun, level = time.perf_counter(), log.level
    log.setLevel(logging.WARNING)
    for place, kind in ((torch.device("cpu"), torch.float32), (device, dtype)):
        model = loading.load_model(str(folder), kind)
        result = api.prune(model, calibration=samples, recipe=recipe, target_sparsity=0.2, device=str(place))
        kept.append(result.layers)
    log.setLevel(level)
    shares = []
    for kind, kept_there in kept[0][0].kept.items():
        sort = next(iter(kept_there))
        pairs = [(set(a.kept[kind][sort]), set(b.kept[kind][sort])) for a, b in zip(*kept)]
        shares.append(f"{sort} as on the CPU {sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs):.3%}")
    return {"wall_seconds": round(time.perf_counter() - begun, 1), "said": ", ".join(shares)}


def _perplexity(run: PruningRecord) -> str:
    return ", ".join(f"perplexity {f['dense']:.0f} -> {f['pruned']:.0f}" for f in run.evaluation)


def _divergence(run: PruningRecord) -> str:
    found = run.distillation
    return f"divergence {found['before']:.4f} -> {found['after']:.4f}, {'kept' if found['kept'] else 'not kept'}"


def _latency(output: str, folder: Path) -> dict:
    found = json.loads((folder / output).read_text())
    of = {(e["model"] == "dense", e["batch_size"]): e for e in found["measurements"]}
    said = []
    for batch in (1, 8):
        for kind in ("prefill", "decode"):
            dense, pruned = (min(of[which, batch][kind]) for which in (True, False))
            said.append(f"{kind} of {batch} {1000 * dense:.1f} -> {1000 * pruned:.1f} ms")
    return {"peak_memory": found["peak_memory"], "said": ", ".join(said)}


def _training(folder: Path) -> dict:
    found = TrainingRecord(**{k: v for k, v in record.read_json(folder / "tuned" / TrainingRecord.FILE).items() if k != "format"})
    [text] = found.evaluation
    return {"seconds": found.seconds, "peak_memory": found.peak_memory, "said": f"perplexity {text['before']:.0f} -> {text['after']:.0f}"}


def run(config: GpuConfig) -> int:
    """Makes the models, runs the steps, and prints their table. Returns the exit status: 1 where a step failed or was left out."""
    device, started = device_of("device", config.device), time.perf_counter()
    results = {"format": record.FORMAT, "size": config.size, "device": str(device), "steps": []}
    output = Path(config.output).absolute()
    with record.results_at(output, True), tempfile.TemporaryDirectory(prefix="slimllm-", dir=config.work_dir) as scratch:
        if config.device == "auto" and device.type != "cuda":
            raise UserError("--device auto: torch finds no GPU here; to rehearse the check on the CPU: --device cpu --size tiny")
        folder = Path(scratch)
        _write_texts(folder)
        _make("small", config.size, folder, device)
        for recipe, dtype in itertools.product(("paper", "best"), (torch.float32, torch.bfloat16, torch.float16)):
            entry = {"step": f"decisions, {recipe}", "model": "small", "dtype": name_of(dtype)}
            _add(results, entry | decisions(folder / "small", device, dtype, recipe), output)
        todo = steps(str(device), config.size)
        for number, step in enumerate(todo, 1):
            left = 60 * config.minutes - (time.perf_counter() - started)
            if left > 0:
                _make(step.model, config.size, folder, device)
            entry = {"step": step.name, "model": step.model, "dtype": step.dtype, "argv": step.argv}
            entry |= _taken(step, folder, left) if left > 0 else {"failed": "left out: the time is up"}
            _add(results, entry, output)
            if "folder" in entry and not any(entry["folder"] in later.argv for later in todo[number:]):
                shutil.rmtree(folder / entry["folder"])  # its checkpoint is large
    log.info("\n%s\n\nin %s", "\n".join(table(results["steps"])), output)
    return int(any("failed" in entry for entry in results["steps"]))


def _make(name: str, size: str, folder: Path, device: torch.device) -> None:
    """Makes a model, where it is not there yet."""
    if (folder / name).is_dir():
        return
    begun = time.perf_counter()
    model_type, sizes = MODELS[size][name]
    (folder / name).mkdir()
    write_random_model(folder / name, sizes, model_type, device)
    log.info("%s: made in %.0f s", name, time.perf_counter() - begun)


def _add(results: dict, entry: dict, output: Path) -> None:
    results["steps"].append(entry)
    record.save_results(results, output)
    log.info("%s", "\n".join(table([entry])[2:]))


def _write_texts(folder: Path) -> None:
    """Text to calibrate on and rows to train on: the Python manual, which every interpreter has."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    (folder / "text.txt").write_text("\n".join(topics), encoding="utf-8")
    paragraphs = [part for text in topics for part in text.split("\n\n") if len(part) > 200]
    (folder / "rows.json").write_text(json.dumps([{"text": part} for part in paragraphs[:TRAINING_ROWS]]), encoding="utf-8")


def _taken(step: Step, folder: Path, limit: float) -> dict:
    """What a step took and came to; where it failed, what it said last."""
    begun = time.perf_counter()
    status, output = program(step.argv, folder, limit)
    entry = {"wall_seconds": round(time.perf_counter() - begun, 1)}
    if status:
        return entry | {"failed": output[-2000:]}
    here = os.getcwd()
    try:
        os.chdir(folder)
        return entry | step.outcome(Path())
    finally:
        os.chdir(here)


def program(argv: list[str], folder: Path, limit: float) -> tuple[int, str]:
    """(exit status, what it printed) of a Python program run in ``folder``, for at most ``limit`` seconds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, "stopped: the time is up"
    return done.returncode, done.stdout + done.stderr


def table(entries: list[dict]) -> list[str]:
    """Markdown, one row per step: seconds in all and of pruning, peaks of memory with what was predicted, what came of it."""
    rows = [["step", "model", "dtype", "seconds", "of them", "GPU memory, GB (predicted)", "host memory, GB (predicted)", "outcome"]]
    for entry in entries:
        peaks, predicted = entry.get("peak_memory") or {}, entry.get("predicted_memory") or {}
        memory = []
        for kind in ("gpu_bytes", "cpu_bytes"):
            expected = f" ({predicted[kind] / 1e9:.2f})" if predicted.get(kind) else ""
            memory.append(f"{peaks[kind] / 1e9:.2f}{expected}" if kind in peaks else "")
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in (entry.get("seconds") or {}).items())
        said = entry.get("said") if "failed" not in entry else "FAILED: " + " ".join(entry["failed"].split())[-300:]
        seconds = f"{entry['wall_seconds']:.0f}" if "wall_seconds" in entry else ""
        rows.append([entry["step"], entry["model"], entry["dtype"], seconds, parts, *memory, said or ""])
    return aligned(rows)
