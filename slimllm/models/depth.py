"""Fewer layers and parts: config and weights of a model that keeps only some of them, each as it was.

What is left computes exactly what the model does where the others are skipped; where whole layers are gone, in the model's own class.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from ..errors import UserError
from ..modeling import take_out
from .adapter import LayerAdapter
from .checked import check_config
from .skeleton import skeleton_of
from .source import ModelSource, stored_tensors
from .weights import OfAnother

_PER_LAYER = re.compile(r"layer|block|types")  # in the names of a config's lists that have one entry per layer
_NUMBERS = ("_idxs", "_indices", "only_layers")  # how the names of its lists of layers' numbers end
_LAST = ("num_kv_shared_layers",)  # numbers of layers that count from the last
_UP_TO = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")  # numbers of layers that count from the first
_OWN_NUMBER = ("layer_idx", "training")


def shallow_source(
    source: ModelSource,
    kept: list[int],
    changed: Mapping[str, torch.Tensor] = MappingProxyType({}),
    gone: Mapping[int, Collection[str]] = MappingProxyType({}),
) -> ModelSource:
    """The model with the layers ``kept`` alone, ascending; ``source`` stays as it is, and no weight is read yet.

    ``changed``: tensors that take the place of the model's, by their names in it. ``gone``: kinds of parts that go from some of these
    layers, by the numbers that the layers have in the model.
    Raises UserError where a layer that stays would compute something else at its new place, since its family goes by the number of a layer.
    """
    config = shallow_config(source.config, kept)
    check_config(config, "--drop_layers: of what is left")
    skeleton = skeleton_of(config, source.dtype)
    if getattr(source.model, "generation_config", None) is not None:
        skeleton.generation_config = copy.deepcopy(source.model.generation_config)
    adapter = LayerAdapter(skeleton.config)
    for new, (old, layer) in enumerate(zip(kept, adapter.layers(skeleton), strict=True)):
        before, now = _settings_of(source.adapter.layers(source.model)[old]), _settings_of(layer)
        if odd := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
            raise UserError(
                f"--drop_layers: layer {old} would become layer {new}, where its class gives it another {odd[0]} "
                f"({now.get(odd[0])}, not {before.get(odd[0])}); leave it out"
            )
        take_out(layer, adapter.modules_of(layer, gone.get(old, ())))
    if source.streams:
        return ModelSource(skeleton, _Renumbered(source, kept, changed), source.dtype)
    old = _old_names(source, stored_tensors(source.model), kept)
    tensors = stored_tensors(source.model) | {name: tensor.to(source.home, source.dtype) for name, tensor in changed.items()}
    skeleton.load_state_dict({name: tensors[before] for name, before in old.items()}, strict=False, assign=True)
    skeleton.tie_weights()
    return ModelSource(skeleton.to(source.home))


def shallow_config(config, kept: list[int]):
    """The config of that model: every list with an entry per layer is cut, every number of a layer is the new one."""
    found, depth, new = copy.deepcopy(config), config.num_hidden_layers, {old: index for index, old in enumerate(kept)}
    widths = found.__dict__.pop("_heterogeneity_spec", None)
    found.num_hidden_layers = len(kept)
    for name, value in list(vars(config).items()):
        if name in _UP_TO and isinstance(value, int):
            setattr(found, name, sum(index < value for index in kept))
        elif name in _LAST:
            setattr(found, name, sum(index >= depth - value for index in kept))
        elif isinstance(value, list | tuple) and name.endswith(_NUMBERS):
            setattr(found, name, [new[index] for index in value if index in new])
        elif isinstance(value, list | tuple) and len(value) == depth and _PER_LAYER.search(name):
            setattr(found, name, [value[index] for index in kept])
    if widths is not None:
        own = widths.per_layer_overrides
        found.per_layer_config = {new[index]: own[index] for index in kept if index in own} or None
    return found


def _settings_of(layer: nn.Module) -> dict[str, object]:
    """What tells a layer from another besides its weights: the numbers and words in its modules, and the shapes of its tensors."""
    found = {}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and not name.startswith("_") and name not in _OWN_NUMBER:
                found[f"{path}.{name}".lstrip(".")] = value
    return found | {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def _old_names(source: ModelSource, names: Iterable[str], kept: list[int]) -> dict[str, str]:
    """What the tensors ``names`` of the model are called where only the layers ``kept`` are left -> their names in it."""
    layers, found = source.adapter.layers_name(), {}
    now = {source.adapter.layer_name(old): source.adapter.layer_name(new) for new, old in enumerate(kept)}
    for name in names:
        own = layers + name.removeprefix(layers).partition(".")[0] + "." if name.startswith(layers) else ""
        if not own or own in now:
            found[now.get(own, "") + name.removeprefix(own)] = name
    return found


class _Renumbered(OfAnother):
    """The tensors of a model's reader under the numbers that its layers have where only the layers ``kept`` are left, some ``changed``."""

    def __init__(self, source: ModelSource, kept: list[int], changed: Mapping[str, torch.Tensor]):
        super().__init__(source.weights)
        self._changed = changed
        self._old = _old_names(source, source.weights.names, kept)

    @property
    def names(self) -> list[str]:
        """Those of the tensors that are left."""
        return list(self._old)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        return super().shape(self._old[name])

    def is_number(self, name: str) -> bool:
        """Whether a tensor is of a plain floating-point type."""
        return super().is_number(self._old[name])

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in ``dtype`` or its own."""
        old = self._old[name]
        return (
            self._changed[old].to(dtype or self._changed[old].dtype, copy=True) if old in self._changed else self._tensors.read(old, dtype)
        )
