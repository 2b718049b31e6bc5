#!/usr/bin/env bash
# What pruning takes and gives on a GPU, in about eight minutes and with no network: bash script/gpu.sh [flags of python -m slimllm gpu]
#
# For a machine with an NVIDIA GPU, Python 3.11 or newer, and the packages of requirement.txt but lm_eval (script/llama_prune.sh makes a
# .venv with them; PYTHON=.venv/bin/python then). Models are made there, with random weights. It needs 35 GB of disk (--work_dir names
# where) and leaves a table and eval_log/gpu.json. What would begin after --minutes is left out, and the table says so.
#   PYTHON=...       another interpreter than python3
#   GPU_WHEELS=DIR   wheels of packages that are missing there, put beside the installed ones for this run only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if [ -n "${GPU_WHEELS:-}" ]; then
    wheels="$(mktemp -d)"
    trap 'rm -rf "$wheels"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$wheels" "$GPU_WHEELS"/*.whl
    export PYTHONPATH="$wheels${PYTHONPATH:+:$PYTHONPATH}"
fi
missing="$("$python" -c '
import importlib.util
names = ("torch", "transformers", "accelerate", "safetensors", "gguf", "datasets", "peft", "psutil", "jinja2", "matplotlib", "tqdm")
print(*[name for name in names if importlib.util.find_spec(name) is None])')"
if [ -n "$missing" ]; then
    echo "gpu.sh: $python has no $missing; on a machine with a network, pip download --no-deps -d wheels $missing" \
        "(and what these need), then GPU_WHEELS=wheels bash $0; or name another interpreter with PYTHON=..." >&2
    exit 2
fi
"$python" -m slimllm gpu "$@"
