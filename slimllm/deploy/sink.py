"""A checkpoint written while its layers are pruned."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from ..models.parts import Units
from ..models.shape import shape_of
from ..models.skeleton import in_float32
from ..models.slicing import slice_skeleton
from ..models.source import ModelSource, stored_tensors
from ..models.weights import Rounded, round_to
from ..settings.pruning import PruneConfig
from ..streaming.activations import ActivationStore
from ..streaming.journal import Journal
from ..streaming.runner import LayerRunner
from .checkpoint import round_module, write_config
from .reference import reload_and_compare, write_reference
from .runtimes import convert_for_runtime
from .weight_files import WeightFiles


class CheckpointSink:
    """The model of a checkpoint, written into a folder layer by layer while ``source`` is pruned; a pipeline's Sink.

    ``ids`` [samples, length]: what the comparison after saving is made on; they follow the layers as these are computed.
    ``dtype``: what the weights are written in, the source's by default. What is rounded is a copy: pruning continues from the layers as
    they were computed, while what is compared follows from the weights as they are saved.
    ``model``, from :meth:`begin` on: the pruned model without its weights, in the class that the runtime asks for.
    """

    def __init__(self, folder: Path, source: ModelSource, config: PruneConfig, ids: torch.Tensor, device, dtype: torch.dtype | None = None):
        self.folder, self.source, self.config, self.dtype = Path(folder), source, config, dtype or source.dtype
        self._rounds = self.dtype != source.dtype
        self._exact = in_float32(source.config, self.dtype)
        rounded = Rounded(source.weights, self.dtype, self._exact)
        self._saved = ModelSource(source.model, rounded, source.dtype) if self._rounds else source
        self._runner = LayerRunner(self._saved, ids, device, split=False)

    def begin(self, units: list[dict[str, Units]], done: int, journal: Journal | None) -> None:
        """Lays out the files and writes all that is in no layer; or where a run is resumed, restores the states after its last layer."""
        self.model = pruned_skeleton(self.source, units, self.config)
        if not done:
            write_config(self.model, self.folder, self.dtype)
        self._files = WeightFiles.of(self.folder, self.model, self.dtype)
        if done:
            self._runner.prepare()
            self._states = journal.restore(done - 1, "reference", self._runner.store(), self._runner.device)
            return
        self._states = self._runner.embed()
        layers = self.source.adapter.layers_name()
        for name in self._files.layout:
            if not name.startswith(layers):
                self._files.write(name, self._saved.tensor(name, self.dtype))

    def layer(self, index: int, layer: nn.Module) -> None:
        """Writes a layer, rounded, and advances the states by which the files are compared."""
        prefix = self.source.adapter.layer_name(index)
        if self._rounds:
            layer = copy.deepcopy(layer)
            round_module(layer, self.dtype, self._exact, prefix)
        tensors = stored_tensors(layer)
        for name, (dtype, shape) in self._files.layout.items():
            if name.startswith(prefix):  # a bias that only the runtime asks for is zero
                tensor = tensors.get(name.removeprefix(prefix))
                self._files.write(name, torch.zeros(shape, dtype=dtype) if tensor is None else tensor)
        self._files.sync()
        self._runner.advance(self._states, layer, index)

    def streams(self) -> dict[str, ActivationStore]:
        """{"reference": the states of ``ids`` after the last layer that was written}."""
        return {"reference": self._states}

    def finish(self, compare: bool = True) -> None:
        """Completes the folder, reads the model back from it, and compares. Raises RuntimeError where it is another one.

        ``compare`` is not for what a stopped run has begun to :meth:`replace`.
        """
        self._files.close()
        if not compare:
            return
        write_reference(self.folder, self._runner, self._states)
        reload_and_compare(self.folder, self.source.dtype, self._runner.device)

    @torch.no_grad()
    def replace(self, model, names: list[str]) -> None:
        """Writes the parameters ``names`` of ``model``, the finished one trained further, in place of what is there; compares again.

        They are rounded in ``model`` to what is written.
        """
        files = WeightFiles.of(self.folder, model, self.dtype)
        for name in names:
            parameter = model.get_parameter(name).data
            if name not in self._exact:
                round_to(self.dtype, parameter, name)
            files.write(name, parameter)
        files.close()
        runner = LayerRunner(model, self._runner.ids, ModelSource.of(model).home, split=False)
        write_reference(self.folder, runner, runner.last_states())
        reload_and_compare(self.folder, self.source.dtype, runner.device)


def pruned_skeleton(source: ModelSource, units: list[dict[str, Units]], config: PruneConfig):
    """The model that pruning ``source`` gives, without its weights. ``units``: what each part of each layer has then."""
    model = copy.deepcopy(source.model)
    slice_skeleton(source.adapter, model, units, config.adds_bias(shape_of(source.config)))
    return convert_for_runtime(model, config.runtime)
