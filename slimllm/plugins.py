"""``--plugin FILE.py``: methods, scores, recoveries and families from a file of the user's, in every program."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from .errors import UserError, first_line

FLAG = "--plugin"
HELP = (
    "Python file that adds methods, scores, recoveries or families of your own, as docs/add-a-method.md and docs/add-a-family.md show; "
    "its code is run first"
)

loaded: dict[str, str] = {}  # file -> SHA-256 of the code that was run, in this process


def load(argv: list[str] | None) -> None:
    """Runs the files that ``--plugin`` names, each once. Raises UserError for one that is not there or that fails."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(FLAG, action="append", default=[], nargs="?")
    for name in parser.parse_known_args(argv)[0].plugin:
        if name is None:
            raise UserError(f"{FLAG}: name a file")
        path = Path(name).resolve()
        if str(path) in loaded:
            continue
        if not path.is_file():
            raise UserError(f"{FLAG} {name}: no such file")
        loaded[str(path)] = _run(path, name)


def _run(path: Path, name: str) -> str:
    """Runs one file; returns the SHA-256 of its content."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{FLAG} {name}: {error.strerror}") from None
    spec = importlib.util.spec_from_file_location(f"slimllm_plugin_{path.stem}_{digest[:8]}", path)
    if spec is None:
        raise UserError(f"{FLAG} {name}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as for any module: its dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        own = isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno
        line = f", line {error.lineno if own else at[-1]}" if own or at else ""
        raise UserError(f"{FLAG} {name}{line}: {type(error).__name__}: {first_line(error)}") from None
    return digest
