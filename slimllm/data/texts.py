"""Texts that perplexity is measured on: from the hub, from files, or the Python manual; tokenized once and cut into blocks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import pydoc_data.topics
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import UserError, first_line, nearest
from ..models import hub
from ..models.families import family_of
from ..utils.files import check_plain
from ..utils.memory import return_free_memory
from .conversations import as_text, has_messages, messages_of

log = logging.getLogger("slimllm")

UTF8_BYTES = 4  # of one character, at most
TOKENIZING = 130  # bytes of memory that tokenizing takes per character of text, at most, as measured
WHOLE_BYTES = 32_000_000  # a file up to this size is read whole even where only a part of it is used

HUB_TEXTS = {  # "between": what its rows are joined with; the part of C4 is that of GPTQ and all who measure as it does
    "wikitext2": dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test", column="text"),
    "ptb": dict(path="ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split="validation", column="sentence"),
    "c4": dict(
        path="allenai/c4",
        data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"},
        split="validation[:1100]",
        column="text",
        between=" ",
    ),
}
DEFAULT_TEXTS = ("wikitext2", "ptb")
EVAL_NAMES = (*HUB_TEXTS, "python_manual", "none")


@dataclass
class EvalText:
    """A text to measure on: ``name`` for people, ``text`` as it is tokenized, ``split`` and SHA-256 for the record."""

    name: str
    text: str
    split: str

    @property
    def sha256(self) -> str:
        """Hash of the text in UTF-8, as hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def figure(self, blocks: torch.Tensor, limit: int | None, **values) -> dict:
        """A record's entry for perplexities measured on these ``blocks`` [blocks, seq_len] of the text; ``values`` are added to it."""
        source = {"data": self.name, "split": self.split, "sha256": self.sha256}
        return {**source, "seq_len": blocks.shape[1], "blocks": len(blocks), "limited": limit is not None, **values}


def read_text(path: Path, characters: int | None = None, rng: random.Random | None = None, tokenizer=None) -> str:
    """A .txt file as it is, or the ``text`` fields of a .jsonl file, one per line; with a ``tokenizer`` conversations by its chat template.

    With ``characters`` it is at most so many of them from a random place, by ``rng``; of a file too large for its characters to be
    counted, no more than these are read. Raises UserError, naming file and line, for what is no text.
    """
    check_plain(path)
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if characters is None or size <= WHOLE_BYTES:
                text = _text_of(path, file.read(), tokenizer=tokenizer)
                start = 0 if characters is None else rng.randrange(max(1, len(text) - characters + 1))
                return text if characters is None else text[start : start + characters]
            file.seek(rng.randrange(size - UTF8_BYTES * characters + 1))
            return _text_of(path, *_piece(file, UTF8_BYTES * characters, Path(path).suffix == ".jsonl"), tokenizer)[:characters]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _piece(file, size: int, lines: bool) -> tuple[bytes, int]:
    """(at most ``size`` bytes of a file from about where it stands, where they begin): whole characters or, where there are such, whole
    ``lines``; a line that has no end within them is read whole.
    """
    if lines:
        if file.tell():
            file.readline()  # the end of one
        if file.tell() == os.fstat(file.fileno()).st_size:
            file.seek(0)
        start = file.tell()
        return b"".join([file.readline(), *file.readlines(size)]), start
    start, content = file.tell(), file.read(size)
    skipped = next((i for i in range(UTF8_BYTES) if content[i] & 0xC0 != 0x80), 0)  # the end of a character
    cut = next((i for i in range(1, UTF8_BYTES) if content[-i] >= 0xC0), 0)  # the beginning of one
    if cut:
        content = content[:-cut]
    return content[skipped:], start + skipped


def _text_of(path: Path, content: bytes, start: int = 0, tokenizer=None) -> str:
    """The text in ``content``, which begins at byte ``start`` of the file ``path``."""
    text = decoded(content, str(path), start)
    if Path(path).suffix != ".jsonl":
        return text

    def where(number: int) -> str:
        return f"{path}, line {_lines_before(path, start) + number}"

    rows = []
    for number, entry in json_lines(text, where):
        try:
            rows.append(_row_text(entry, tokenizer))
        except UserError as error:
            raise UserError(f"{where(number)}: {error}") from None
    return "\n".join(rows)


