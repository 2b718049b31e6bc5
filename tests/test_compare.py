import json
import math

import pytest
import torch
from PIL import Image

from slimllm.__main__ import main as slim
from slimllm.deploy.export_gguf import quantized_bytes
from slimllm.experiments import trials
from slimllm.settings.compare import OURS, CompareConfig
from slimllm.settings.methods import METHODS
from tests.conftest import make_model, prune_to, stop_at_fourth_pruning
from tests.test_export_gguf import bpe_tokenizer


@pytest.fixture
def flags(tiny_folder, text_file, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "SEQ_LEN", 32)
    text_file.write_text(4 * text_file.read_text())
    rows = [{"question": "a b c", "choices": {"text": ["d", "e f"], "label": ["A", "B"]}, "answerKey": "A", "id": str(i)} for i in range(4)]
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prune_to(tmp_path / "other", tiny_tokenizer)
    data = ["--calibration", str(text_file), "--eval_data", f"fox={text_file}", "--eval_limit", "2", "--output", "out"]
    data += ["--data_dir", str(tmp_path), "--limit", "3", "--also", f"other={tmp_path / 'other'}"]
    return ["--base_model", str(tiny_folder), "--target_sparsity", "0.3", *data]


def test_every_method_at_equal_parameters_and_a_stopped_run_goes_on(flags, monkeypatch, capsys):
    calls = stop_at_fourth_pruning(monkeypatch)
    assert slim(["compare", *flags]) == 130
    assert slim(["compare", *flags]) == 0
    rows = json.loads(open("out/results.json").read())["rows"]
    pruned = [row for row in rows if row["share"]]
    others = sum(method.recovery != "least_squares" for method in METHODS.values())  # what least squares are put in place of
    assert len(pruned) == len(METHODS) + others + len(OURS) == len(calls)  # one ran twice; distilled starts from best
    channel = 3 * 32 / (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 64))
    layers = [row for row in pruned if METHODS[row["name"]].whole_layers]  # of two layers one goes
    assert len(layers) == 3 and all(row["removed"] == pytest.approx(0.5) for row in layers)
    parts = [row for row in pruned if METHODS[row["name"]].whole_parts]  # the attention of one layer goes, or the feed-forward part
    assert len(parts) == 2 and all(0.19 < row["removed"] < 0.31 for row in parts)
    assert all(abs(row["removed"] - 0.3) <= channel for row in pruned if row not in (*layers, *parts))
    assert {config.recovery for config in calls} == {"none", "bias", "linear", "least_squares"}
    by_name = {row["name"]: row for row in rows if not row["share"]}
    assert list(by_name) == ["dense", "dense, q8_0", "dense, q4_0", "other"]
    assert by_name["dense"]["bytes"] > by_name["dense, q8_0"]["bytes"] > by_name["dense, q4_0"]["bytes"]
    assert 0 < by_name["other"]["removed"] < 1
    table = open("out/table.md").read()
    assert "with least squares" in table and "first 3 questions" in table and table.count("\n|") == len(rows) + 1
    best = next(row for row in pruned if row["variant"] == "recipe best")
    lost = math.log(best["perplexity"][0]["pruned"] / by_name["dense"]["perplexity"][0]["pruned"])
    assert f"| {lost:.3f} " in next(line for line in table.splitlines() if "recipe best" in line)
    assert Image.open("out/compare.png").size[0] > 300
    assert slim(["compare", *flags, "--limit", "2"]) == 2
    assert "another limit" in capsys.readouterr().err


def test_the_model_writes_its_text_and_teaches_once_for_all_shares(flags):
    config = CompareConfig(base_model=flags[1], calibration=flags[flags.index("--calibration") + 1], eval_data=("python_manual",))
    recipes = [trials.Trial("slimllm", "", share, {"recipe": recipe}) for share in (0.3, 0.5) for recipe in OURS]
    bench = trials.Bench(config, torch.float32, torch.device("cpu"), recipes)
    best, *others = [bench.settings(trial) for trial in recipes]
    samples = bench.samples(best)
    assert samples.distill_ids is not None and all(bench.samples(each) is samples for each in others)
    assert bench.teacher(others[0])[0] is bench.teacher(others[2])[0]


def test_speeds_stand_beside_the_loss_of_what_is_deployed(flags, tmp_path):
    """Of the dense model and of a checkpoint, in 16 and fewer bits; what is measured once is not measured again."""
    sizes = {"num_key_value_heads": 2, "vocab_size": 310, "max_position_embeddings": 512}
    make_model(**sizes).save_pretrained(tmp_path / "tiny")
    bpe_tokenizer().save_pretrained(tmp_path / "tiny")
    prune_to(tmp_path / "with_bpe", bpe_tokenizer(), **sizes)
    flags = [*flags[:-1], f"other={tmp_path / 'with_bpe'}", "--methods", "none", "--recipes", "none", "--tasks", "none"]
    assert slim(["compare", *flags, "--speed"]) == 0
    rows = json.loads(open("out/results.json").read())["rows"]
    assert [row["name"] for row in rows] == [f"{name}{kind}" for name in ("dense", "other") for kind in ("", ", q8_0", ", q4_0")]
    assert all(row["tokens_per_second"]["generation"] > 0 < row["tokens_per_second"]["prompt"] for row in rows)
    assert rows[3]["bytes"] > rows[4]["bytes"] > rows[5]["bytes"] and Image.open("out/compare.png").size[0] > 300
    assert slim(["compare", *flags, "--speed"]) == 0
    assert json.loads(open("out/results.json").read())["rows"] == rows


@pytest.mark.parametrize("kind, bits", [("q8_0", 8.5), ("q4_0", 4.5)])
def test_quantized_weights_are_near_and_take_the_bytes_of_their_type(kind, bits):
    model, dense = make_model(hidden_size=64, intermediate_size=96), make_model(hidden_size=64, intermediate_size=96)
    matrices = sum(p.numel() for p in dense.parameters() if p.ndim == 2)
    vectors = sum(p.numel() for p in dense.parameters() if p.ndim == 1)
    assert quantized_bytes(model, kind) == matrices * bits / 8 + 4 * vectors
    for parameter, was in zip(model.parameters(), dense.parameters()):
        assert 0 < (parameter - was).norm() / was.norm() < (0.01 if kind == "q8_0" else 0.12) or parameter.ndim == 1


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--methods", "flop"], "did you mean 'flap'?"),
        (["--also", "x=nowhere"], "NAME=FOLDER"),
        (["--also", "dense=."], "dense is the name of another row"),
        (["--also", "x, q8_0=."], "says how many bits a row has"),
        (["--tasks", "piqa"], "none of piqa.jsonl"),
        (["--data_dir", "nowhere", "--tasks", "none"], "no such folder"),
    ],
)
def test_mistakes(flags, wrong, said, capsys):
    assert slim(["compare", *flags, *wrong]) == 2
    assert said in capsys.readouterr().err
