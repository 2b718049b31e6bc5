"""How fast and how large a model is, beside the dense one it came from: ``python -m slimllm.latency DIR --baseline DENSE``.

Both models are measured in turns in one run: prefill (one forward pass over a prompt) and decode (one token after the other with
the KV cache), synchronised, after a warm-up, as medians with the range of the middle half.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cli, families, record, report
from .cli import UserError, check_choices, check_range, flag
from .config import DTYPES
from .evaluation import evaluation_dtype

log = cli.log
PARTS = {"attention": "self_attn", "feed-forward": "mlp", "output head": "lm_head"}


@dataclass
class LatencyConfig:
    """Settings of a measurement. Raises UserError where a value makes no sense."""

    model: str = flag("model", "checkpoint folder, hub name or .gguf file", positional=True, nargs="?")
    baseline: str = flag("model", "the dense model to compare with")
    dtype: str = flag("model", "dtype of the weights; auto: bfloat16 on a GPU or a CPU fast in it, else float32", "auto", choices=DTYPES)
    device: str = flag("model", "auto takes a GPU if there is one", "auto")
    batch_size: tuple = flag("measurement", "sequences at once", (1, 8), nargs="+", type=int)
    length: tuple = flag("measurement", "tokens of the prompt", (128, 512), nargs="+", type=int)
    new_tokens: int = flag("measurement", "tokens decoded after it", 32, type=int)
    repeats: int = flag("measurement", "measurements of each kind", 7, type=int)
    json: str = flag("output", "write the measurements to this file as well")

    def __post_init__(self):
        if not self.model:
            raise UserError("name a model: python -m slimllm.latency prune_log/NAME")
        check_choices(self)
        check_range(self, "new_tokens", 1)
        check_range(self, "repeats", 1)
        for name in ("batch_size", "length"):
            for value in getattr(self, name):
                if value < 1:
                    raise UserError(f"--{name} {value}: must be at least 1")


def size_of(model) -> dict:
    """Parameters, bytes of weights, KV-cache bytes a token, MACs a token of all Linears, attention's MACs a pair of tokens."""
    blocks = [layer.self_attn for layer in model.model.layers]
    kv = sum(block.k_proj.out_features + block.v_proj.out_features for block in blocks)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return {
        "parameters": model.num_parameters(),
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "kv_bytes_a_token": kv * model.dtype.itemsize,
        "linear_macs": linear,  # the output head included, tied or not
        "attention_macs": 2 * sum(block.q_proj.out_features for block in blocks),
    }


def macs(size: dict, length: int) -> int:
    """Multiply-accumulates of one sequence's prefill: every Linear at each token, and causal attention."""
    return length * size["linear_macs"] + size["attention_macs"] * length * (length + 1) // 2


