"""``slimllm export-gguf DIR``: writes a checkpoint, dense or pruned, as GGUF files for llama.cpp."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from ..deploy.export_gguf import export
from ..errors import UserError
from ..reporting import card
from ..settings.export_gguf import ExportConfig
from ..utils.outputs import check_target, is_export, taken, unless

log = logging.getLogger("slimllm")


def run(settings: ExportConfig) -> None:
    """Writes every file that the settings ask for."""
    if not Path(settings.folder).is_dir():  # before its place for the file is made
        raise UserError(f"{settings.folder}: no such folder")
    targets = [(name, settings.target(name)) for name in settings.outtypes]
    way = "name another --output"
    with contextlib.ExitStack() as names:
        for _, target in targets:
            check_target(target, settings.overwrite, way, [settings.folder], unless(is_export))
            names.enter_context(taken(target, way))
        for name, target in targets:
            export(settings.folder, target, name, settings.arch)
            log.info("%s  %.1f MB", target, target.stat().st_size / 1e6)
    card.update_files(Path(settings.folder))
