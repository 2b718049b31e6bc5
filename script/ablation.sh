#!/usr/bin/env bash
# Every ingredient of the method off or changed in turn, at equal kept parameters: bash script/ablation.sh [MODEL] [flags]
#
# Without MODEL it takes the embedded SmolLM2-135M-Instruct. The flags are those of `python -m slimllm ablation --help`.
# A stopped run goes on with the same command.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt -e .
choose_model "$@"
set -- "${flags[@]}"
exec .venv/bin/python -m slimllm ablation --base_model "$model" "$@"
