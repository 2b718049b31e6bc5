"""A run that is stopped goes on where it was, and ends with the same bytes as one that was never stopped."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import hf_prune
from slimllm.models import tensor_file
from slimllm.pruning import pipeline
from slimllm.pruning.layer import LayerPruner
from slimllm.reporting.record import PROCESSES
from slimllm.streaming import journal, runner
from tests.conftest import ROOT, make_model

FILES = ("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "modeling.py")


@pytest.fixture
def folder(tmp_path, tiny_tokenizer, monkeypatch):
    """A folder with a model of eight layers, to run in."""
    make_model(num_hidden_layers=8).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(text_file, *more):
    known = ["--base_model", "model", "--calibration", text_file, "--eval_data", text_file, "--max_seq_len", 16, "--eval_limit", 8]
    known += ["--num_examples", 12, "--seq_len", 16, "--recipe", "best", "--target_sparsity", 0.3, "--save_ckpt_log_name", "run"]
    return [str(flag) for flag in (*known, *more)]


def run_whole(text_file, *more):
    """A run that is not stopped, and what it wrote."""
    assert hf_prune.main(flags(text_file, *more)) == 0
    return contents(Path("prune_log/run"))


def contents(run):
    record = json.loads((run / "pruning.json").read_text())
    kept = [(layer["kept"], layer["errors"], layer["sensitivity"]) for layer in record["layers"]]
    files = {path.name: path.read_bytes() for pattern in FILES for path in run.glob(pattern)}
    assert {"config.json", "reference.safetensors", "calibration.safetensors"} <= set(files)
    return files, kept, [f["pruned"] for f in record["evaluation"]], record["parameters"]


def _finished_layers() -> int:
    try:
        return len(list(Path("prune_log").glob(".run.*.partial/.journal/layer-*.json")))
    except FileNotFoundError:  # the run ends while it is looked at
        return 0


def _child(folder, arguments):
    os.chdir(folder)
    torch.set_num_threads(1)
    os._exit(hf_prune.main(arguments))


def test_killed_at_ten_random_moments_and_resumed_each_time(folder, text_file, monkeypatch):
    """kill -9. The children are forked from a process that has everything imported, so that a run takes a second."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hf_prune", "tests.test_resume", "slimllm.api", "slimllm.reporting.figures", "slimllm.evaluation.zero_shot"]
    )
    make_model(num_hidden_layers=32).save_pretrained(folder / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    quick = ["--layer_ratio", "importance"]  # most of the time goes by layer after layer
    whole = run_whole(text_file, *quick)
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    Path("prune_log/run").rename("whole")
    rng, killed, done = random.Random(0), [], False
    while len(killed) < 10 and not done:
        more = quick + (["--resume"] if list(Path("prune_log").glob(".run.*.partial")) else [])
        child = context.Process(target=_child, args=(folder, flags(text_file, *more)))
        child.start()
        before = _finished_layers()
        wanted = before + rng.randint(0, 3)  # so that the moments lie all over the run, not in one of its phases
        while child.is_alive() and _finished_layers() < wanted:
            time.sleep(0.001)
        child.join(rng.uniform(0.0, 0.2 if wanted == before else 0.01) * seconds)
        done = not child.is_alive()
        if not done:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed.append(_finished_layers())
    assert killed == sorted(killed) and len(set(killed)) > 3, killed  # what was finished stayed finished
    if not done:
        assert hf_prune.main(flags(text_file, *quick, "--resume")) == 0
    assert contents(Path("prune_log/run")) == whole
    assert [path.name for path in Path("prune_log").iterdir()] == ["run"] and not Path("prune_log/run/.journal").exists()


@pytest.mark.parametrize("layer, shard_bytes", [(2, 10**9), (4, 40_000), (7, 10**9)])
def test_only_the_layers_that_are_missing_are_pruned_again(folder, text_file, layer, shard_bytes, monkeypatch):
    monkeypatch.setattr("slimllm.deploy.weight_files.SHARD_BYTES", shard_bytes)
    whole = run_whole(text_file)
    pruned = []
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(layer))
    assert hf_prune.main(flags(text_file, "--overwrite")) == 130
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(None, pruned))
    monkeypatch.setattr(runner.LayerRunner, "layer_cosines", lambda *_: pytest.fail("pass 1 was made again"))
    assert hf_prune.main(flags(text_file, "--overwrite", "--resume")) == 0
    assert pruned == [index for index in range(layer, 8) if index in pruned] and layer in pruned
    assert contents(Path("prune_log/run")) == whole


