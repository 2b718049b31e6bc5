"""Settings of ``slimllm export-transformers``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..cli import flag
from ..errors import UserError


@dataclass
class StockConfig:
    """Settings of the export. Raises UserError where a folder is not named."""

    folders: tuple[str, ...] = flag("folders", "checkpoint folder, and the folder to write", positional=True, nargs="*")
    into: str | None = flag(
        "folders",
        "the model of text and images that the text model was taken from, a folder or hub name: it is written whole, "
        "with the pruned text model in place of its own",
    )
    overwrite: bool = flag("folders", "replace an existing folder", False)

    def __post_init__(self):
        if len(self.folders) != 2:
            raise UserError("name two folders: slimllm export-transformers prune_log/NAME OUT")
        target = Path(self.folders[1]).resolve()
        for name, folder in (("DIR", self.folders[0]), ("--into", self.into)):
            if folder is not None and Path(folder).is_dir() and Path(folder).resolve() in target.parents:
                raise UserError(f"{self.folders[1]} lies inside {name} {folder}: name another folder")
