#!/usr/bin/env bash
# Prunes Vicuna-7B at the paper's two settings: bash script/vicuna_prune.sh [MODEL] [flags], as llama_prune.sh.
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model="$1"
    shift
else
    model="lmsys/vicuna-7b-v1.3"
fi
NAME="${NAME:-vicuna_prune}" exec bash "$(dirname "${BASH_SOURCE[0]}")/llama_prune.sh" "$model" "$@"
