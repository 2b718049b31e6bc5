"""The toy mixture: seconds of training give a stock model with its tokenizer, which hf_prune.py prunes."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from slimllm.__main__ import main as slim
from slimllm.errors import UserError
from slimllm.settings.toy_mixture import ToyMixtureConfig
from tests.conftest import TEXT, run_cli


def test_it_is_trained_saved_and_pruned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{number}: {TEXT[:2000]}" for number in range(30)))
    assert slim(["toy-mixture", "toy", "--text", "text.txt", "--steps", "3"]) == 0
    assert "Qwen3MoeForCausalLM, perplexity" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained("toy"), AutoTokenizer.from_pretrained("toy")
    assert type(model) is Qwen3MoeForCausalLM and model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("a quick fox, or two").input_ids) == "a quick fox, or two"
    flags = ["--calibration", "toy/train.txt", "--eval_data", "held=toy/held_out.txt", "--num_examples", "4", "--eval_limit", "2"]
    done = run_cli("--base_model", "toy", "--target_sparsity", 0.3, *flags, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0 and "saved, loaded again and compared: the same logits" in done.stdout, done.stderr[-2000:]
    assert slim(["toy-mixture", "toy", "--text", "text.txt", "--steps", "1"]) == 2
    assert slim(["toy-mixture", "toy", "--text", "text.txt", "--steps", "1", "--overwrite"]) == 0


def test_the_folder_must_be_named():
    with pytest.raises(UserError, match="--output is required"):
        ToyMixtureConfig()
