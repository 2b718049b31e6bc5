"""The tokenizer's part of a GGUF file: a .gguf model's own metadata where the model came from one, else made from tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf

from ..errors import UserError
from ..models import hub
from ..models.gguf_tensors import gguf_reader
from ..models.loading import load_tokenizer
from ..utils.files import atomic_file

FILE = "tokenizer.gguf"  # beside a checkpoint that came from a .gguf file: that file's metadata of tokenizer and origin, and no tensors
PREFIX = "tokenizer."
TOKENS = "tokenizer.ggml.tokens"
ORIGIN = tuple(f"general.{name}" for name in ("license", "author", "organization", "languages", "tags", "base_model"))
CARD_FIELDS = {  # at the head of a model card -> in the file
    "license": gguf.Keys.General.LICENSE,
    "license_name": gguf.Keys.General.LICENSE_NAME,
    "license_link": gguf.Keys.General.LICENSE_LINK,
    "language": gguf.Keys.General.LANGUAGES,
    "tags": gguf.Keys.General.TAGS,
    "base_model": gguf.Keys.General.BASE_MODEL_COUNT,
}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

# How byte-level BPE tokenizers split text before they merge -> llama.cpp's name for it (tokenizer.ggml.pre).
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST,): "qwen2",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen35",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "deepseek-v3",
    (f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",): "tekken",
}


def carry(source: str, folder: Path, kept: list[int] | None = None) -> None:
    """Puts the metadata of ``source``, a .gguf file or a checkpoint that has some, beside the checkpoint in ``folder``.

    ``kept``: the ids, ascending, of the tokens that the checkpoint has, where it has not all.
    """
    is_file = str(source).endswith(".gguf")
    file = Path(source) if is_file else Path(source) / FILE
    if not is_file and not file.is_file():
        return
    if not is_file and kept is None:
        shutil.copyfile(file, folder / FILE)
        return
    with atomic_file(folder / FILE) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        _copy(writer, file, (PREFIX, *ORIGIN, *(() if is_file else ("general.base_model",))), kept)
        if is_file:
            _add_as_base_model(writer, gguf_reader(source).fields)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()


def add(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Adds the tokenizer of the checkpoint in ``folder`` to a GGUF file. Raises UserError where llama.cpp has no type for it."""
    if (folder / FILE).is_file():
        _copy(writer, folder / FILE, (PREFIX,))
        return
    tokenizer = load_tokenizer(str(folder), "DIR")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{folder}: its {type(tokenizer).__name__} has no fast form (tokenizer.json), which the export reads")
    data = json.loads(backend.to_str())
    kind = _kind_of(data, folder)
    tokens = _tokens(tokenizer, data, vocab_size)
    writer.add_tokenizer_model("llama" if kind == "spm" else "gpt2")
    writer.add_tokenizer_pre("default" if kind == "spm" else kind)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([token_type for _, token_type in tokens])
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in data["model"]["merges"]]
    if kind == "spm":
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(data))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_space_prefix(False)
    # By the tokenizer itself. gguf.SpecialVocab reads the files: it takes an id that no tokenizer has (pad) from config.json, and
    # writes no add_bos_token where tokenizer.json has no template for it, and then llama.cpp adds one in a llama-bpe file.
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def add_origin(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Adds where the model comes from: by the .gguf file that it was made from, or else by its card."""
    if (folder / FILE).is_file():
        _copy(writer, folder / FILE, ORIGIN)
    present = {field for fields in writer.kv_data for field in fields}
    card = hub.card_data(folder)
    from_card = {name: card[name] for name, field in CARD_FIELDS.items() if card.get(name) and field not in present}
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(name=""), from_card)  # an empty name is not written: the file has one
    bases = from_card.get("base_model", [])
    for base, name in zip(metadata.base_models or [], [bases] if isinstance(bases, str) else bases):
        *_, base["organization"], base["name"] = ["", *name.split("/")]  # as the hub has them; gguf makes titles of them (Me, First)
    metadata.set_gguf_meta_model(writer)


def _add_as_base_model(writer: gguf.GGUFWriter, fields: dict) -> None:
    """Names the file with these fields as the base model, where it names none itself."""
    if "general.base_model.count" in fields or "general.name" not in fields:
        return
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, fields["general.name"].contents())
    if organization := fields.get("general.organization"):
        writer.add_base_model_organization(0, organization.contents())


def _copy(writer: gguf.GGUFWriter, source: Path, prefixes: tuple[str, ...], kept: list[int] | None = None) -> None:
    """Copies every field of another GGUF file whose name begins with one of ``prefixes``; ``kept``: as for :func:`carry`."""
    try:
        fields = gguf_reader(source).fields
        copied = {name: field for name, field in fields.items() if name.startswith(prefixes)}
        tokens = fields[TOKENS].contents() if kept is not None else []
        for name, field in copied.items():
            kind, *inner = field.types
            content = field.contents() if kept is None else _trimmed(name, field.contents(), kept, tokens)
            if content is not None:
                writer.add_key_value(name, content, kind, inner[-1] if inner else None)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{source}: not a readable GGUF file ({error})") from None
    if PREFIX in prefixes and TOKENS not in copied:
        raise UserError(f"{source}: it holds no tokenizer")


def _trimmed(name: str, content, kept: list[int], tokens: list[str]):
    """A field of the tokenizer's metadata, of the tokens ``kept`` alone; None where the one that it names is gone."""
    if name.endswith("_token_id"):
        return kept.index(content) if content in kept else None
    if name == "tokenizer.ggml.merges":
        stays = {tokens[index] for index in kept}
        pairs = ((entry, entry.split(" ", 1)) for entry in content)
        return [entry for entry, (a, b) in pairs if a in stays and b in stays and a + b in stays]
    if isinstance(content, list) and len(content) == len(tokens):
        return [content[index] for index in kept]
    return content


def _kind_of(data: dict, folder: Path) -> str:
    """``spm``, or llama.cpp's name for how this byte-level BPE splits text. Raises UserError for any other tokenizer."""
    model = data["model"]
    if model["type"] != "BPE":
        raise UserError(f"{folder}: llama.cpp has no type for a {model['type']} tokenizer of this family")
    steps = data.get("pre_tokenizer") or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if model.get("byte_fallback"):
        return "spm"
    key = tuple(step["pattern"].get("Regex", "") if step["type"] == "Split" else step["type"] for step in steps)
    if steps[-1]["type"] == "ByteLevel" and not steps[-1].get("use_regex", True):
        key = key[:-1]
    if key not in PRE_TOKENIZERS:
        names = ", ".join(PRE_TOKENIZERS.values())
        raise UserError(f"{folder}: llama.cpp has no known type for how this tokenizer splits text ({' + '.join(key)}); known are {names}")
    return PRE_TOKENIZERS[key]


def _tokens(tokenizer, data: dict, vocab_size: int) -> list[tuple[str, int]]:
    """(text, type) of every id below ``vocab_size``; ids that the tokenizer lacks are unused."""
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(texts) >= vocab_size:
        raise UserError(f"the tokenizer's id {max(texts)} is outside the model's vocabulary of {vocab_size}")
    unknown, fallback = data["model"].get("unk_token"), data["model"].get("byte_fallback")

    def type_of(index: int, text: str) -> gguf.TokenType:
        if fallback and text == unknown:
            return gguf.TokenType.UNKNOWN
        if index in added:
            return gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        if fallback and len(text) == 6 and text.startswith("<0x"):
            return gguf.TokenType.BYTE
        return gguf.TokenType.NORMAL

    return [(texts[i], type_of(i, texts[i])) if i in texts else (f"[PAD{i}]", gguf.TokenType.UNUSED) for i in range(vocab_size)]


def _scores(tokens: list[tuple[str, int]], merges: list[tuple[str, str]]) -> list[float]:
    """A SentencePiece score for each token: the earlier a merge makes it, the higher. The order is all that the merging looks at."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair), index)
    lowest = -float(len(merges))
    return [-float(rank[text]) if text in rank else (lowest if token_type == gguf.TokenType.NORMAL else 0.0) for text, token_type in tokens]


def _adds_space(data: dict) -> bool:
    """Whether a blank is put before the text, by the normalizer (Prepend) or the pre-tokenizer (Metaspace)."""
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
