"""Which device and which dtype: no GPU is needed, what the libraries would say of one is put in their mouths."""

import json

import pytest
import torch

import hf_prune
from slimllm.errors import UserError
from slimllm.utils import device
from slimllm.utils.device import device_of, evaluation_dtype, pruning_dtype, training_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[True, False], ids=["bfloat16 in hardware", "bfloat16 emulated"])
def gpu(request, monkeypatch):
    """A GPU that has bfloat16, or one that only emulates it, as those before compute capability 8.0 do."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: request.param or including_emulation)
    return torch.bfloat16 if request.param else torch.float16


def test_a_gpu_trains_in_what_it_computes_itself(gpu):
    assert training_dtype(GPU, torch.float32) == gpu


def test_a_gguf_file_on_a_gpu_is_pruned_in_bfloat16_where_there_is_it(gpu):
    assert pruning_dtype("auto", GPU, stored=None) == gpu
    assert pruning_dtype("auto", GPU, stored=torch.float16) == torch.float16 and pruning_dtype("auto", CPU, stored=None) == torch.float32


@pytest.mark.parametrize("fast, wanted", [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("own", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cpu_evaluates_in_what_it_is_fast_in(own, fast, wanted, monkeypatch):
    monkeypatch.setattr(device, "cpu_is_fast_in_bfloat16", lambda: fast)
    assert evaluation_dtype(own, CPU) == wanted == training_dtype(CPU, own)
    assert evaluation_dtype(own, GPU) == own


@pytest.mark.parametrize("own", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", [True, False])
def test_every_cpu_prunes_distils_and_evaluates_every_checkpoint(own, fast, tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "cpu_is_fast_in_bfloat16", lambda: fast)
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", str(tiny_folder), "--dtype", own, "--recipe", "distilled", "--target_sparsity", "0.3"]
    flags += ["--calibration", str(text_file), "--seq_len", "16", "--num_examples", "12", "--distill_examples", "40"]
    flags += ["--distill_epochs", "4", "--distill_learning_rate", "0.001"]
    assert hf_prune.main([*flags, "--eval_data", str(text_file), "--max_seq_len", "16", "--eval_limit", "8"]) == 0
    record = json.loads((tmp_path / "prune_log/llama_prune/pruning.json").read_text())
    assert record["distillation"]["kept"] and record["model"]["dtype"] == own


@pytest.mark.parametrize("name, said", [("mps", "Apple's GPU has no float64"), ("mps:0", "use cpu"), ("gpu", "no such device here")])
def test_a_device_that_cannot_be_used_is_named(name, said):
    with pytest.raises(UserError, match=f"--device {name}: .*{said}"):
        device_of("device", name)
