"""Perplexity as published: rows joined with two newlines, tokenized once, cut into blocks, every block counted."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import pydoc_data.topics
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import hub
from .calibration import read_text
from .cli import UserError, nearest
from .config import EVAL_NAMES, PruneConfig
from .record import return_free_memory

log = logging.getLogger("slimllm")

HUB_TEXTS = {
    "wikitext2": dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test", column="text"),
    "ptb": dict(path="ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split="validation", column="sentence"),
}
TOKENS_PER_BATCH = 1024
_LOGIT_ROWS = 256  # so that no more than this many rows of the vocabulary's width are held in float32


@dataclass
class EvalText:
    """A text to measure on: ``name`` for people, ``text`` as it is tokenized, ``split`` and SHA-256 for the record."""

    name: str
    text: str
    split: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def to_dict(self) -> dict:
        return {"data": self.name, "split": self.split, "sha256": self.sha256}


def wikitext_rows(raw: str) -> list[str]:
    """The hub's rows of a wiki.test.raw file: a blank line is an empty row, any other keeps its newline."""
    return [line + "\n" if line.strip() else "" for line in raw.split("\n")[: -1 if raw.endswith("\n") else None]]


def ptb_rows(raw: str) -> list[str]:
    """The hub's rows of a ptb.valid.txt file: its sentences without surrounding blanks."""
    return [line.strip() for line in raw.splitlines() if line.strip()]


def _file_text(name: str | None, path: Path, flag: str) -> EvalText:
    raw = read_text(path)
    if not raw.strip():
        raise UserError(f"{flag} {path}: the file is empty")
    if name == "wikitext2" or (name is None and path.name.startswith("wiki.")):
        return EvalText("wikitext2", "\n\n".join(wikitext_rows(raw)), path.name)
    if name == "ptb" or (name is None and path.name.startswith("ptb.")):
        return EvalText("ptb", "\n\n".join(ptb_rows(raw)), path.name)
    return EvalText(name or path.stem, raw, path.name)


def _python_manual() -> EvalText:
    topics = pydoc_data.topics.topics
    return EvalText(
        "python_manual", "\n\n".join(topics[key] for key in sorted(topics)), f"pydoc_data.topics of Python {platform.python_version()}"
    )


def _hub_text(name: str) -> EvalText:
    source = dict(HUB_TEXTS[name])
    split, column = source["split"], source.pop("column")
    return EvalText(name, "\n\n".join(hub.rows(source.pop("path"), column, **source)), split)


def load_texts(eval_data: tuple | None, flag: str = "--eval_data") -> list[EvalText]:
    """The texts that ``--eval_data`` (or another ``flag``) names. Raises UserError for one that cannot be had.

    Nothing named: wikitext2 and ptb from the hub or, where it cannot be reached, the Python manual that comes with the
    interpreter (pydoc_data.topics).
    """
    if eval_data is None:
        try:
            return [_hub_text(name) for name in HUB_TEXTS]
        except OSError as error:
            log.info("evaluation: %s; using the text of the Python manual instead (%s python_manual)", error, flag)
            return [_python_manual()]
    if "none" in eval_data:
        return []
    return [_named_text(item, flag) for item in eval_data]


def _named_text(item: str, flag: str) -> EvalText:
    if item == "python_manual":
        return _python_manual()
    if item in HUB_TEXTS:
        try:
            return _hub_text(item)
        except OSError as error:
            raise UserError(f"{flag} {item}: {error}; give a local file as {item}=FILE") from None
    name, _, path = item.rpartition("=")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {item}: no such file, and not one of {', '.join(EVAL_NAMES)}{nearest(item, EVAL_NAMES)}")
    return _file_text(name or None, Path(path), flag)


def blocks_of(text: EvalText, tokenizer, seq_len: int, limit: int | None = None) -> torch.Tensor:
    """Token ids [blocks, seq_len] of the text tokenized once; what does not fill a last block is dropped."""
    ids = torch.tensor(tokenizer(text.text, verbose=False).input_ids, dtype=torch.long)
    blocks = len(ids) // seq_len
    if not blocks:
        raise UserError(f"{text.name}: {len(ids)} tokens do not fill one block of {seq_len} tokens")
    return ids[: blocks * seq_len].view(blocks, seq_len)[:limit]


def evaluation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 for a float32 model on a CPU with fast bfloat16 matrix products, else the model's own."""
    if device.type == "cpu" and dtype == torch.float32:
        flags = torch.cpu.get_capabilities()
        if flags.get("amx_bf16") or flags.get("avx512_bf16"):
            return torch.bfloat16
    return dtype


@contextmanager
def evaluating(model, device: torch.device):
    """The model with its weights on ``device`` in the dtype that evaluation uses; afterwards they are as before.

    Only parameters are cast: position frequencies stay float32, as from_pretrained leaves them.
    """
    dtype = evaluation_dtype(model.dtype, device)
    originals = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device=device, dtype=dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device=device)
        yield model
    finally:
        for tensor, data in originals:
            tensor.data = data
        return_free_memory()


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor, description: str = "perplexity") -> float:
    """exp(mean negative log-likelihood) over the tokens that the model predicts: all but the first of each block.

    ``blocks`` [blocks, seq_len] token ids; the losses are taken in float32 and added in float64.
    Raises UserError if the model's loss is not finite.
    """
    total = 0.0
    batch = max(1, TOKENS_PER_BATCH // blocks.shape[1])
    for ids in tqdm(blocks.split(batch), desc=description, leave=False, disable=None):
        ids = ids.to(model.device)
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        for rows, wanted in zip(states.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS)):
            total += torch.nn.functional.cross_entropy(model.lm_head(rows).float(), wanted, reduction="sum").double().item()
    mean = total / (len(blocks) * (blocks.shape[1] - 1))
    if not math.isfinite(mean):
        raise UserError(f"{description}: the loss is not finite in {model.dtype}; try --dtype float32 or bfloat16")
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def continuations(model, tokenizer, config: PruneConfig) -> list[str]:
    """Prompts of the published scripts with 64 sampled tokens each; temperature 0 is greedy."""
    prompts = (
        "I believe the meaning of life is",
        "Simply put, the theory of relativity states that",
        "Building a website can be done in 10 simple steps:\n",
    )
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p} if config.temperature else {"do_sample": False}
    texts = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            output = model.generate(**inputs, max_new_tokens=64, pad_token_id=tokenizer.pad_token_id or 0, **sampling)
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts
