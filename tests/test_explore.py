"""``slimllm explore``: what pruning by any share would cost, and the price list that hf_prune.py takes."""

import json
import shlex

import pytest

import hf_prune
from slimllm.__main__ import main
from slimllm.experiments import explore


@pytest.fixture
def small(tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--calibration", str(text_file), "--num_examples", "8"]


def test_what_is_explored_can_be_pruned_with_nothing_measured_again(small, tiny_folder, text_file, tmp_path, capsys):
    flags = [*small, "--eval_data", f"t={text_file}", "--eval_limit", "2", "--output", "out", "--check", "0.3"]
    assert main(["explore", str(tiny_folder), "--target_sparsity", "0.1", "0.3", "0.5", *flags]) == 0
    said = capsys.readouterr().out
    assert "predicted loss" in said and "--price_list out/price_list.json" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["check", "explore.png", "price_list.json", "table.md"]
    rows = [line.split("|") for line in (tmp_path / "out/table.md").read_text().splitlines() if line.startswith("| ")]
    _, _, *rows = rows
    losses = [float(row[5]) for row in rows]
    assert losses == sorted(losses) and len(rows) == 3 and rows[1][6].strip() and not rows[0][6].strip()
    run = [
        "--base_model",
        str(tiny_folder),
        *small,
        "--seq_len",
        "128",
        "--recipe",
        "best",
        "--eval_data",
        "none",
        "--target_sparsity",
        "0.3",
    ]
    assert hf_prune.main([*run, "--save_ckpt_log_name", "a", "--price_list", "out/price_list.json"]) == 0
    assert hf_prune.main([*run, "--save_ckpt_log_name", "b"]) == 0
    records = [json.loads((tmp_path / f"prune_log/{name}/pruning.json").read_text()) for name in "ab"]
    assert records[0]["predicted_loss"] == records[1]["predicted_loss"] == pytest.approx(losses[1], abs=1e-3)
    assert [layer["kept"] for layer in records[0]["layers"]] == [layer["kept"] for layer in records[1]["layers"]]
    kept = (tmp_path / "prune_log/b/price_list.json").read_text()
    assert json.loads(kept)["prices"] == json.loads((tmp_path / "out/price_list.json").read_text())["prices"]
    assert not (tmp_path / "prune_log/a/price_list.json").exists()


def test_the_command_that_it_ends_with_takes_the_list(small, tiny_folder, tmp_path, capsys):
    """With the settings that the list was made with, and a share that the layers can give up."""
    flags = [*small, "--output", "out", "--head_unit", "group", "--prune", "heads", "--target_sparsity", "0.05", "0.1"]
    assert main(["explore", str(tiny_folder), *flags]) == 0
    [command] = [line for line in capsys.readouterr().out.splitlines() if " prune " in line]
    words = shlex.split(command)
    words = words[words.index("prune") :]
    assert words[words.index("--target_sparsity") + 1] == "0.1" and "--prices" not in words
    assert main([*words, "--eval_data", "none", "--output_dir", "pruned"]) == 0


def test_the_price_list_of_an_earlier_run_is_replaced_on_request_alone(small, tiny_folder, tmp_path, capsys):
    def run(*flags):
        return main(["explore", str(tiny_folder), "--target_sparsity", "0.2", *small, "--output", "out", *flags])

    file = tmp_path / "out/price_list.json"
    assert run() == 0
    before = file.read_text()
    assert run("--seed", "7") == 2 and file.read_text() == before
    said = "out/price_list.json: an earlier run measured it; plan from it with --price_list out/price_list.json, name another --output, or"
    assert said in capsys.readouterr().err
    assert run("--seed", "7", "--price_list", "out/price_list.json") == 0 and file.read_text() == before
    assert run("--seed", "7", "--overwrite") == 0 and file.read_text() != before
    file.write_text("[]")
    assert run("--overwrite") == 2 and file.read_text() == "[]"
    assert "no run of this program wrote out/price_list.json, so it is not replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--check", "2"], "--check 2.0: must be above 0 and below 1"),
        (["--target_sparsity", "0"], "--target_sparsity 0.0: must be above 0 and below 1"),
        (["--check", "0.2", "0.99"], "--check 0.99: the layers cannot give up as much; ask for less"),
        (["--target_sparsity", "0.98", "0.99"], "--target_sparsity 0.98 0.99: the layers cannot give up as much; ask for less"),
        (["--price_list", "none.json"], "--price_list none.json: no such file"),
        (["--output", "mine"], "mine: not empty, and it holds no price_list.json of this program; name another --output"),
        (["--recipe", "paper"], "--recipe paper: not one of best, distilled"),
    ],
)
def test_mistakes_of_an_exploration(flags, said, small, tiny_folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("mine")
    assert main(["explore", str(tiny_folder), *small, *flags]) == 2
    assert said in capsys.readouterr().err and [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert not (tmp_path / "eval_log").exists()


def test_the_curve_in_words():
    line = [{"share": share, "loss": loss} for share, loss in ((0.1, 0.04), (0.2, 0.09), (0.3, 0.15), (0.4, 0.3))]
    assert explore.said(line) == [
        "predicted loss stays below 0.1 nats per token (perplexity 11% higher) up to 20% of the decoder",
        "from 30% on each further per cent costs more than 2 times what the first ones do",
    ]
    assert explore.said(line[2:]) == [
        "predicted loss stays below 0.1 nats per token (perplexity 11% higher) at no share from 30% on of the decoder",
        "from 30% on each further per cent costs more than 2 times what the first ones do",
    ]
