"""``slimllm families``: the supported model families, and the refused ones with the reason, which is docs/families.md."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..cli import NoSettings
from ..models.families import FAMILIES, TEXT_MODELS, Family
from ..models.refused import UNSUPPORTED, WRAPPERS
from ..models.shape import HEADS_FILL_HIDDEN

log = logging.getLogger("slimllm")


def _llama_cpp(family: Family) -> str:
    if family.gguf_free:
        return f"`{family.gguf_free}`, or `{family.gguf}` with one width"
    if family.gguf is None:
        return "none"
    return f"`{family.gguf}`, one width" + (", no head removed" if family.gguf in HEADS_FILL_HIDDEN else "")


def _what_can_go(family: Family) -> str:
    if family.is_mixture:
        without = None if family.variant is None else replace(family, steps=family.variant[2], variant=None)
        dense = f"; without experts {_what_can_go(without)}" if without else ""
        channels = ", their channels" if len(family.part("experts").sizes) > 1 else ""
        return f"whole experts{channels}" + ("" if family.heads_fixed() else ", or heads") + dense
    return ("channels" if family.heads_fixed() else "heads, channels") + (", not the mixers" if family.is_hybrid else "")


def _wrappers() -> tuple[dict[str, str], dict[str, str]]:
    """(model_type -> that of its text model, of those whose text model is pruned; the same of all others)"""
    pruned = {name: text for name, text in WRAPPERS.items() if TEXT_MODELS.get(text, text) in FAMILIES}
    left = {name: text for name, text in WRAPPERS.items() if name not in pruned}
    return tuple(dict(sorted(pairs.items(), key=lambda pair: (pair[1], pair[0]))) for pairs in (pruned, left))


def _by_value(pairs: dict[str, str]) -> dict[str, list[str]]:
    """Value -> the names that have it, in their order."""
    found: dict[str, list[str]] = {}
    for name, value in pairs.items():
        found.setdefault(value, []).append(f"`{name}`")
    return found


def families_page() -> str:
    """The page, from the family table."""
    head = ["`model_type`", "models", "what can go", "layers of different widths in vLLM's DeciLM", "architecture in llama.cpp"]
    rows = [
        [
            f"`{family.model_type}`",
            family.models,
            _what_can_go(family),
            "yes" if family.decilm else "no",
            _llama_cpp(family),
        ]
        for family in FAMILIES.values()
    ]
    count = len(FAMILIES) + len(UNSUPPORTED) + len(WRAPPERS)
    whole, left = _wrappers()
    parts = [
        "# Families",
        "The model families that can be pruned, one row of `slimllm/models/families.py` each. All load in transformers with a width per "
        "layer (`--runtime any`) or as the family's own class (`--runtime transformers`); the last two columns say in what form "
        "`--runtime vllm` and `--runtime gguf` prune. Of a model of text and images the text model is taken, and "
        "`export-transformers --into` puts it back. "
        "Of a mixture of experts all layers lose the same number of experts, of channels of each expert, or of heads, and the result is "
        "the family's own class, but for `--runtime any` with prices or importance. "
        f"Of {count} types of transformers, {len(FAMILIES)} are rows here, {len(whole)} hold a text model that is, and "
        f"{count - len(FAMILIES) - len(whole)} are refused with the reason. "
        "This page is the output of `slimllm families`; [add-a-family.md](add-a-family.md) shows how to add a row.",
        "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]),
        "## Refused",
        "These are refused before a weight is read, each with the reason:",
        "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in _by_value(UNSUPPORTED).items()),
        "## Models of text and images, sound or film",
        f"Of {len(whole) + len(left)} such types {len(whole)} are read for their text model, where that is of a family above; most take "
        "text models of several families, and what their config says counts. By default they hold:",
        "\n".join(f"- `{text}`: {', '.join(names)}." for text, names in _by_value(whole).items()),
        "Refused, since their text models are (above):",
        "\n".join(f"- `{text}`: {', '.join(names)}." for text, names in _by_value(left).items()),
    ]
    return "\n\n".join(parts) + "\n"


def run(settings: NoSettings) -> None:
    log.info("%s", families_page().rstrip("\n"))
