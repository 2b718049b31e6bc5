"""script/gpu.sh, rehearsed on the CPU with tiny models; and what a GPU changes, as far as it can be told without one."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch

import hf_prune
import post_training
from slimllm import __main__ as programs
from slimllm.experiments import gpu
from slimllm.utils import device, memory


def in_this_process(argv, folder, limit):
    """gpu.program without a process of its own."""
    mains = {"hf_prune.py": hf_prune.main, "post_training.py": post_training.main}
    said, here = io.StringIO(), os.getcwd()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.chdir(folder):
        status = programs.main(argv[2:]) if argv[0] == "-m" else mains[Path(argv[0]).name](argv[1:])
    assert os.getcwd() == here
    return status, said.getvalue()


def test_the_whole_check_runs_on_tiny_models(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "program", in_this_process)
    output = tmp_path / "gpu.json"
    assert programs.main(["gpu", "--device", "cpu", "--size", "tiny", "--work_dir", str(tmp_path), "--output", str(output)]) == 0
    found = json.loads(output.read_text())["steps"]
    steps = {"decisions, paper", "decisions, best", "paper", "best", "distilled", "latency, best", "latency, paper", "LoRA, merged"}
    assert {entry["step"] for entry in found} == steps
    assert {entry["dtype"] for entry in found} == {"float32", "bfloat16", "float16"}
    assert found[0]["said"] == "heads as on the CPU 100.000%, channels as on the CPU 100.000%"
    pruned = [entry for entry in found if entry["step"] in ("paper", "best", "distilled")]
    assert all(entry["predicted_memory"]["cpu_bytes"] and entry["peak_memory"]["cpu_bytes"] for entry in pruned)
    assert not list(tmp_path.glob("slimllm-*"))


def test_a_step_that_fails_or_comes_too_late_is_a_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "program", lambda argv, folder, limit: (1, "Traceback\nValueError: no"))
    monkeypatch.setattr(gpu, "decisions", lambda *_: {"said": "the same"})
    assert gpu.run(gpu.GpuConfig(device="cpu", size="tiny", output=str(tmp_path / "gpu.json"))) == 1
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert all("ValueError: no" in step["failed"] for step in steps if not step["step"].startswith("decisions"))
    assert "FAILED: Traceback ValueError: no" in "\n".join(gpu.table(steps))


@pytest.mark.parametrize(
    "own, bfloat16, wanted",
    [
        (torch.float16, True, torch.bfloat16),
        (torch.float16, False, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, True, torch.float32),
    ],
)
def test_nothing_is_distilled_in_float16(own, bfloat16, wanted, monkeypatch):
    monkeypatch.setattr(device, "gpu_has_bfloat16", lambda: bfloat16)
    assert device.distillation_dtype(own, torch.device("cuda")) == wanted


def test_the_room_for_activations_follows_what_is_free_and_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda place: 800)
    assert memory.activation_room(torch.device("cpu"), 10) == 800 // memory.FREE_SHARE
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.activation_room(torch.device("cpu"), 10) == 800 // memory.FREE_SHARE // 4
    assert memory.activation_room(torch.device("cpu"), 500) == 500


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device.resolved("cuda") == torch.device("cuda", 3) and device.resolved("cuda:1") == torch.device("cuda", 1)
    assert device.resolved("cpu") == torch.device("cpu")


def test_without_a_gpu_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert programs.main(["gpu", "--output", str(tmp_path / "gpu.json")]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err and not list(tmp_path.iterdir())
