"""What the flags of several programs have in common."""

from __future__ import annotations

from ..cli import flag

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZED = ("q8_0",)  # types of a GGUF file, in blocks
OUTTYPES = ("f32", "f16", "bf16", *QUANTIZED)
VLLM_PYTHON = ".vllm/bin/python"  # as script/vllm.sh makes it


def trust_flag(group: str):
    """``--trust_remote_code`` of a program that runs vLLM."""
    return flag(group, "let vLLM run code that a folder brings; this program's own modeling.py, unchanged, needs no leave", False)
