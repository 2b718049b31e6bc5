"""``slimllm chat``: a conversation with one model or with two beside each other, in the terminal or in a browser."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from pathlib import Path

import torch

from ..data.texts import is_encodable
from ..errors import UserError
from ..evaluation.answers import as_chat
from ..evaluation.partner import Partner
from ..models import loading
from ..settings.chat import ChatConfig
from ..utils.device import device_of, evaluation_dtype

log = logging.getLogger("slimllm")
HELP = "type a message and press Enter; /new forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C ends an answer"


def run(config: ChatConfig) -> None:
    """Reads messages until the input ends. Raises UserError for a model that cannot be read."""
    partners = [_partner(name, option, config) for name, option in ((config.model, "MODEL"), (config.beside, "--beside")) if name]
    for partner in partners:
        if not partner.tokenizer.chat_template:
            alone = "; --system is not for it" if config.system else ""
            log.info("%s has no chat template: it goes on from what you write%s", partner.name, alone)
    if config.browser:
        from . import chat_page

        chat_page.serve(partners, config)
    else:
        _in_terminal(partners, config)


def _partner(name: str, option: str, config: ChatConfig) -> Partner:
    device = device_of("device", config.device)
    own = loading.own_dtype(name, loading.load_config(name, option))
    dtype = evaluation_dtype(getattr(torch, config.dtype) if config.dtype != "auto" else own or torch.bfloat16, device)
    tokenizer = loading.load_tokenizer(name, option)
    system = [{"role": "system", "content": config.system}] if config.system and tokenizer.chat_template else []
    partner = Partner(Path(name).name, loading.load_model(name, dtype, option, device), tokenizer, system)
    _try(tokenizer, system, f"{option} {name}")
    return partner


def _try(tokenizer, system: list[dict], where: str) -> None:
    """Raises UserError, naming ``where`` and the way out, for a chat template that takes no conversation that begins so."""
    hello = {"role": "user", "content": "Hello"}
    try:
        as_chat(tokenizer, [*system, hello])
    except UserError as error:
        way = "correct its chat template"
        with contextlib.suppress(UserError):
            as_chat(tokenizer, [hello] if system else [{"role": "system", "content": "Hello"}, hello])
            way = "leave --system out" if system else "say something with --system"
        raise UserError(f"{where}: {error}; {way}") from None


def _in_terminal(partners: list[Partner], config: ChatConfig) -> None:
    log.info("%s", HELP)
    talks = [list(partner.beginning) for partner in partners]
    while (text := _typed()) is not None:
        if text.strip() == "/new":
            talks = [list(partner.beginning) for partner in partners]
        elif text.lstrip().startswith("/"):
            log.info("%s", HELP)
        elif text.strip():
            for partner, talk in zip(partners, talks):
                _answer(partner, talk, text, config)


def _answer(partner: Partner, talk: list[dict], text: str, config: ChatConfig) -> None:
    """Prints the answer as it is written, and adds question and answer to the conversation."""
    talk.append({"role": "user", "content": text})
    started, written = time.perf_counter(), ""
    log.info("%s:", partner.name)
    try:
        with contextlib.closing(partner.pieces(talk, config)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                written += piece
    except KeyboardInterrupt as error:
        error.arrived = True  # the answer is long enough; what was written of it stays
    except UserError as error:
        talk.pop()
        log.info("%s: %s", partner.name, error)
        return
    print()
    log.info("[%s]", partner.speed(written, time.perf_counter() - started))
    talk.append({"role": "assistant", "content": written})


def _typed() -> str | None:
    """The next message; None where there is none."""
    if sys.stdin is None:
        return None
    try:
        text = input("\n> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt) as error:
        error.arrived = True
        return None
    except UnicodeDecodeError:
        text = None
    if text is None or not is_encodable(text):
        raise UserError("the message is not UTF-8 text; write it in UTF-8")
    return None if text.strip() in ("/quit", "/exit") else text
