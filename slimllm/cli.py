"""Command lines made from dataclasses: a field is a flag, and a mistake is one line and exit status 2."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import MISSING, field, fields

log = logging.getLogger("slimllm")


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the thing and the way out, exit status 2."""


def nearest(value: str, allowed) -> str:
    """``"; did you mean 'x'?"`` for the allowed name that ``value`` begins, or is nearest to; or an empty string."""
    allowed, value = list(allowed), str(value)
    begun = [name for name in allowed if value.strip("-") and name.startswith(value)]
    close = begun or difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_choice(flag: str, value: str, allowed) -> None:
    if value not in allowed:
        raise UserError(f"--{flag} {value}: not one of {', '.join(allowed)}{nearest(value, allowed)}")


def flag(group: str, help: str, default=None, **kwargs):
    """A dataclass field that is a command-line flag: its group and text in ``--help``, and what argparse is told.

    ``choices`` are checked by :func:`check_choices`, ``negatable`` gives a boolean its ``--no_`` form, and a flag with
    ``positional`` is an argument without a name.
    """
    return field(default=default, metadata={"group": group, "help": help, **kwargs})


def check_choices(settings) -> None:
    """Raises UserError for a field whose value is not among its choices, naming the nearest."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.metadata.get("choices") and value is not None:
            for item in value if isinstance(value, tuple | list) else (value,):
                check_choice(f.name, item, f.metadata["choices"])


def check_range(settings, name: str, low: float, high: float = float("inf"), right_open: bool = False, left_open: bool = False) -> None:
    """Raises UserError for a field outside low .. high; None passes."""
    value = getattr(settings, name)
    if value is None:
        return
    if not low <= value <= high or (right_open and value == high) or (left_open and value == low):
        least = f"above {low:g}" if left_open else f"at least {low:g}"
        bound = least if high == float("inf") else f"from {low:g} to {'below ' if right_open else ''}{high:g}"
        raise UserError(f"--{name} {value}: must be {bound}")


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage text."""

    def error(self, message):
        raise UserError(message)


class _Formatter(argparse.HelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) and not action.const
        return action.help + (" [%(default)s]" if shown else "")


def build_parser(settings: type, prog: str, usage: str, description: str) -> argparse.ArgumentParser:
    """The parser of a program, one flag for each field of the dataclass ``settings``."""
    parser = _Parser(prog=prog, usage=usage, description=description, allow_abbrev=False, formatter_class=_Formatter)
    groups: dict = {}
    for f in fields(settings):
        meta = dict(f.metadata)
        name = meta.pop("group")
        group = groups.setdefault(name, parser.add_argument_group(name))
        choices = meta.pop("choices", None)
        if choices:  # checked by the dataclass, which names the nearest
            meta["metavar"] = "{" + ",".join(choices) + "}"
        default = None if f.default is MISSING else f.default
        if isinstance(default, bool):
            negatable = meta.pop("negatable", False)
            group.add_argument(f"--{f.name}", action="store_true", default=default, **meta)
            if negatable:
                group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
        else:
            meta.setdefault("metavar", f.name.upper() if "type" not in meta else "N" if meta["type"] is int else "X")
            positional = meta.pop("positional", False)
            group.add_argument(f.name if positional else f"--{f.name}", default=default, **meta)
    return parser


def parse(parser: argparse.ArgumentParser, settings: type, argv=None):
    """Flags to a validated ``settings``. Raises UserError, also for an unknown flag (naming the nearest)."""
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    return settings(**vars(namespace))


def guarded(prog: str, run, interrupted: str = "nothing was written") -> int:
    """Runs ``run()``; exit status 0, 2 for a user's mistake (one line on stderr), 130 when interrupted or terminated.

    ``interrupted`` is what a user who stops the program is told about what is left on disk.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0


class Log:
    """The program's log: lines on the console, and in files from :meth:`to_file` on."""

    def __init__(self):
        self.handlers: list[logging.Handler] = []
        self._add(logging.StreamHandler(sys.stdout))

    def _add(self, handler: logging.Handler) -> None:
        log.addHandler(handler)
        self.handlers.append(handler)

    def to_file(self, path) -> None:
        self._add(logging.FileHandler(path, encoding="utf-8"))


@contextmanager
def logging_to_console():
    """Gives a :class:`Log` and closes its handlers afterwards; silences what the libraries would print beside it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    log.setLevel(logging.INFO)
    log.propagate = False
    lines = Log()
    try:
        yield lines
    finally:
        for handler in lines.handlers:
            log.removeHandler(handler)
            handler.close()


def device_of(flag: str, name: str):
    """The torch device that ``--flag NAME`` means; auto is a GPU if there is one. Raises UserError for one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--{flag} {name}: no such device here; use cpu{', cuda' if torch.cuda.is_available() else ''} or auto") from None
    return device


def program(
    settings: type, module: str, arguments: str, description: str, work, argv=None, interrupted="nothing was written", memory=""
) -> int:
    """The ``main`` of ``python -m module``: flags to ``settings``, then ``work(settings)`` with a log; returns the exit status.

    ``memory`` is the advice where a GPU is full; ``interrupted`` as for :func:`guarded`, which says what the statuses are.
    """
    parser = build_parser(settings, prog=module, usage=f"python -m {module} {arguments}", description=description)

    def run():
        chosen = parse(parser, settings, argv)
        with logging_to_console(), memory_errors(memory):
            work(chosen)

    return guarded(module, run, interrupted)


@contextmanager
def memory_errors(advice: str):
    """Turns a GPU that is full into one line with ``advice``."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on the GPU ({str(error).splitlines()[0]}); {advice}") from None
