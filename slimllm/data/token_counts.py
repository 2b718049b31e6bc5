"""Which tokens of a vocabulary are kept: those that a text uses most, and among the others those that it would use first."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable

from ..errors import UserError, nearest
from ..models.vocabulary import Vocabulary


def in_order(
    vocabulary: Vocabulary,
    counts: Counter,
    expected: list[float],
    decode: Callable[[int], str],
    scripts: tuple[str, ...] | None = None,
) -> list[int]:
    """All ids, those first that are to be kept first.

    What counts is how often a text has a token and, as much again, how often the model ``expected`` it there, [V], 1 in sum: a word that is
    missing from a text of a million tokens may well come in the next one. Tokens with letters of other ``scripts`` come after all others:
    of other scripts than were named, or among those that do not occur, than the text has. ``decode``: id -> its text.
    """
    written = {index: _scripts_of(decode(index)) for index in vocabulary.texts}
    wanted = set(scripts) if scripts is not None else _frequent(written, counts)
    total = sum(counts.values())

    def key(index: int) -> tuple:
        foreign = bool(written[index] - wanted) and (scripts is not None or not counts.get(index))
        return foreign, -counts.get(index, 0) - total * expected[index], index

    return sorted(vocabulary.texts, key=key)


def check_scripts(vocabulary: Vocabulary, decode: Callable[[int], str], scripts: tuple[str, ...]) -> None:
    """Raises UserError for scripts of which no token has a letter."""
    known = set().union(*(_scripts_of(decode(index)) for index in vocabulary.texts))
    for name in scripts:
        if name not in known:
            close = nearest(name, sorted(known)) or f"; the tokenizer has {', '.join(sorted(known))}"
            raise UserError(f"--vocab_scripts {name}: no token has letters of it{close}")


def first_of(vocabulary: Vocabulary, order: list[int], size: int) -> list[int]:
    """The first tokens of the ``order`` with all that they need, ``size`` of them, ascending; more where more have to stay."""
    kept = set(vocabulary.always)
    for index in order:
        if len(kept) >= size:
            break
        more = vocabulary.needs(index) - kept
        if len(kept) + len(more) <= size:
            kept |= more
    return sorted(kept)


def _frequent(written: dict[int, set[str]], counts: Counter) -> set[str]:
    """The scripts of at least one in a thousand of the letters' tokens."""
    seen = Counter()
    for index, count in counts.items():
        for script in written.get(index, ()):
            seen[script] += count
    least = sum(seen.values()) / 1000
    return {script for script, count in seen.items() if count >= least}


def _scripts_of(text: str) -> set[str]:
    """The scripts of the letters of a text, as Unicode names them (latin, cyrillic, cjk); half a character has none."""
    return {unicodedata.name(letter, "").split(" ")[0].split("-")[0].lower() for letter in text if letter.isalpha()} - {""}
