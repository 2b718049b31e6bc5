"""The price list measured: what pruning one part of one layer costs, the rest being whole. ``--prices`` names the way.

Each part is pruned and refitted at some levels on the states that the dense model gives it; what this changes of its output is d. Experts
are too large for a copy at each level: they are pruned in place, in a layer that is read anew for each.
``gradient`` and ``streams`` differ in how they tell from d what it costs. Layers are visited one at a time, so that the time grows with the
depth (of ``streams``: with its square), and states that do not fit in memory go to the disk.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import nn

from ...data.calibration import draw
from ...errors import UserError
from ...models.adapter import Experts, LayerAdapter
from ...models.parts import ExpertsShape, Kept, Units
from ...models.slicing import slice_part
from ...run import Run
from ...settings.methods import PRICES
from ...streaming.activations import ActivationStore
from ...streaming.runner import LOGIT_ROWS, LayerRunner, frozen
from ...streaming.sizes import Sizes, widest
from ...utils import processes
from ...utils.device import evaluation_dtype
from ..choice import choice_of, choose, needs_of
from ..experts_run import ExpertsRun
from ..layer import cut_experts
from ..part_run import PartRun, join, part_runs, taken
from ..recovery import Recovered
from .inputs import AllocationInputs
from .price_list import Level, Price, PriceList, is_price, levels_in

FIT_TOKENS = 4096  # calibration tokens that parts are pruned from, at most; fewer make channels look dearer than heads
PROBE_TOKENS = {"gradient": 4096, "streams": 512}  # others of them, that prices are measured on, at most


@dataclass(frozen=True)
class Option:
    """One part pruned: what it keeps, and its output projection afterwards."""

    part: str
    units: Units
    share: float
    kept: Kept
    columns: torch.Tensor
    recovered: Recovered

    def change(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """d [tokens, D] in float32: what it gives for the inputs ``x`` [tokens, n] of its output projection, less what that gave, ``y``."""
        weight, bias = self.recovered.weight.to(x.dtype), self.recovered.bias
        return nn.functional.linear(x[:, self.columns], weight, bias if bias is None else bias.to(x.dtype)).float() - y.float()


def measured(inputs: AllocationInputs) -> PriceList:
    """The price list of the run's model on its calibration samples. What a stopped run measured of a layer is not fitted again.

    Raises UserError for a price that is no number.
    """
    begun, ids = time.perf_counter(), inputs.run.samples.ids
    samples = max(1, PROBE_TOKENS[inputs.config.prices] // ids.shape[1])
    probe_ids = ids[-samples:]
    with torch.no_grad():
        prices = PRICES[inputs.config.prices](inputs, Fits(inputs), probe_ids)
    for price in prices:
        if not is_price(price.nats):
            raise UserError(f"layer {price.layer}: its {price.part} costs {price.nats} nats per token; try --dtype float32 or bfloat16")
    seconds = time.perf_counter() - begun
    return PriceList.of(inputs.shape, inputs.config, inputs.run.samples.sha256, probe_ids.numel(), prices, seconds)


class Fits:
    """The dense model's layers, each of their parts pruned at every level from the first FIT_TOKENS of the calibration tokens."""

    def __init__(self, inputs: AllocationInputs):
        run = inputs.run
        self.inputs, self.config = inputs, inputs.config
        ids = run.samples.ids
        self.dtype = evaluation_dtype(run.source.dtype, run.device)
        self.runner = run.runner(ids[: max(1, FIT_TOKENS // ids.shape[1])], self.dtype)

    def levels(self, index: int) -> dict[str, list[Level]]:
        """What is priced of the parts of a layer, by their kind."""
        found = {}
        for part, level in levels_in(self.inputs.shape.layers[index].parts, self.config, self.inputs.shape.is_mixture):
            found.setdefault(part.kind, []).append(level)
        return found

    def options(self, layer: nn.Module, index: int, hidden: ActivationStore) -> list[Option]:
        """All options of one layer but those of its experts; the layer stays as it is. ``hidden``, the states before it, become those
        after it.
        """
        shapes, levels = {part.kind: part for part in self.inputs.shape.layers[index].parts}, self.levels(index)
        found = []
        for step in self.runner.adapter.steps(layer):
            runs = part_runs(self.runner, hidden, step, index)
            for part_run in runs:
                if isinstance(part_run, PartRun) and part_run.part.kind in levels:
                    found += self._of_part(part_run, shapes[part_run.part.kind], levels[part_run.part.kind], index)
                else:
                    part_run.take()
            join(runs)
        return found

    def _of_part(self, part_run: PartRun, shape, levels: list[Level], index: int) -> list[Option]:
        config = self.config
        part_run.take(needs_of(shape.kind, config, True))
        saliency = self.inputs.saliency and self.inputs.saliency[index]
        choice = choice_of(part_run, shape, config, index, saliency)
        ridge, new_bias = config.ridge_for(self.runner.tokens), config.adds_bias(self.inputs.shape)
        found = []
        for level in levels:
            kept = processes.from_first(functools.partial(choose, choice, level.steps))
            columns = part_run.part.columns(kept, part_run.weight.device)
            recovered, _ = part_run.fit(columns, config.recovery, ridge, new_bias)
            found.append(Option(shape.kind, level.units, level.share, kept, columns, recovered))
        return found

    def pruned_experts(self, index: int, hidden: ActivationStore) -> Iterator[tuple[Level, nn.Module]]:
        """(what is priced of its experts, the layer with these pruned and refitted), for each level in turn.

        The layer is read anew for each, or copied where the model is in memory, so that it is in memory once. ``hidden``: the states before
        it, which stay as they are.
        """
        for level in self.levels(index).get("experts", []):
            for _, layer in self.runner.visit(start=index, stop=index + 1):
                own = layer if self.runner.source.streams else copy.deepcopy(layer)
                states = hidden.copy()
                self._prune_experts(own, index, level, states)
                states.close()
                yield level, own

    def _prune_experts(self, layer: nn.Module, index: int, level: Level, hidden: ActivationStore) -> None:
        shape = next(part for part in self.inputs.shape.layers[index].parts if part.kind == "experts")
        part_run = experts_of(self.runner, layer, index, hidden)
        cut_experts(part_run, shape, self.config, index, level.units)
        part_run.recover(self.config.recovery, self.config.ridge_for, replace=False)
        part_run.close()


def experts_of(runner: LayerRunner, layer: nn.Module, index: int, hidden: ActivationStore) -> ExpertsRun:
    """The run of a layer's experts. ``hidden``, the states before the layer, become those before the experts."""
    for step in runner.adapter.steps(layer):
        if any(isinstance(part, Experts) for part in step):
            return next(part_run for part_run in part_runs(runner, hidden, step, index) if isinstance(part_run, ExpertsRun))
        join(taken(runner, hidden, step, index))
    raise RuntimeError(f"layer {index} has no experts")


def gradient(inputs: AllocationInputs, fits: Fits, probe_ids: torch.Tensor) -> list[Price]:
    """Half the mean over tokens of (g . d)^2, g the gradient at a part's output of the log-likelihood of labels that the dense model draws
    itself: to second order the divergence that d causes (Eq. h of docs/method.md). One pass forwards, and one backwards.
    """
    run, runner = inputs.run, inputs.run.runner(probe_ids, fits.dtype)
    fit_inputs, probe_inputs = [], []
    fit_states, upstream = fits.runner.embed(), runner.embed()
    for index, layer in runner.visit("prices, forward"):
        fit_inputs.append(fit_states.copy())
        probe_inputs.append(upstream.copy())
        fits.runner.advance(fit_states, layer, index)
        runner.advance(upstream, layer, index)
    fit_states.close()
    drawn = processes.share(torch.rand(probe_ids.shape, generator=torch.Generator().manual_seed(inputs.config.seed)))
    norm, head = runner.output_modules()
    for i, uniform in enumerate(drawn.split(runner.batch)):
        upstream[i] = _likelihood_gradient(runner, norm, head, upstream[i], uniform)
    last_first, total = [], len(inputs.shape.layers)
    for index in reversed(range(total)):
        known, levels = run.known(f"prices-{index:05d}"), fits.levels(index)
        given = [runner.store(), runner.store()] if "experts" in levels and not known else None
        for _, layer in runner.visit(start=index, stop=index + 1):
            states = fit_inputs[index].copy() if given is not None else fit_inputs[index]  # which its experts are priced on afterwards
            options = [] if known or not levels.keys() - {"experts"} else fits.options(layer, index, states)
            costs = _backward(runner, layer, index, probe_inputs[index], upstream, options, given)
        del layer
        if not known:
            found = [Price(index, option.part, option.units, option.share, cost) for option, cost in zip(options, costs)]
            if given is not None:
                states.close()
                found += _experts_by_gradient(fits, runner, index, fit_inputs[index], probe_inputs[index], *given)
            known = [asdict(price) for price in found]
            run.keep(f"prices-{index:05d}", known)
        last_first.append([Price(**entry) for entry in known])
        fit_inputs[index].close()
        probe_inputs[index].close()
        runner.progress("prices", total - index, total)
    upstream.close()
    return [price for prices in reversed(last_first) for price in prices]


def _likelihood_gradient(runner: LayerRunner, norm, head, states: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The gradient, by the last states [samples, length, D], of the sum over tokens of the log-likelihood of one label each, which
    ``uniform`` numbers [samples, length] draw from the model's own distribution.
    """
    gradient, places = torch.empty_like(states), uniform.flatten().to(states.device)
    chunks = zip(*(tensor.split(LOGIT_ROWS) for tensor in (states.flatten(0, 1), gradient.flatten(0, 1), places)))
    for rows, into, place in chunks:
        rows = rows.detach().requires_grad_()
        with torch.enable_grad():
            log_p = runner.adapter.logits(head, norm(rows)).log_softmax(-1)
        labels = draw(log_p.detach().exp(), place[:, None])
        with torch.enable_grad():
            likelihood = log_p.gather(1, labels).sum()
        into[:] = torch.autograd.grad(likelihood, rows)[0]
    return gradient


def _backward(
    runner: LayerRunner,
    layer: nn.Module,
    index: int,
    inputs: ActivationStore,
    upstream: ActivationStore,
    options: list[Option],
    of_experts: list[ActivationStore] | None = None,
) -> list[float]:
    """Replaces ``upstream``, the gradients of the layer's outputs, by those of its ``inputs``; gives what each option costs.

    ``of_experts``: where what the layer's experts give, and the gradients of that, are to be kept, [tokens, D] each.
    """
    caught, sums = {}, torch.zeros(len(options), dtype=torch.float64)

    def catch(kind: str):
        return lambda _, args, output: caught.update({kind: (args[0], output[0] if isinstance(output, tuple) else output)})

    parts = [part for part in runner.adapter.parts(layer) if of_experts is not None or not isinstance(part, Experts)]
    hooks = [(part.module if isinstance(part, Experts) else part.output).register_forward_hook(catch(part.kind)) for part in parts]
    with frozen(layer):
        for i in range(len(inputs)):
            gradients = runner.backward(layer, index, inputs, upstream, i, lambda: [y for _, y in caught.values()])
            of = {kind: [t.detach().flatten(0, -2) for t in (x, y, g)] for (kind, (x, y)), g in zip(caught.items(), gradients)}
            if of_experts is not None:
                for store, tensor in zip(of_experts, of["experts"][1:]):
                    store.append(tensor)
            for k, option in enumerate(options):
                x, y, g = of[option.part]
                sums[k] += (g.float() * option.change(x, y)).sum(-1).double().square().sum().cpu()
    for hook in hooks:
        hook.remove()
    *totals, tokens = processes.total(*sums.tolist(), runner.ids.numel())
    return [value / tokens / 2 for value in totals]


def _experts_by_gradient(
    fits: Fits,
    runner: LayerRunner,
    index: int,
    fit_inputs: ActivationStore,
    probe_inputs: ActivationStore,
    given: ActivationStore,
    gradients: ActivationStore,
) -> list[Price]:
    """The prices of a layer's experts. ``fit_inputs`` and ``probe_inputs``: the states before the layer, which stay as they are; ``given``
    and ``gradients`` [tokens, D]: what the experts give to the probe tokens, and the gradients of that.
    """
    found = []
    for level, layer in fits.pruned_experts(index, fit_inputs):
        states, total = probe_inputs.copy(), 0.0
        part_run = experts_of(runner, layer, index, states)
        for i, batch in enumerate(states):
            change = part_run.part.give(batch).flatten(0, -2).float() - given[i].float()
            total += float((gradients[i].float() * change).sum(-1).double().square().sum())
        part_run.close()
        states.close()
        total, tokens = processes.total(total, runner.ids.numel())
        found.append(Price(index, "experts", level.units, level.share, total / tokens / 2))
    for store in (given, gradients):
        store.close()
    return found


def streams(inputs: AllocationInputs, fits: Fits, probe_ids: torch.Tensor) -> list[Price]:
    """The divergence itself: KL of the dense model's next-token distribution from that of the model with this part alone pruned, for each
    option a stream of the probe tokens through all layers after it. All streams go through a layer together.
    """
    runner = inputs.run.runner(probe_ids, fits.dtype)
    states, dense = fits.runner.embed(), runner.embed()
    variants, found, total = [], [], len(inputs.shape.layers)
    for index in range(total):
        before, fit_inputs = dense.copy(), states.copy()
        for _, layer in runner.visit(start=index, stop=index + 1):
            for stream in (dense, *variants):
                runner.advance(stream, layer, index)
            for option in fits.options(layer, index, states):
                variants.append(before.copy())
                runner.advance(variants[-1], _pruned(runner.adapter, layer, option), index)
                found.append((index, option.part, option.units, option.share))
        del layer
        for level, pruned in fits.pruned_experts(index, fit_inputs):
            variants.append(before.copy())
            runner.advance(variants[-1], pruned, index)
            found.append((index, "experts", level.units, level.share))
        for store in (before, fit_inputs):
            store.close()
        runner.progress("prices", index + 1, total)
    costs = runner.divergences(dense, variants)
    for store in (states, dense, *variants):
        store.close()
    return [Price(*about, max(cost, 0.0)) for about, cost in zip(found, costs)]


def _pruned(adapter: LayerAdapter, layer: nn.Module, option: Option) -> nn.Module:
    """A copy of the layer in which this part alone is pruned."""
    pruned = copy.deepcopy(layer)
    slice_part(adapter.part(pruned, option.part), option.kept, option.recovered.weight, option.recovered.bias)
    return pruned


def activation_bytes(run: Run, sizes: Sizes) -> int:
    """Bytes of the states that are kept while prices are measured: those before every layer, or those of every option and those of
    the dense model before and behind a layer; and what the experts of one layer take, while these are priced.
    """
    if not run.config.measures_prices:
        return 0
    shape, by_gradient = run.shape, run.config.prices == "gradient"
    probes, fitted = min(PROBE_TOKENS[run.config.prices], sizes.tokens), min(FIT_TOKENS, sizes.tokens)
    priced = [levels_in(layer.parts, run.config, shape.is_mixture) for layer in shape.layers]
    kept = len(shape.layers) * (probes + fitted) if by_gradient else sum(map(len, priced)) * probes + 2 * (probes + fitted)
    inputs = (probes + fitted) * shape.token_inputs
    of_experts = max((fitted * _experts_bytes(part, run, sizes) for part, _ in chain(*priced) if part.kind == "experts"), default=0)
    if of_experts and by_gradient:
        of_experts += 2 * probes * shape.hidden * sizes.evaluation  # what they give, and the gradients of that
    return (kept * shape.streamed + inputs) * sizes.evaluation + of_experts


def _experts_bytes(part: ExpertsShape, run: Run, sizes: Sizes) -> int:
    """Bytes per token of what is kept while the experts of a layer are pruned and refitted at one level (:class:`ExpertsRun`): the states,
    what the experts read and give, and in float32 what is missing of that, and the inputs of one of them where all are given as much.
    """
    return (run.shape.streamed + part.width + part.hidden) * sizes.evaluation + 4 * (part.hidden + part.output_inputs() // part.experts)


def peak_bytes(run: Run, sizes: Sizes) -> int:
    """Bytes while one layer's prices are measured, at most: itself, the next one as stored, its options, and a part that is fitted."""
    if not run.config.measures_prices:
        return 0
    peak, tokens = 0, min(FIT_TOKENS, sizes.tokens)
    for layer in run.shape.layers:
        priced = levels_in(layer.parts, run.config, run.shape.is_mixture)
        options = sum(4 * part.hidden * part.output_inputs(level.units) for part, level in priced if part.kind != "experts")
        inner = widest(layer)
        fitting = 4 * inner * (2 * inner + 4 * layer.parts[0].hidden) + tokens * inner * (sizes.evaluation + 4)
        peak = max(peak, layer.parameters * (sizes.evaluation + sizes.stored) + options + fitting)
    kept = activation_bytes(run, sizes)
    return peak + sizes.kept_in_memory(max(layer.parameters for layer in run.shape.layers) * sizes.evaluation, kept)
