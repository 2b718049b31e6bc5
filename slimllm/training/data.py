"""Instruction data to rows of tokens, as the published recovery stage makes them (LLM-Pruner's, which SlimLLM uses)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from pathlib import Path

import torch

from ..data.texts import as_it_came, check_vocabulary, is_encodable
from ..errors import UserError
from ..models import hub
from ..settings.training import TEMPLATES, TrainConfig
from ..utils.files import check_plain

log = logging.getLogger("slimllm")

IGNORED = -100  # the label of a token that is not learned
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimllm"
COLUMNS = ("instruction", "input", "output", "text")


def read_rows(config: TrainConfig) -> list[dict]:
    """Rows of the training data: {"instruction", "input", "output"} or {"text"}. Raises UserError naming file and row."""
    path = Path(config.data_path)
    if path.suffix in (".json", ".jsonl"):
        where = f"--data_path {path}"
        check_plain(path, "--data_path ")
        try:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not {path.suffix[1:].upper()} ({error})") from None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{where}: not a list of rows, or an empty one")
    elif path.exists() or config.data_path.startswith((".", "/", "~")):
        raise UserError(f"--data_path {path}: not a .json or .jsonl file, or not there")
    else:
        where = f"--data_path {config.data_path}"
        try:
            rows = list(hub.rows(config.data_path, split="train"))
        except OSError as error:
            raise UserError(f"{where}: {error}; name a local .json or .jsonl file") from None
    required = ("text",) if config.no_instruction or (isinstance(rows[0], dict) and "text" in rows[0]) else ("instruction", "output")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in required):
            raise UserError(f"{where}, row {number}: without {' and '.join(required)}")
        if not all(is_encodable(row[name]) for name in COLUMNS if isinstance(row.get(name), str)):
            raise UserError(f"{where}, row {number}: it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return rows


def tokenize(row: dict, tokenizer, config: TrainConfig) -> dict:
    """{"input_ids", "labels"} of one row; labels are IGNORED over the prompt unless it is to be learned."""
    if row.get("text") is not None and (config.no_instruction or row.get("output") is None):
        prompt, text = "", row["text"]
    else:
        with_input, without = TEMPLATES[config.prompt_template_name]
        prompt = (with_input if row.get("input") else without).format(instruction=row["instruction"], input=row.get("input"))
        text = prompt + row["output"]
    ids = tokenizer(text, truncation=True, max_length=config.cutoff_len, verbose=False).input_ids
    if config.add_eos_token and len(ids) < config.cutoff_len and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    labels = list(ids)
    if prompt and not config.train_on_inputs:
        hidden = min(len(tokenizer(prompt, verbose=False).input_ids), len(ids))
        labels[:hidden] = [IGNORED] * hidden
    return {"input_ids": ids, "labels": labels}


def load_data(config: TrainConfig, tokenizer, vocab_size: int):
    """(training rows, held-out rows, SHA-256 of the tokens), two ``datasets.Dataset`` with ``input_ids`` and ``labels``.

    Rows with nothing to learn in them are left out. With ``cache_dataset`` the tokens are kept in CACHE, by the content of the rows
    and everything that decides what they become. Raises UserError where no row is left, and for a token beyond ``vocab_size``.
    """
    import datasets  # slow to import

    if config.add_eos_token and tokenizer.eos_token_id is None:
        raise UserError(f"--prune_model {config.prune_model}: its tokenizer has no end-of-text token to end a row with; --no_add_eos_token")
    datasets.disable_progress_bars()
    rows = [{name: row[name] if isinstance(row.get(name), str) else None for name in COLUMNS} for row in read_rows(config)]
    cached = None
    if config.cache_dataset:
        names = ("cutoff_len", "prompt_template_name", "no_instruction", "train_on_inputs", "add_eos_token")
        settings = [getattr(config, name) for name in names]
        key = hashlib.sha256(json.dumps([rows, settings, tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()
        CACHE.mkdir(parents=True, exist_ok=True)
        cached = str(CACHE / f"tokenized-{key}.arrow")
    data = datasets.Dataset.from_list(rows)
    with as_it_came(tokenizer):
        data = data.map(lambda row: tokenize(row, tokenizer, config), remove_columns=list(COLUMNS), cache_file_name=cached)
    for number, ids in enumerate(data["input_ids"], 1):
        check_vocabulary(torch.tensor(ids), vocab_size, f"--data_path {config.data_path}, row {number}")
    learns = [i for i, labels in enumerate(data["labels"]) if any(label != IGNORED for label in labels[1:])]
    if len(learns) < len(data):
        log.info(
            "%d of %d rows have no token to learn within --cutoff_len %d and are left out",
            len(data) - len(learns),
            len(data),
            config.cutoff_len,
        )
    if not learns:
        raise UserError(
            f"--data_path {config.data_path}: none of its {len(data)} rows has a token to learn within --cutoff_len {config.cutoff_len}; "
            "raise it, or give shorter rows"
        )
    held_out = min(2000, len(learns) // 10) if config.val_set_size is None else config.val_set_size
    if held_out >= len(learns):
        raise UserError(f"--val_set_size {held_out}: the data has {len(learns)} usable rows, none would be left to train on")
    random.Random(config.seed).shuffle(learns)
    data = data.select(learns)
    digest = hashlib.sha256(json.dumps(list(data)).encode()).hexdigest()
    return data.select(range(held_out, len(data))), data.select(range(held_out)), digest


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest: input_ids, labels (IGNORED there) and attention_mask [rows, length]; their numbers, if they have some."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(lists, value):
        return torch.tensor([items + [value] * (length - len(items)) for items in lists])

    numbers = {"row": torch.tensor([row["row"] for row in rows])} if "row" in rows[0] else {}
    return numbers | {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }
