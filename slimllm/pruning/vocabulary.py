"""Which tokens of the vocabulary stay (``--vocab``), and the run on the model that has these alone (docs/method.md, section 8)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..data import calibration, token_counts
from ..data.calibration import Calibration
from ..data.texts import first_token, in_blocks, token_ids
from ..errors import UserError
from ..models import vocabulary
from ..models.vocabulary import Vocabulary
from ..run import Measure, Run
from ..settings.pruning import PruneConfig
from ..settings.samples import is_sample_file
from ..streaming.runner import LOGIT_ROWS
from ..utils import processes
from ..utils.files import write_text
from .allocation.auto import price_list_of
from .allocation.budget import budgets_of
from .allocation.inputs import AllocationInputs
from .allocation.price_list import PriceList
from .allocation.sizing import Sizing
from .allocation.solver import predicted, solve_all

log = logging.getLogger("slimllm")

MAP = "vocab_map.json"  # beside a checkpoint: the id that each token had before
FEW = 1_000_000  # tokens of text below which what it does not use says little
SHARES = (1.0, 0.85, 0.7, 0.55, 0.42, 0.32, 0.24, 0.18, 0.13, 0.1)  # of the tokens that auto looks at, most first
PART = 2048  # tokens of a piece of text, of which every tenth is not counted
EXPECTED_BLOCKS = 192  # samples of text on which the model is asked what else it would expect there
HELD_OUT_BLOCKS = 64  # samples of text on which auto measures what fewer tokens cost


@dataclasses.dataclass
class Kept:
    """The tokens that stay.

    ``ids``: ascending, as the model that was given numbers them. ``of``: how many it has. ``text``: what was counted, ``counted``: its
    tokens. Of text like it that was held out: ``unchanged``, the share of its tokens that stay; ``longer``, by what share more it has now.
    """

    ids: list[int]
    of: int
    text: str
    counted: int
    unchanged: float
    longer: float

    def __post_init__(self):
        if self.ids != sorted(set(self.ids)) or not self.ids or not 0 <= self.ids[0] <= self.ids[-1] < self.of:
            raise ValueError("its ids are not those of a vocabulary in ascending order")

    def described(self) -> dict:
        """What a record holds of it: all but the ids."""
        return {"kept": len(self.ids), **{name: value for name, value in vars(self).items() if name != "ids"}}

    @property
    def in_words(self) -> str:
        """In one line."""
        return (
            f"vocabulary: {len(self.ids):,} of {self.of:,} tokens stay, by {self.counted:,} tokens of {self.text}; in text like it that "
            f"was not counted {self.unchanged:.2%} of the tokens are as before, and it comes to {self.longer:.1%} more tokens"
        )


def vocabulary_of(run: Run) -> Vocabulary:
    """The tokens of the run's tokenizer that its model has rows for."""
    return Vocabulary(run.tokenizer, run.model_config.vocab_size)


def check(run: Run) -> int:
    """How many tokens have to stay. Raises UserError before any work for a tokenizer that cannot be trimmed, for scripts that it does not
    have, and for files of text that cannot be read.
    """
    for name in run.config.vocab_text or ():
        calibration.text_files(name, "--vocab_text")
    found, decode = vocabulary_of(run), run.tokenizer.decode
    if run.config.vocab_scripts:
        token_counts.check_scripts(found, lambda index: decode([index]), run.config.vocab_scripts)
    return len(found.always)


def chosen(run: Run, measure: Measure) -> Kept:
    """The tokens that stay as ``--vocab`` says; with auto ``measure`` tells what losing some of them costs."""
    ranked, size = Ranked(run), run.config.tokens_of(run.source.config.vocab_size)
    kept, _ = ranked.first(_best_size(ranked, measure) if size is None else size)
    return kept


class Ranked:
    """The tokens of a run's model, those first that are to stay first, by what its text uses.

    ``counts``: how often each occurs in nine of ten pieces of the text. ``held_out``: ids of the tenth ones, by which it shows what it is
    worth that others stay; ``dense``: what the dense model loses on them, nats per token, once it was measured.
    """

    def __init__(self, run: Run):
        self.run, self.vocabulary, self.dense = run, vocabulary_of(run), None
        streams, self.text = self._counted()
        parts = [ids.split(max(1, min(PART, len(ids) // 10))) for ids in streams]
        self.counts = Counter(index for some in parts for at, part in enumerate(some) if at % 10 for index in part.tolist())
        apart = [part for some in parts for part in some[::10]]
        each = -(-EXPECTED_BLOCKS * run.config.seq_len // max(len(apart), 1))
        self.held_out = torch.cat([part[: each // 3 + 1] for part in apart])
        counted = sum(self.counts.values())
        if not counted:
            raise UserError(f"--vocab_text {self.text}: no text, so nothing says which tokens are to stay; name files that hold some")
        if counted < FEW:
            log.warning("vocabulary: only %s tokens of text were counted; --vocab_text names more", f"{counted:,}")
        named = vocabulary.ids_in(run.model_config) | set(run.tokenizer.all_special_ids)
        if (generation := getattr(run.source.model, "generation_config", None)) is not None:
            named |= vocabulary.ids_in(generation)
        self.vocabulary.always |= named & self.vocabulary.texts.keys()
        decode = run.tokenizer.decode
        expected = self._expected(torch.cat([part[:each] for some in parts for at, part in enumerate(some) if at % 10]))
        self.order = token_counts.in_order(self.vocabulary, self.counts, expected, lambda index: decode([index]), run.config.vocab_scripts)

    def _expected(self, ids: torch.Tensor) -> list[float]:
        """What the model expects on text [tokens] at each place, summed over the places: one number per id, 1 in sum."""
        run = self.run
        if len(ids) < 2:
            return [0.0] * run.source.config.vocab_size
        blocks = in_blocks(ids, min(run.config.seq_len, len(ids)), first_token(run.tokenizer, run.model_config))[:EXPECTED_BLOCKS]
        runner = run.runner(blocks)
        states = runner.last_states("what the model expects")
        norm, head = runner.output_modules()
        total = torch.zeros(run.source.config.vocab_size, device=runner.device)
        for batch in states:
            for rows in norm(batch).flatten(0, -2).split(LOGIT_ROWS):
                total += runner.adapter.logits(head, rows).softmax(-1).sum(0)
        states.close()
        processes.add(total)
        return (total.double() / total.double().sum()).tolist()

    def _counted(self) -> tuple[list[torch.Tensor], str]:
        """(the ids of all text that is counted, its name)."""
        config, samples, tokenizer = self.run.config, self.run.samples, self.run.tokenizer
        if config.vocab_text:
            names = config.vocab_text
            texts = [calibration.text_of(name, samples.seed, tokenizer, "--vocab_text") for name in names]
        elif samples.source in ("self", "token ids") or is_sample_file(samples.source):
            return [ids.flatten() for ids in (samples.ids, samples.distill_ids) if ids is not None], "the calibration samples"
        else:
            names, texts = (samples.source,), [calibration.text_of(samples.source, samples.seed, tokenizer)]
        return [token_ids(text, tokenizer, special=False) for text in texts], " ".join(Path(name).name for name in names)

    def first(self, size: int) -> tuple[Kept, PreTrainedTokenizerBase]:
        """The first tokens with all that they need, ``size`` of them or as many as have to stay; and the tokenizer that has these alone."""
        multiple = self.run.config.vocab_multiple
        size = -(-max(size, len(self.vocabulary.always)) // multiple) * multiple
        ids = token_counts.first_of(self.vocabulary, self.order, size)
        new, among, decode = self.vocabulary.tokenizer(ids), set(ids), self.run.tokenizer.decode
        gone = Counter(index for index in self.held_out.tolist() if index not in among)
        pieces = {index: len(new(decode([index]), add_special_tokens=False).input_ids) for index in gone}
        held_out, missing = max(len(self.held_out), 1), sum(gone.values())
        longer = sum(count * (pieces[index] - 1) for index, count in gone.items()) / held_out
        return Kept(ids, self.run.source.config.vocab_size, self.text, sum(self.counts.values()), 1 - missing / held_out, longer), new


def _best_size(ranked: Ranked, measure: Measure) -> int:
    """The number of tokens with which the whole budget is met at the least predicted loss: what fewer tokens cost on the text held out, and
    by the price list what goes of the layers besides.
    """
    run, config = ranked.run, ranked.run.config
    prices, offers, too_many = price_list_of(AllocationInputs(run.shape, config, run)), [], run.source.config.vocab_size

    def offer(tokens: int, nats: float, layers: float) -> None:
        offers.append((nats + layers, tokens))
        line = "vocabulary: %s tokens: predicted loss %.3f nats per token, %.3f of them for the tokens that go"
        log.info(line, f"{tokens:,}", nats + layers, nats)

    for tokens, nats in losses(ranked, measure):
        try:
            layers = of_layers(run, config, prices, tokens)
        except UserError as error:
            log.info("vocabulary: %s tokens: %s", f"{tokens:,}", error)
            too_many = tokens
            continue
        offer(tokens, nats, layers)
        if not layers:  # so no layer need be touched with a few more tokens either
            if (most := _most_that_suffice(run, config, tokens, too_many)) > tokens:
                [(most, nats)] = losses(ranked, measure, [most])
                offer(most, nats, 0.0)
            break
        too_many = tokens
    if not offers:
        name, value = config.amount
        raise UserError(
            f"--{name} {value}: fewer tokens and smaller layers together do not come to that; the lines above say how near they come"
        )
    return min(offers)[1]


def losses(ranked: Ranked, measure: Measure, sizes: list[int] | None = None) -> Iterator[tuple[int, float]]:
    """(a number of tokens, what the dense model loses with these alone, in nats per token that the text had before), of ever fewer.

    ``sizes``: in place of those of SHARES, which come first.
    """
    fewest = None
    for size in sizes or [round(share * ranked.run.source.config.vocab_size) for share in SHARES]:
        kept, tokenizer = ranked.first(size)
        if len(kept.ids) == fewest:
            return
        nats, fewest = _nats_per_token(ranked, kept, tokenizer, measure), len(kept.ids)
        ranked.dense = nats if ranked.dense is None else ranked.dense
        yield fewest, nats - ranked.dense


def _most_that_suffice(run: Run, config: PruneConfig, enough: int, too_many: int) -> int:
    """The largest number of tokens, within ``vocab_multiple``, with which what ``config`` asks for is met by the tokens alone."""
    while too_many - enough > config.vocab_multiple:
        tokens = (enough + too_many) // 2
        try:
            met = all(budget.target <= 0 for budget in budgets_of(_inputs_with(run, config, tokens)))
        except UserError:
            met = False
        enough, too_many = (tokens, too_many) if met else (enough, tokens)
    return enough // config.vocab_multiple * config.vocab_multiple


def _inputs_with(run: Run, config: PruneConfig, tokens: int) -> AllocationInputs:
    """What an allocation knows of the model with so many tokens."""
    return AllocationInputs(run.shape.with_tokens(tokens), config, file_overhead=run.file_overhead * tokens // run.shape.vocab)


def of_layers(run: Run, config: PruneConfig, prices: PriceList, tokens: int) -> float:
    """What the layers lose by the price list where so many tokens stay and the rest of what ``config`` asks for is theirs to give.

    Raises UserError where they cannot.
    """
    inputs = _inputs_with(run, config, tokens)
    sizing = Sizing(inputs.shape, config)
    binding = [budget for budget in budgets_of(inputs) if budget.target > 0]
    return predicted(prices, sizing, solve_all(prices, sizing, binding)) if binding else 0.0


def _nats_per_token(ranked: Ranked, kept: Kept, tokenizer: PreTrainedTokenizerBase, measure: Measure) -> float:
    """What the model loses with these tokens on the text held out, in nats per token that the text had before."""
    run = ranked.run
    first, length = first_token(run.tokenizer, run.model_config), run.config.seq_len
    stream = ranked.held_out
    text = run.tokenizer.decode(stream, clean_up_tokenization_spaces=False)
    ids = token_ids(text, tokenizer, special=False)
    length = min(length, len(ids))
    blocks = in_blocks(ids, length, None if first is None else tokenizer.convert_tokens_to_ids(run.tokenizer.convert_ids_to_tokens(first)))
    return math.log(measure(vocabulary.trimmed_source(run.source, kept.ids), blocks)) * len(ids) / max(len(stream), 1)


def apply(run: Run, kept: Kept) -> None:
    """From now on the run is one on the model with these tokens: its tokenizer, its rows of embeddings and head, its samples."""
    old = run.tokenizer
    run.tokenizer = vocabulary_of(run).tokenizer(kept.ids)
    run.shape = run.shape.with_tokens(len(kept.ids))  # it may have to keep more than was asked for
    run.source = vocabulary.trimmed_source(run.source, kept.ids)
    run.model_config = run.source.config
    first = first_token(old, run.model_config)
    ids, distill_ids = (
        None if ids is None else _spelled_anew(ids, old, run.tokenizer, kept.ids, first)
        for ids in (run.samples.ids, run.samples.distill_ids)
    )
    run.samples = Calibration(ids, run.samples.source, run.samples.seed, distill_ids, run.samples.own)
    log.info("%s", kept.in_words)


def write_map(folder: Path, kept: Kept) -> None:
    """Writes the list of ids before, one for each id now, for those who have adapters or logs of the model that was given."""
    write_text(folder / MAP, json.dumps(kept.ids) + "\n")


def _spelled_anew(ids: torch.Tensor, old, new, kept: list[int], first: int | None) -> torch.Tensor:
    """Samples [samples, length] in the new tokens. One whose tokens all stay is as it was; of another the text is tokenized again, and what
    is then too much at its end is left away.
    """
    number = torch.full((max(int(ids.max()), kept[-1]) + 1,), -1)
    number[torch.tensor(kept)] = torch.arange(len(kept))
    found, length = number[ids], ids.shape[1]
    spare: list[int] = []  # for a sample that became shorter: its tokens were not those that its text would have
    for row in (found < 0).any(1).nonzero().flatten().tolist():
        at_head = [int(number[first])] if first is not None and int(ids[row, 0]) == first else []
        text = old.decode(ids[row, len(at_head) :], clean_up_tokenization_spaces=False)
        spelled = new(text, add_special_tokens=False).input_ids or [0]
        spelled, spare = (spelled + spare)[: length - len(at_head)], spelled[length:] or spare
        while len(spelled) < length - len(at_head):
            spelled += spelled
        found[row] = torch.tensor((at_head + spelled)[:length])
    return found
