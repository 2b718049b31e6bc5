"""A causal LM whose parts come one at a time: read from its files when they are needed, or as they lie in memory.

Everything that runs layers (both passes of pruning, the probes of ``auto``, perplexity, the comparison after saving) runs them
from a ModelSource, so that a model never has to be whole in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UserError
from ..utils.device import name_of, resolved
from ..utils.memory import return_free_memory
from .adapter import LayerAdapter
from .skeleton import in_float32

_CHECKED = 1 << 22  # numbers that are looked at together


def stored_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a module: its parameters, tied ones once, and its persistent buffers, by name."""
    kept = module.state_dict(keep_vars=True)
    return {**dict(module.named_parameters()), **{name: buffer for name, buffer in module.named_buffers() if name in kept}}


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether every number is finite, without a copy of the tensor."""
    return all(bool(part.isfinite().all()) for part in tensor.detach().flatten().split(_CHECKED))


class ModelSource:
    """The parts of one model.

    ``model``: the model itself, or where ``weights`` are given its skeleton, whose parameters are on the meta device. ``weights``:
    a reader of :mod:`weights`. ``dtype``: what its parts are handed out in, unless a visit asks for another.
    """

    def __init__(self, model, weights=None, dtype: torch.dtype | None = None):
        self.model, self.weights = model, weights
        self.config, self.adapter = model.config, LayerAdapter(model.config)
        self.dtype = dtype or model.dtype
        self.home = torch.device("cpu") if weights else next(model.parameters()).device
        self._canonical = {}  # name of a tied tensor -> the name that it has in the files
        self._in_float32: dict[torch.dtype, frozenset[str]] = {}
        self._finite: set[tuple[str, torch.dtype | None]] = set()  # what was read before
        if weights:
            first: dict[int, str] = {}
            for name, tensor in model.state_dict(keep_vars=True).items():
                self._canonical[name] = first.setdefault(id(tensor), name)

    @classmethod
    def of(cls, model) -> ModelSource:
        """A source of ``model``, which may be one already."""
        return model if isinstance(model, cls) else cls(model)

    @property
    def streams(self) -> bool:
        """Whether parts are read from files when they are needed."""
        return self.weights is not None

    def __len__(self) -> int:
        return len(self.adapter.layers(self.model))

    def visit(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, nn.Module]]:
        """Layers ``start`` to ``stop`` in turn, each on ``device`` while it is worked on; the next one is read meanwhile.

        A layer of a model in memory is the model's own, and what is done to it stays done, unless ``dtype`` is another than the
        model's. Any other layer is forgotten when the next one comes.
        """
        dtype, indices = dtype or self.dtype, range(start, len(self) if stop is None else stop)
        if not self.streams:
            for index in indices:
                layer = self.adapter.layers(self.model)[index]
                if dtype != self.dtype:
                    yield index, self._cast(layer, self.adapter.layer_name(index), device, dtype)
                else:
                    yield index, layer.to(device)
                    layer.to(self.home)
                return_free_memory()
            return
        with ThreadPoolExecutor(1, "read") as reader:
            pending = reader.submit(self._read_layer, start) if indices else None
            for index in indices:
                tensors = pending.result()
                if index + 1 < indices.stop:
                    pending = reader.submit(self._read_layer, index + 1)
                layer = self._filled(index, tensors, dtype).to(device)
                del tensors
                yield index, layer
                del layer
                return_free_memory()  # batches come and go; without this the holes they leave add up over the layers

    @contextmanager
    def decoder(self, layers: nn.ModuleList):
        """The decoder with ``layers`` in place of its own, its embeddings in the model's dtype."""
        original_layers = self.adapter.layers(self.model)
        self.adapter.set_layers(self.model, layers)
        try:
            if not self.streams:
                yield self.adapter.decoder(self.model)
                return
            decoder = self._copy(self.adapter.decoder(self.model), layers)
        finally:
            self.adapter.set_layers(self.model, original_layers)
        yield self._read(decoder, self.adapter.decoder_name(), self.dtype)

    def final_norm(self, device, dtype: torch.dtype | None = None) -> nn.Module:
        """The norm after the last layer, on ``device``, in ``dtype`` or the source's."""
        return self._part(self.adapter.final_norm(self.model), self.adapter.norm_name(), device, dtype)

    def head(self, device, dtype: torch.dtype | None = None) -> nn.Module:
        """The output head, whose weight [V, D] may be the embeddings', on ``device``, in ``dtype`` or the source's."""
        return self._part(self.adapter.head(self.model), self.adapter.head_name(), device, dtype)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor ``name`` of the model, such as its embeddings, in ``dtype`` or the model's."""
        if not self.streams:
            return self.model.get_parameter_or_buffer(name).data.to(self._dtype_of(name, dtype or self.dtype))
        return self._tensor(name, dtype or self.dtype)

    def whole(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"):
        """The whole model in the memory of ``device``, in ``dtype`` or its own; the one that was given, where one was.

        Tensors go there one at a time, so that a GPU's model is never in the machine's memory.
        """
        if not self.streams:
            return self.model
        model = copy.deepcopy(self.model)
        tensors = {name: self._tensor(name, dtype or self.dtype).to(device) for name in stored_tensors(self.model)}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        return model.eval().to(device)  # what is in no file, too

    def weight_bytes(self, dtype: torch.dtype | None = None) -> int:
        """How much memory the whole model takes."""
        return self.model.num_parameters() * (dtype or self.dtype).itemsize

    def _part(self, module: nn.Module, name: str, device, dtype: torch.dtype | None) -> nn.Module:
        if self.streams:
            return self._read(self._copy(module), name, dtype or self.dtype).to(device)
        tensor = next(module.parameters(), None)  # a norm may have none
        same = (tensor is None or tensor.device == resolved(device)) and dtype in (None, self.dtype)
        return module if same else self._cast(module, name, device, dtype or self.dtype)

    def _cast(self, module: nn.Module, prefix: str, device, dtype: torch.dtype) -> nn.Module:
        """A copy of a part on ``device`` in ``dtype``, but for what stays in float32."""
        copied = self._copy(module).to(device=device, dtype=dtype)
        cast = stored_tensors(copied)
        for name, tensor in stored_tensors(module).items():
            if tensor.is_floating_point() and self._dtype_of(prefix + name, dtype) != dtype:
                cast[name].data = tensor.data.to(device=device, dtype=torch.float32)
        return copied

    def _read(self, module: nn.Module, prefix: str, dtype: torch.dtype) -> nn.Module:
        """``module``, a part of the skeleton, with its weights."""
        return_free_memory()  # embeddings and head are the largest tensors
        return self._fill(module, {name: self._tensor(prefix + name, dtype) for name in stored_tensors(module)})

    def _read_layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix, layer = self.adapter.layer_name(index), self.adapter.layers(self.model)[index]
        return {name: self._tensor(prefix + name) for name in stored_tensors(layer)}

    def _filled(self, index: int, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
        prefix = self.adapter.layer_name(index)
        for name, tensor in tensors.items():  # one at a time, so that only one is there in two dtypes
            wanted = self._dtype_of(prefix + name, dtype)
            if tensor.is_floating_point() and tensor.dtype != wanted:
                tensors[name] = tensor.to(wanted)
                if wanted == torch.float16:
                    self._check_finite(name, tensors[name], tensor.dtype)
        return self._fill(self._copy(self.adapter.layers(self.model)[index]), tensors)

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What the tensor ``name`` is in where the model is in ``dtype``."""
        if dtype not in self._in_float32:
            self._in_float32[dtype] = in_float32(self.config, dtype)
        return torch.float32 if name in self._in_float32[dtype] else dtype

    def _tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor from the files, in ``dtype`` if it holds numbers. Raises UserError where some of them are not finite."""
        stored_name, dtype = self._canonical[name], dtype and self._dtype_of(name, dtype)
        tensor = self.weights.read(stored_name, dtype if self.weights.is_number(stored_name) else None)
        if (stored_name, dtype) not in self._finite:
            self._check_finite(stored_name, tensor, None)
            self._finite.add((stored_name, dtype))
        return tensor

    def _check_finite(self, name: str, tensor: torch.Tensor, before: torch.dtype | None) -> None:
        """``before``: the dtype in which its numbers are known to be finite, if any."""
        if not tensor.is_floating_point() or all_finite(tensor):
            return
        fits = before is not None or (tensor.dtype == torch.float16 and bool(self.weights.read(name, torch.float32).isfinite().all()))
        if fits:
            raise UserError(f"{name}: some of its numbers are too large for {name_of(tensor.dtype)}; use --dtype bfloat16 or float32")
        raise UserError(f"{name}: some of its numbers are not finite in the file; copy, download or train the model again")

    def _copy(self, module: nn.Module, *shared) -> nn.Module:
        """A copy of a part, with the same config and the same ``shared`` objects."""
        return copy.deepcopy(module, {id(thing): thing for thing in (self.config, *shared)})

    @staticmethod
    def _fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
        module.load_state_dict(tensors, strict=False, assign=True)
        return module.eval().requires_grad_(False)
