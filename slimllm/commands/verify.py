"""``slimllm verify DIR [FILE.gguf ...]``: proves that a checkpoint, and files made from it, are the model that was pruned."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from ..data.texts import blocks_of, load_texts
from ..deploy import whole_model
from ..deploy.verify import GREEDY_TOKENS, Check, checks_of_bytes, checks_of_file, checks_of_folder, checks_of_vllm
from ..errors import UserError
from ..models import loading
from ..reporting.tables import aligned
from ..settings.verify import VerifyConfig

log = logging.getLogger("slimllm")


def run(config: VerifyConfig) -> int:
    """Prints every check. Returns the exit status: 1 where one failed."""
    found = checks(config)
    log.info("%s", "\n".join(aligned([["check", "measured", "allowed", ""], *(check.row() for check in found)])))
    return 0 if all(check.passed for check in found) else 1


def checks(config: VerifyConfig) -> list[Check]:
    """Every check, in order. Raises UserError for what is no checkpoint or cannot be read."""
    if not os.path.isdir(config.folder):
        raise UserError(f"{config.folder}: no such folder")
    for path in config.files:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
    found = checks_of_bytes(config.folder)
    if not all(check.passed for check in found):
        return found  # what other files compute proves nothing of those that were written
    model = loading.load_model(config.folder, torch.float32, "DIR")
    tokenizer = loading.load_tokenizer(config.folder, "DIR")
    (text,) = load_texts((config.text or "python_manual",), "--text")
    length = min(config.seq_len, model.config.max_position_embeddings - GREEDY_TOKENS - 1)
    blocks = blocks_of(text, tokenizer, model.config, max(4, length), config.blocks)
    found += checks_of_folder(config.folder, model, tokenizer, blocks)
    if whole_model.is_whole(config.folder):
        found.append(Check("the whole in its own class: logits of text", *whole_model.compare(Path(config.folder))))
    for path in config.files:
        found += checks_of_file(path, model, tokenizer, text.text, blocks)
    if config.vllm:
        found += checks_of_vllm(config.vllm, config.folder, model, tokenizer, text.text, blocks, config.trust_remote_code)
    return found
