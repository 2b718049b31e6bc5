"""Which device and which dtype: no GPU is needed, what the libraries would say of one is put in their mouths."""

import pytest
import torch

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
    assert pruning_dtype("auto", GPU, own=None) == gpu
    assert pruning_dtype("auto", GPU, own=torch.float16) == torch.float16 and pruning_dtype("auto", CPU, own=None) == torch.float32


@pytest.mark.parametrize("fast, wanted", [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("own", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cpu_evaluates_in_what_it_is_fast_in(own, fast, wanted, monkeypatch):
    monkeypatch.setattr(device, "cpu_is_fast_in_bfloat16", lambda: fast)
    assert evaluation_dtype(own, CPU) == wanted == training_dtype(CPU, own)
    assert evaluation_dtype(own, GPU) == own


@pytest.mark.parametrize("name, said", [("mps", "Apple's GPU has no float64"), ("mps:0", "use cpu"), ("gpu", "no such device here")])
def test_a_device_that_cannot_be_used_is_named(name, said):
    with pytest.raises(UserError, match=f"--device {name}: .*{said}"):
        device_of("device", name)
