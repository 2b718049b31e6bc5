"""``--plugin``: scores and methods from a file of the user's."""

import json

import pytest
import torch

import hf_prune
from slimllm import plugins
from slimllm.__main__ import main as slimllm_main
from slimllm.pruning.importance.channels import ChannelStatistics
from slimllm.reporting.record import PruningRecord
from slimllm.settings import methods

MINE = """
import torch
from slimllm.settings.methods import CHANNEL_SCORES, METHODS, ChannelScore, Method


def loudest(s):
    assert s.input_covariance.shape == (len(s.input_norm), len(s.input_norm))
    return s.input_covariance.diagonal()


CHANNEL_SCORES["loudest"] = ChannelScore(loudest, {"input_covariance"})
METHODS["mine"] = Method("magnitude", "loudest", "uniform", "none", all_layers=True, title="Mine")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "loaded", {})
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path / "mine.py"
    methods.CHANNEL_SCORES.pop("loudest", None)
    methods.METHODS.pop("mine", None)


def test_a_method_of_the_users_prunes_and_is_compared(plugin, tiny_folder, text_file, capsys):
    flags = ["--base_model", str(tiny_folder), "--calibration", str(text_file), "--eval_data", "none"]
    samples = ["--num_examples", "8", "--seq_len", "16", "--target_sparsity", "0.3"]
    assert hf_prune.main([*flags, *samples, "--method", "mine"]) == 2 and "--method mine: not one of" in capsys.readouterr().err
    assert hf_prune.main([*flags, *samples, "--method", "mine", "--plugin", "mine.py"]) == 0
    record = PruningRecord.read("prune_log/llama_prune")
    assert record.config["channel_score"] == "loudest" and [name for name, _ in record.environment["plugins"]] == ["mine.py"]
    assert 0.29 < record.parameters.decoder_removed < 0.31
    plugin.write_text(MINE + "# changed\n")
    flags = [*flags[:2], "--calibration", "self", "--eval_data", "python_manual", "--eval_limit", "1", "--output", "out", "--tasks", "none"]
    flags += ["--methods", "mine", "--recipes", "none", "--target_sparsity", "0.3", "--plugin", "mine.py"]
    assert slimllm_main(["compare", *flags]) == 0
    assert "| Mine " in open("out/table.md").read()
    assert {row["name"] for row in json.load(open("out/results.json"))["rows"]} >= {"dense", "mine"}


@pytest.mark.parametrize(
    "content, said",
    [
        ("x = 1\n1 / 0\n", "--plugin mine.py, line 2: ZeroDivisionError: division by zero"),
        ("x = (\n", "--plugin mine.py, line 1: SyntaxError"),
        (None, "--plugin mine.py: no such file"),
        ("import sys\nsys.exit(0)\n", "--plugin mine.py, line 2: SystemExit"),
        ("x = '\\0'\n\0", "--plugin mine.py: "),
        ("from slimllm.settings.methods import ChannelScore\nChannelScore(print, {'nothing'})\n", "line 2: ValueError: needs 'nothing'"),
    ],
)
def test_a_plugin_that_fails_is_one_line(plugin, content, said, capsys):
    plugin.unlink() if content is None else plugin.write_text(content)
    assert slimllm_main(["prune", "x", "--plugin", "mine.py"]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


def test_a_function_that_fails_is_named_with_its_line(plugin, tiny_folder, capsys):
    plugin.write_text(MINE.replace(', {"input_covariance"}', ""))
    flags = [
        "--calibration",
        "self",
        "--eval_data",
        "none",
        "--num_examples",
        "4",
        "--seq_len",
        "16",
        "--method",
        "mine",
        "--plugin",
        "mine.py",
    ]
    assert hf_prune.main([str(tiny_folder), *flags]) == 2
    err = capsys.readouterr().err
    assert "loudest (mine.py, line 7): AttributeError: 'NoneType' object" in err and "does not name in its needs is None" in err


def test_scores_that_do_not_need_the_covariance_get_none():
    plain = ChannelStatistics(None, torch.ones(2, 3), torch.ones(3, 2), torch.ones(3, 2), torch.ones(3), torch.ones(2))
    assert plain.input_covariance is None
