"""Calibration tokens: from hub data sets, local text, the model's own samples, or a saved calibration file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import hub
from .cli import UserError, nearest
from .config import CALIBRATION_NAMES, PruneConfig
from .record import return_free_memory

log = logging.getLogger("slimllm")

HUB_SOURCES = {
    "bookcorpus": dict(path="bookcorpus/bookcorpus", revision="refs/convert/parquet", split="train", column="text"),
    "c4": dict(path="allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz", split="train", column="text"),
    "wikitext2": dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train", column="text"),
}
TEXT_SUFFIXES = (".txt", ".jsonl")
MAX_CHARACTERS = 8_000_000  # enough for over ten thousand samples of 128 tokens; more is not read
SELF_SAMPLE_BATCH = 16
HELD_BACK = 4
OVERLAP_TOKENS = 16  # a run this long in common is no accident


@dataclass
class Calibration:
    """Token ids [samples, length] int64, where they came from, and their hash (SHA-256 of the int64 bytes).

    ``held_back`` [samples, length]: text that ``--layer_ratio auto`` measures on, as from :func:`held_back`.
    """

    ids: torch.Tensor
    source: str
    seed: int | None = None
    held_back: torch.Tensor | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    def save(self, folder: Path) -> None:
        tensors = {"calibration_ids": self.ids.contiguous()}
        if self.held_back is not None:
            tensors["held_back_ids"] = self.held_back.contiguous()
        save_file(tensors, folder / "calibration.safetensors", {"source": self.source})

    def to_dict(self) -> dict:
        return {"source": self.source, "samples": len(self.ids), "length": self.ids.shape[1], "seed": self.seed, "sha256": self.sha256}


def load(config: PruneConfig, model, tokenizer) -> Calibration:
    """The calibration samples that the flags ask for.

    Without ``--calibration`` it is bookcorpus, or samples of the model itself where that cannot be had.
    Raises UserError for a source that the user named and that cannot be had, is empty, too short or broken.
    """
    name = config.calibration
    if name is None:
        try:
            return _from_hub("bookcorpus", config, tokenizer)
        except OSError as error:
            log.info("calibration: %s; using samples of the model itself instead (--calibration self)", error)
            name = "self"
    if name == "self":
        return Calibration(sample_from_model(model, tokenizer, config), "self", config.seed)
    if name.endswith(".safetensors"):
        return _from_file(name, model.config.vocab_size)
    if name in HUB_SOURCES:
        try:
            return _from_hub(name, config, tokenizer)
        except OSError as error:
            raise UserError(f"--calibration {name}: {error}; name a local .txt or .jsonl file, or self") from None
    return _from_text(name, config, tokenizer)


def check_source(name: str | None) -> None:
    """Raises UserError early, before a model is read, where ``--calibration`` names nothing that exists."""
    if name is not None and name not in CALIBRATION_NAMES and not os.path.exists(name):
        raise UserError(
            f"--calibration {name}: no such file or folder, and not one of {', '.join(CALIBRATION_NAMES)}{nearest(name, CALIBRATION_NAMES)}"
        )


def _from_file(path: str, vocab_size: int) -> Calibration:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in ("calibration_ids", "held_back_ids")}
    except (SafetensorError, OSError) as error:
        raise UserError(f"--calibration {path}: not a calibration file ({error})") from None
    if "calibration_ids" not in tensors:
        raise UserError(f"--calibration {path}: not a calibration file (it has no calibration_ids)")
    for name, ids in tensors.items():
        if ids.ndim != 2 or ids.dtype != torch.int64 or 0 in ids.shape:
            raise UserError(f"--calibration {path}: {name} is {ids.dtype} {list(ids.shape)}, not int64 [samples, length]")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise UserError(f"--calibration {path}: token id {int(ids.max())} is outside the model's vocabulary of {vocab_size}")
    return Calibration(tensors["calibration_ids"], path, held_back=tensors.get("held_back_ids"))


def _from_hub(name: str, config: PruneConfig, tokenizer) -> Calibration:
    source = dict(HUB_SOURCES[name])
    column = source.pop("column")
    parts, size = [], 0
    for text in hub.rows(source.pop("path"), column, **source):
        parts.append(text)
        size += len(text) + 1
        if size >= MAX_CHARACTERS:
            break
    return Calibration(_sample("\n".join(parts), name, config, tokenizer), name, config.seed)


def _from_text(name: str, config: PruneConfig, tokenizer) -> Calibration:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"--calibration {name}: the folder holds no {' or '.join(TEXT_SUFFIXES)} file")
    elif path.suffix in TEXT_SUFFIXES:
        files = [path]
    else:
        raise UserError(f"--calibration {name}: not a .txt, .jsonl or .safetensors file, nor a folder")
    rng, share = random.Random(config.seed), MAX_CHARACTERS // len(files)
    parts = []
    for file in files:
        text = read_text(file)
        start = rng.randrange(max(1, len(text) - share + 1))
        parts.append(text[start : start + share])
    return Calibration(_sample("\n".join(parts), name, config, tokenizer), name, config.seed)


def read_text(path: Path) -> str:
    """A .txt file as it is, or the ``text`` fields of a .jsonl file, one a line. Raises UserError naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if Path(path).suffix != ".jsonl":
        return text
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a JSON object with a text field") from None
    return "\n".join(rows)


