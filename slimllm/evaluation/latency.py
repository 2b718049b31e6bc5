"""How fast and how large models are, measured alternately in one run: prefill (one forward pass over a prompt) and decode (one token
after the other with the KV cache), synchronised, after a warm-up.
"""

from __future__ import annotations

import logging
import statistics
import time
from contextlib import contextmanager

import torch

from ..models.adapter import Experts, LayerAdapter
from ..models.parts import KINDS, ExpertsShape
from ..models.shape import shape_of
from ..utils.device import synchronise
from ..utils.memory import peak_since_reset, reset_peak, return_free_memory

log = logging.getLogger("slimllm")


def size_of(model) -> dict[str, int]:
    """Parameters, bytes of weights, KV-cache bytes per token, MACs per token of all Linears and of the experts that it is routed to,
    attention's MACs per pair of tokens.

    What linear attention and state spaces multiply besides their Linears is not counted.
    """
    shape = shape_of(model.config)
    experts = [part for part in LayerAdapter(model.config).all_parts(model) if isinstance(part, Experts)]
    routed = {id(module) for part in experts for inside in (part.router, part.experts) for module in inside.modules()}
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and id(module) not in routed]
    parts = [part for layer in shape.layers for part in layer.parts]
    linear = sum(linear.weight.numel() for linear in linears)
    linear += sum(part.active_parameters() - part.fixed for part in parts if isinstance(part, ExpertsShape))
    return {
        "parameters": model.num_parameters(),
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "kv_bytes_per_token": shape.cache_numbers() * model.dtype.itemsize,
        "linear_macs": linear,  # the output head included, tied or not
        "attention_macs": sum(part.pair_multiplications() for part in parts),
    }


def macs(size: dict, length: int) -> int:
    """Multiply-accumulates of one sequence's prefill: every Linear at each token, and causal attention."""
    return length * size["linear_macs"] + size["attention_macs"] * length * (length + 1) // 2


@torch.no_grad()
def prefill(model, ids) -> tuple[float, object, torch.Tensor]:
    """(seconds, cache, next token ids [batch, 1]) of one forward pass over the prompt ``ids`` [batch, length]."""
    synchronise(model.device)
    started = time.perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    synchronise(model.device)
    return time.perf_counter() - started, output.past_key_values, token


@torch.no_grad()
def decode(model, cache, token, count: int) -> float:
    """Seconds per step of decoding ``count`` tokens greedily."""
    synchronise(model.device)
    started = time.perf_counter()
    for _ in range(count):
        output = model(token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    synchronise(model.device)
    return (time.perf_counter() - started) / count


@contextmanager
def timed_parts(model):
    """Gives a dict that collects the seconds spent in the modules of each kind of part, and in the output head."""
    adapter, hooks = LayerAdapter(model.config), []
    parts = adapter.all_parts(model)
    titles = [kind.title for kind in KINDS.values() if any(part.kind == kind.kind for part in parts)]
    seconds = dict.fromkeys([*titles, "output head"], 0.0)

    def watch(module, part):
        started = []

        def before(*_):
            synchronise(model.device)
            started.append(time.perf_counter())

        def after(*_):
            synchronise(model.device)
            seconds[part] += time.perf_counter() - started.pop()

        hooks.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    for part in parts:
        watch(part.module, KINDS[part.kind].title)
    watch(adapter.head(model), "output head")
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def measure(
    models: dict, batch_sizes: tuple[int, ...], lengths: tuple[int, ...], new_tokens: int, repeats: int, device: torch.device
) -> list[dict]:
    """One entry per model, batch size and length: all times in seconds, as lists of ``repeats`` measurements."""
    entries = []
    weights = {name: size_of(model)["weight_bytes"] for name, model in models.items()}
    others = {name: sum(weights.values()) - weight_bytes for name, weight_bytes in weights.items()}  # all models stay loaded
    vocabulary = min(model.config.vocab_size for model in models.values())
    for batch in batch_sizes:
        for length in lengths:
            ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
            runs = {name: {"prefill": [], "decode": []} for name in models}
            for repeat in range(repeats + 1):
                for name, model in models.items():
                    if not repeat:
                        return_free_memory()  # what the model before left behind
                        reset_peak(device)
                    seconds, step = _once(model, ids, new_tokens)
                    if not repeat:  # the warm-up, which also touches all memory
                        runs[name]["peak_bytes"] = peak_since_reset(device) - others[name]
                        continue
                    runs[name]["prefill"].append(seconds)
                    runs[name]["decode"].append(step)
            for name, model in models.items():
                with timed_parts(model) as parts:
                    prefill(model, ids)
                entries.append({"model": name, "batch_size": batch, "length": length, **runs[name], "prefill_parts": parts})
                log.info("%s, batch %d, length %d: prefill %s", name, batch, length, milliseconds(runs[name]["prefill"]))
    return entries


def _once(model, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(seconds of the prefill, seconds per decoded token). Its KV cache is gone when it returns: the next model pays for its own."""
    seconds, cache, token = prefill(model, ids)
    return seconds, decode(model, cache, token, new_tokens)


def milliseconds(seconds: list[float]) -> str:
    """Median and middle half of measurements, or their range where there are fewer than four: ``12.3 ms (11.9..12.8)``."""
    ms = sorted(1000 * s for s in seconds)
    if len(ms) < 4:
        return f"{statistics.median(ms):.1f} ms ({ms[0]:.1f}..{ms[-1]:.1f})"
    low, middle, high = statistics.quantiles(ms, n=4)
    return f"{middle:.1f} ms ({low:.1f}..{high:.1f})"
