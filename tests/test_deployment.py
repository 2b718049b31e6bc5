"""The real model, pruned, exported, proved to be the same model, served by llama.cpp and asked over HTTP as a client would."""

import json
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimllm.__main__ import main as slim
from slimllm.deploy import export_gguf, llama_cpp
from tests.conftest import once, run_cli


@pytest.fixture(scope="session")
def half(smollm2, tmp_path_factory):
    """The real model, from safetensors, with half of its decoder removed, all layers alike, as a plain Llama: its folder."""
    flags = ("--target_sparsity", 0.5, "--runtime", "transformers", "--round_to", 32, "--recovery", "least_squares")
    data = ("--save_ckpt_log_name", "half", "--calibration", "self", "--num_examples", 4, "--seq_len", 48, "--eval_data", "none")

    def make(home):
        done = run_cli("--base_model", smollm2, *flags, *data, cwd=home)
        assert done.returncode == 0, done.stderr[-3000:]

    return once(tmp_path_factory, "half", make) / "prune_log" / "half"


def proved(folder, outtypes, capsys, tmp_path):
    files = [str(export_gguf.export(folder, tmp_path / f"{folder.name}-{name}.gguf", name)) for name in outtypes.split(",")]
    assert slim(["verify", str(folder), *files, "--seq_len", "48", "--blocks", "1"]) == 0
    table = capsys.readouterr().out
    assert "FAILED" not in table and table.count("log-probabilities") == len(outtypes.split(","))


def test_the_exported_model_is_the_pruned_one(run, half, capsys, tmp_path):
    """20 % in layers of different widths, 50 % in layers that are alike."""
    folder, _, _ = run
    proved(folder, "f32,q8_0", capsys, tmp_path)
    proved(half, "f16", capsys, tmp_path)


def test_served_over_http_it_says_what_transformers_says(run, tmp_path):
    folder, _, _ = run
    path = export_gguf.export(folder, tmp_path / "served.gguf", "f32")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, min_new_tokens=16, max_new_tokens=16, do_sample=False)  # it may have nothing to say
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with llama_cpp.LlamaCpp(path) as server:
        body = json.dumps({"messages": messages, "max_tokens": 16, "ignore_eos": True, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
    assert said.strip() == expected.strip() and len(said) > 10
