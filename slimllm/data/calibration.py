"""Calibration tokens: from hub data sets, local text, the model's own samples, or a saved calibration file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import UserError, nearest
from ..models import hub
from ..models.loading import WholeModel
from ..models.shape import shape_of
from ..settings.pruning import PruneConfig
from ..settings.samples import HUB, SampleSpec, is_sample_file
from ..utils.device import name_of
from ..utils.files import atomic_file, check_plain
from ..utils.memory import return_free_memory
from .conversations import FIELDS, Turns, as_text, messages_of, turns_of
from .texts import check_vocabulary, first_token, in_blocks, is_encodable, read_text, token_ids

log = logging.getLogger("slimllm")

CALIBRATION_NAMES = ("bookcorpus", "c4", "wikitext2", "self")
HUB_SOURCES = {
    "bookcorpus": dict(path="bookcorpus/bookcorpus", revision="refs/convert/parquet", split="train", column="text", stream=True),
    "c4": dict(path="allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz", split="train", column="text", stream=True),
    "wikitext2": dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train", column="text"),
}
TEXT_SUFFIXES = (".txt", ".jsonl")
MAX_CHARACTERS = 8_000_000  # enough for over ten thousand samples of 128 tokens; more is not read
SELF_SAMPLE_BATCH = 32  # samples that are made at once, at least
SELF_SAMPLE_CACHE = 512 << 20  # bytes of keys and values that more of them may take
LONGEST_PATH = 4096  # characters
OVERLAP_TOKENS = 16  # a run this long in common is no accident


@dataclass
class Calibration:
    """Token ids [samples, length] int64, where they came from, and their hash (SHA-256 of the int64 bytes).

    ``distill_ids`` [samples, length]: what ``--distill`` trains on. ``own``: how many of the ``ids`` the model itself wrote, whatever the
    source.
    """

    ids: torch.Tensor
    source: str
    seed: int | None = None
    distill_ids: torch.Tensor | None = None
    own: int = 0

    @property
    def sha256(self) -> str:
        """Hash of the ``ids`` alone, as hexadecimal digits."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes all token ids to calibration.safetensors in ``folder``, which ``--calibration`` can name in another run."""
        tensors = {"calibration_ids": self.ids, "distill_ids": self.distill_ids}
        tensors = {name: ids.contiguous() for name, ids in tensors.items() if ids is not None}
        with atomic_file(folder / "calibration.safetensors") as partial:
            save_file(tensors, partial, {"source": self.source})

    @classmethod
    def read(cls, folder: Path, described: dict) -> Calibration:
        """What :meth:`save` wrote into ``folder``; ``described`` as by :meth:`to_dict`. Raises ValueError for other samples than these."""
        tensors = load_file(folder / "calibration.safetensors")
        found = cls(
            tensors["calibration_ids"],
            described["source"],
            described["seed"],
            distill_ids=tensors.get("distill_ids"),
            own=described["own"],
        )
        if found.to_dict() != described:
            raise ValueError("it holds other samples")
        return found

    def to_dict(self) -> dict:
        """What a record holds of it: where the samples came from, their number, length and hash, but not the ids."""
        entry = {"source": self.source, "samples": len(self.ids), "length": self.ids.shape[1], "seed": self.seed, "own": self.own}
        entry["sha256"] = self.sha256
        distilled = {} if self.distill_ids is None else {"distill_samples": len(self.distill_ids)}
        return entry | distilled


def load(source: str | None, model, tokenizer, spec: SampleSpec, instead: SampleSpec | None = None) -> Calibration:
    """The calibration samples that ``--calibration SOURCE`` asks for. ``model``: itself, or a WholeModel of it.

    Without a source it is bookcorpus, or where that cannot be had samples of the model itself, those of the spec ``instead`` if given.
    Raises UserError for a source that the user named and that cannot be had, is empty, too short or broken.
    """
    config = model.config
    if source is None:
        try:
            return _drawn_from("bookcorpus", tokenizer, spec, config)
        except OSError as error:
            log.info("calibration: %s; using samples of the model itself instead (--calibration self)", error)
            source, spec = "self", instead or spec
    if source == "self":
        return Calibration(sample_from_model(model, tokenizer, spec), "self", spec.seed, own=spec.num_examples)
    if is_sample_file(source):
        return _from_file(source, model.config.vocab_size)
    if _hub_source(source):
        try:
            return _drawn_from(source, tokenizer, spec, config)
        except OSError as error:
            raise UserError(f"--calibration {source}: {error}; name a local .txt or .jsonl file, or self") from None
    return _drawn_from(source, tokenizer, spec, config)


