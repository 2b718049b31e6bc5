"""Several processes, started by torchrun: they decide as one does, and what they finished stays when one of them dies."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_prune
from slimllm.streaming.journal import Journal
from slimllm.streaming.statistics import Covariance, PairMoments, SquareSum
from slimllm.training import distillation, sharding
from slimllm.training.teacher import Teacher
from slimllm.utils import processes
from tests.conftest import ROOT, make_config, make_ids, make_model, prune, run_of
from tests.test_distillation import stopping_at_step

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # on a port that is free


@pytest.fixture
def folder(tmp_path, tiny_tokenizer, monkeypatch):
    make_model(num_hidden_layers=6).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(text_file, name, *more):
    known = ["--base_model", "model", "--calibration", text_file, "--eval_data", text_file, "--max_seq_len", 16, "--eval_limit", 9]
    known += ["--num_examples", 12, "--seq_len", 16, "--target_sparsity", 0.3, "--save_ckpt_log_name", name]
    return [str(flag) for flag in (*known, *more)]


def two_processes(*arguments):
    return [*TORCHRUN, str(ROOT / "hf_prune.py"), *arguments]


@pytest.mark.parametrize("recipe, more", [("best", ()), ("best", ("--drop_parts", 2)), ("distilled", ())])
def test_two_processes_decide_as_one(folder, text_file, recipe, more):
    """The paper's recipe runs in two processes below."""
    how = ["--recipe", recipe, "--distill_examples", 40, "--distill_learning_rate", 3e-4, *more]
    assert hf_prune.main(flags(text_file, "one", *how)) == 0
    done = subprocess.run(two_processes(*flags(text_file, "two", *how)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = check_alike(done.stdout, "one", "two")
    if recipe == "distilled":
        assert one["distillation"]["kept"] and two["distillation"]["kept"]
        for key in ("before", "after"):
            assert two["distillation"][key] == pytest.approx(one["distillation"][key], rel=1e-2)


def check_alike(stdout, *names):
    """The second run, of two processes, spoke once, and decided as the first, with very nearly the same model. Returns their records."""
    assert stdout.count("layer   3") == 1 and stdout.count(f"everything lies in prune_log/{names[1]}/") == 1
    one, two = (json.loads(Path("prune_log", name, "pruning.json").read_text()) for name in names)
    for a, b in zip(one["layers"], two["layers"]):
        assert a["kept"] == b["kept"]
        assert b["cosine"] == pytest.approx(a["cosine"], abs=1e-5)
        assert a["errors"].get("mlp", []) == pytest.approx(b["errors"].get("mlp", []), rel=1e-3)
    for key in ("dense", "pruned"):  # training in bfloat16 adds up roundings that a decision does not
        assert two["evaluation"][0][key] == pytest.approx(one["evaluation"][0][key], rel=1e-2 if one.get("distillation") else 1e-3)
    weights = [load_file(Path("prune_log", name, "model.safetensors")) for name in names]
    for name in weights[0]:
        # a gradient near zero may have another sign in bfloat16, and Adam takes a whole step by it: 3e-4 at most, four times, either way
        distant = (weights[1][name] - weights[0][name]).abs() > 1e-3 + 1e-2 * weights[0][name].abs()
        assert distant.float().mean() <= (0.002 if one.get("distillation") else 0)
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-2, atol=2.4e-3)
    return one, two


def test_a_process_that_dies_ends_the_run_with_one_line_and_what_it_finished_stays(folder, text_file):
    """The second process is killed after the third layer."""
    arguments = flags(text_file, "two")
    code = "import os, sys, signal; sys.path.insert(0, sys.argv.pop(1)); import hf_prune; from slimllm.pruning.layer import LayerPruner\n"
    code += "prune = LayerPruner.prune\n"
    code += "def dying(*a):\n    if a[2] == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n    return prune(*a)\n"
    code += "LayerPruner.prune = dying\nsys.exit(hf_prune.main())\n"
    (folder / "dying.py").write_text(code)
    done = subprocess.run([*TORCHRUN, "dying.py", str(ROOT), *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "hf_prune.py: " in line]
    assert len(lines) == 1 and re.search("another process of this run ended|interrupted", lines[0]), done.stderr[-3000:]
    assert lines[0].endswith("go on with the same command and --resume") and "Traceback" not in done.stdout
    (partial,) = Path("prune_log").glob(".two.*.partial")
    assert len(list(partial.glob(".journal/layer-*.json"))) == 3
    done = subprocess.run(two_processes(*arguments, "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = subprocess.run(two_processes(*flags(text_file, "whole")), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert Path("prune_log/two/model.safetensors").read_bytes() == Path("prune_log/whole/model.safetensors").read_bytes()
    assert hf_prune.main(flags(text_file, "one")) == 0
    check_alike(whole.stdout, "one", "whole")


def test_a_mistake_is_said_once(folder, text_file):
    done = subprocess.run(two_processes(*flags(text_file, "two", "--recovery", "liner")), capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf_prune.py: error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "did you mean 'linear'?" in lines[0]
    assert "Terminated" not in done.stderr


def test_a_dry_run_is_shown_once(folder, text_file, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert hf_prune.main(flags(text_file, "two", "--dry_run")) == 0
    assert capsys.readouterr().out == ""


def test_statistics_of_two_halves_merge_to_those_of_the_whole(monkeypatch):
    """Two processes are played by one: what the other one holds is added as the engine would."""
    rows, more = torch.randn(300, 7) * 3 + 5, torch.randn(300, 7)
    make = {
        "covariance": lambda: Covariance(7),
        "squares": lambda: SquareSum(7),
        "pair": lambda: PairMoments(7),
    }
    for name, new in make.items():
        whole, first, second = new(), new(), new()
        for statistic, part in ((whole, slice(None)), (first, slice(0, 100)), (second, slice(100, None))):
            statistic.update(*((rows[part], more[part]) if name == "pair" else (rows[part],)))
        _merge(first, second, monkeypatch)
        if name == "covariance":
            torch.testing.assert_close(first.matrix(), whole.matrix(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(first.mean, whole.mean)
        elif name == "squares":
            torch.testing.assert_close(first.norm(), whole.norm())
        else:
            torch.testing.assert_close(first.cov_xy, whole.cov_xy, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(first.var_x, whole.var_x, rtol=1e-4, atol=1e-4)
            assert first.relative_error() == pytest.approx(whole.relative_error(), rel=1e-4)


def _merge(first, second, monkeypatch):
    """Runs ``merge`` of both in step: each call of the engine waits for the other's."""
    import threading

    barrier, held, lock = threading.Barrier(2), {}, threading.Lock()
    who = threading.local()

    def all_reduce(tensor):
        with lock:
            held[who.index] = tensor.clone()
        barrier.wait()
        tensor.copy_(held[0] + held[1])
        barrier.wait()

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", all_reduce)

    def run(index, statistic):
        who.index = index
        statistic.merge()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()


def in_processes(count, run, folder, patience=30):
    """What ``run()`` gives in each of ``count`` processes, forked from this one, that have joined.

    The others than the first have ``patience`` seconds more than it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        try:
            with processes.group(torch.device("cpu")):
                found = run()
        except processes.ProcessEnded as error:
            found = str(error)
        torch.save(found, folder / f"{rank}.pt")
        os._exit(0)

    started = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(60 if process is started[0] else patience)
        process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(count) if (folder / f"{rank}.pt").is_file()]


@pytest.mark.parametrize("count, samples", [(2, 40), (3, 40), (4, 40), (3, 11), (4, 3), (3, 2)])
def test_each_number_of_processes_distils_as_one(count, samples, tmp_path, monkeypatch):
    """Also where a process has no row of a batch, and where there are fewer samples than processes.

    Of 11 samples 9 are trained on, a batch of eight and one of a single row; the other 2 are held out, too few for three processes.
    """
    monkeypatch.setattr("slimllm.training.teacher.distillation_dtype", lambda dtype, device: torch.float32)

    def run():
        dense, student = make_model(), make_model()
        prune(student, make_ids(), make_config())
        config = make_config(distill="all", distill_learning_rate=1e-3)
        found = distillation.distil(run_of(student, make_ids(), config), student, Teacher(dense, make_ids(samples)))
        return [found.before, found.after, *(float(p.double().abs().sum()) for p in student.parameters())]

    torch.set_num_threads(1)
    alone = run()
    found = in_processes(count, run, tmp_path)
    assert len(found) == count and all(values == found[0] for values in found)
    assert found[0] == pytest.approx(alone, rel=1e-3) and alone[0] != alone[1]


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr("slimllm.training.teacher.distillation_dtype", lambda dtype, device: torch.float32)


def distilled(journal=None, mode="all", epochs=1):
    """A pruned model trained on 40 samples by all processes that there are."""
    dense, student = make_model(), make_model()
    prune(student, make_ids(), make_config())
    run = run_of(student, make_ids(), make_config(distill=mode, distill_learning_rate=1e-3, distill_epochs=epochs), journal=journal)
    assert distillation.distil(run, student, Teacher(dense, make_ids(40))).kept
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("mode, most", [("all", 0.51), ("scales", 1.0)])
def test_of_two_processes_each_holds_half_of_the_weights_that_are_all_trained(mode, most, in_float32, tmp_path, monkeypatch):
    """And of their gradients and moments; what came of it is that of one process, and whole in each."""
    step, held = torch.optim.AdamW.step, []

    def watched(optimizer, *arguments):
        [group] = optimizer.param_groups
        of_gradients = [parameter.grad for parameter in group["params"]]
        found = step(optimizer, *arguments)
        of_moments = [optimizer.state[parameter][name] for name in distillation._Training.MOMENTS for parameter in group["params"]]
        for tensors in (group["params"], of_gradients, of_moments):
            local = sum(getattr(one, "to_local", lambda one=one: one)().numel() for one in tensors)
            held.append(local / sum(one.numel() for one in tensors))
        return found

    def run():
        weights = distilled(mode=mode)
        return weights, max(held)

    alone = distilled(mode=mode)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    found = in_processes(2, run, tmp_path)
    assert len(found) == 2 and all(share <= most for _, share in found)
    for weights, _ in found:
        for name, values in weights.items():
            torch.testing.assert_close(values, alone[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case, dtype", [("llama_gqa", torch.float32), ("llama_gqa", torch.bfloat16), ("starcoder2", torch.bfloat16)])
def test_gradients_of_shares_are_sums_over_the_processes(case, dtype, tmp_path, monkeypatch):
    """Adam would not show it: its steps are the same where all gradients are a half. The norms of one model have biases."""
    monkeypatch.setattr("slimllm.training.teacher.distillation_dtype", lambda own, device: dtype)

    def run():
        student, teacher = make_model(case), Teacher(make_model(case, seed=1), make_ids(5))
        names = distillation.trained_names(student, "all")
        if processes.count() == 1:
            with distillation._trainable(student, "all", dtype) as parameters:
                distillation._Loss(student, teacher).backward(torch.arange(5))
                return torch.cat([parameter.grad.flatten() for parameter in parameters])
        model = sharding.sharded(student, names, teacher.device, dtype, False)
        distillation._Loss(model, teacher, True).backward(torch.arange(5))
        return torch.cat([model.get_parameter(name).grad.full_tensor().flatten() for name in names])

    alone, *found = run(), *in_processes(2, run, tmp_path)
    assert len(found) == 2
    for gradients in found:
        assert float((gradients - alone).norm() / alone.norm()) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2), (3, 2)])
def test_a_stopped_distillation_is_gone_on_with_by_any_number_of_processes(before, after, in_float32, tmp_path, monkeypatch):
    """By as many processes the weights are those of a run that nothing stopped, to the last bit."""
    backward, steps = distillation._Loss.backward, []

    def stopped():
        with pytest.raises(KeyboardInterrupt):
            distilled(Journal(tmp_path / "journal"), epochs=2)

    def resumed():
        monkeypatch.setattr(distillation._Loss, "backward", lambda self, samples: steps.append(0) or backward(self, samples))
        weights = distilled(Journal(tmp_path / "journal"), epochs=2)
        assert 0 < len(steps) < 8  # of 2 times 4 batches of the 30 samples that are trained on
        return weights

    whole = in_processes(after, lambda: distilled(epochs=2), tmp_path)
    monkeypatch.setattr(distillation._Loss, "backward", stopping_at_step(6, steps))
    in_processes(before, stopped, tmp_path)
    assert (tmp_path / "journal" / distillation._Training.FILE).is_file()
    found = in_processes(after, resumed, tmp_path)
    assert len(found) == len(whole) == after
    for ours, uninterrupted in zip(found, whole):
        for name, values in ours.items():
            bits = dict(rtol=0, atol=0) if before == after else dict(rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(values, uninterrupted[name], **bits)


def test_a_process_that_dies_while_it_distils_ends_the_others_with_a_line(in_float32, tmp_path, monkeypatch):
    backward = distillation._Loss.backward

    def dies(self, samples):
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(self, samples)

    monkeypatch.setattr(distillation._Loss, "backward", dies)
    [said] = in_processes(2, distilled, tmp_path)
    assert said.startswith("another process of this run ended (")


@pytest.mark.parametrize("free, offloads", [(10**6, True), (10**12, False)])
def test_shares_lie_on_the_host_where_a_gpu_has_no_room_for_them(free, offloads, monkeypatch):
    monkeypatch.setattr(distillation, "free_memory", lambda device: free)
    assert distillation._offloads(make_model(), torch.device("cuda"), torch.bfloat16) == offloads
    assert not distillation._offloads(make_model(), torch.device("cpu"), torch.bfloat16)


def test_a_process_that_hangs_ends_the_others_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=6))

    def run():
        processes.wait()
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        processes.wait()

    [said] = in_processes(2, run, tmp_path, patience=0)
    assert said.startswith("another process of this run has not answered (")


def test_one_process_shares_with_nobody():
    rows = torch.arange(6)
    assert processes.count() == 1 and torch.equal(processes.share(rows), rows)
    assert processes.total(1.0, 2.0) == [1.0, 2.0] and processes.from_first(lambda: 7) == 7 and processes.from_all(7) == [7]