@pytest.mark.parametrize("name", ["identity", "calibration", "allocation", "layer-00000"])
def test_an_entry_of_another_kind_is_named(name, folder, text_file, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(2))
    assert hf_prune.main(flags(text_file)) == 130
    (entry,) = Path("prune_log").glob(f".run.*.partial/.journal/{name}.json")
    entry.write_text("[1]")
    capsys.readouterr()
    assert hf_prune.main(flags(text_file, "--resume")) == 2
    err = capsys.readouterr().err
    assert f"{name}.json, which the stopped run had written, is broken (a list, not a dict); start anew without the flag" in err


def stopping_at(layer, seen=None):
    """A LayerPruner for pass 2 that is interrupted before it prunes this layer; ``seen`` gets the layers that it prunes."""

    class Stopping(LayerPruner):
        def prune(self, module, index, *rest):
            if index == layer:
                raise KeyboardInterrupt
            if seen is not None:
                seen.append(index)
            return super().prune(module, index, *rest)

    return Stopping


def test_a_disk_that_fills_up_in_the_middle_and_is_given_room(folder, text_file, monkeypatch, capsys):
    whole = run_whole(text_file)
    put, count = tensor_file.TensorFile._put, []

    def full(self, data, offset):
        count.append(1)
        if len(count) > 90:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, data, offset)

    monkeypatch.setattr(tensor_file.TensorFile, "_put", full)
    capsys.readouterr()
    assert hf_prune.main(flags(text_file, "--overwrite")) == 2
    err = capsys.readouterr().err.strip()
    assert "prune_log/run: cannot be written (No space left on device)" in err and err.endswith("--resume") and len(err.splitlines()) == 1
    assert 0 < _finished_layers() < 8
    monkeypatch.setattr(tensor_file.TensorFile, "_put", put)
    assert hf_prune.main(flags(text_file, "--overwrite", "--resume")) == 0
    assert contents(Path("prune_log/run")) == whole


@pytest.mark.parametrize(
    "change, said",
    [
        (["--target_sparsity", "0.4"], "--target_sparsity 0.3, this one has 0.4"),
        (["--recovery", "linear"], "--recovery least_squares, this one has linear"),
        (["--seed", "1"], "--seed 42, this one has 1"),
        ("model", "the file model.safetensors"),
        ("config", "the file config.json"),
        ("text", "text.txt"),
        ("processes", "the number of processes 2, this one has 1"),
    ],
)
def test_another_run_is_not_gone_on_with(folder, text_file, change, said, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(5))
    assert hf_prune.main(flags(text_file)) == 130
    monkeypatch.setattr(pipeline, "LayerPruner", LayerPruner)
    more = []
    if change == "model":
        make_model(num_hidden_layers=8, seed=1).save_pretrained("model")
    elif change == "config":
        config = json.loads(Path("model/config.json").read_text())
        Path("model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    elif change == "text":
        text_file.write_text(text_file.read_text() + "More.\n")
    elif change == "processes":
        (identity,) = Path("prune_log").glob(".run.*.partial/.journal/identity.json")
        identity.write_text(json.dumps(json.loads(identity.read_text()) | {PROCESSES: 2}))
    else:
        more = change
    capsys.readouterr()
    assert hf_prune.main(flags(text_file, "--resume", *more)) == 2
    err = capsys.readouterr().err
    assert "--resume: the stopped run had" in err and said in err and len(err.strip().splitlines()) == 1
    assert list(Path("prune_log").glob(".run.*.partial"))  # it is still there to be gone on with


def test_nothing_to_go_on_with(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--resume")) == 2
    assert "--resume: no stopped run left anything for prune_log/run; start without the flag" in capsys.readouterr().err


def test_the_states_lie_in_tmp_dir_and_go_with_the_run(folder, text_file, monkeypatch):
    whole = run_whole(text_file)
    (folder / "scratch").mkdir()
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(4))
    stopped = flags(text_file, "--overwrite", "--tmp_dir", "scratch")
    assert hf_prune.main(stopped) == 130
    [left] = Path("scratch").iterdir()
    assert list(left.glob("states-00003-*.safetensors")) and not list(Path("prune_log").rglob("states-*.safetensors"))
    assert hf_prune.main(stopped) == 130  # anew: what the first one left goes, here and there
    [other] = Path("scratch").iterdir()
    assert other != left
    monkeypatch.setattr(pipeline, "LayerPruner", LayerPruner)
    assert hf_prune.main(flags(text_file, "--overwrite", "--resume")) == 0  # which knows where they are
    assert contents(Path("prune_log/run")) == whole
    assert hf_prune.main(flags(text_file, "--overwrite", "--tmp_dir", "scratch")) == 0
    assert not list(Path("scratch").iterdir()) and contents(Path("prune_log/run")) == whole


def test_states_that_are_gone_are_said(folder, text_file, monkeypatch, capsys):
    (folder / "scratch").mkdir()
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(4))
    assert hf_prune.main(flags(text_file, "--tmp_dir", "scratch")) == 130
    [left] = Path("scratch").iterdir()
    for path in left.glob("states-*"):
        path.unlink()
    capsys.readouterr()
    assert hf_prune.main(flags(text_file, "--resume")) == 2
    err = capsys.readouterr().err
    assert f"{left.name}/states-" in err and "is gone; start anew without the flag" in err and len(err.strip().splitlines()) == 1


