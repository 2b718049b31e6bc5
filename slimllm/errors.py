"""A user's mistake, said in one line."""

from __future__ import annotations

import difflib


class UserError(ValueError):
    """A user's mistake: one line that names the thing and the way out, and exit status 2."""


class Terminated(BaseException):
    """SIGTERM came: the program ends, also where Ctrl-C would end no more than a part of its work."""


def nearest(value: str, allowed) -> str:
    """``"; did you mean 'x'?"`` for the allowed name that ``value`` begins, or is nearest to; or an empty string."""
    allowed, value = list(allowed), str(value)
    begun = [name for name in allowed if value.strip("-") and name.startswith(value)]
    close = begun or difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
