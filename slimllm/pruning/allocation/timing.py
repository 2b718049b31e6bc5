"""How long one generated token takes in each part of a layer on this machine, for ``--target_speedup``."""

from __future__ import annotations

import copy
import itertools
import logging
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch

from ...models.adapter import Mixer
from ...models.shape import ModelShape
from ...models.slicing import slice_part
from ...run import Run
from ...streaming.runner import LayerRunner
from ...utils.device import evaluation_dtype, name_of, synchronise

log = logging.getLogger("slimllm")

REPEATS = 60
BEYOND_CACHE = 400 << 20  # bytes of weights that no processor keeps in its cache


@dataclass(frozen=True)
class Times:
    """``parts``: (seconds of a part without units, seconds per unit of its first sort), by kind; ``rest``: of what no pruning changes."""

    parts: dict[str, tuple[float, float]]
    rest: float


def by_parameters(shape: ModelShape) -> Times:
    """Where nothing can be measured: as long as there are parameters, a nanosecond each."""
    firsts = {part.kind: part for layer in reversed(shape.layers) for part in layer.parts}
    found = {kind: (0.0, 1e-9 * part.parameters() / part.units[part.sorts[0]]) for kind, part in firsts.items()}
    return Times(found, 1e-9 * (shape.vocab * shape.hidden + sum(layer.uncut_parameters for layer in shape.layers)))


@torch.no_grad()
def measured(run: Run) -> Times:
    """Of the first layer that has it, each part whole and with half of its units, what has no units as it is, and of the output head: one
    token, medians of REPEATS.
    """
    dtype = evaluation_dtype(run.source.dtype, run.device)
    runner = run.runner(run.samples.ids[:1, :1], dtype)
    [states] = runner.embed()
    mixers = [_mixers(runner, layer) for layer in runner.adapter.layers(run.source.model)]
    parts, uncut = {}, None if any(mixers) else 0.0
    wanted = {part.kind for layer in run.shape.layers for part in layer.parts}
    for index, layer in runner.visit():
        if mixers[index] and uncut is None:
            own = _mixers(runner, layer)
            times = [_median(partial(mixer.after, states, runner.arguments[index]), run.device) for mixer in own]
            uncut = sum(map(len, mixers)) * sum(times) / len(times)
        shapes = {part.kind: part for part in run.shape.layers[index].parts if part.kind not in parts}
        for kind, shape in shapes.items():
            steps = shape.steps("group")
            counts = [shape.units, steps.units(-(-steps.count // 2))]
            whole, half = (_seconds(runner, layer, index, kind, units, states) for units in counts)
            first, second = (units[shape.sorts[0]] for units in counts)
            by_unit = max(whole - half, 0.0) / max(first - second, 1)
            parts[kind] = max(whole - by_unit * first, 0.0), by_unit
            log.info(
                "one token through %s on %s in %s: %.3f ms, with half of it %.3f ms",
                shape.title,
                run.device,
                name_of(dtype),
                1e3 * whole,
                1e3 * half,
            )
        if wanted <= set(parts) and uncut is not None:
            break
    norm, head = runner.output_modules()
    rest = _median(lambda: runner.adapter.logits(head, norm(states)), run.device)
    log.info("one token through the output head: %.3f ms", 1e3 * rest)
    return Times(parts, rest + uncut)


def _mixers(runner: LayerRunner, layer) -> list[Mixer]:
    return [part for step in runner.adapter.steps(layer) for part in step if isinstance(part, Mixer)]


def _seconds(runner: LayerRunner, layer, index: int, kind: str, units: dict[str, int], states: torch.Tensor) -> float:
    """Of one part that keeps the first so many units; its weights come from memory, as in a model, not from the processor's cache."""
    part = runner.adapter.part(copy.deepcopy(layer), kind)
    if part.units != units:
        kept = {sort: list(range(count)) for sort, count in units.items()}
        slice_part(part, kept, part.output.weight[:, part.columns(kept)], part.output.bias)
    size = sum(parameter.nbytes for parameter in part.module.parameters())
    modules = itertools.cycle([part.module, *(copy.deepcopy(part.module) for _ in range(min(BEYOND_CACHE // size, REPEATS)))])

    def run() -> None:
        part.module = next(modules)
        part.run(part.read(states), runner.arguments[index])

    return _median(run, runner.device)


def _median(work, device: torch.device) -> float:
    found = []
    for _ in range(REPEATS):
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)
