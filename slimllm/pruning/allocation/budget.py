"""What a plan has to free: parameters, bytes of a file and its KV cache, or time."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gguf

from ... import cli
from ...errors import Recurring
from ...models.parts import PartShape, Units, all_steps, goes
from ...models.shape import ModelShape
from ...plan import LayerPlan, Measure, parameters, removed
from ...settings.pruning import BY_PRICES, BYTES, PruneConfig
from . import timing
from .inputs import AllocationInputs
from .sizing import Slot
from .timing import Times


@dataclass(frozen=True)
class Budget:
    """``target`` is to go of what the parts of a model take by ``measure``.

    ``asked``: the flag and its value, as messages name it. ``in_words``: an amount, as messages say it. ``exact``: as much as that is to go
    and no more, where it can be had; else more may go where that is predicted to lose less. ``least``: what is left when so much is
    gone, in words, of a budget that says what may be left.
    """

    shape: ModelShape
    config: PruneConfig
    target: float
    measure: Measure
    asked: str
    in_words: Callable[[float], str]
    exact: bool = False
    least: Callable[[float], str] | None = None

    @property
    def share(self) -> float:
        """The share of all that the parts take that is to go."""
        measure = self.measure
        return max(self.target, 0.0) / sum(
            measure(part, part.units, part.input_bias, part.output_bias) for layer in self.shape.layers for part in layer.parts
        )

    def removed(self, plans: list[LayerPlan]) -> float:
        """What the plans remove, less what the biases that are added take."""
        return removed(self.shape, plans, self.config, self.measure)

    def frees(self, slot: Slot, steps: int) -> float:
        """What one part gives up where it keeps so many steps."""
        part = slot.part
        bias = part.output_bias or (steps < slot.steps.count and self.config.adds_bias(self.shape))
        whole = self.measure(part, part.units, part.input_bias, part.output_bias)
        return whole - self.measure(part, part.units | slot.steps.units(steps), part.input_bias, bias)

    def out_of_reach(self, most: list[LayerPlan]) -> Recurring:
        """The error for a target beyond what the plans ``most``, which remove as much as can go, remove."""
        gone, layers = self.removed(most), len(self.shape.layers)
        if self.least is not None:
            return Recurring(f"{self.asked}: with a part of each layer left it takes {self.least(gone)} at least; raise it")
        way = f"{self.config.way_to_less}: a part of each must stay"
        return Recurring(f"{self.asked}: all {layers} layers can give up at most {self.in_words(gone)}; {way}")


def budgets_of(inputs: AllocationInputs) -> list[Budget]:
    """What the settings ask for, one budget for each flag that says something of it."""
    shape, config = inputs.shape, inputs.config
    found = [] if config.amount[0] in BY_PRICES else [of_parameters(shape, config)]
    if config.fit is not None:
        found.append(of_bytes(shape, config, inputs.file_overhead))
    if config.target_speedup is not None:
        found.append(of_time(shape, config, timing.measured(inputs.run) if inputs.run else timing.by_parameters(shape)))
    return found


def together(budgets: list[Budget], weights: list[float], target: float) -> Budget:
    """Several budgets as one: the mean of the shares of their targets that are met, with these weights, is to come to ``target``."""

    def measure(part: PartShape, units: Units, input_bias: bool, output_bias: bool) -> float:
        values = (budget.measure(part, units, input_bias, output_bias) / budget.target for budget in budgets)
        return sum(weight * value for weight, value in zip(weights, values))

    def in_words(amount: float) -> str:
        return f"{amount:.3f} of what they ask for"

    asked = " and ".join(budget.asked for budget in budgets)
    return Budget(budgets[0].shape, budgets[0].config, target, measure, asked, in_words)


def of_parameters(shape: ModelShape, config: PruneConfig) -> Budget:
    """``--target_sparsity``; of a ``--pruning_ratio``, that share of what may go of as many layers as are pruned."""
    share = config.sparsity_of(shape)
    if share is None:
        gone = 0
        for part in (part for layer in shape.layers for part in layer.parts):
            least = [s.units(s.least) for s in all_steps(part, config.head_unit) if goes(config.prune, part, s.sort, shape.is_mixture)]
            gone += part.parameters() - part.parameters(functools.reduce(operator.or_, least, part.units))
        share = config.pruning_ratio * config.pruned_layers / len(shape.layers) * gone / shape.decoder_parameters
    name, value = config.amount

    def in_words(amount: float) -> str:
        return config.as_asked(shape, amount)

    return Budget(shape, config, share * shape.decoder_parameters, parameters, f"--{name} {value}", in_words, exact=True)


def of_bytes(shape: ModelShape, config: PruneConfig, overhead: int) -> Budget:
    """``--fit``: a GGUF file of ``--gguf_type``, and what llama.cpp keeps of ``--context`` tokens: the KV cache in 16 bits, the states of
    layers without attention in 32. ``overhead``: bytes of the file that hold no weights, the vocabulary above all.
    """

    def measure(part: PartShape, units: Units, input_bias: bool, output_bias: bool) -> float:
        weights = stored(part.parameters(units, input_bias, output_bias), part.matrices(units))
        return weights + part.cache_bytes(config.context, units)

    def stored(parameters: int, matrices: Sequence[tuple[int, int]]) -> int:
        vectors = parameters - sum(rows * columns for rows, columns in matrices)
        return sum(gguf_bytes(*matrix, config.gguf_type) for matrix in matrices) + 4 * vectors

    layers = sum(measure(p, p.units, p.input_bias, p.output_bias) for layer in shape.layers for p in layer.parts)
    uncut = sum(stored(layer.uncut_parameters, layer.uncut_matrices) for layer in shape.layers)
    caches = sum(cache.bytes(config.context) for layer in shape.layers for cache in layer.caches)
    whole = layers + uncut + caches + overhead + stored(shape.norm_parameters + shape.head_bias * shape.vocab, shape.token_matrices)
    whole += (1 if shape.tied else 2) * gguf_bytes(shape.vocab, shape.hidden, config.gguf_type)
    whole += gguf_bytes(shape.vocab, shape.token_inputs, config.gguf_type)
    asked = cli.number_of("fit", config.fit, BYTES)

    def in_words(amount: float) -> str:
        return f"{amount / 1e6:.1f} of the {whole / 1e6:.1f} MB that the model takes"

    def least(gone: float) -> str:
        return f"{(whole - gone) / 1e6:.4g} MB"

    return Budget(shape, config, whole - asked, measure, f"--fit {config.fit}", in_words, least=least)


def gguf_bytes(rows: int, columns: int, kind: str) -> int:
    """Bytes of a matrix in a GGUF file of this type: f16 where its rows do not fill the blocks of the type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return rows * columns * 2 if columns % block else rows * (columns // block) * size


def of_time(shape: ModelShape, config: PruneConfig, times: Times) -> Budget:
    """``--target_speedup``: the time of one generated token, from what single parts were measured to take."""

    def measure(part: PartShape, units: Units, input_bias: bool, output_bias: bool) -> float:
        fixed, by_unit = times.parts[part.kind]
        sort = part.sorts[0]
        return fixed + by_unit * units[sort] if units[sort] else 0.0

    whole = times.rest + sum(measure(part, part.units, False, False) for layer in shape.layers for part in layer.parts)

    def in_words(amount: float) -> str:
        return f"{1000 * amount:.2f} of the {1000 * whole:.2f} ms that a token takes"

    target = whole * (1 - 1 / config.target_speedup)
    return Budget(shape, config, target, measure, f"--target_speedup {config.target_speedup}", in_words)