def from_text(text: str, name: str, tokenizer, spec: SampleSpec, config) -> Calibration:
    """Samples of a text for the model of ``config``. Raises UserError, naming the text by ``name``, where it is too short, is blank, or
    has what is not in the vocabulary of the model or its tokenizer.
    """
    return Calibration(_sample(text, name, tokenizer, spec, config), name, spec.seed)


def check_source(name: str | None) -> None:
    """Raises UserError early, before a model is read, where ``--calibration`` names nothing that exists or can be read."""
    if name is None or name in CALIBRATION_NAMES or _hub_source(name):
        return
    if len(name) > LONGEST_PATH or "\n" in name:
        raise UserError(f"calibration: a text of {len(name)} characters in place of a name; give texts as a list, or in a file")
    if not os.path.lexists(name):
        raise UserError(
            f"--calibration {name}: no such file or folder, and not one of {', '.join(CALIBRATION_NAMES)}{nearest(name, CALIBRATION_NAMES)}"
        )
    if is_sample_file(name):
        check_plain(name, "--calibration ")
    else:
        text_files(name, "--calibration")


def _from_file(path: str, vocab_size: int) -> Calibration:
    try:
        with safe_open(path, "pt") as file:
            names = ("calibration_ids", "distill_ids")
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"--calibration {path}: not a calibration file ({error})") from None
    if "calibration_ids" not in tensors:
        raise UserError(f"--calibration {path}: not a calibration file (it has no calibration_ids)")
    for name, ids in tensors.items():
        if ids.ndim != 2 or ids.dtype != torch.int64 or 0 in ids.shape:
            raise UserError(f"--calibration {path}: {name} is {ids.dtype} {list(ids.shape)}, not int64 [samples, length]")
        check_vocabulary(ids, vocab_size, f"--calibration {path}")
    return Calibration(tensors["calibration_ids"], path, distill_ids=tensors.get("distill_ids"))


def text_of(name: str, seed: int, tokenizer, option: str = "--calibration") -> str:
    """The text that ``--calibration NAME`` draws samples from, at most MAX_CHARACTERS of it: of the hub, of a file or a folder of them.

    Conversations are written with the chat template of ``tokenizer``.

    Raises UserError for files that cannot be read, OSError for a hub that is out of reach.
    """
    source = _hub_source(name)
    if source is None:
        files = text_files(name, option)
        rng, share = random.Random(seed), MAX_CHARACTERS // len(files)
        return "\n".join(read_text(file, share, rng, tokenizer) for file in files)
    column = source.pop("column")
    parts, size = [], 0
    for text in hub.rows(source.pop("path"), column, **source):
        if text is None or text == []:
            continue  # a row without it
        if isinstance(text, list):
            text = _written(text, f"{option} {name}: the column {column}", tokenizer)
        if not isinstance(text, str):
            raise UserError(f"{option} {name}: the column {column} holds a {type(text).__name__}, neither text nor messages; name another")
        parts.append(text)
        size += len(text) + 1
        if size >= MAX_CHARACTERS:
            break
    return "\n".join(parts)


def _written(messages: list, where: str, tokenizer) -> str:
    """A column's list of messages by the chat template. Raises UserError, naming ``where`` it is from, for a list of anything else."""
    field = next((name for name, (role, _) in FIELDS.items() if messages and isinstance(messages[0], dict) and role in messages[0]), None)
    if field is None:
        raise UserError(f"{where} holds a list, and not of messages; name another")
    try:
        return as_text(tokenizer, messages_of({field: messages}))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _hub_source(name: str) -> dict | None:
    """Where on the hub the text that a flag names is: its data set, config, split and column; None for what is no data set.

    Any data set is ``hub:OWNER/NAME[/CONFIG][:COLUMN[:SPLIT]]``. Raises UserError for a name that begins like this and is none.
    """
    if not name.startswith(HUB):
        return dict(HUB_SOURCES[name]) if name in HUB_SOURCES else None
    path, *more = name.removeprefix(HUB).split(":")
    owner, data, config = [*path.split("/", 2), "", ""][:3]
    column, split = [*more, "", ""][:2]
    if len(more) > 2 or not owner or not data:
        raise UserError(f"{name}: a data set of the hub is {HUB}OWNER/NAME, then /CONFIG, :COLUMN and :SPLIT where they are needed")
    found = dict(path=f"{owner}/{data}", split=split or "train", column=column or "text", stream=True)
    return found | ({"name": config} if config else {})


def _drawn_from(name: str, tokenizer, spec: SampleSpec, config) -> Calibration:
    return from_text(text_of(name, spec.seed, tokenizer), name, tokenizer, spec, config)


