"""A user's mistake, said in one line."""

from __future__ import annotations

import difflib
import os
import signal
import threading


class UserError(ValueError):
    """A user's mistake: one line that names the thing and the way out, and exit status 2."""


class Recurring(UserError):
    """One in which a run with the same settings ends again, wherever it goes on."""


class _SentAgain:
    """What the handler of signal ``number`` raises. Python drops what is raised in a destructor, in the callback of a weak reference
    or below C code that clears errors; the signal is sent again then, unless somebody said that it arrived (``arrived = True``).
    """

    arrived = False

    def __del__(self):
        if not self.arrived and signal.getsignal(self.number) is interrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), self.number)).start()


class Interrupted(_SentAgain, KeyboardInterrupt):
    """Ctrl-C."""

    number = signal.SIGINT


class Terminated(_SentAgain, BaseException):
    """SIGTERM came: the program ends, also where Ctrl-C would end no more than a part of its work."""

    number = signal.SIGTERM


def interrupt(number: int, _) -> None:
    """The handler of both signals."""
    raise Terminated if number == signal.SIGTERM else Interrupted


def nearest(value: str, allowed) -> str:
    """``"; did you mean 'x'?"`` for the allowed name that ``value`` begins, or is nearest to; or an empty string."""
    allowed, value = list(allowed), str(value)
    begun = [name for name in allowed if value.strip("-") and name.startswith(value)]
    close = begun or difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
