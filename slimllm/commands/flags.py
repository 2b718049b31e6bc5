"""``slimllm flags``: every flag of every program as Markdown, which is docs/flags.md."""

from __future__ import annotations

import argparse
import logging

from .. import cli
from ..cli import NoSettings
from . import COMMANDS

log = logging.getLogger("slimllm")


def parsers() -> list[argparse.ArgumentParser]:
    """The parser of each program."""
    return [command.parser(name) for name, command in COMMANDS.items()]


def flags_page() -> str:
    """The page, from the same declarations as each program's ``--help``."""
    parts = [
        "# Flags",
        "Every flag of every program. In brackets at the end: what holds without the flag, where that is not simply off. "
        "A mistyped flag or value is answered with the nearest one. This page is the output of `slimllm flags`.",
    ]
    for parser in parsers():
        parts += [f"## `{parser.usage}`", parser.description]
        for group in parser._action_groups:
            rows = [[_name(action), cli.help_text(action)] for action in group._group_actions if action.help != argparse.SUPPRESS]
            if rows and group.title not in ("options", "positional arguments"):
                lines = [f"| {' | '.join(row)} |" for row in [["flag", "meaning"], ["---", "---"], *rows]]
                parts += [f"### {group.title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    values = "" if action.nargs == 0 else " " + action.metavar.replace("|", r"\|")
    return f"`{action.option_strings[0]}{values}{' ...' if action.nargs in ('+', '*') else ''}`"


def run(settings: NoSettings) -> None:
    log.info("%s", flags_page().rstrip("\n"))
