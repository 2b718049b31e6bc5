#!/usr/bin/env bash
# Every recipe at every share, measured by the protocols of the literature, on one page: bash script/evidence.sh [MODEL] [flags]
#
# Without MODEL it takes the embedded SmolLM2-135M-Instruct. The flags are those of `python -m slimllm evidence --help`; --dry_run says
# what it will take. A stopped run goes on with the same command.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt -e .
choose_model "$@"
set -- "${flags[@]}"
exec .venv/bin/python -m slimllm evidence --base_model "$model" "$@"
