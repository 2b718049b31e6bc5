"""Prunes a model, under the name and with the defaults of the paper's script: ``slimllm prune`` is the same program."""

import sys

from slimllm.commands import run_script


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    return run_script("hf_prune.py", "prune", argv)


if __name__ == "__main__":
    sys.exit(main())
