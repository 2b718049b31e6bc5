"""What the flags of several programs have in common."""

from __future__ import annotations

from pathlib import Path

from ..cli import flag

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZED = ("q8_0",)  # types of a GGUF file, in blocks
OUTTYPES = ("f32", "f16", "bf16", *QUANTIZED)
VLLM_PYTHON = ".vllm/bin/python"  # as script/vllm.sh makes it


def short_name(model: str) -> str:
    """What a model is called in tables and the names of files: the end of its name on the hub or of its path; ``.`` says no name itself."""
    path = Path(model)
    return path.resolve().name if path.name in ("", "..") else path.name


def trust_flag(group: str):
    """``--trust_remote_code`` of a program that runs vLLM."""
    return flag(group, "let vLLM run code that a folder brings; this program's own modeling.py, unchanged, needs no leave", False)
