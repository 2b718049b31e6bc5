"""Recovers a pruned model with LoRA, under the name of the paper's script: ``slimllm train`` is the same program."""

import sys

from slimllm.commands import run_script


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    return run_script("post_training.py", "train", argv)


if __name__ == "__main__":
    sys.exit(main())
