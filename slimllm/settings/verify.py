"""Settings of ``slimllm verify``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_range, flag
from ..errors import UserError
from .common import VLLM_PYTHON, trust_flag


@dataclass
class VerifyConfig:
    """Settings of a verification. Raises UserError where a value makes no sense."""

    paths: tuple[str, ...] = flag("checkpoint", "checkpoint folder, then any .gguf files made from it", positional=True, nargs="*")
    vllm: str | None = flag(
        "checkpoint",
        "the checkpoint in vLLM too; PYTHON: interpreter of an environment with vLLM [without PYTHON: .vllm/bin/python]",
        metavar="PYTHON",
        nargs="?",
        const=VLLM_PYTHON,
    )
    trust_remote_code: bool = trust_flag("checkpoint")
    text: str | None = flag("checkpoint", "file with the text to compare on [the Python manual]")
    blocks: int = flag("checkpoint", "pieces of the text", 2)
    seq_len: int = flag("checkpoint", "tokens per piece", 96)

    def __post_init__(self):
        if not self.paths:
            raise UserError("name a checkpoint folder: slimllm verify prune_log/NAME [FILE.gguf ...]")
        check_range(self, "blocks", 1)
        check_range(self, "seq_len", 4)
        self.folder, *self.files = self.paths
        if self.folder.endswith(".gguf"):
            raise UserError(f"{self.folder}: name the checkpoint folder first, then its .gguf files")
