"""The real model, pruned, exported, proved to be the same model, served by llama.cpp and asked over HTTP as a client would."""

import json
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimllm import export_gguf, llama_cpp, verify
from tests.conftest import run_cli


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def pruned(home, gguf_file):
    """Prunes the real model to a share once: (share, flags) -> checkpoint folder."""
    made = {}

    def prune(share, *flags):
        key = (share, *flags)
        if key not in made:
            name = f"pruned_{len(made)}"
            base = ("--base_model", gguf_file, "--target_sparsity", share, "--save_ckpt_log_name", name)
            done = run_cli(*base, "--calibration", "self", "--num_examples", 4, "--eval_data", "none", *flags, cwd=home)
            assert done.returncode == 0, done.stderr[-3000:]
            made[key] = home / "prune_log" / name
        return made[key]

    return prune


@pytest.mark.parametrize(
    "share, flags, outtypes",
    [
        (0.2, (), "f32,f16,q8_0"),
        (0.5, ("--runtime", "transformers", "--recovery", "least_squares"), "bf16"),
    ],
)
def test_the_exported_model_is_the_pruned_one(pruned, share, flags, outtypes, capsys):
    folder = pruned(share, *flags)
    assert export_gguf.main([str(folder), "--outtype", outtypes]) == 0
    assert verify.main([str(folder), *map(str, sorted(folder.glob("*-*.gguf"))), "--seq_len", "48", "--blocks", "1"]) == 0
    table = capsys.readouterr().out
    assert "FAILED" not in table and table.count("log-probabilities") == len(outtypes.split(","))


def test_served_over_http_it_says_what_transformers_says(pruned):
    folder = pruned(0.2)
    path = export_gguf.export(folder, folder / "served-f32.gguf", "f32")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with llama_cpp.LlamaCpp(path) as server:
        body = json.dumps({"messages": messages, "max_tokens": 16, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
    assert said.strip() == expected.strip() and len(said) > 10


def test_llama_cpp_runs_the_pruned_model_faster(pruned, smollm2, home):
    files = []
    for name, folder in (("dense", smollm2), ("pruned", pruned(0.5, "--runtime", "transformers", "--recovery", "least_squares"))):
        for outtype in ("f16", "q8_0"):
            files.append(export_gguf.export(folder, home / f"{name}-{outtype}.gguf", outtype))
    for dense, small in ((files[0], files[2]), (files[1], files[3])):
        settings = llama_cpp.SpeedConfig(files=(str(dense), str(small)), prompt_tokens=192, new_tokens=32, repeats=3, threads=2)
        before, after = llama_cpp.speeds(settings)
        assert after["prompt"] > before["prompt"] and after["generation"] > before["generation"], (before, after)
