"""Weights that files hold in FP8 or MXFP4, read as numbers of the model's own dtype, one tensor at a time.

What a number is follows transformers' own conversion; a last block that is not full, as DeepSeek-V3 has some, is as its publisher reads it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import UserError
from .weights import OfAnother

_POWERS = torch.tensor([2.0 ** (byte - 127) for byte in range(256)])  # what a scale of one byte stands for
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_HALVES = (*_E2M1, *(-number for number in _E2M1))  # what four bits stand for
_PAIRS = torch.tensor([[_HALVES[byte % 16], _HALVES[byte // 16]] for byte in range(256)])  # the lower half of a byte comes first


class Dequantized(OfAnother):
    """The tensors of another reader, of which some are quantized, as numbers of ``dtype``. ``settings``: what config.json says of it."""

    def __init__(self, tensors, dtype: torch.dtype, settings: dict):
        super().__init__(tensors)
        self._dtype, self._settings, self._there = dtype, settings, set(tensors.names)

    def dtype_name(self, name: str) -> str:
        """The type of a tensor, as the files name it."""
        return self._tensors.dtype_name(name)

    def is_number(self, name: str) -> bool:
        """Whether a tensor is of a plain floating-point type, or read as one."""
        return self._is_quantized(name) or self._tensors.is_number(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in ``dtype`` or its own; a quantized one is rounded to the model's own dtype first."""
        return self._dequantized(name).to(dtype or self._dtype) if self._is_quantized(name) else self._tensors.read(name, dtype)

    def check(self, where: str) -> None:
        """Raises UserError, naming ``where``, for a tensor whose scales are missing or fit it not, by their shapes; reads none."""
        for name in self.names:
            if fault := self._fault(name):
                raise UserError(f"{where}: {name}: {fault}; download the model again")

    def _fault(self, name: str) -> str | None:
        """Why a tensor cannot be dequantized, in words."""
        raise NotImplementedError

    def _is_quantized(self, name: str) -> bool:
        raise NotImplementedError

    def _dequantized(self, name: str) -> torch.Tensor:
        raise NotImplementedError


class Fp8(Dequantized):
    """Numbers of 8 bits, each block of a matrix multiplied by a scale of its own: NAME and NAME_scale_inv."""

    @property
    def names(self) -> list[str]:
        """Those of the other reader, without scales."""
        scales = {f"{name}_scale_inv" for name in self._there}
        return [name for name in self._tensors.names if name not in scales and not name.endswith("activation_scale")]

    def check(self, where: str) -> None:
        given = self._settings.get("weight_block_size")
        pair = isinstance(given, list | tuple) and len(given) == 2
        if given is not None and not (pair and all(isinstance(size, int) and size > 0 for size in given)):
            raise UserError(f"{where}: weight_block_size is {given!r}, not two whole numbers of at least 1; correct config.json")
        super().check(where)

    def _fault(self, name: str) -> str | None:
        if not self._is_quantized(name):
            return None
        shape, scales = self._tensors.shape(name), self._tensors.shape(f"{name}_scale_inv")
        if math.prod(scales) == 1:
            return None
        *stacked, rows, columns = scales if len(scales) > 1 else (0, 0)
        same = all(n in (1, size) for n, size in zip(reversed(stacked), [*reversed(shape[:-2]), *[1] * len(stacked)]))
        if not (rows and columns and same and len(shape) > 1):
            return f"its scales are {list(scales)}, and it is {list(shape)}"
        given = self._settings.get("weight_block_size") or (None, None)
        odd = (n for size, n, block in zip(shape[-2:], (rows, columns), given) if _block(size, n, block) is None)
        return next((f"{n} scales do not divide its {shape[-2]} rows or {shape[-1]} columns into equal blocks" for n in odd), None)

    def _is_quantized(self, name: str) -> bool:
        return f"{name}_scale_inv" in self._there and self._tensors.dtype_name(name) == "F8_E4M3"

    def _dequantized(self, name: str) -> torch.Tensor:
        stored, scales = self._tensors.read(name), self._tensors.read(f"{name}_scale_inv")
        scales = _POWERS[scales.int()] if scales.dtype == torch.uint8 else scales.float()
        scales = scales.view(1, 1) if scales.numel() == 1 else scales
        given, sizes = self._settings.get("weight_block_size") or (None, None), zip(stored.shape[-2:], scales.shape[-2:])
        height, width = (_block(*pair, block) for pair, block in zip(sizes, given))
        found = torch.empty(stored.shape, dtype=self._dtype)
        for band in range(scales.shape[-2]):
            rows = slice(band * height, (band + 1) * height)
            factors = scales[..., band : band + 1, :].repeat_interleave(width, -1)[..., : stored.shape[-1]]
            found[..., rows, :] = stored[..., rows, :].float() * factors
        return found


def _block(size: int, count: int, given: int | None) -> int | None:
    """How long a block is where ``count`` of them make up ``size``; ``given``: by the config. None where they cannot."""
    if given and -(-size // given) == count:
        return given
    return None if size % count else size // count


class Mxfp4(Dequantized):
    """Numbers of 4 bits of stacked experts, 32 of them multiplied by a power of two: NAME_blocks and NAME_scales, outputs before inputs."""

    @property
    def names(self) -> list[str]:
        """Those of the model."""
        pairs = {name.removesuffix("_blocks") for name in self._there if name.endswith("_blocks")}
        return [
            *(name for name in self._tensors.names if name.removesuffix("_blocks").removesuffix("_scales") not in pairs),
            *sorted(pairs),
        ]

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        if not self._is_quantized(name):
            return self._tensors.shape(name)
        experts, outputs, *inputs = self._tensors.shape(f"{name}_blocks")
        return [experts, 2 * inputs[0] * inputs[1], outputs]

    def _fault(self, name: str) -> str | None:
        if f"{name}_blocks" not in self._there:
            return None
        if f"{name}_scales" not in self._there:
            return "the files hold its blocks, and no scales"
        pair = [f"{name}_{what}" for what in ("blocks", "scales")]
        if odd := [one for one in pair if self._tensors.dtype_name(one) != "U8"]:
            return f"{odd[0]} is {self._tensors.dtype_name(odd[0])}, not bytes"
        blocks, scales = (list(self._tensors.shape(one)) for one in pair)
        return None if len(blocks) == 4 and blocks[:-1] == scales else f"its scales are {scales}, and its blocks {blocks}"

    def _is_quantized(self, name: str) -> bool:
        return {f"{name}_blocks", f"{name}_scales"} <= self._there

    def _dequantized(self, name: str) -> torch.Tensor:
        found = torch.empty(self.shape(name), dtype=self._dtype)
        for expert in range(len(found)):  # one at a time: as numbers they take many times what is read
            blocks, scales = (self._tensors.rows(f"{name}_{what}", slice(expert, expert + 1))[0] for what in ("blocks", "scales"))
            numbers = nn.functional.embedding(blocks.int(), _PAIRS).flatten(-2) * _POWERS[scales.int()][..., None]
            found[expert] = numbers.to(self._dtype).flatten(-2).T
        return found


READERS = {"fp8": Fp8, "mxfp4": Mxfp4}  # quant_method -> the reader
