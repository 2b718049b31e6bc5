"""What the tensors of a model are called in its files, where these are not the model's own names: transformers holds the experts of a
layer stacked in one tensor, and writes a tensor for each, under names of their own in some families; and it holds some tensors in one
that are several there, such as the convolutions of queries, keys and values.

The rules are transformers' own, turned round as it does where it saves a model. Of a text model inside another they are the other's.
"""

from __future__ import annotations

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

from .adapter import LayerAdapter
from .families import is_pruned
from .source import stored_tensors
from .weights import OfAnother

Place = tuple[int | slice, ...]  # where a tensor of a file lies in the model's: an index of it


def stored_pieces(model) -> dict[str, dict[str, Place]]:
    """Of each tensor of ``model``, which may be without weights: the tensors of its files that make it up, and their places in it.

    Those of a model with widths per layer, which transformers has no rules for, are called there as in the model.
    """
    if is_pruned(model.config):
        return {name: {name: ()} for name in stored_tensors(model)}
    return {name: _pieces(model, name, tensor) for name, tensor in stored_tensors(model).items()}


def _pieces(model, name: str, tensor: torch.Tensor) -> dict[str, Place]:
    found = revert_weight_conversion(model, {name: torch.empty_like(tensor, device="meta")})
    if len(found) == 1:
        return dict.fromkeys(found, ())
    experts = len(tensor)
    chunks, rest = divmod(len(found), experts)
    if not chunks:
        return _rows(model, name, tensor)
    if rest or tensor.shape[1] % chunks:
        raise NotImplementedError(f"{name}: transformers writes {experts} experts as {len(found)} tensors")
    numbers = torch.arange(len(found)).view(experts, chunks, *[1] * (tensor.ndim - 2))  # a number in the place of each piece
    rows, places = tensor.shape[1] // chunks, {}
    for stored, number in revert_weight_conversion(model, {name: numbers}).items():
        expert, chunk = divmod(int(number), chunks)
        places[stored] = (expert, slice(chunk * rows, (chunk + 1) * rows))
    return places


def _rows(model, name: str, tensor: torch.Tensor) -> dict[str, Place]:
    """Of a tensor that is several in the files, the rows of each there."""
    numbers = torch.arange(len(tensor)).view(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape)
    ends = ((stored, rows.flatten()[[0, -1]].tolist()) for stored, rows in revert_weight_conversion(model, {name: numbers}).items())
    return {stored: (slice(first, last + 1),) for stored, (first, last) in ends}


class Inside:
    """The names of a text model's tensors where its files are those of ``whole``, a model without weights that holds it, or is it: what
    transformers calls each when it reads the files, without what comes before it in ``whole``. ``adapter``: the text model's.
    """

    def __init__(self, whole, adapter: LayerAdapter):
        rules = get_model_conversion_mapping(whole)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        whole._weight_conversions = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._whole, self._names = whole, whole.state_dict()
        family, modules = adapter.family, {id(module): name for name, module in whole.named_modules()}
        embeddings = modules[id(whole.get_input_embeddings())]
        head = next(name for name in modules.values() if name.rpartition(".")[2] == family.head)
        self._places = {embeddings.removesuffix(family.embedding): adapter.decoder_name(), f"{head}.": adapter.head_name()}

    def name_of(self, stored: str) -> str | None:
        """What the text model calls a tensor of the files; None where it is another part's."""
        found, _ = rename_source_key(stored, self._renamings, [], self._whole.base_model_prefix or None, self._names)
        return self._own(found)

    def pieces(self) -> dict[str, dict[str, Place]]:
        """:func:`stored_pieces` of the text model, by the names of :meth:`name_of`."""
        named = ((self._own(name), name, tensor) for name, tensor in stored_tensors(self._whole).items())
        found = {own: _pieces(self._whole, name, tensor) for own, name, tensor in named if own is not None}
        return {own: {self._own(name): place for name, place in places.items()} for own, places in found.items()}

    def _own(self, name: str) -> str | None:
        return next((own + name.removeprefix(before) for before, own in self._places.items() if name.startswith(before)), None)


class Stacked(OfAnother):
    """The tensors of files by the names that ``model`` has for them: stacked where the files hold a tensor for each expert, one of which
    is in memory at a time besides. Files that hold them stacked are read as they are. ``pieces``: :func:`stored_pieces`, where they are
    not those of ``model``.
    """

    def __init__(self, tensors, model, pieces: dict[str, dict[str, Place]] | None = None):
        super().__init__(tensors)
        there = set(tensors.names)
        pieces = stored_pieces(model) if pieces is None else pieces
        pieces = {name: places for name, places in pieces.items() if name not in there and there.issuperset(places)}
        self._pieces, self._shapes = pieces, {name: list(tensor.shape) for name, tensor in stored_tensors(model).items()}

    @property
    def names(self) -> list[str]:
        """Those of the model, and of what the files hold besides."""
        used = {stored for places in self._pieces.values() for stored in places}
        return [*self._pieces, *(name for name in self._tensors.names if name not in used)]

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor; of a stacked one that of its first odd piece, where one does not fit its place."""
        if name not in self._pieces:
            return self._tensors.shape(name)
        whole = torch.empty(self._shapes[name], device="meta")
        shapes = ((list(self._tensors.shape(stored)), list(whole[place].shape)) for stored, place in self._pieces[name].items())
        return next((found for found, expected in shapes if found != expected), self._shapes[name])

    def is_number(self, name: str) -> bool:
        """Whether a tensor is of a plain floating-point type."""
        return all(self._tensors.is_number(stored) for stored in self._pieces.get(name, [name]))

    def dtype_name(self, name: str) -> str:
        """The type of a tensor, as the files name it."""
        return self._tensors.dtype_name(next(iter(self._pieces.get(name, [name]))))

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in ``dtype`` or its own."""
        places = self._pieces.get(name, {name: ()})
        if len(places) == 1:
            return self._tensors.read(next(iter(places)), dtype)
        whole = None
        for stored, place in places.items():
            piece = self._tensors.read(stored, dtype)
            whole = piece.new_empty(self._shapes[name]) if whole is None else whole
            whole[place] = piece
        return whole

    def expert(self, name: str, index: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One expert's part of a stacked tensor, in ``dtype`` or its own, without reading the others'."""
        places = self._pieces.get(name, {name: ()})
        if len(places) == 1:
            return self._tensors.rows(next(iter(places)), slice(index, index + 1))[0].to(dtype=dtype, copy=True)
        own = sorted((place[1].start, stored) for stored, place in places.items() if place[0] == index)
        return torch.cat([self._tensors.read(stored, dtype) for _, stored in own])
