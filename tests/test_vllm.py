"""Pruned checkpoints in vLLM itself, wherever ``script/vllm.sh`` (or VLLM_PYTHON) provides it: 2 GB of packages of its own."""

import os
import re

import pytest

from slimllm.__main__ import main as slim
from slimllm.deploy import vllm
from slimllm.errors import UserError
from tests.conftest import ROOT, prune_to, run_cli
from tests.test_export_gguf import bpe_tokenizer, save

PYTHON = os.environ.get("VLLM_PYTHON") or str(ROOT / vllm.PYTHON)
wherever_it_is = pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason="no environment with vLLM: bash script/vllm.sh makes one")


def test_without_vllm_the_way_to_it_is_named(tmp_path, tiny_tokenizer, capsys):
    folder = prune_to(tmp_path / "pruned", tiny_tokenizer)
    assert slim(["verify", str(folder), "--seq_len", "16", "--vllm", str(tmp_path / "python")]) == 2
    error = capsys.readouterr().err
    assert "no such interpreter" in error and "script/vllm.sh" in error and error.count("\n") == 1
    assert slim(["vllm-speed", str(folder), "--vllm", str(tmp_path / "python")]) == 2
    assert slim(["vllm-speed", str(tmp_path / "nowhere")]) == 2


@wherever_it_is
@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_vllm_computes_the_same_model(smollm2, tmp_path, capsys, runtime):
    flags = ("--target_sparsity", 0.3, "--recovery", "least_squares", "--calibration", "self", "--num_examples", 4, "--eval_data", "none")
    assert run_cli("--base_model", smollm2, "--runtime", runtime, *flags, cwd=tmp_path).returncode == 0
    folder = str(tmp_path / "prune_log" / "llama_prune")
    assert slim(["verify", folder, "--seq_len", "48", "--blocks", "2", "--vllm", PYTHON]) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"vLLM: .* ok ", table)) == 3 and "FAILED" not in table


@wherever_it_is
def test_another_model_is_found_out(tmp_path, capsys):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer(), runtime="any")
    with pytest.raises(UserError, match="vLLM failed: .*Error"):
        vllm.ask(PYTHON, folder, 32)