def characters_of(name: str | None) -> int:
    """How many characters :func:`text_of` would give, at most; 0 for what is no text. Raises UserError as :func:`text_files` does."""
    if name is None or name == "self" or is_sample_file(name):
        return 0
    if _hub_source(name):
        return MAX_CHARACTERS
    return min(MAX_CHARACTERS, sum(file.stat().st_size for file in text_files(name, "--calibration")))


def text_files(name: str, option: str) -> list[Path]:
    """The text file or files that a flag, ``option NAME``, means. Raises UserError where there are none, or what cannot be one."""
    path = Path(name)
    if path.is_dir():
        try:
            files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES)
        except OSError as error:
            raise UserError(f"{option} {name}: {error.filename}: {error.strerror}") from None
        if not files:
            raise UserError(f"{option} {name}: the folder holds no {' or '.join(TEXT_SUFFIXES)} file")
    elif path.suffix in TEXT_SUFFIXES:
        files = [path]
    else:
        kinds = ".txt, .jsonl or .safetensors" if option == "--calibration" else ".txt or .jsonl"
        raise UserError(f"{option} {name}: not a {kinds} file, nor a folder")
    for file in files:
        check_plain(file, f"{option} ")
    return files


def _sample(text: str, name: str, tokenizer, spec: SampleSpec, config) -> torch.Tensor:
    """``num_examples`` distinct blocks of ``seq_len`` tokens, in random order, from the text as one stream of tokens.

    Short texts are thereby joined; none is searched for.
    """
    if text.isspace():
        raise UserError(f"--calibration {name}: nothing but blanks; give text")
    if not is_encodable(text):
        raise UserError(f"--calibration {name}: it holds half of a surrogate pair, which is no character; remove it")
    ids = token_ids(text, tokenizer, special=False)
    blocks = in_blocks(ids, spec.seq_len, first_token(tokenizer, config))
    count = min(spec.num_examples, max(len(blocks), 1)) if spec.or_fewer else spec.num_examples
    if len(blocks) < count:
        raise UserError(
            f"--calibration {name}: {len(ids)} tokens are too few for {spec.num_examples} samples of {spec.seq_len}; give more text, or "
            "ask for fewer or shorter samples"
        )
    drawn = blocks[random.Random(spec.seed).sample(range(len(blocks)), count)]
    check_vocabulary(drawn, config.vocab_size, f"--calibration {name}")
    return drawn


def overlap(ids: torch.Tensor, text: torch.Tensor) -> int:
    """How many of the samples ``ids`` [samples, length] share a run of OVERLAP_TOKENS tokens with the text ``text`` [tokens]."""
    if min(ids.shape[1], len(text)) < OVERLAP_TOKENS:
        return 0
    keys = torch.randint(2**62, (OVERLAP_TOKENS,), generator=torch.Generator().manual_seed(0))

    def runs(stream):  # a hash of each run: 64-bit sums that wrap around
        return sum(stream[..., k : stream.shape[-1] - OVERLAP_TOKENS + 1 + k] * key for k, key in enumerate(keys))

    return int(torch.isin(runs(ids), runs(text)).any(1).sum())


def with_own(text: torch.Tensor, share: float, model, tokenizer, spec: SampleSpec) -> tuple[torch.Tensor, int]:
    """(samples [num_examples, length] in random order, how many the model wrote): ``share`` of them, the rest taken from ``text``.

    Where ``text`` [samples, length] has too few, the model writes more.
    """
    text = text[: spec.num_examples - round(share * spec.num_examples)]
    written = spec.num_examples - len(text)
    samples = torch.cat([text, sample_from_model(model, tokenizer, dataclasses.replace(spec, num_examples=written))]) if written else text
    return _shuffled(samples, spec.seed), written


def _shuffled(samples: torch.Tensor, seed: int) -> torch.Tensor:
    return samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))]


