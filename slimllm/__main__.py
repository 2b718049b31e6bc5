"""``python -m slimllm NAME ...``: everything but pruning and post-training, which have scripts of their own."""

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
        print("usage: python -m slimllm COMMAND [arguments]; COMMAND --help says more\n")
        for known, command in COMMANDS.items():
            print(f"  {known:20} {command.description}")
        return 0
    command = COMMANDS.get(name)

    def run():
        if command is None:
            raise UserError(f"{name}: not one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
        parsed = cli.parse(command.parser(name), command.settings_class(), rest)
        from .utils.memory import memory_errors

        work = command.load()
        with cli.logging_to_console("transformers" in sys.modules), memory_errors(command.advice):
            return work(parsed)

    return cli.guarded(f"slimllm {name}" if command else "slimllm", run, command.interrupted if command else "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
