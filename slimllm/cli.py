"""Command lines made from dataclasses: a field is a flag, and a mistake is one line and exit status 2."""

from __future__ import annotations

import argparse
import logging
import math
import numbers
import os
import re
import shutil
import signal
import sys
import time
import types
import typing
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from . import plugins
from .errors import Interrupted, Terminated, UserError, interrupt, nearest

log = logging.getLogger("slimllm")

FIRST_SAYS = 10  # seconds that the first of several processes has to say what is wrong


def check_choice(option_name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise UserError(f"--{option_name} {value}: not one of {', '.join(allowed)}{nearest(value, allowed)}")


def flag(group: str, help: str, default=None, **kwargs):
    """A dataclass field that is a command-line flag: its group and text in ``--help``, and what argparse is told.

    Its type is the field's annotation, and a tuple takes several values. ``choices`` are checked by :func:`check_choices`,
    ``negatable`` gives a boolean its ``--no_`` form, and a flag with ``positional`` is an argument without a name. The name of a flag that
    is ``leading`` may be left out; one that is needed ``often`` is shown before the others.
    """
    return field(default=default, metadata={"group": group, "help": help, **kwargs})


def drop_repeats(settings, *names: str) -> None:
    """Leaves each value of these fields, which have several, once."""
    for name in names:
        setattr(settings, name, tuple(dict.fromkeys(getattr(settings, name))))


def check_choices(settings) -> None:
    """Raises UserError for a field whose value is not among its choices, naming the nearest."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.metadata.get("choices") and value is not None:
            for item in value if isinstance(value, tuple | list) else (value,):
                check_choice(f.name, item, f.metadata["choices"])


LARGEST = 2**62  # whole number: what is added to one still fits in 64 bits
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


def check_types(settings) -> None:
    """Raises UserError for a field whose value is not of its type, as settings from Python may be; a path becomes its name, a numpy
    number a plain one, and a single string several of them.
    """
    annotations = typing.get_type_hints(type(settings))
    for f in fields(settings):
        value = getattr(settings, f.name)
        if "group" not in f.metadata or value is None and f.default is None:
            continue
        kind, several = _element_type(annotations[f.name])
        if several and isinstance(value, tuple | list):
            setattr(settings, f.name, tuple(_typed(f.name, kind, item) for item in value))
        else:
            value = _typed(f.name, kind, value)
            setattr(settings, f.name, (value,) if several else value)


def _typed(option_name: str, kind: type, value):
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    _check_value(option_name, value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, numbers.Integral if kind is int else numbers.Real):
        return value if isinstance(value, int | float) else kind(value)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    raise UserError(f"--{option_name} {value!r}: must be {_KINDS[kind]}")


def _check_value(option_name: str, value) -> None:
    """Raises UserError for a string that is no text, and so no name of anything (a NUL in it, or bytes that are not UTF-8), and for a
    whole number that nothing can count to.
    """
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"--{option_name}: too large a number; at most {LARGEST}")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        raise UserError(f"--{option_name} {value!r}: not UTF-8 text")


def check_range(settings, name: str, low: float, high: float = math.inf, right_open: bool = False, left_open: bool = False) -> None:
    """Raises UserError for a field outside low .. high, or one that is not a finite number; None passes."""
    value = getattr(settings, name)
    if value is None:
        return
    if not math.isfinite(value) or not low <= value <= high or (right_open and value == high) or (left_open and value == low):
        least = f"above {low:g}" if left_open else f"at least {low:g}"
        bound = f"a finite number, {least}" if high == math.inf else f"from {low:g} to {'below ' if right_open else ''}{high:g}"
        meant = f"; did you mean {value / 100:g}?" if high == 1 and 1 < value <= 100 else ""
        raise UserError(f"--{name} {value}: must be {bound if not math.isfinite(value) or high != math.inf else least}{meant}")


def number_of(name: str, text: str, units: dict[str, float]) -> float:
    """The number that ``--name TEXT`` means, such as 5.4B; ``units``: what the letters behind it stand for. Raises UserError."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([A-Za-z]*)", text.strip())
    if found is None or found[2] not in units:
        billion = next(unit for unit, size in units.items() if size == 1e9)
        raise UserError(f"--{name} {text}: must be a number followed by one of {', '.join(filter(None, units))}, such as 5.4{billion}")
    if not math.isfinite(value := float(found[1]) * units[found[2]]):
        raise UserError(f"--{name} {text[:20]}...: too large a number")
    return value


def given(settings) -> set[str]:
    """The fields whose value is not their default."""
    return {f.name for f in fields(settings) if getattr(settings, f.name) not in (f.default, None)}


def without_effect(names: set[str], because: list[tuple[bool, tuple[str, ...], str]]) -> list[str]:
    """A line for each of the flags ``names`` that changes nothing; ``because``: (whether it holds, for which flags, why)."""
    return [f"--{name} has no effect: {why}" for holds, flags, why in because if holds for name in flags if name in names]


@dataclass
class NoSettings:
    """Settings of a program that has none."""


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage text."""

    def error(self, message):
        raise UserError(message)


def help_text(action: argparse.Action) -> str:
    """What ``--help`` says of a flag: its text and, where there is one, its default."""
    default = action.default
    if default in (None, False, "", ()) or default == argparse.SUPPRESS or action.const:
        return action.help % {}
    return f"{action.help % {}} [{' '.join(map(str, default)) if isinstance(default, tuple) else default}]"


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text, width, indent):
        return "\n".join(super(_Formatter, self)._fill_text(line, width, indent) if line[:1] != " " else line for line in text.split("\n"))

    def _expand_help(self, action):
        return help_text(action)


def _element_type(annotation) -> tuple[type, bool]:
    """(type of one value, whether there are several) of ``float | None``, ``tuple[int, ...]`` and the like."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def version() -> str:
    """What ``--version`` says."""
    import slimllm

    return f"slimllm {slimllm.__version__}"