def test_a_run_without_resume_keeps_nothing_for_it(folder, text_file, monkeypatch, capsys):
    whole = run_whole(text_file)
    written, finish = [], journal.Journal.finish_layer
    monkeypatch.setattr(journal.Journal, "finish_layer", lambda self, index, *rest: written.append(index) or finish(self, index, *rest))
    assert hf_prune.main(flags(text_file, "--overwrite", "--no_resume")) == 0
    assert contents(Path("prune_log/run")) == whole and not written
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(4))
    capsys.readouterr()
    assert hf_prune.main(flags(text_file, "--overwrite", "--no_resume")) == 130
    assert "--resume" not in capsys.readouterr().err and [path.name for path in Path("prune_log").iterdir()] == ["run"]


def test_a_plan_of_a_file_needs_no_pass_for_importance(folder, text_file, monkeypatch):
    run_whole(text_file)
    plan = Path("prune_log/run/pruning.json")
    plan.rename("plan.json")
    monkeypatch.setattr(runner.LayerRunner, "layer_cosines", lambda *_: pytest.fail("pass 1 was made"))
    known = flags(text_file, "--plan", "plan.json", "--overwrite")
    del known[known.index("--target_sparsity") : known.index("--target_sparsity") + 2]
    assert hf_prune.main(known) == 0
    record = json.loads(plan.read_text())
    assert all(layer["cosine"] is None for layer in record["layers"])
    assert [layer["kept"] for layer in record["layers"]] == [layer["kept"] for layer in json.loads(Path("plan.json").read_text())["layers"]]


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes"])
def test_a_file_of_the_stopped_run_that_is_broken_is_said(damage, folder, text_file, monkeypatch, capsys):
    """Whichever file it is: one line that names it and the way out. What it can do without it goes on."""
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(4))
    more = ("--recipe", "best", "--self_share", "0", "--num_examples", "8")
    assert hf_prune.main(flags(text_file, *more)) == 130
    [left] = Path("prune_log").glob(".run.*.partial")
    files = sorted(
        path for path in left.rglob("*") if path.is_file() and (path.parent.name == ".journal" or path.name == "calibration.safetensors")
    )
    assert {"calibration.safetensors", "calibration.json", "allocation.json", "price_list.json"} <= {path.name for path in files}
    assert any(path.name.startswith("states-") for path in files)
    for path in files:
        if path.name == "layer-00000.json" or path.suffix == ".partial":
            continue
        content = path.read_bytes()
        if damage == "other bytes":
            path.write_bytes(content[:-64] + bytes(byte ^ 0x55 for byte in content[-64:]))
        else:
            path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
        capsys.readouterr()
        code, err = hf_prune.main(flags(text_file, *more, "--resume")), capsys.readouterr().err
        unread = path.name.startswith("prices-")  # the whole list is known
        silent = unread or (damage == "other bytes" and path.name.startswith("states-"))  # numbers like any others
        assert code == (130 if silent else 2), (path.name, err)
        assert silent or (path.name in err and "start anew without the flag" in err and len(err.strip().splitlines()) == 1), (
            path.name,
            err,
        )
        path.write_bytes(content)
