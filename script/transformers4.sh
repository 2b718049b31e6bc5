#!/usr/bin/env bash
# Reads pruned checkpoints of --runtime transformers in transformers 4.57, which is installed into a folder of its own (.transformers4).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt -e .
install tests -r tests/requirement.txt
wanted="transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2"
if [ "$(cat .transformers4/.installed 2>/dev/null)" != "$wanted" ]; then
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --target .transformers4 --no-deps $wanted
    printf '%s' "$wanted" > .transformers4/.installed
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTHONPATH=. .venv/bin/python tests/transformers4.py write "$folder"
PYTHONPATH=.transformers4 .venv/bin/python tests/transformers4.py read "$folder"
