"""What config.json and tokenizer_config.json of a checkpoint hold, for other programs, besides what transformers 5 writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers.tokenization_utils_base import LARGE_INTEGER

from .. import modeling
from ..models.families import family_of
from ..models.shape import rope_of
from ..utils.device import name_of
from ..utils.files import file_hash

# SHA-256 of older forms of modeling.py, which lie beside the checkpoints of their time
OLDER_MODELING = (
    "16db1e1d776b4a2d6079276b4b174a209179bff5c186f3ca7eedc3f25b467309",
    "0b5a7063dff8ab694862987b7f76c560969da10b39680597535c7cbe9bf65174",
    "caca9c70c496d5c8e6ba03ee52f8f1cb77487e00ad479840e9aeb777f690c7e0",
    "c5326afaed6baa0cdb3dda1d2c32ea9d51fa4ec89718cf88cd12007c44cfe3dd",
)
FULL_ROPE = ("olmo3",)  # families whose settings in transformers 4 were those of the layers without a window
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


def complete_config(folder: Path, config, dtype: torch.dtype) -> None:
    """Adds to config.json what transformers 4, mlx-lm, candle and vLLM look for, and takes out what points to files that are not there.

    ``dtype``: what the weights are saved in.
    """

    def complete(written: dict) -> dict:
        written["dtype"] = name_of(dtype)
        if hasattr(config, "block_configs"):  # transformers goes by auto_map, vLLM by this
            written["architectures"] = ["DeciLMForCausalLM"]
        return written | older_rope(config) | counts_of_experts(config)

    rewrite(folder / CONFIG, complete)


def complete_tokenizer_config(folder: Path, context: int) -> None:
    """Names a tokenizer class that transformers 4 has too and, where no limit is stated, the model's ``context`` in tokens."""

    def complete(written: dict) -> dict:
        if written.get("tokenizer_class") == "TokenizersBackend":
            written["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name in both versions
        if (written.get("model_max_length") or LARGE_INTEGER) >= LARGE_INTEGER:
            written["model_max_length"] = context
        return written

    rewrite(folder / TOKENIZER_CONFIG, complete)


def older_rope(config) -> dict:
    """The rotary settings as transformers 4 had them, at the top of config.json; 5 reads the same from them as from its own."""
    family, rope = family_of(config), rope_of(config)
    by_kind = any(isinstance(settings, dict) for settings in (getattr(config, "rope_parameters", None) or {}).values())
    if "rope_theta" not in rope or (by_kind and not family.local_rope and family.model_type not in FULL_ROPE):
        return {}  # there are none, or of each kind of layer its own, which 4 had no common way to write
    kind = rope.get("rope_type", "default")
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    older = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if family.local_rope:
        older[family.local_rope] = rope_of(config, "sliding_attention")["rope_theta"]
    if kind == "longrope":  # Phi-3 takes these three settings by these names, and no others
        scaling["type"] = scaling.pop("rope_type")
        older["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if kind != "default":
        older["rope_scaling"] = scaling
    return older


def counts_of_experts(config) -> dict:
    """The number of experts under all names that transformers has for it: 5 writes one, 4 and other programs may read another."""
    names = {name for row in family_of(config).parts if row.kind == "experts" for name in row.sizes}
    pairs = [pair for pair in (getattr(config, "attribute_map", None) or {}).items() if names & set(pair)]
    return {name: getattr(config, name) for pair in pairs for name in pair}


def brings_only_our_code(folder: Path) -> bool:
    """Whether all code that loading ``folder`` would run is this program's own modeling file, of this or an older version, unchanged."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
    maps = [json.loads(path.read_text(encoding="utf-8")).get("auto_map") for path in folder.glob("*config.json")]
    named = {str(name).rpartition(".")[0] for auto_map in maps for _, entry in _entries(auto_map) for name in _classes(entry)}
    ours = Path(modeling.__file__)
    return files == [ours.name] and named <= {ours.stem} and file_hash(folder / ours.name) in {file_hash(ours), *OLDER_MODELING}


def rewrite(path: Path, complete) -> None:
    """Passes the JSON object in a file through ``complete``; of its ``auto_map`` only what refers to files beside it stays."""
    written = complete(json.loads(path.read_text(encoding="utf-8")))
    auto_map = {name: entry for name, entry in _entries(written.pop("auto_map", None)) if _is_there(entry, path.parent)}
    if auto_map:
        written["auto_map"] = auto_map
    path.write_text(json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _entries(auto_map) -> list[tuple]:
    """(auto class, class or classes) of an ``auto_map``; older tokenizers have a list without a name."""
    return list(auto_map.items()) if isinstance(auto_map, dict) else [("AutoTokenizer", auto_map)] if auto_map else []


def _is_there(entry, folder: Path) -> bool:
    """Whether the classes of an ``auto_map`` entry (MODULE.CLASS, or several, or None) are in files of ``folder``."""
    return all((folder / f"{name.rpartition('.')[0]}.py").is_file() for name in _classes(entry))


def _classes(entry) -> list[str]:
    return [name for name in (entry if isinstance(entry, list | tuple) else [entry]) if name is not None]
