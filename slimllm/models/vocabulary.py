"""Fewer tokens: which other tokens a token needs, and tokenizer, config and weights of a model that keeps only some.

A BPE tokenizer merges neighbouring pieces, in the order of its list of merges, until none of them makes a token. Where a token stays, every
piece on the way to it has to stay with it; then a text all of whose tokens stay is split as before, since each merge that made them is
still there and none came in between that was not there before (docs/method.md, section 8).
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ..errors import UserError
from .skeleton import skeleton_of
from .source import ModelSource
from .weights import Selected

SPACE = "▁"  # what SentencePiece writes for a blank: as bytes it would not become one again
_ID_FIELDS = ("_token_id", "_token_ids", "_token_index")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")  # of a generation config
_SEQUENCES = ("bad_words_ids", "force_words_ids")  # lists of lists of ids, or of lists of these
_OTHER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json", "special_tokens_map.json")


class Vocabulary:
    """The tokens of a tokenizer that a model has a row for, ``size`` of them: what each needs, and the tokenizer that has only some.

    ``texts``: id -> the token as the tokenizer stores it. ``always``: the ids that have to stay: special and added tokens, and what spells
    every other text, bytes or else single characters.
    Raises UserError for a kind of tokenizer whose tokens cannot be removed.
    """

    def __init__(self, tokenizer, size: int):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"--vocab: its {type(tokenizer).__name__} has no fast form (tokenizer.json), which tokens are removed from")
        self._tokenizer, self._data = tokenizer, json.loads(backend.to_str())
        model = self._data["model"]
        kind, odd = model["type"], [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
        if kind not in ("BPE", "Unigram") or odd:
            raise UserError(
                f"--vocab: no tokens can be removed from a {kind} tokenizer{f' with {odd[0]}' if odd else ''}; BPE and Unigram can"
            )
        listed = model["vocab"].items() if kind == "BPE" else ((text, index) for index, (text, _) in enumerate(model["vocab"]))
        self._ids = {text: index for text, index in listed if index < size}
        added = {entry["id"]: entry["content"] for entry in self._data["added_tokens"] if entry["id"] < size}
        self.texts = {index: text for text, index in self._ids.items()} | added
        self._ranks = {}
        for rank, pair in enumerate(model.get("merges", [])):
            self._ranks.setdefault(_pair(pair), rank)
        self._pieces: dict[int, frozenset[int]] = {}
        self.always = set(added) | self._alphabet(model)

    def _alphabet(self, model: dict) -> set[int]:
        unknown = model.get("unk_token")
        special = {self._ids[text] for text in (unknown, SPACE) if text in self._ids}
        special |= set() if model.get("unk_id") is None else {model["unk_id"]}
        as_bytes = {index for text, index in self._ids.items() if len(text) == 6 and text.startswith("<0x") and text.endswith(">")}
        if model.get("byte_fallback") and len(as_bytes) == 256:
            return special | as_bytes
        return special | {index for text, index in self._ids.items() if len(text) == 1}

    def needs(self, index: int) -> frozenset[int]:
        """The token itself and all that it is merged from on the way."""
        if index not in self._pieces:
            self._pieces[index] = frozenset({index, *self._merged_from(self.texts[index])} if self._ranks else {index})
        return self._pieces[index]

    def _merged_from(self, text: str) -> list[int]:
        """The ids of the pieces that a word of this text is merged from, down to characters; none where no merges make it."""
        parts, made = list(text), []
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in zip(parts, parts[1:])]
            rank = min(ranks)
            if rank == len(self._ranks):
                return []
            at = ranks.index(rank)
            made += [self._ids[part] for part in parts[at : at + 2] if part in self._ids]
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return made

    def tokenizer(self, kept: list[int]):
        """The same tokenizer with the tokens ``kept`` alone, ascending ids; they are numbered anew, in their order."""
        new = {old: index for index, old in enumerate(kept)}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self._tokenizer.save_pretrained(folder)
            for name in _OTHER_FILES:
                (folder / name).unlink(missing_ok=True)
            file = json.dumps(self._trimmed(new), ensure_ascii=False)
            (folder / "tokenizer.json").write_text(file, encoding="utf-8")
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            if listed := settings.get("added_tokens_decoder"):
                settings["added_tokens_decoder"] = {str(new[int(old)]): entry for old, entry in listed.items() if int(old) in new}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            found._tokenizer = Tokenizer.from_str(file)  # a class of its own may have made its parts anew, by its own rules
            found.name_or_path = self._tokenizer.name_or_path
            return found

    def _trimmed(self, new: dict[int, int]) -> dict:
        data = copy.copy(self._data)
        model = data["model"] = dict(data["model"])
        if model["type"] == "BPE":
            model["vocab"] = {text: new[index] for text, index in self._ids.items() if index in new}
            stays = model["vocab"].keys()
            pairs = ((entry, _pair(entry)) for entry in model["merges"])
            model["merges"] = [entry for entry, (a, b) in pairs if a in stays and b in stays and a + b in stays]
        else:
            model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
            model["unk_id"] = new.get(model.get("unk_id"))
        data["added_tokens"] = [{**entry, "id": new[entry["id"]]} for entry in data["added_tokens"] if entry["id"] in new]
        data["padding"] = None  # of the last call, with its id
        data["post_processor"] = _processor(data.get("post_processor"), new)
        return data


def _pair(entry) -> tuple[str, str]:
    first, second = entry.split(" ") if isinstance(entry, str) else entry
    return first, second


def _processor(entry: dict | None, new: dict[int, int]) -> dict | None:
    """A post-processor with the ids of its special tokens as they are now."""
    if entry is None or entry["type"] == "ByteLevel":
        return entry
    if entry["type"] == "Sequence":
        return {**entry, "processors": [_processor(part, new) for part in entry["processors"]]}
    if entry["type"] == "TemplateProcessing":
        special = {text: {**token, "ids": [new[index] for index in token["ids"]]} for text, token in entry["special_tokens"].items()}
        return {**entry, "special_tokens": special}
    if entry["type"] in ("RobertaProcessing", "BertProcessing"):
        return {**entry, **{name: [text, new[index]] for name in ("sep", "cls") for text, index in [entry[name]]}}
    raise UserError(f"--vocab: its tokenizer adds tokens by {entry['type']}, which cannot be numbered anew")


def trimmed_source(source: ModelSource, kept: list[int]) -> ModelSource:
    """The model with these rows of embeddings and head alone; ``source`` stays as it is, and no weight is read yet.

    Ids in its config and generation config are numbered anew; one whose token is gone is none.
    """
    adapter, rows = source.adapter, torch.tensor(kept)
    new = {old: index for index, old in enumerate(kept)}
    config = copy.deepcopy(source.config)
    config.vocab_size = len(kept)
    if table := adapter.token_table_name():
        setattr(config, adapter.family.token_inputs[1], len(kept))
    _number_anew(config, new)
    skeleton = skeleton_of(config, source.dtype)
    if getattr(source.model, "generation_config", None) is not None:
        skeleton.generation_config = copy.deepcopy(source.model.generation_config)
        _number_anew(skeleton.generation_config, new)
    heads = adapter.head_name()
    names = [adapter.embedding_name(), *([table] if table else []), *(name for name in source.weights.names if name.startswith(heads))]
    return ModelSource(skeleton, Selected(source.weights, names, rows), source.dtype)


def ids_in(config) -> set[int]:
    """The token ids that a config or a generation config names."""
    found = set()
    for name, value in vars(config).items():
        if name.endswith(_ID_FIELDS) or name in _ID_LISTS:
            found |= {index for index in (value if isinstance(value, list | tuple) else [value]) if isinstance(index, int)}
    return found


def _number_anew(config, new: dict[int, int]) -> None:
    """Replaces every id that a config or a generation config names, in place; what names one that is gone goes."""
    for name, value in list(vars(config).items()):
        if value is None:
            continue
        if name.endswith(_ID_FIELDS) or name in _ID_LISTS:
            several = isinstance(value, list | tuple)
            found = [new[index] for index in value if index in new] if several else new.get(value)
            setattr(config, name, None if found == [] else found)
        elif name in _SEQUENCES:
            setattr(config, name, _sequences(value, new) or None)
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, dict) else value
            setattr(config, name, [[found, bias] for ids, bias in pairs for found in _sequences([ids], new)] or None)
        elif name == "forced_decoder_ids":
            setattr(config, name, [[place, new[index]] for place, index in value if index in new] or None)


def _sequences(value, new: dict[int, int]) -> list:
    """Lists of ids, or of lists of them, numbered anew; those with an id that is gone are left out."""
    if all(isinstance(index, int) for item in value for index in item):
        return [[new[index] for index in item] for item in value if all(index in new for index in item)]
    return [found for item in value if (found := _sequences(item, new))]
