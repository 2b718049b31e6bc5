"""The scripts that run a whole grid, with a stand-in for the interpreter: it notes what it is to run, and leaves what that would leave.

The programs themselves are tested elsewhere; here their parsers read every command line that a script makes.
"""

import os
import shlex
import shutil
import subprocess

import pytest

from slimllm import cli
from slimllm.commands import COMMANDS
from tests.conftest import ROOT

STAND_IN = """#!/bin/bash
if [ "$1" = - ]; then echo embedded.gguf && exit; fi  # asked where the embedded model is
if [ "$2" = pip ]; then exit; fi
printf '%q ' "$@" >> calls.txt && echo >> calls.txt
while [ $# -gt 0 ]; do
    case "$1" in
    --save_ckpt_log_name) made="prune_log/$2" ;;
    --recipe) recipe="$2" ;;
    --prune_model) made="tune_log/$(basename "$2")" ;;
    esac
    shift
done
if [ -n "$made" ]; then
    mkdir -p "$made/merged" "$made/adapter"
    touch "$made/pruning.json" "$made/merged/pruning.json" "$made/post_training.json" "$made/adapter/adapter_config.json"
    if [ "$recipe" = best ]; then touch "$made/price_list.json"; fi
fi
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """``calls(script, *arguments, **environment)``: the commands that a script runs, each a list of words that its program understands."""
    shutil.copytree(ROOT / "script", tmp_path / "script")
    for file in ("requirement.txt", "tests/requirement.txt", "tests/lowest.txt", ".venv/bin/python"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch(0o755)
    (tmp_path / ".venv/bin/python").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments, **environment):
        (tmp_path / "calls.txt").unlink(missing_ok=True)
        command = ["bash", f"script/{script}.sh", *arguments]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found = [shlex.split(line) for line in (tmp_path / "calls.txt").read_text().splitlines()]
        for words in found:
            understand(words)
        return found

    return run


def understand(words):
    """Raises UserError where the program that a command line names does not take it."""
    if words[0] == "hf_prune.py":
        return COMMANDS["prune"].parsed("prune", words[1:], "hf_prune.py")
    if words[0] == "post_training.py":
        return COMMANDS["train"].parsed("train", words[1:])
    assert words[:2] == ["-m", "slimllm"]
    command = COMMANDS[words[2]]
    return cli.parse(command.parser(words[2]), command.settings_class(), words[3:])


def programs(found):
    return [words[2] if words[0] == "-m" else words[0] for words in found]


def following(words, name):
    return words[words.index(name) + 1]


def test_paper_tables(calls):
    grid = dict(TRAIN="--data_path rows.json --num_epochs 1", EVALUATE="--eval_data text.txt --max_seq_len 32")
    found = calls("paper_tables", "models/small", "--calibration", "text.txt", **grid)
    a_setting = ["hf_prune.py", "evaluate", "post_training.py", "evaluate"]
    assert programs(found) == ["evaluate", *a_setting, *a_setting, "report"]
    assert [following(words, "--pruning_ratio") for words in found if words[0] == "hf_prune.py"] == ["0.25", "0.55"]
    names = ["dense", "small_20", "small_20_tuned", "small_50", "small_50_tuned"]
    assert found[-1][3:] == [*(f"eval_log/small/{name}.json" for name in names), "--output", "eval_log/small"]
    for words in found:
        wanted = {"hf_prune.py": "--calibration text.txt", "post_training.py": "--num_epochs 1", "evaluate": "--max_seq_len 32"}
        assert wanted.get(programs([words])[0], "") in " ".join(words)
    assert found[4][3] == "prune_log/small_20" and following(found[4], "--adapter") == "tune_log/small_20/adapter"
    again = calls("paper_tables", "models/small", "--calibration", "text.txt", **grid, TUNE="0")
    assert programs(again) == ["evaluate"] * 3 + ["report"]


def test_compare_distils_and_trains_once_per_model_and_seed(calls):
    grid = dict(TUNE="rows.json", TRAIN="--num_epochs 1", CALIBRATION="books")
    found = calls("compare", "models/small.gguf", "--seed", "6", "--eval_limit", "5", **grid)
    assert programs(found) == ["hf_prune.py", "post_training.py"] * 2 + ["compare"]
    assert following(found[0], "--calibration") == "books"
    written = "prune_log/compare_small_seed6_distilled_20/calibration.safetensors"
    flags = dict(recipe="distilled", target_sparsity="0.50", seed="6", calibration=written)
    assert all(following(found[2], f"--{name}") == value for name, value in flags.items())
    assert following(found[3], "--prune_model") == "prune_log/compare_small_seed6_distilled_50"
    assert following(found[3], "--data_path") == "rows.json" and following(found[3], "--num_epochs") == "1"
    assert following(found[4], "--also") == "distilled and LoRA, 20 %=tune_log/compare_small_seed6_distilled_20/merged"
    assert calls("compare", "models/small.gguf", "--seed", "6", "--eval_limit", "5", **grid) == found[4:]
    assert len(calls("compare", "models/small.gguf", **grid)) == 5  # another seed
    assert programs(calls("compare", "models/small.gguf", CALIBRATION="books")) == ["compare"]
    named = calls("compare", "models/small.gguf", **grid, NAME="mine")
    assert following(named[0], "--seed") == "42" and following(named[0], "--save_ckpt_log_name") == "mine_distilled_20"


def test_ablation(calls):
    (words,) = calls("ablation", "--eval_limit", "3")
    assert words[2:] == ["ablation", "--base_model", "embedded.gguf", "--eval_limit", "3"]


def test_evidence(calls):
    (words,) = calls("evidence", "models/small", "--shares", "0.2", "0.5", "--no_latency")
    assert words[2:] == ["evidence", "--base_model", "models/small", "--shares", "0.2", "0.5", "--no_latency"]


def test_the_first_command_shows_both_recipes_on_the_same_tokens(calls):
    found = calls("llama_prune")
    assert programs(found) == ["hf_prune.py"] * 4 + ["report"]
    assert [(following(words, "--recipe"), following(words, "--target_sparsity")) for words in found[:4]] == [
        ("best", "0.2"),
        ("best", "0.5"),
        ("paper", "0.2"),
        ("paper", "0.5"),
    ]
    assert following(found[1], "--calibration") == "prune_log/llama_prune_best_20/calibration.safetensors"
    assert following(found[1], "--price_list") == "prune_log/llama_prune_best_20/price_list.json"
    assert found[-1][3:] == [f"prune_log/llama_prune_{run}" for run in ("best_20", "best_50", "paper_20", "paper_50")]
    vicuna = calls("vicuna_prune", "models/vicuna")
    assert [(following(words, "--pruning_ratio"), following(words, "--recipe")) for words in vicuna[:2]] == [
        ("0.25", "best"),
        ("0.55", "best"),
    ]
    paper = calls("vicuna_prune", "models/vicuna", "--recipe", "paper", "--layer_ratio", "uniform")
    assert all(words.count("--recipe") == 1 for words in paper[:2]) and programs(paper) == ["hf_prune.py"] * 2 + ["report"]
    assert programs(calls("llama_prune", "models/small", "--target_sparsity", "0.3")) == ["hf_prune.py"]
