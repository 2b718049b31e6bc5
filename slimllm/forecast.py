"""How long a run takes on this machine, about: what its stages multiply, at the speeds that the machine has at such products now."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .models.parts import PartShape
from .models.shape import LayerShape
from .plan import LayerPlan
from .pruning import depth
from .pruning.allocation.price_list import levels_in
from .pruning.allocation.prices import FIT_TOKENS, PROBE_TOKENS
from .pruning.choice import needs_of
from .run import Run
from .settings.methods import RECOVERIES
from .streaming.sizes import Sizes
from .utils.device import evaluation_dtype, synchronise

TOKENS = 512  # that go through a product at a time
EIGEN_SIZE = 512  # of the matrix whose eigenvectors are timed
WRITING = 6  # times what its products take: the attention to what is written, and all that happens once per token
GRADIENT_PASSES = 4  # forwards, that gradients take as long as: one forwards, one for what that did not keep, and one backwards
EXPERT_PASSES = 6  # at each level that is priced: what they give, each alone, routed anew, and three sweeps of their fit
SECONDS_BESIDE = 8  # starting, reading and writing, of any run


@dataclass(frozen=True)
class Speeds:
    """Multiplications per second: of many tokens in the dtype of pruning, in float32 and in the dtype of evaluation, of ``rows`` tokens in
    the last; and the seconds per cubed size of an eigendecomposition.
    """

    pruning: float
    float32: float
    evaluation: float
    writing: float
    eigen: float


def speeds(run: Run, rows: int) -> Speeds:
    """Those of the run's devices, in about a second. ``rows``: tokens that are generated side by side."""
    size = min(run.shape.hidden, 1024)
    evaluation = evaluation_dtype(run.dtype, run.eval_device)
    return Speeds(
        _products(TOKENS, size, run.dtype, run.device),
        _products(TOKENS, size, torch.float32, run.device),
        _products(TOKENS, size, evaluation, run.eval_device),
        _products(max(rows, 1), size, evaluation, run.eval_device),
        _eigen(run.device),
    )


