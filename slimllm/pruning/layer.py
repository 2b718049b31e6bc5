"""One layer pruned, part by part: each part sees what the pruned parts before it give (paper section 3)."""

from __future__ import annotations

from torch import nn

from ..models.parts import ExpertsShape, Kept, PartShape, Units
from ..models.slicing import slice_part
from ..plan import LayerPlan, LayerReport
from ..run import Run
from ..settings.methods import CHANNEL_SCORES
from ..settings.pruning import PruneConfig
from ..streaming.activations import ActivationStore
from ..streaming.runner import TOKENS_PER_BATCH, LayerRunner
from ..streaming.sizes import Sizes, widest
from ..utils import processes
from .choice import choice_of, choose, expert_channels, needs_of
from .experts_run import ExpertsRun
from .importance.taylor import Saliency
from .part_run import Aim, PartRun, part_runs


class LayerPruner:
    """Prunes layers of one model as the settings of ``run`` say, on the tokens of ``runner``.

    ``saliency`` [L]: first-order importance of the units of each layer, for a choice that goes by gradients.
    """

    def __init__(self, run: Run, runner: LayerRunner, saliency: list[Saliency | None] | None = None):
        self.run, self.runner, self.config = run, runner, run.config
        self.saliency = saliency or [None] * len(run.shape.layers)
        self.new_bias = self.config.adds_bias(run.shape)

    def prune(
        self, layer: nn.Module, index: int, plan: LayerPlan, hidden: ActivationStore, dense: ActivationStore | None = None
    ) -> LayerReport:
        """Prunes ``layer`` in place and advances ``hidden``, the states before it, to what it now gives.

        ``dense``: the states before it in the dense model, which are advanced too; then its fits make up for some of what is lost by then.

        A method that measures the dense model's states (``config.dense_states``) gets what the layer gave before it was pruned.
        """
        shape = self.run.shape.layers[index]
        report, shapes = LayerReport.of_whole(index, shape, plan), {part.kind: part for part in shape.parts}
        for step in self.runner.adapter.steps(layer):
            runs = part_runs(self.runner, hidden, step, index)
            whole = [] if dense is None else part_runs(self.runner, dense, step, index)
            try:
                for part_run in whole:
                    part_run.take()
                aims = [Aim(part_run, self.config.look_back, len(step)) for part_run in whole] or [None] * len(step)
                for part_run, aim in zip(runs, aims):
                    if part_run.part.kind in shapes:  # what has no units stays as it is
                        self._prune_part(part_run, shapes[part_run.part.kind], plan, report, aim)
                for part_run in (*runs, *whole):
                    part_run.join()
            finally:
                for part_run in (*runs, *whole):
                    part_run.close()
        return report

    def _prune_part(self, part_run: PartRun | ExpertsRun, shape: PartShape, plan: LayerPlan, report: LayerReport, aim: Aim | None) -> None:
        part, kind, config = part_run.part, shape.kind, self.config
        if plan.units[kind] == shape.units:
            part_run.take()
            return
        if isinstance(part_run, ExpertsRun):
            self._prune_experts(part_run, shape, plan, report, aim)
            return
        part_run.take(needs_of(kind, config, plan.kept is None), aim)
        kept = report.kept[kind] = processes.from_first(lambda: self._choose(part_run, shape, plan, report.index))
        ridge = config.ridge_for(self.runner.tokens)
        columns = part.columns(kept, part_run.weight.device)
        recovered, error = part_run.recover(columns, config.recovery, ridge, self.new_bias, not config.dense_states)
        slice_part(part, kept, recovered.weight, recovered.bias)
        report.errors[kind] = error

    def _prune_experts(self, part_run: ExpertsRun, shape: PartShape, plan: LayerPlan, report: LayerReport, aim: Aim | None) -> None:
        config, kind = self.config, shape.kind
        planned = None if plan.kept is None else plan.kept[kind]
        report.kept[kind] = cut_experts(part_run, shape, config, report.index, plan.units[kind], planned)
        recovered = part_run.recover(config.recovery, config.ridge_for, not config.dense_states, aim and aim.beyond)
        report.errors[kind], report.starved = recovered

    def _choose(self, part_run: PartRun | ExpertsRun, shape: PartShape, plan: LayerPlan, index: int) -> Kept:
        """The units that stay, ascending: those of the plan, or by their importance."""
        if plan.kept is not None:
            return plan.kept[shape.kind]
        steps = shape.steps(self.config.head_unit).of(plan.units[shape.kind])
        return choose(choice_of(part_run, shape, self.config, index, self.saliency[index]), steps)