def _sample(text: str, name: str, config: PruneConfig, tokenizer) -> torch.Tensor:
    """``num_examples`` distinct blocks of ``seq_len`` tokens, in random order, from the text as one stream of tokens.

    Short texts are thereby joined; none is searched for.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    blocks = len(ids) // config.seq_len
    if blocks < config.num_examples:
        raise UserError(
            f"--calibration {name}: {len(ids)} tokens are too few for {config.num_examples} samples of {config.seq_len}; "
            "give more text, or fewer or shorter samples (--num_examples, --seq_len)"
        )
    chosen = random.Random(config.seed).sample(range(blocks), config.num_examples)
    return torch.tensor(ids[: blocks * config.seq_len]).view(blocks, config.seq_len)[chosen]


def overlap(ids: torch.Tensor, text: torch.Tensor) -> int:
    """How many of the samples ``ids`` [samples, length] share a run of OVERLAP_TOKENS tokens with the text ``text`` [tokens]."""
    if min(ids.shape[1], len(text)) < OVERLAP_TOKENS:
        return 0
    keys = torch.randint(2**62, (OVERLAP_TOKENS,), generator=torch.Generator().manual_seed(0))

    def runs(stream):  # a hash of each run: 64-bit sums that wrap around
        return sum(stream[..., k : stream.shape[-1] - OVERLAP_TOKENS + 1 + k] * key for k, key in enumerate(keys))

    return int(torch.isin(runs(ids), runs(text)).any(1).sum())


def held_back(model, tokenizer, config: PruneConfig) -> torch.Tensor:
    """HELD_BACK samples [samples, seq_len] of the model itself that no calibration uses, for ``--layer_ratio auto``.

    The model's own text, whatever the calibration source: what a layer costs on one kind of text says little about another.
    """
    return sample_from_model(model, tokenizer, dataclasses.replace(config, num_examples=HELD_BACK, seed=config.seed + 1))


@torch.no_grad()
def sample_from_model(model, tokenizer, config: PruneConfig) -> torch.Tensor:
    """Samples [num_examples, seq_len] from the model at temperature 1, each from a random first token. Same seed, same ids.

    Special tokens are never sampled, so that every sample is text from end to end.
    """
    from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

    device, vocab = model.device, model.config.vocab_size
    special = sorted({i for i in tokenizer.all_special_ids if i < vocab} | set(range(len(tokenizer), vocab)))
    words = torch.tensor(sorted(set(range(vocab)) - set(special)))
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.seq_len - 1,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    suppress = LogitsProcessorList([SuppressTokensLogitsProcessor(special, device=device)] if special else [])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        first = words[torch.randint(len(words), (config.num_examples, 1))].to(device)
        parts = [
            model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings, logits_processor=suppress)
            for start in first.split(SELF_SAMPLE_BATCH)
        ]
    return_free_memory()
    return torch.cat(parts).cpu()
