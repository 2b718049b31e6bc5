#!/usr/bin/env bash
# Sets itself up and runs the tests: bash script/test.sh [pytest arguments]. WORKERS=... processes, of one thread each [2]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt
install tests -r tests/requirement.txt
install_embedded_model
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist worksteal "${@:-tests}"
