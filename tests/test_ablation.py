import json

import pytest
from PIL import Image

from slimllm.__main__ import main as slim
from slimllm.experiments import ablation, trials
from slimllm.reporting import trial_tables
from slimllm.settings.pruning import PruneConfig
from tests.conftest import make_shape, stop_at_fourth_pruning


@pytest.fixture
def flags(tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text_file.write_text(2 * text_file.read_text())  # enough for 128 samples
    monkeypatch.setattr(ablation, "CURVE", (0.1, 0.3))
    data = ["--calibration", str(text_file), "--eval_data", f"fox={text_file}", "--eval_limit", "2", "--output", "out"]
    monkeypatch.setattr(trials, "SEQ_LEN", 32)
    return ["--base_model", str(tiny_folder), "--target_sparsity", "0.3", *data]


def rows():
    return json.loads(open("out/results.json").read())["rows"]


def test_every_row_keeps_the_same_parameters_and_a_stopped_run_goes_on(flags, monkeypatch, capsys):
    calls = stop_at_fourth_pruning(monkeypatch)
    assert slim(["ablation", *flags]) == 130 and len(rows()) == 3
    assert slim(["ablation", *flags]) == 0
    found = rows()
    assert len(found) == len(ablation.ROWS) + 5 == len({(r["name"], r["variant"], r["share"]) for r in found})
    assert len(calls) == len(found) + 1  # the one that was stopped ran twice
    channel = 3 * 32 / (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 64))
    assert all(abs(r["removed"] - r["share"]) <= channel for r in found)
    assert [c.num_examples for c in calls if c.num_examples != 32] == [8, 128, 128, 128, 192]
    assert len({r["perplexity"][0]["pruned"] for r in found}) >= len(found) // 2  # the settings do something
    table = open("out/table.md").read()
    assert "30 %: fox" in table and "* limited" in table and table.count("\n|") == len(ablation.ROWS) + 1
    assert Image.open("out/recovery.png").size[0] > 300
    assert slim(["ablation", *flags, "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err
    with open(flags[flags.index("--eval_data") + 1].removeprefix("fox="), "a") as text:
        text.write("more")
    assert slim(["ablation", *flags, "--target_sparsity", "0.2"]) == 2
    assert "the text fox was changed since; name another --output" in capsys.readouterr().err


def test_the_picture_takes_each_recovery_once():
    names = [trial for trial in ablation.cases((0.2, 0.5)) if trial.name == "recovery"]
    assert len(names) == 4 * len(ablation.CURVE)
    base = [trial.share for trial in ablation.cases((0.2, 0.5)) if trial.name == "the paper's method"]
    assert sorted(base) == sorted(ablation.CURVE)


def test_a_missing_figure_is_a_dash():
    figure = {"data": "ptb", "pruned": 3.0, "limited": False, "blocks": 1, "seq_len": 8}
    found = [{"name": "a", "variant": "", "share": 0.2, "perplexity": [figure]}]
    assert trial_tables.ablation_table(found, (0.2, 0.5))[-1].split("|")[3:5] == [" 3.0       ", " -         "]


@pytest.mark.parametrize("wrong, said", [(["--target_sparsity", "1.5"], "above 0 and below 1"), (["--base_model", ""], "required")])
def test_mistakes(flags, wrong, said, capsys):
    assert slim(["ablation", *flags, *wrong]) == 2
    assert said in capsys.readouterr().err


def test_each_row_of_a_mixture_is_what_a_mixture_can_be_given():
    shape = make_shape("qwen3_moe")
    for trial in ablation.cases((0.2,), mixture=True):
        settings = PruneConfig(base_model="test", target_sparsity=trial.share, **trial.settings).resolved(shape)
        assert settings.prune in ("experts", "channels", "both") and not any("no effect" in line for line in settings.remarks())
