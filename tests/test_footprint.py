"""What --dry_run says of memory and disk is what a run then takes."""

import json
import re

import pytest

import hf_prune
from slimllm.experiments.benchmark import write_random_model
from tests.conftest import run_cli

SHAPES = {
    "channels weigh most": dict(hidden_size=1024, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=4, vocab_size=8000),
    "the vocabulary weighs most": dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, vocab_size=160_000),
    "nothing weighs much": dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12, vocab_size=32_000),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_predicted_peak_is_that_of_the_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write_random_model(tmp_path / "model", dict(SHAPES[name], num_hidden_layers=2))
    flags = ["--base_model", "model", "--calibration", "model/calibration.safetensors", "--eval_data", "none", "--pruning_ratio", 0.25]
    flags += ["--recovery", "least_squares", *(["--dtype", "bfloat16"] if name == "nothing weighs much" else [])]
    assert hf_prune.main([*map(str, flags), "--dry_run"]) == 0
    said = capsys.readouterr().out
    done = run_cli(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "prune_log/llama_prune/pruning.json").read_text())
    assert bytes_said(said, "peak memory of a run, about") == pytest.approx(record["peak_memory"]["cpu_bytes"], rel=0.15)
    weights = sum(path.stat().st_size for path in (tmp_path / "prune_log/llama_prune").glob("model*.safetensors"))
    dense = (tmp_path / "model/model.safetensors").stat().st_size
    assert record["bytes"] == {"dense": dense, "pruned": weights}
    before, after = re.search(r"weights on disk +\| ([\d.]+) MB +\| ([\d.]+) MB", said).groups()
    assert [1e6 * float(before), 1e6 * float(after)] == [pytest.approx(dense, rel=0.01), pytest.approx(weights, rel=0.02)]


def bytes_said(text: str, row: str) -> float:
    return 1e9 * float(re.search(rf"^\| {re.escape(row)} +\| +\| ([\d.]+) GB", text, re.M).group(1))


def test_what_tokenizing_a_long_text_takes_is_counted(tiny_folder, tmp_path, capsys):
    for name, characters in (("short.txt", 10_000), ("long.txt", 4_000_000)):
        (tmp_path / name).write_text("a b c d e " * (characters // 10))
        assert hf_prune.main([str(tiny_folder), "--calibration", str(tmp_path / name), "--dry_run"]) == 0
    short, long = (bytes_said(said, "peak memory of a run, about") for said in capsys.readouterr().out.split("dry run")[1:])
    assert long >= 0.49e9 + 130 * 4e6 > short