@functools.cache  # so that what is foreseen of several runs goes by the same machine
def _products(tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications per second of so many tokens with a matrix [4 size, size]."""
    states, weight = torch.ones(tokens, size, dtype=dtype, device=device), torch.ones(4 * size, size, dtype=dtype, device=device)
    return tokens * weight.numel() / _seconds(lambda: torch.nn.functional.linear(states, weight), device)


@functools.cache
def _eigen(device: torch.device) -> float:
    """Seconds of an eigendecomposition, per cubed size."""
    symmetric = torch.randn(EIGEN_SIZE, EIGEN_SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    symmetric = symmetric + symmetric.T
    return _seconds(lambda: torch.linalg.eigh(symmetric), device) / EIGEN_SIZE**3


def _seconds(work: Callable, device: torch.device) -> float:
    """The least of five times, after one that warms up: other programs only lengthen them."""
    found = []
    for _ in range(6):
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def seconds(run: Run, plans: list[LayerPlan], sizes: Sizes) -> dict[str, float]:
    """Seconds of the stages of a run with these plans, about, by what they do."""
    config, shape = run.config, run.shape
    own = config.num_examples * config.seq_len * (config.self_share if sizes.may_generate else 0)
    own = config.num_examples * config.seq_len if config.calibration == "self" else own
    speed = speeds(run, min(config.num_examples, 64))
    head = shape.vocab * shape.hidden
    dense, left = _forward(shape.given_layers) + head, _forward(shape.layers) + head
    found = {
        "own text": WRITING * own * dense / speed.writing,
        "layers and parts to go": _dropping(run, sizes.tokens, speed) if shape.staying is not None else 0.0,
        "prices": _prices(run, speed) if config.measures_prices else 0.0,
        "pruning": _pruning(run, plans, sizes.tokens, speed),
        "distillation": _distillation(run, dense, left, speed) if config.distill != "none" else 0.0,
        "evaluation": sizes.evaluated_tokens * (dense + left) / speed.evaluation,
        "the rest": SECONDS_BESIDE,
    }
    return {name: value for name, value in found.items() if value}


def _forward(layers: Sequence[LayerShape]) -> int:
    """Multiplications of one token in these layers."""
    return sum(layer.active_parameters for layer in layers)


def _dropping(run: Run, tokens: int, speed: Speeds) -> float:
    """Of what goes whole: a pass of the model that was given to measure it, where no plan says it, and one of it and one of what is left
    to make up for it; and where layers may go in two ways, both tried.
    """
    dense, left = _forward(run.shape.given_layers), _forward(run.shape.layers)
    bridged = dense + left if depth.refits(run.config) else 0
    total = tokens * (dense * (run.config.plan is None) + bridged) / speed.pruning
    if len(tried := depth.ways(run.config)) > 1:
        apart = tokens / depth.HELD_OUT
        total += len(tried) * ((tokens - apart) * bridged / speed.pruning + apart * left / speed.evaluation)
    return total


def _pruning(run: Run, plans: list[LayerPlan], tokens: int, speed: Speeds) -> float:
    config = run.config
    pruned = [index for index, plan in enumerate(plans) if plan.units != run.shape.layers[index].units]
    scored = config.plan is None and config.layer_ratio in ("importance", "uniform")  # by their cosines
    passes = scored + GRADIENT_PASSES * config.needs_gradients
    total = passes * tokens * _forward(run.shape.layers) / speed.pruning
    if pruned:  # what follows the last of them need not run, nor what the dense model gives before the first
        streams = [run.shape.layers[: pruned[-1] + 1], run.shape.layers[pruned[0] : pruned[-1] + 1] if config.look_back else ()]
        total += tokens * sum(map(_forward, streams)) / speed.pruning
    for layer, plan in zip(run.shape.layers, plans):
        for part in layer.parts:
            if plan.units[part.kind] == part.units:
                continue
            kept = part.output_inputs(plan.units[part.kind])
            total += _statistics(part, tokens, needs_of(part.kind, config, plan.kept is None), speed)
            total += _fit(part, tokens, kept, config.recovery, speed)
    return total


def _statistics(part: PartShape, tokens: int, needs: frozenset[str], speed: Speeds) -> float:
    """Of one part: covariances of the input and the output of its output projection, and what is decided by them."""
    inner, hidden = part.output_inputs(), part.hidden
    covariances = inner**2 * ("input_covariance" in needs) + hidden**2 * ("output_covariance" in needs)
    eigen = speed.eigen * hidden**3 if "output_covariance" in needs else 0.0
    return tokens * covariances / speed.float32 + eigen


def _fit(part: PartShape, tokens: int, kept: int, recovery: str, speed: Speeds) -> float:
    """Of one part that keeps so many columns: the pruned and the recovered output, and the solution of the least squares."""
    solved = kept**3 / 6 + kept**2 * part.hidden if "input_covariance" in RECOVERIES[recovery].needs else 0
    return (2 * tokens * kept * part.hidden + 2 * solved) / speed.float32


def _prices(run: Run, speed: Speeds) -> float:
    config = run.config
    asked = config.num_examples * config.seq_len
    fitted, probes = min(FIT_TOKENS, asked), min(PROBE_TOKENS[config.prices], asked)
    options, total = 0, 0.0
    for layer in run.shape.layers:
        priced = levels_in(layer.parts, config, run.shape.is_mixture)
        for part in {part.kind: part for part, _ in priced}.values():
            total += _statistics(part, fitted, needs_of(part.kind, config, True), speed)
        for part, level in priced:
            kept = part.output_inputs(level.units)
            total += _fit(part, fitted, kept, config.recovery, speed) / 2 + probes * kept * part.hidden / speed.evaluation
            options += 1
            if part.kind == "experts":  # which are run again at each level
                total += (EXPERT_PASSES * fitted + probes) * layer.active_parameters / speed.evaluation
    passes = 2 * fitted + GRADIENT_PASSES * probes if config.prices == "gradient" else 2 * fitted + probes * options / 2
    return total + passes * _forward(run.shape.layers) / speed.evaluation


def _distillation(run: Run, dense: int, left: int, speed: Speeds) -> float:
    """What the dense model says once; then, each epoch, a pass forwards, one backwards and one for what the forward pass did not keep.
    ``dense``, ``left``: multiplications of a token in each of the two models.
    """
    spec, epochs = run.config.distill_samples, run.config.distill_epochs
    return spec.num_examples * spec.seq_len * (dense + 3 * epochs * left) / speed.evaluation