OFTEN = "what most people need"  # the group of flags that a field with ``often`` is shown in, and whose place is first


def program() -> str:
    """How this project's commands begin in the user's shell."""
    installed = Path(sys.executable).with_name("slimllm")
    if shutil.which("slimllm"):
        return "slimllm"
    return os.path.relpath(installed) if installed.exists() else "python -m slimllm"


def build_parser(settings: type, prog: str, usage: str, description: str, examples: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The parser of a program, one flag for each field of the dataclass ``settings``. ``usage``, ``examples``: what follows ``prog``."""
    shown = "".join(f"\n  {prog} {example}" for example in examples)
    parser = _Parser(prog=prog, usage=f"{prog} {usage}", description=description + shown, allow_abbrev=False, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=version(), help="show the version and exit")
    parser.add_argument(plugins.FLAG, metavar="FILE", action="append", help=plugins.HELP)
    groups: dict = {}
    annotations = typing.get_type_hints(settings)
    shown_as_flags = [f for f in fields(settings) if "group" in f.metadata]
    parser.leading = next((f.name for f in shown_as_flags if f.metadata.get("leading")), None)
    for f in sorted(shown_as_flags, key=lambda f: not f.metadata.get("often")):
        meta = {key: value for key, value in f.metadata.items() if key not in ("often", "leading")}
        name = meta.pop("group")
        name = OFTEN if f.metadata.get("often") else name
        group = groups.setdefault(name, parser.add_argument_group(name))
        choices = meta.pop("choices", None)
        if choices:  # checked by the dataclass, which names the nearest
            meta["metavar"] = "{" + ",".join(choices) + "}"
        default = None if f.default is MISSING else f.default
        element, several = _element_type(annotations[f.name])
        if element is bool:
            negatable = meta.pop("negatable", False)
            if negatable and default:
                meta["help"] += f" [on; --no_{f.name}]"
            group.add_argument(f"--{f.name}", action="store_true", default=default, **meta)
            if negatable:
                group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
            continue
        if several:
            meta.setdefault("nargs", "+")
        if element is not str:
            meta["type"] = element
        meta.setdefault("metavar", f.name.upper() if element is str else "N" if element is int else "X")
        positional = meta.pop("positional", False)
        group.add_argument(f.name if positional else f"--{f.name}", default=default, **meta)
    return parser


def parse(parser: argparse.ArgumentParser, settings: Callable, argv=None):
    """What ``settings`` makes of the flags, given by name. Raises UserError, also for an unknown flag (naming the nearest)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    namespace, unknown = parser.parse_known_intermixed_args(argv)
    if parser.leading and unknown and not unknown[0].startswith("-"):
        if getattr(namespace, parser.leading) is not None:
            raise UserError(f"{unknown[0]} and --{parser.leading} both name the same: give one of them")
        setattr(namespace, parser.leading, unknown.pop(0))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    vars(namespace).pop("plugin", None)  # they are loaded by now
    for name, value in vars(namespace).items():
        for item in value if isinstance(value, list | tuple) else (value,):
            _check_value(name, item)
    return settings(**vars(namespace))


def guarded(prog: str, run, interrupted: str = "nothing was written") -> int:
    """Runs ``run()``; exit status 0 or what it returns, 2 for a user's mistake (one line on stderr), 130 when interrupted, 143 when
    terminated.

    ``interrupted`` is what a user who stops the program is told about what is left on disk.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _interruptible():
            return run() or 0
    except UserError as error:
        _say(" ".join(f"{prog}: error: {'; '.join([str(error), *_notes(error)])}".splitlines()))
        if os.environ.get("RANK", "0") != "0":  # the first one, which says it, would be stopped as soon as this one has ended
            time.sleep(FIRST_SAYS)
        return 2
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, Terminated) as error:
        _say(f"{prog}: interrupted; {'; '.join(_notes(error)) or interrupted}")
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


@contextmanager
def _interruptible():
    """Ctrl-C (where it is not ignored, as in the background) and SIGTERM raise what no destructor can drop, until the block ends."""
    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    hook = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, Interrupted | Terminated) else hook(dropped)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """One line on stderr, from the first of the processes that torchrun may have started."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def log_to_file(path) -> None:
    """Writes the log's lines to a file too, until :func:`logging_to_console` ends. Raises UserError where it cannot be written."""
    try:
        log.addHandler(_LogFile(path, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


class _LogFile(logging.FileHandler):
    """Lines in a file, as long as the disk takes them: what a run makes lies in the same folder, and says what is wrong with it."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self):
        with suppress(OSError):  # lines that it could not write are still to be written
            super().close()


class _Console(logging.StreamHandler):
    """Lines on the console, above the bar where there is one, as long as somebody reads them: a run goes on without (``| head``).

    tqdm's own handler takes an interruption that comes while a line is written for an error of the log, and drops it.
    """

    def emit(self, record):
        if "tqdm" not in sys.modules:
            return super().emit(record)
        with sys.modules["tqdm"].tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


@contextmanager
def logging_to_console():
    """Prints the log's lines, until the block ends; silences what transformers, where it is used, would print beside them."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    before, console = list(log.handlers), _Console(sys.stdout)
    console.setLevel(logging.INFO)
    log.addHandler(console)
    try:
        yield
    finally:
        for handler in [handler for handler in log.handlers if handler not in before]:
            log.removeHandler(handler)
            handler.close()