def _row_text(entry, tokenizer) -> str:
    """The text of a row of a .jsonl file. Raises UserError for a row that has none."""
    row = entry.get("text") if isinstance(entry, dict) else None
    if tokenizer is not None and has_messages(entry):
        row = as_text(tokenizer, messages_of(entry))
    if not isinstance(row, str) and tokenizer is None and has_messages(entry):
        raise UserError("a row of messages, where perplexity is measured on plain text; give rows with a text field, or a .txt file")
    if not isinstance(row, str):
        raise UserError("not a JSON object with a text field that is a string, or with messages or conversations")
    if not is_encodable(row):
        raise UserError("its text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it")
    return row


def _lines_before(path: Path, end: int) -> int:
    """How many lines of a file end before byte ``end``."""
    with Path(path).open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(min(WHOLE_BYTES, end - file.tell())), b""))


def decoded(content: bytes, where: str, start: int = 0) -> str:
    """The text of a file, or of a piece of it that begins at byte ``start``, with plain newlines. Raises UserError, beginning with
    ``where``, for what is no text.
    """
    nul = content.find(b"\0")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {start + error.start})") from None
    if nul >= 0:
        raise UserError(f"{where}: not UTF-8 text (byte {start + nul} is zero, as in UTF-16 or a binary file)")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as files that are opened as text have it


def json_lines(text: str, where: Callable[[int], str]) -> Iterator[tuple[int, object]]:
    """(the number of a line, what it holds) for each line of a .jsonl file that is not blank.

    Raises UserError, beginning with ``where`` of its number, for one that is not JSON.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where(number)}: not JSON ({error.msg}, at character {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists without end
            raise UserError(f"{where(number)}: not JSON ({first_line(error)})") from None
        yield number, entry


def is_encodable(text: str) -> bool:
    """Whether a text has characters only: JSON may hold halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def wikitext_rows(raw: str) -> list[str]:
    """The hub's rows of a wiki.test.raw file: a blank line is an empty row, any other keeps its newline."""
    return [line + "\n" if line.strip() else "" for line in raw.split("\n")[: -1 if raw.endswith("\n") else None]]


def ptb_rows(raw: str) -> list[str]:
    """The hub's rows of a ptb.valid.txt file: its sentences without surrounding blanks."""
    return [line.strip() for line in raw.splitlines() if line.strip()]


def _file_text(name: str | None, path: Path, option_name: str) -> EvalText:
    raw = read_text(path)
    if not raw.strip():
        raise UserError(f"{option_name} {path}: the file is empty")
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
    split, column, between = source["split"], source.pop("column"), source.pop("between", "\n\n")
    return EvalText(name, between.join(hub.rows(source.pop("path"), column, **source)), split)


def load_texts(eval_data: tuple[str, ...] | None, option_name: str = "--eval_data") -> list[EvalText]:
    """The texts that ``--eval_data`` (or another option) names. Raises UserError for one that cannot be had.

    Nothing named: wikitext2 and ptb from the hub or, where it cannot be reached, the Python manual that comes with the
    interpreter (pydoc_data.topics).
    """
    if eval_data is None:
        try:
            return [_hub_text(name) for name in DEFAULT_TEXTS]
        except OSError as error:
            log.info("evaluation: %s; using the text of the Python manual instead (%s python_manual)", error, option_name)
            return [_python_manual()]
    if "none" in eval_data:
        return []
    texts = [_named_text(item, option_name) for item in dict.fromkeys(eval_data)]
    check_names(texts, option_name)
    return texts


def check_names(texts: list[EvalText], option_name: str = "--eval_data") -> None:
    """Raises UserError where two texts go by one name: only one of them would be shown."""
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{option_name}: two texts are called {name}; name one of them otherwise: NAME=FILE")


