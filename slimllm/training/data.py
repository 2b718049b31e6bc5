"""Instruction data to rows of tokens, as the published recovery stage makes them (LLM-Pruner's, which SlimLLM uses)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from pathlib import Path

import torch

from ..data.conversations import answers_in, has_messages, messages_of
from ..data.texts import as_it_came, check_vocabulary, decoded, is_encodable, json_lines
from ..errors import UserError
from ..models import hub
from ..settings.training import TEMPLATES, TrainConfig
from ..utils.files import check_plain

log = logging.getLogger("slimllm")

IGNORED = -100  # the label of a token that is not learned
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimllm"
COLUMNS = ("instruction", "input", "output", "text", "messages")


def check_rows(name: str, option_name: str = "--data_path") -> None:
    """Raises UserError where ``name`` is a file that is not there or cannot be one of rows, before anything is read."""
    path = Path(name)
    if path.suffix in (".json", ".jsonl"):
        check_plain(path, f"{option_name} ")
    elif path.exists() or name.startswith((".", "/", "~")):
        raise UserError(f"{option_name} {name}: not a .json or .jsonl file, or not there")


def read_rows(config: TrainConfig) -> dict[str, dict]:
    """Rows of the training data, by where each stands (row 3, line 4): {"instruction", "input", "output"}, {"text"} or {"messages"},
    which ShareGPT's conversations become too.

    Raises UserError naming file and row.
    """
    where = f"--data_path {config.data_path}"
    rows = _all_rows(config, where)
    if not rows:
        raise UserError(f"{where}: not a list of rows, or an empty one")
    if not config.no_instruction and any(map(has_messages, rows.values())):
        return _conversations(rows, where, config)
    plain = config.no_instruction or any(isinstance(row, dict) and "text" in row for row in rows.values())
    required = ("text",) if plain else ("instruction", "output")
    for place, row in rows.items():
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in required):
            raise UserError(f"{where}, {place}: without {' and '.join(required)}")
        if not all(is_encodable(row[name]) for name in COLUMNS if isinstance(row.get(name), str)):
            raise UserError(f"{where}, {place}: it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return rows


def _conversations(rows: dict, where: str, config: TrainConfig) -> dict[str, dict]:
    """Rows of messages, as JSON. Raises UserError, beginning with ``where``, for one that is odd, and where nothing is to be learned."""
    found = {place: _messages(row, f"{where}, {place}") for place, row in rows.items()}
    if not config.train_on_inputs and not any(message["role"] == "assistant" for messages in found.values() for message in messages):
        raise UserError(f"{where}: no row has an answer of the assistant to learn; add them, or learn all messages with --train_on_inputs")
    return {place: {"messages": json.dumps(messages)} for place, messages in found.items()}


def _messages(row, where: str) -> list[dict]:
    if not has_messages(row):
        raise UserError(f"{where}: without messages, which other rows have")
    try:
        messages = messages_of(row)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not is_encodable(json.dumps(messages, ensure_ascii=False)):
        raise UserError(f"{where}: it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return messages


def _all_rows(config: TrainConfig, where: str) -> dict[str, object]:
    """What the file or the data set on the hub holds, by where it stands. Raises UserError, beginning with ``where``."""
    check_rows(config.data_path)
    path = Path(config.data_path)
    if path.suffix in (".json", ".jsonl"):
        return _rows_of_file(path, where)
    try:
        return {f"row {number}": row for number, row in enumerate(hub.rows(config.data_path, split="train"), 1)}
    except OSError as error:
        raise UserError(f"{where}: {error}; name a local .json or .jsonl file") from None


def _rows_of_file(path: Path, where: str) -> dict[str, object]:
    try:
        text = decoded(path.read_bytes(), where)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    if path.suffix == ".jsonl":
        return {f"line {number}": row for number, row in json_lines(text, lambda number: f"{where}, line {number}")}
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    return {f"row {number}": row for number, row in enumerate(rows, 1)} if isinstance(rows, list) else {}


def tokenize(row: dict, tokenizer, config: TrainConfig) -> dict:
    """{"input_ids", "labels"} of one row; labels are IGNORED over the prompt unless it is to be learned.

    Of a conversation the assistant's messages alone are learned.
    """
    if row.get("messages") is not None:
        return _conversation(json.loads(row["messages"]), tokenizer, config)
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


def _conversation(messages: list[dict], tokenizer, config: TrainConfig) -> dict:
    text, answers = answers_in(tokenizer, messages)
    made = tokenizer(
        text, add_special_tokens=False, truncation=True, max_length=config.cutoff_len, return_offsets_mapping=True, verbose=False
    )
    learned = [config.train_on_inputs or any(begin <= at < end for begin, end in answers) for at, _ in made.offset_mapping]
    return {"input_ids": made.input_ids, "labels": [token if learns else IGNORED for token, learns in zip(made.input_ids, learned)]}


def _tokens_of(row: dict, place: str, tokenizer, config: TrainConfig) -> dict:
    try:
        return tokenize(row, tokenizer, config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _text(value) -> str | None:
    return value if isinstance(value, str) else None


def load_data(config: TrainConfig, tokenizer, vocab_size: int):
    """(training rows, held-out rows, SHA-256 of the tokens), two ``datasets.Dataset`` with ``input_ids`` and ``labels``.

    Rows with nothing to learn in them are left out. With ``cache_dataset`` the tokens are kept in CACHE, by the content of the rows
    and everything that decides what they become. Raises UserError where no row is left, and for a token beyond ``vocab_size``.
    """
    import datasets  # slow to import

    if config.add_eos_token and tokenizer.eos_token_id is None:
        raise UserError(f"--prune_model {config.prune_model}: its tokenizer has no end-of-text token to end a row with; --no_add_eos_token")
    datasets.disable_progress_bars()
    found = read_rows(config)
    places, rows = list(found), [{name: _text(row.get(name)) for name in COLUMNS} for row in found.values()]
    cached = None
    if config.cache_dataset:
        names = ("cutoff_len", "prompt_template_name", "no_instruction", "train_on_inputs", "add_eos_token")
        settings = [getattr(config, name) for name in names]
        template = tokenizer.chat_template
        key = hashlib.sha256(json.dumps([rows, settings, template, tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()
        CACHE.mkdir(parents=True, exist_ok=True)
        cached = str(CACHE / f"tokenized-{key}.arrow")
    data = datasets.Dataset.from_list(rows)
    with as_it_came(tokenizer):
        try:
            data = data.map(
                lambda row, number: _tokens_of(row, places[number], tokenizer, config),
                with_indices=True,
                remove_columns=list(COLUMNS),
                cache_file_name=cached,
            )
        except UserError as error:
            raise UserError(f"--data_path {config.data_path}, {error}") from None
    for place, ids in zip(places, data["input_ids"]):
        check_vocabulary(torch.tensor(ids), vocab_size, f"--data_path {config.data_path}, {place}")
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
