"""vLLM, in an environment of its own (script/vllm.sh makes one), asked through :mod:`vllm_worker`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from ..errors import UserError
from ..settings.common import VLLM_PYTHON
from .config_files import brings_only_our_code

_WORKER = Path(__file__).with_name("vllm_worker.py")
_CACHE_GIGABYTES = "1"  # of keys and values on a CPU; by default vLLM takes half of the memory there is


def check_interpreter(python: str) -> None:
    """Raises UserError where there is no such interpreter."""
    if not os.path.isfile(python) or not os.access(python, os.X_OK):
        raise UserError(
            f"--vllm {python}: no such interpreter; script/vllm.sh makes {VLLM_PYTHON}, or name that of an environment with vLLM"
        )


def ask(python: str, model: str | os.PathLike, context: int, dtype: str = "float32", trust_remote_code: bool = False, **queries) -> dict:
    """What vLLM, run by the interpreter ``python``, computes for the model in a folder; ``queries`` and the results as in vllm_worker.

    Code that the folder brings is run where that is this program's own, or with ``trust_remote_code``.
    Raises UserError where there is no such interpreter, it has no vLLM, or vLLM does not take the model.
    """
    check_interpreter(python)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": _CACHE_GIGABYTES, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONSAFEPATH"] = "1"  # the worker's folder is not a place to import from: this file would be taken for vLLM
    with tempfile.TemporaryDirectory(prefix="slimllm-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        trusted = trust_remote_code or brings_only_our_code(Path(model))
        settings = {"model": str(Path(model).resolve()), "context": context, "dtype": dtype, "trust_remote_code": trusted}
        request.write_text(json.dumps(settings | queries))
        command = [os.path.abspath(python), _WORKER, request, answer]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        if done.returncode or not answer.is_file():
            output = done.stderr + done.stdout
            if not trusted and "trust_remote_code" in output.replace("-", "_"):
                raise UserError(f"{model}: it brings code that is not this program's; look at it, then allow it with --trust_remote_code")
            raise UserError(f"{model}: vLLM failed: {_reason(output)}")
        return json.loads(answer.read_text())


def _reason(output: str) -> str:
    """The first line that names an error which is not only that another process failed."""
    lines = [line.strip() for line in output.splitlines() if "Error" in line and ": " in line]
    causes = [line for line in lines if "Engine core" not in line and "Traceback" not in line]
    return (causes or lines or ["no message"])[0]
