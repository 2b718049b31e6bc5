"""``python -m slimllm verify DIR [FILE.gguf ...]``: proves that a checkpoint, and files made from it, are the model that was pruned."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from ..cli import check_range, flag
from ..data.texts import blocks_of, load_texts
from ..deploy import vllm
from ..deploy.verify import GREEDY_TOKENS, Check, checks_of_bytes, checks_of_file, checks_of_folder, checks_of_vllm
from ..deploy.vllm import trust_flag
from ..errors import UserError
from ..models import loading
from ..reporting.tables import aligned

log = logging.getLogger("slimllm")


@dataclass
class VerifyConfig:
    """Settings of a verification. Raises UserError where a value makes no sense."""

    paths: tuple[str, ...] = flag("checkpoint", "checkpoint folder, then any .gguf files made from it", positional=True, nargs="*")
    vllm: str | None = flag(
        "checkpoint",
        "the checkpoint in vLLM too; PYTHON: interpreter of an environment with vLLM [without PYTHON: .vllm/bin/python]",
        metavar="PYTHON",
        nargs="?",
        const=vllm.PYTHON,
    )
    trust_remote_code: bool = trust_flag("checkpoint")
    text: str | None = flag("checkpoint", "file with the text to compare on [the Python manual]")
    blocks: int = flag("checkpoint", "pieces of the text", 2)
    seq_len: int = flag("checkpoint", "tokens per piece", 96)

    def __post_init__(self):
        if not self.paths:
            raise UserError("name a checkpoint folder: python -m slimllm verify prune_log/NAME [FILE.gguf ...]")
        check_range(self, "blocks", 1)
        check_range(self, "seq_len", 4)
        self.folder, *self.files = self.paths
        if self.folder.endswith(".gguf"):
            raise UserError(f"{self.folder}: name the checkpoint folder first, then its .gguf files")


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
    for path in config.files:
        found += checks_of_file(path, model, tokenizer, text.text, blocks)
    if config.vllm:
        found += checks_of_vllm(config.vllm, config.folder, model, tokenizer, text.text, blocks, config.trust_remote_code)
    return found