def _named_text(item: str, option_name: str) -> EvalText:
    if item == "python_manual":
        return _python_manual()
    if item in HUB_TEXTS:
        try:
            return _hub_text(item)
        except OSError as error:
            raise UserError(f"{option_name} {item}: {error}; give a local file as {item}=FILE") from None
    name, _, path = item.rpartition("=")
    if not os.path.isfile(path):
        raise UserError(f"{option_name} {item}: no such file, and not one of {', '.join(EVAL_NAMES)}{nearest(item, EVAL_NAMES)}")
    return _file_text(name or None, Path(path), option_name)


@contextmanager
def as_it_came(tokenizer):
    """Restores, after the block, how the tokenizer truncates and pads: using it changes both, and both are saved with it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (backend.truncation, backend.padding) if backend else (None, None)
    try:
        yield backend
    finally:
        if backend:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def token_ids(text: str, tokenizer, special: bool = True) -> torch.Tensor:
    """Token ids [tokens] int64 of a text, with the tokenizer's ``special`` tokens before or after it or without."""
    with as_it_came(tokenizer) as backend:
        if backend is None:
            ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        else:  # the same without positions in the text, which take more room than the rest of a run
            backend.no_truncation()
            backend.no_padding()
            ids = backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
    return_free_memory()
    return torch.tensor(ids, dtype=torch.long)


def check_vocabulary(ids: torch.Tensor, vocab_size: int, where: str) -> None:
    """Raises UserError, beginning with ``where``, for a token id that the model does not have."""
    if not ids.numel() or 0 <= ids.min() and ids.max() < vocab_size:
        return
    wrong = int(ids.min() if ids.min() < 0 else ids.max())
    raise UserError(f"{where}: token id {wrong} is outside the model's vocabulary of {vocab_size}")


def first_token(tokenizer, config) -> int | None:
    """The token that every block of a text begins with, where the model needs one: <bos> for Gemma. None for most."""
    return tokenizer.bos_token_id if family_of(config).begins_text else None


def blocks_of(text: EvalText, tokenizer, config, seq_len: int, limit: int | None = None) -> torch.Tensor:
    """Token ids [blocks, seq_len] of the text tokenized once; what does not fill a last block is dropped.

    ``config``: the model's. Each block begins with its :func:`first_token`, where it has one, and the text fills the rest.
    Raises UserError for a text that is too short, or has a token that is not in the model's vocabulary.
    """
    first = first_token(tokenizer, config)
    blocks = in_blocks(token_ids(text.text, tokenizer, special=first is None), seq_len, first)
    if not len(blocks):
        raise UserError(f"{text.name}: it is too short for one block of {seq_len} tokens")
    check_vocabulary(blocks[:limit], config.vocab_size, text.name)
    return blocks[:limit]


def blocks_in_other_tokens(text: EvalText, blocks: torch.Tensor, old, tokenizer, config, limit: int | None = None) -> torch.Tensor:
    """Token ids [blocks, seq_len] of the text for a model with another ``tokenizer`` and ``config``.

    ``blocks`` are the text's in the tokens of ``old``. Where they are the first ``limit`` of it, the same part of the text is taken,
    however many blocks that is now: figures per byte of two vocabularies are of one text.
    """
    if limit is not None:
        begin = 0 if first_token(old, config) is None else 1
        part = old.decode(blocks[:, begin:].flatten(), clean_up_tokenization_spaces=False)
        text = replace(text, text=part)
    return blocks_of(text, tokenizer, config, blocks.shape[1])


def in_blocks(ids: torch.Tensor, seq_len: int, first: int | None) -> torch.Tensor:
    """Token ids [blocks, seq_len] of a stream of tokens [tokens], each block beginning with ``first``, where there is one."""
    begin = ids.new_tensor([] if first is None else [first])
    width = seq_len - len(begin)
    blocks = ids[: len(ids) // width * width].view(-1, width)
    return torch.cat([begin.expand(len(blocks), -1), blocks], 1)
