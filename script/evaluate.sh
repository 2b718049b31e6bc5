#!/usr/bin/env bash
# Perplexity and the paper's zero-shot tasks of a model, dense or pruned: bash script/evaluate.sh MODEL [flags]
#
#   bash script/evaluate.sh prune_log/NAME                                         data from the hub
#   bash script/evaluate.sh prune_log/NAME --data_dir FOLDER                       tasks from local files
#   bash script/evaluate.sh prune_log/NAME --adapter tune_log/NAME/adapter         with a LoRA adapter
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt -e .
exec .venv/bin/python -m slimllm evaluate "$@"
