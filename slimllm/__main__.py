"""``slimllm NAME ...``, or ``python -m slimllm NAME ...``."""

from __future__ import annotations

import sys

from . import cli
from .commands import COMMANDS
from .errors import UserError, nearest


def main(argv=None) -> int:
    """Exit status: 0, what the command says, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "--version":
        print(cli.version())
        return 0
    if name in ("-h", "--help"):
        print("usage: slimllm COMMAND [arguments]; COMMAND --help says more\n")
        for known, command in COMMANDS.items():
            print(f"  {known:20} {command.description}")
        return 0
    if name in COMMANDS:
        return COMMANDS[name].run(name, rest)

    def unknown():
        raise UserError(f"{name}: not one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")

    return cli.guarded("slimllm", unknown)


if __name__ == "__main__":
    sys.exit(main())
