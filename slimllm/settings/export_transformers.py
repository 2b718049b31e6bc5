"""Settings of ``python -m slimllm export-transformers``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import flag
from ..errors import UserError


@dataclass
class StockConfig:
    """Settings of the export. Raises UserError where a folder is not named."""

    folders: tuple[str, ...] = flag("folders", "checkpoint folder, and the folder to write", positional=True, nargs="*")
    overwrite: bool = flag("folders", "replace an existing folder", False)

    def __post_init__(self):
        if len(self.folders) != 2:
            raise UserError("name two folders: python -m slimllm export-transformers prune_log/NAME OUT")
