"""Devices, and the dtype in which each of them computes best."""

from __future__ import annotations

import torch

from ..errors import UserError


def device_of(option_name: str, name: str) -> torch.device:
    """The torch device that ``--option_name NAME`` means; auto is a GPU if there is one.

    Raises UserError for one that is not there, and for mps, which has no float64.
    """
    usable = f"use cpu{', cuda' if torch.cuda.is_available() else ''} or auto"
    if name == "auto":  # of several processes each has the GPU that it was given
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] == "mps":
        raise UserError(f"--{option_name} {name}: Apple's GPU has no float64, which the statistics need; {usable}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--{option_name} {name}: no such device here; {usable}") from None
    return device


def resolved(device: torch.device | str) -> torch.device:
    """The device with its number: ``cuda`` is the current GPU, as a tensor that lies there has it."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that time can be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype as flags and files have it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def cpu_is_fast_in_bfloat16() -> bool:
    """Whether this CPU has matrix products of bfloat16 in hardware (AMX, or AVX-512 BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def gpu_has_bfloat16() -> bool:
    """Whether the current GPU computes in bfloat16 itself, rather than emulating it (compute capability 8.0 and newer)."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def pruning_dtype(name: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """What the weights are loaded and computed in for ``--dtype NAME``.

    auto: float32 on a CPU; on a GPU the dtype that the checkpoint is ``stored`` in, or bfloat16 where it names none.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    if stored is None:
        return torch.bfloat16 if gpu_has_bfloat16() else torch.float16
    return stored


def saving_dtype(name: str, stored: torch.dtype | None, computed: torch.dtype) -> torch.dtype:
    """What the weights are saved in for ``--save_dtype NAME``, where the source's are ``stored`` in and the method ``computed`` in.

    auto: the source's, so that a checkpoint is no larger than what it was made of; where fewer bits were computed in, these.
    """
    if name != "auto":
        return getattr(torch, name)
    return stored if stored in (torch.float16, torch.bfloat16) and computed == torch.float32 else computed


def evaluation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a model of ``dtype`` is evaluated in on ``device``: on a CPU bfloat16 where that is fast, else float32, since products of
    16-bit numbers are several times as slow there; on a GPU the model's own.
    """
    if device.type == "cpu":
        return torch.bfloat16 if cpu_is_fast_in_bfloat16() else torch.float32
    return dtype


def distillation_dtype(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a model of ``model_dtype`` is distilled in: the evaluation's, but on a GPU never float16, in which small gradients vanish."""
    dtype = evaluation_dtype(model_dtype, device)
    if dtype != torch.float16:
        return dtype
    return torch.bfloat16 if gpu_has_bfloat16() else torch.float32


def training_dtype(device: torch.device, model_dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the device computes in it itself, else float16 on a GPU and the evaluation's on a CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if gpu_has_bfloat16() else torch.float16
    return evaluation_dtype(model_dtype, device)
