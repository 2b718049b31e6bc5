"""Conversations, lists of messages with role and content, as the text that a model's chat template makes of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UserError, first_line

# Where a row keeps its messages, and in what entries of each are its role and its content; the second is ShareGPT's.
FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of them


def has_messages(row) -> bool:
    """Whether this is a row of messages, whole or odd."""
    return isinstance(row, dict) and _field(row) is not None


def _field(row: dict) -> str | None:
    return next((name for name in FIELDS if isinstance(row.get(name), list) and row[name]), None)


def messages_of(row: dict) -> list[dict]:
    """The messages of such a row, each with a role and a content. Raises UserError naming one that has none."""
    field = _field(row)
    return [_message(given, number, *FIELDS[field]) for number, given in enumerate(row[field], 1)]


def _message(given, number: int, role: str, content: str) -> dict:
    if not (isinstance(given, dict) and isinstance(given.get(role), str) and isinstance(given.get(content), str)):
        raise UserError(f"message {number} is not one with a {role} and a {content} that are text")
    return given if role == "role" else {"role": _ROLES.get(given[role], given[role]), "content": given[content]}


def as_text(tokenizer, messages: list[dict], answer_next: bool = False) -> str:
    """The conversation with its special tokens, ``answer_next``: up to where the model's next answer begins.

    Raises UserError where the tokenizer has no chat template, or one that does not take these messages.
    """
    if not tokenizer.chat_template:
        raise UserError("rows of messages: the model has no chat template to write them with; give rows of text")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except Exception as error:  # whatever the template's own code raises
        raise UserError(f"the model's chat template does not take these messages ({first_line(error)})") from None


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the words of a conversation, as token ids: ``before`` a question that opens one, ``between`` a
    question and its answer, and ``after`` an answer, before the next question.
    """

    before: list[int]
    between: list[int]
    after: list[int]


def turns_of(tokenizer) -> Turns:
    """Those of the tokenizer's template. Raises UserError for one that writes no turns, or none that end by one token."""
    words = "qqqq", "aaaa", "zzzz"
    messages = [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), words)]
    pieces = re.split("|".join(words), as_text(tokenizer, messages))
    if len(pieces) != 4:
        raise UserError("the model's chat template does not write a question, an answer and a question in turn")
    before, between, after = (tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces[:3])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if not before or not between or not after or between[0] != after[0] or between[0] not in special:
        raise UserError("the model's chat template does not end questions and answers by one and the same special token")
    return Turns(before, between, after)


def answers_in(tokenizer, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """(the text of a conversation, from which to which character each answer of the assistant goes, with what ends it).

    Raises UserError for a template that writes a message differently once others follow it.
    """
    text, found = as_text(tokenizer, messages), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not index:
            raise UserError("a conversation begins with an answer, and nothing was asked; leave that message out")
        before, until = as_text(tokenizer, messages[:index], answer_next=True), as_text(tokenizer, messages[: index + 1])
        if not (until.startswith(before) and text.startswith(until)):
            raise UserError(
                "the model's chat template writes an answer differently once it is followed; cut each row after its first answer"
            )
        found.append((len(before), len(until)))
    return text, found
