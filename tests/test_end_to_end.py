"""The command line on the real model."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimllm.__main__ import main as slim
from slimllm.data import calibration, texts
from slimllm.evaluation.perplexity import perplexity
from slimllm.models import loading
from slimllm.models.shape import shape_of
from slimllm.training import distillation
from slimllm.training.teacher import Teacher
from slimllm.utils.device import cpu_is_fast_in_bfloat16
from tests.conftest import ROOT, make_config, run_of


def test_twenty_percent_is_twenty_percent(run):
    _, record, out = run
    channel = 3 * 576
    assert abs(record["parameters"]["decoder_removed"] - 0.2) * record["parameters"]["dense_decoder"] <= channel
    assert "20.00%" in out
    assert record["parameters"]["removed"] == pytest.approx(1 - record["parameters"]["pruned"] / record["parameters"]["dense"])


def test_without_network_calibration_and_evaluation_are_named(run):
    _, record, out = run
    assert record["calibration"]["source"] == "self" and record["evaluation"][0]["data"] == "python_manual"
    assert "--calibration self" in out and "--eval_data python_manual" in out


def test_peak_memory_is_at_most_a_gigabyte(run):
    """The interpreter and its libraries included. Where bfloat16 is slow the model is in float32 while it writes its samples."""
    _, record, _ = run
    more = 0 if cpu_is_fast_in_bfloat16() else 2 * record["parameters"]["dense"]
    assert record["peak_memory"]["cpu_bytes"] <= 1e9 + more


def test_the_pruned_model_still_works(run, smollm2):
    folder, record, _ = run
    (figure,) = record["evaluation"]
    assert figure["dense"] < figure["pruned"] < 4 * figure["dense"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == loading.load_tokenizer(str(smollm2)).get_vocab() and tokenizer.chat_template
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output.shape[1] == inputs.input_ids.shape[1] + 8
    (text,) = texts.load_texts(("python_manual",))
    blocks = texts.blocks_of(text, tokenizer, model.config, 128, limit=figure["blocks"])
    assert perplexity(model, blocks) == pytest.approx(figure["pruned"], rel=0.02)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_of_pruning(smollm2, text_file, tmp_path, sent):
    text_file.write_text(text_file.read_text() * 10)
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            ROOT / "hf_prune.py",
            "--base_model",
            smollm2,
            "--calibration",
            text_file,
            "--seq_len",
            "64",
            "--num_examples",
            "64",
            "--eval_data",
            "none",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has its children ignore it
    )
    for line in process.stdout:
        if line.startswith("layer   3"):
            process.send_signal(sent)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + sent and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("hf_prune.py: interrupted; what is finished is kept in prune_log/.llama_prune.")
    assert list((tmp_path / "prune_log").glob("[!.]*")) == []


PEAK = """
import sys, torch
from slimllm.models import loading
from slimllm.utils import memory
from slimllm.models.shape import shape_of
from slimllm.training import distillation
from tests.conftest import make_config, make_config, prune
memory.FREE_SHARE = 10**9  # as where little is free: else an eighth of that may hold them
model = loading.load_model(sys.argv[1], torch.float32)
ids = torch.randint(1000, (int(sys.argv[2]), 128), generator=torch.Generator().manual_seed(0))
prune(model, ids, make_config(layers=len(model.model.layers), recovery="least_squares", pruning_ratio=0.25))
print(memory.peak_memory()["cpu_bytes"])
"""


def test_memory_does_not_grow_with_the_number_of_samples(smollm2, tmp_path):
    """The first layer of the real model, so that hundreds of samples take seconds; less model makes the bound stricter.

    From 128 samples on, the activations fill what they may take of the memory.
    """
    model = loading.load_model(str(smollm2), torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "one")
    # every large tensor has a mapping of its own: how full the heaps of several threads get depends on how busy the machine is
    peaks, no_heaps = [], {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    for samples in (128, 320):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, tmp_path / "one", str(samples)], cwd=ROOT, capture_output=True, text=True, env=no_heaps
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] <= 1.05 * peaks[0], peaks  # the states of the other samples alone would be 1.08


def test_self_samples_read_like_text(smollm2):
    model, tokenizer = loading.load_model(str(smollm2), torch.float32), loading.load_tokenizer(str(smollm2))
    ids = calibration.sample_from_model(model, tokenizer, calibration.SampleSpec(8, 24))
    assert ids.shape == (8, 24)
    random = torch.randint(1000, 40000, (8, 24), generator=torch.Generator().manual_seed(0))
    assert perplexity(model, ids) < 0.01 * perplexity(model, random)


def test_the_benchmark_runs(smollm2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("slimllm.experiments.benchmark.SAMPLES", 1)
    monkeypatch.setattr("slimllm.experiments.benchmark.LENGTH", 48)
    monkeypatch.setattr("slimllm.experiments.benchmark.LLAMA_7B", dict(hidden_size=64, intermediate_size=96, num_attention_heads=4))
    assert slim(["benchmark", "--base_model", str(smollm2), "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    assert "speed-up" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "b.json").read_text())["results"]) == 2


def test_post_training_lowers_the_perplexity_of_held_out_text(run, tmp_path):
    """The Python manual: its beginning for training, what follows for the figures; one short epoch on the pruned real model."""
    folder, _, _ = run
    (text,) = texts.load_texts(("python_manual",))
    parts = [text.text[i : i + 400] for i in range(0, 42_000, 400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts[:36]))
    (tmp_path / "later.txt").write_text("".join(parts[96:104]))
    flags = [
        "--prune_model",
        folder,
        "--data_path",
        tmp_path / "rows.jsonl",
        "--val_set_size",
        4,
        "--extra_val_dataset",
        "later=later.txt",
    ]
    flags += ["--batch_size", 4, "--micro_batch_size", 4, "--cutoff_len", 64, "--num_epochs", 1, "--learning_rate", "1e-3"]
    done = subprocess.run(
        [sys.executable, ROOT / "post_training.py", *map(str, flags), "--output_dir", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "post_training.json").read_text())
    (figure,) = record["evaluation"]
    assert figure["after"] < 0.95 * figure["before"]
    assert record["validation"]["after"] < 0.95 * record["validation"]["before"]


def test_distillation_brings_the_pruned_model_nearer_to_the_dense_one(run, smollm2):
    """Short samples of the Python manual; the divergence is of those that come last and are not trained on."""
    folder, _, _ = run
    (text,) = texts.load_texts(("python_manual",))
    blocks = texts.blocks_of(text, loading.load_tokenizer(str(smollm2)), loading.load_config(str(smollm2)), 48, limit=32)
    student = loading.load_model(str(folder), torch.float32)
    config = make_config(30, shape_of(student.config), distill="all", distill_epochs=2, distill_learning_rate=1e-4)
    teacher = Teacher(loading.open_source(str(smollm2), torch.float32), blocks)
    found = distillation.distil(run_of(student, blocks, config), student, teacher)
    assert found.kept and found.held_out == 8 and found.after < 0.95 * found.before