def _never_sampled(tokenizer, generation_config, vocab_size: int) -> list[int]:
    """Ids that are no text: special tokens, named or not, end tokens of the generation config, and ids without a token."""
    special = set(tokenizer.all_special_ids) | set(range(len(tokenizer), vocab_size))
    special |= {index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(generation_config, name, None)
        special |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return sorted(index for index in special if index < vocab_size)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One id for each row of ``probabilities`` [rows, V], [rows, 1], drawn by one ``uniform`` number each, [rows, 1]."""
    below = probabilities.cumsum(-1)
    return torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp_max(below.shape[1] - 1)


def _next_ids(never: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Ids [samples, 1], drawn from the softmax of ``logits`` [samples, V] without the ids ``never``.

    By one random number per row: one per token, as ``generate`` takes them, costs more than the model.
    """
    probabilities = logits.float().index_fill(1, never, -math.inf).softmax(-1)
    return draw(probabilities, torch.rand(len(logits), 1, device=logits.device))


class _Conversations:
    """Draws the next token of conversations: the words from the model, and once it ends a question or an answer what the template
    has there.

    ``never``: ids of which none but the one that ends a turn is drawn. ``rows``: how many conversations there are.
    """

    def __init__(self, turns: Turns, never: torch.Tensor, rows: int):
        self._turns, self._never = turns, never[never != turns.between[0]]
        self._asking, self._forced = [True] * rows, [[] for _ in range(rows)]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """As :func:`_next_ids`."""
        chosen = _next_ids(self._never, logits)[:, 0].tolist()
        for row, forced in enumerate(self._forced):
            if forced:
                chosen[row] = forced.pop(0)
            elif chosen[row] == self._turns.between[0]:
                forced += (self._turns.between if self._asking[row] else self._turns.after)[1:]
                self._asking[row] = not self._asking[row]
        return torch.tensor(chosen, device=logits.device)[:, None]


@torch.no_grad()
def sample_from_model(model, tokenizer, spec: SampleSpec) -> torch.Tensor:
    """Samples [num_examples, seq_len] from the model at temperature 1, each from a random first token. Same seed, same ids.

    Special tokens are never sampled, and nothing of the model's generation config applies (end tokens, penalties, top-k), so
    that every sample is plain text of the model's own distribution from end to end. The ``chat_share`` of them are conversations: the model
    writes questions and answers, and its chat template what stands before, between and after them.
    """
    from transformers import GenerationConfig

    progress = model.progress if isinstance(model, WholeModel) else lambda *_: None
    model = model.model() if isinstance(model, WholeModel) else model
    device, vocab = model.device, model.config.vocab_size
    special = _never_sampled(tokenizer, model.generation_config, vocab)
    words = torch.tensor(sorted(set(range(vocab)) - set(special)))
    shape = shape_of(model.config)
    numbers = shape.cache_numbers() or 2 * shape.hidden * len(shape.layers)  # no more than attention that is no part of it keeps
    cache = numbers * spec.seq_len * model.dtype.itemsize
    begin = first_token(tokenizer, model.config)
    settings = GenerationConfig(do_sample=False, max_length=spec.seq_len, pad_token_id=0)  # what is drawn is the only choice left
    never = torch.tensor(special, dtype=torch.long, device=device)
    chats = round(spec.chat_share * spec.num_examples)
    written, total = 0, spec.num_examples * spec.seq_len

    def write(start: torch.Tensor, drawn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What the model goes on with after the ids ``start``, the next of each row ``drawn`` from its logits: all that is left of them."""

        def next_token(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            nonlocal written
            written += len(ids)
            progress("the model writes, tokens", written, total)
            return torch.zeros_like(logits).scatter(1, drawn(logits), 1.0)

        mask = torch.ones_like(start)
        return model.generate(start, attention_mask=mask, generation_config=settings, logits_processor=[next_token])

    original_config, model.generation_config = model.generation_config, GenerationConfig()  # what `settings` leaves open is taken from it
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(spec.seed)
            rows = max(SELF_SAMPLE_BATCH, SELF_SAMPLE_CACHE // cache)
            words = words[torch.randint(len(words), (spec.num_examples - chats,))]
            first = in_blocks(words, 1 if begin is None else 2, begin).to(device)
            parts = [write(start, functools.partial(_next_ids, never)) for start in first.split(rows) if len(start)]
            if chats:
                turns = turns_of(tokenizer)
                bos = [begin] if begin is not None and turns.before[0] != begin else []
                opening = torch.tensor([bos + turns.before], device=device).expand(chats, -1)
                parts += [write(start, _Conversations(turns, never, len(start))) for start in opening.split(rows)]
    finally:
        model.generation_config = original_config
        progress("the model writes, tokens", total, total)
    return_free_memory()
    return torch.cat(parts).cpu()


TokenIds = torch.Tensor | np.ndarray | Sequence[Sequence[int]]
CalibrationSource = str | os.PathLike | Sequence[str] | TokenIds | Calibration | None
DISTILL_SELF_SHARE = 0.5  # of the samples that a model is distilled on; the rest are calibration text


def samples_for(
    config: PruneConfig,
    source: CalibrationSource,
    model: WholeModel,
    tokenizer,
) -> Calibration:
    """The samples of a run with these settings: those to prune from, and where it distils, those to distil on.

    ``source``: as from :func:`source_of`. What the model itself has to write, it writes whole, in the dtype of evaluation, and where it
    does not fit, the text of ``source`` takes the place of that.
    Raises UserError for a source that cannot be had or is too short, and where a tokenizer is needed and not there.
    """
    if config.chat_share and tokenizer is not None:
        _check_room(config, tokenizer)
    samples = _to_prune_from(config, source, model, tokenizer)
    if config.distill != "none" and samples.distill_ids is None:
        spec, named = config.distill_samples, samples.source if source is None else source  # what it was in the end
        # what the model wrote once, it need not write again; but what is held out is text that nothing was fitted to
        reused = samples.ids[: spec.num_examples // 2 if samples.own else 0]
        spec = dataclasses.replace(spec, num_examples=spec.num_examples - len(reused), seq_len=samples.ids.shape[1])
        if isinstance(source, torch.Tensor) or is_sample_file(samples.source):
            text = samples.ids
        else:
            text = samples.ids[:0] if named == "self" else _drawn(named, model, tokenizer, spec).ids
        if model.fits and tokenizer is not None:
            text, _ = with_own(text, DISTILL_SELF_SHARE, model, tokenizer, spec)
        samples.distill_ids = torch.cat([reused, text])
    return samples


def _check_room(config: PruneConfig, tokenizer) -> None:
    """Raises UserError where the model cannot write conversations: by its chat template, or by the length of the samples."""
    try:
        before = turns_of(tokenizer).before
    except UserError as error:
        raise UserError(f"--chat_share {config.chat_share}: {error}") from None
    if len(before) >= config.seq_len:
        raise UserError(f"--seq_len {config.seq_len}: the chat template takes {len(before)} tokens before a question begins; give more")


def _to_prune_from(
    config: PruneConfig,
    source: CalibrationSource,
    model: WholeModel,
    tokenizer,
) -> Calibration:
    """The samples to prune from."""
    if isinstance(source, torch.Tensor):
        return Calibration(source, "token ids")
    if tokenizer is None:
        raise UserError("tokenizer: needed to make calibration samples; give one, or token ids [samples, length]")
    spec = config.samples
    written = round(config.self_share * spec.num_examples) if model.fits and source != "self" else 0
    drawn = spec.num_examples - written
    text = dataclasses.replace(spec, num_examples=max(drawn, 1), or_fewer=written > 0)
    samples = _drawn(source, model, tokenizer, text, instead=spec)
    if written and samples.source == "self":  # there was no text: all of them are the model's own
        samples.ids = _shuffled(samples.ids, spec.seed)
    elif written and not is_sample_file(samples.source):
        samples.ids, samples.own = with_own(samples.ids[:drawn], config.self_share, model, tokenizer, spec)
    return samples


def _drawn(
    source: str | Sequence[str] | None, model: WholeModel, tokenizer, spec: SampleSpec, instead: SampleSpec | None = None
) -> Calibration:
    """Samples of a named source, or of texts; ``instead`` as of :func:`load`."""
    if source is None or isinstance(source, str):
        check_source(source)
        return load(source, model, tokenizer, spec, instead)
    return from_text("\n".join(source), "texts", tokenizer, spec, model.config)


def source_of(given: CalibrationSource, vocab_size: int) -> str | list[str] | torch.Tensor | Calibration | None:
    """What samples are made from, in one of five forms. Raises UserError for anything else, and for token ids that are none."""
    if isinstance(given, Calibration):
        for ids in (given.ids, given.distill_ids):
            if ids is not None:
                _token_ids(ids, vocab_size)
        return given
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    if isinstance(given, torch.Tensor | np.ndarray):
        return _token_ids(given, vocab_size)
    if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
        empty = isinstance(given, Sequence) and not given
        what = "is empty" if empty else f"is a {type(given).__name__}"
        raise UserError(f"calibration: {what}; give texts, token ids [samples, length], or the name of a file, folder or data set")
    if all(isinstance(text, str) for text in given):
        return list(given)
    return _token_ids(given, vocab_size)


def _token_ids(given: TokenIds, vocab_size: int) -> torch.Tensor:
    """Token ids [samples, length] int64 on the CPU."""
    try:
        ids = given if isinstance(given, torch.Tensor) else torch.from_numpy(np.asarray(given))
    except (TypeError, ValueError, RuntimeError):
        raise UserError("calibration: neither texts nor token ids, lists of integers all of one length") from None
    if ids.ndim != 2 or not ids.numel():
        raise UserError(f"calibration: token ids are [samples, length], not {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"calibration: token ids are integers, not {name_of(ids.dtype)}")
    ids = ids.cpu().long()
    check_vocabulary(ids, vocab_size, "calibration")
    return ids