def _synchronise(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def prefill(model, ids) -> tuple[float, object, torch.Tensor]:
    """(seconds, cache, next token ids [batch, 1]) of one forward pass over the prompt ``ids`` [batch, length]."""
    _synchronise(model.device)
    started = time.perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    _synchronise(model.device)
    return time.perf_counter() - started, output.past_key_values, token


@torch.no_grad()
def decode(model, cache, token, count: int) -> float:
    """Seconds a step of decoding ``count`` tokens greedily."""
    _synchronise(model.device)
    started = time.perf_counter()
    for _ in range(count):
        output = model(token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    _synchronise(model.device)
    return (time.perf_counter() - started) / count


@contextmanager
def timed_parts(model):
    """Gives a dict that collects the seconds spent in the attention, feed-forward and output-head modules."""
    seconds, hooks = dict.fromkeys(PARTS, 0.0), []

    def watch(module, part):
        started = []

        def before(*_):
            _synchronise(model.device)
            started.append(time.perf_counter())

        def after(*_):
            _synchronise(model.device)
            seconds[part] += time.perf_counter() - started.pop()

        hooks.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    for part, name in PARTS.items():
        for module_name, module in model.named_modules():
            if module_name.rpartition(".")[2] == name:
                watch(module, part)
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _reset_peak(device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux: the peak is then the process's so far


def _peak(device) -> int:
    """Peak bytes since :func:`_reset_peak`: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return record.peak_memory()["cpu_bytes"]


def measure(models: dict, sizes: dict, config: LatencyConfig, device: torch.device) -> list[dict]:
    """One entry for each model, batch size and length: all times in seconds, as lists of ``repeats`` measurements."""
    entries = []
    weights = {name: size["weight_bytes"] for name, size in sizes.items()}
    others = {name: sum(weights.values()) - own for name, own in weights.items()}  # all models stay loaded
    vocabulary = min(model.config.vocab_size for model in models.values())
    for batch in config.batch_size:
        for length in config.length:
            ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
            runs = {name: {"prefill": [], "decode": []} for name in models}
            for repeat in range(config.repeats + 1):
                for name, model in models.items():
                    if not repeat:
                        _reset_peak(device)
                    seconds, cache, token = prefill(model, ids)
                    step = decode(model, cache, token, config.new_tokens)
                    if not repeat:  # the warm-up, which also touches all memory
                        runs[name]["peak_bytes"] = _peak(device) - others[name]
                        continue
                    runs[name]["prefill"].append(seconds)
                    runs[name]["decode"].append(step)
            for name, model in models.items():
                with timed_parts(model) as parts:
                    prefill(model, ids)
                entries.append({"model": name, "batch_size": batch, "length": length, **runs[name], "prefill_parts": parts})
                log.info("%s, batch %d, length %d: prefill %s", name, batch, length, _spread(runs[name]["prefill"]))
    return entries


def _spread(seconds: list[float]) -> str:
    """Median and middle half, in milliseconds."""
    ms = sorted(1000 * s for s in seconds)
    if len(ms) < 4:
        return f"{statistics.median(ms):.1f} ms ({ms[0]:.1f}..{ms[-1]:.1f})"
    low, middle, high = statistics.quantiles(ms, n=4)
    return f"{middle:.1f} ms ({low:.1f}..{high:.1f})"


def tables(sizes: dict, entries: list[dict], baseline: str | None) -> list[str]:
    """Markdown: one table of sizes and one of times; speed-ups are of medians, against ``baseline``."""
    rows = [["model", "parameters", "weights", "KV cache a token", "MACs of a 128-token prompt"]]
    for name, size in sizes.items():
        cells = [f"{size['parameters'] / 1e6:.1f} M", f"{size['weight_bytes'] / 1e6:.1f} MB", f"{size['kv_bytes_a_token']} bytes"]
        rows.append([name, *cells, f"{macs(size, 128) / 1e9:.2f} G"])
    lines = [*report.aligned(rows), ""]
    rows = [
        ["batch", "length", "model", "prefill", "tokens/s", "decode a step", "tokens/s", "of prefill: " + " / ".join(PARTS), "peak memory"]
    ]
    if baseline:
        rows[0][5:5] = ["faster"]
        rows[0][8:8] = ["faster"]
    of = {(e["model"], e["batch_size"], e["length"]): e for e in entries}
    for e in entries:
        first, step = (statistics.median(e[kind]) for kind in ("prefill", "decode"))
        cells = [str(e["batch_size"]), str(e["length"]), e["model"], _spread(e["prefill"]), f"{e['batch_size'] * e['length'] / first:.0f}"]
        later = [_spread(e["decode"]), f"{e['batch_size'] / step:.0f}"]
        if baseline:
            base = of[baseline, e["batch_size"], e["length"]]
            cells.append(f"{statistics.median(base['prefill']) / first:.2f} x")
            later.append(f"{statistics.median(base['decode']) / step:.2f} x")
        parts = " / ".join(f"{1000 * seconds:.0f}" for seconds in e["prefill_parts"].values()) + " ms"
        rows.append([*cells, *later, parts, f"{e['peak_bytes'] / 1e9:.2f} GB"])
    return [*lines, *report.aligned(rows)]


def run(config: LatencyConfig) -> dict:
    device = cli.device_of("device", config.device)
    names = {Path(config.model).name: ("MODEL", config.model)}
    if config.baseline:
        names = {"dense": ("--baseline", config.baseline), **names}
    if config.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else evaluation_dtype(torch.float32, device)
    else:
        dtype = getattr(torch, config.dtype)
    models, sizes = {}, {}
    for name, (what, source) in names.items():
        families.load_config(source, what, pruned=True)
        models[name] = families.load_model(source, dtype, what).to(device)
        sizes[name] = size_of(models[name])
    limit = min(model.config.max_position_embeddings for model in models.values())
    if max(config.length) + config.new_tokens > limit:
        raise UserError(f"--length {max(config.length)} with --new_tokens {config.new_tokens}: the model's context is {limit} tokens")
    entries = measure(models, sizes, config, device)
    return {
        "format": record.FORMAT,
        "dtype": record.name_of(dtype),
        "sizes": sizes,
        "measurements": entries,
    }


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""

    def latency(config):
        result = run(config)
        log.info("\n%s", "\n".join(tables(result["sizes"], result["measurements"], "dense" if config.baseline else None)))
        if config.json:
            record.keep(result, Path(config.json))

    return cli.program(
        LatencyConfig,
        "slimllm.latency",
        "MODEL [--baseline DENSE] [flags]",
        "Size, prefill and decode speed and memory of a model, dense or pruned.",
        latency,
        argv,
        memory="lower --batch_size or --length",
    )


if __name__ == "__main__":
    sys.exit(main())