def cut_experts(
    part_run: ExpertsRun, shape: ExpertsShape, config: PruneConfig, index: int, units: Units, planned: Kept | None = None
) -> Kept:
    """Runs the experts of layer ``index`` and takes away all but these ``units``, in place; returns what stays. ``planned``: what that is,
    where it is decided already.

    Whole experts go first; the channels of those that stay are chosen by the tokens that are routed to them then.
    """
    experts, channels = units.values()
    part_run.take(needs_of(shape.kind, config, planned is None and experts < shape.experts))
    if planned is not None:
        part_run.cut(planned)
        return planned
    choice = choice_of(part_run, shape, config, index, None)
    kept = {"experts": list(range(experts)), "channels": list(range(channels))}
    if experts < shape.experts:
        kept = processes.from_first(lambda: choose(choice, shape.steps().of(units)))
        part_run.cut(kept)
    if channels < shape.channels:
        part_run.take_channels(CHANNEL_SCORES[config.channel_score].needs)
        own = processes.from_first(lambda: expert_channels(choice, channels))
        part_run.cut({"experts": list(range(experts)), "channels": own})
        kept = kept | {"channels": own}
    return kept


def activation_bytes(run: Run, sizes: Sizes) -> int:
    """Bytes of one part's activations: the states, the inputs and outputs of its output projection, and its pruned outputs in float32;
    with ``look_back`` the states and the outputs of the dense model too.
    """
    most = max(widest(layer) for layer in run.shape.layers)
    streams = 2 if run.config.look_back else 1
    return sizes.tokens * (run.shape.hidden * 4 + (2 * streams * run.shape.streamed + most + run.shape.token_inputs) * sizes.compute)


def peak_bytes(run: Run, plans: list[LayerPlan], sizes: Sizes) -> int:
    """Bytes while a layer is pruned, at most: itself, the next one as stored, activations, and the largest step of one of its parts."""
    peak = 0
    for layer, plan in zip(run.shape.layers, plans, strict=True):
        layer_bytes = layer.parameters * sizes.compute
        steps = [_step_bytes(part, plan, run.config, sizes) for part in layer.parts]
        activations = sizes.kept_in_memory(layer_bytes, activation_bytes(run, sizes))
        peak = max(peak, layer_bytes + layer.parameters * sizes.stored + activations + max(steps, default=0))
    return peak


def _step_bytes(part: PartShape, plan: LayerPlan, config: PruneConfig, sizes: Sizes) -> int:
    """Bytes of the largest step while one part is pruned: running it, choosing its units, or fitting its output."""
    hidden, inner = part.hidden, part.output_inputs()
    wants_covariance = "input_covariance" in needs_of(part.kind, config, plan.kept is None)
    fits = wants_covariance and plan.units[part.kind] != part.units
    batch, cast = min(TOKENS_PER_BATCH, sizes.tokens), sizes.compute != 4  # a copy in float32
    covariance = 4 * inner**2 if fits else 0
    if fits and config.look_back:
        covariance += 4 * inner * hidden  # of the inputs with what was lost
    running = batch * inner * (2 * sizes.compute + 4 * (2 + cast))
    choosing = 4 * hidden * inner * (3 * cast + 2) + 4 * 4 * hidden**2
    fitting = 4 * inner * (inner + 4 * hidden if fits else hidden)  # the layer that matters most keeps nearly all of them
    recovering = 4 * hidden * inner * (1 + cast) + fitting
    return covariance + 4 * hidden**2 + max(running, choosing, recovering)
