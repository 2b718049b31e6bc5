"""``python -m slimllm families``: the supported model families, and the refused ones with the reason, which is docs/families.md."""

from __future__ import annotations

import logging

from ..cli import NoSettings
from ..models.families import FAMILIES, UNSUPPORTED, Family
from ..models.shape import HEADS_FILL_HIDDEN

log = logging.getLogger("slimllm")


def _llama_cpp(family: Family) -> str:
    if family.gguf_free:
        return f"`{family.gguf_free}`, or `{family.gguf}` with one width"
    return f"`{family.gguf}`, one width" + (", no head removed" if family.gguf in HEADS_FILL_HIDDEN else "")


def families_page() -> str:
    """The page, from the family table."""
    head = ["`model_type`", "models", "what can go", "layers of different widths in vLLM's DeciLM", "architecture in llama.cpp"]
    rows = [
        [
            f"`{family.model_type}`",
            family.models,
            "channels" if family.heads_fixed else "heads, channels",
            "yes" if family.decilm else "no",
            _llama_cpp(family),
        ]
        for family in FAMILIES.values()
    ]
    refused: dict[str, list[str]] = {}
    for model_type, reason in UNSUPPORTED.items():
        refused.setdefault(reason, []).append(f"`{model_type}`")
    parts = [
        "# Families",
        "The model families that can be pruned, one row of `slimllm/models/families.py` each. All load in transformers with a width per "
        "layer (`--runtime any`) or as the family's own class (`--runtime transformers`); the last two columns say in what form "
        "`--runtime vllm` and `--runtime gguf` prune. Of a model of text and images the text model is taken. "
        "This page is the output of `python -m slimllm families`; [add-a-family.md](add-a-family.md) shows how to add a row.",
        "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]),
        "## Refused",
        "These are refused before a weight is read, each with the reason:",
        "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in refused.items()),
    ]
    return "\n\n".join(parts) + "\n"


def run(settings: NoSettings) -> None:
    log.info("%s", families_page().rstrip("\n"))
