"""What a run may replace, and what it never does: foreign things, inputs, what changed meanwhile, anything but files and folders."""

import json
import os
import signal
import socket

import pytest

import hf_prune
import slimllm
from slimllm.__main__ import main as slim
from slimllm.errors import Recurring, UserError
from slimllm.utils import outputs
from slimllm.utils.files import atomic_file, write_text
from slimllm.utils.outputs import atomic_dir
from tests.conftest import make_ids, make_model


def written(target):
    """A folder as a run leaves it."""
    with atomic_dir(target, overwrite=True) as folder:
        write_text(folder / "model.safetensors", "weights")
        write_text(folder / "figures" / "layers.png", "picture")
        write_text(folder / "log.txt", "log")
    return target


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_s_own_folder_is_replaced_with_what_belongs_to_it(tmp_path):
    target = written(tmp_path / "run")
    (target / "README.md").write_text("edited")
    (target / "run-f16.gguf").write_bytes(b"GGUF" + bytes(20) + outputs.GGUF_MARK.encode())
    write_text(target / "eval.json", json.dumps({"format": 1, "environment": {"slimllm": "0"}}))
    (target / ".journal").mkdir()  # these are left by kills at the worst moments
    (target / ".adapter.lock").touch()
    (target / ".adapter.abcd_123.partial").mkdir()
    (target / ".tmpaB3xY9").touch()
    with atomic_dir(target, overwrite=True) as folder:
        (folder / "a").touch()
    assert names(target) == ["a", outputs.SEAL] and names(tmp_path) == ["run"]


@pytest.mark.parametrize("folders", [(), ("adapter",)])
def test_training_states_belong_to_a_training_of_this_program_only(folders, tmp_path):
    target = tmp_path / "run"
    write_text(target / "checkpoint-500" / "trainer_state.json", "{}")
    outputs.seal(target, [], folders)
    assert outputs.foreign(target) == (None if folders else target / "checkpoint-500")


def test_what_came_deep_inside_meanwhile_stays(tmp_path):
    target = written(tmp_path / "run")
    with pytest.raises(UserError, match="no run of this program wrote .*mine.png"), atomic_dir(target, True):
        write_text(target / "figures" / "mine.png", "mine")
    assert (target / "figures" / "mine.png").read_text() == "mine" and names(tmp_path) == ["run"]


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), os.mkfifo], ids=["file", "pipe"])
def test_what_has_the_name_of_a_lock_and_is_none_stays(make, tmp_path):
    make(tmp_path / ".run.lock")
    with pytest.raises(UserError, match=r"\.run\.lock: no run of this program wrote it.*move it away"), atomic_dir(tmp_path / "run", False):
        pytest.fail("the work began")
    assert names(tmp_path) == [".run.lock"]


def test_a_folder_named_like_one_that_was_set_aside_stays(tmp_path):
    write_text(tmp_path / ".run.20240101.old" / "thesis.tex", "mine")
    written(tmp_path / "run")
    assert names(tmp_path) == [".run.20240101.old", "run"]


def test_a_seal_that_was_edited_is_no_crash(tmp_path):
    folder, strange = written(tmp_path / "run"), ["x" * 5000, "a\0b", "../run", "/dev/zero"]
    (folder / "notes.txt").touch()
    outputs.seal(folder, [])
    found = json.loads((folder / outputs.SEAL).read_text()) | {"files": dict.fromkeys(strange, "0")}
    (folder / outputs.SEAL).write_text(json.dumps(found))
    assert outputs.altered(folder) == strange
    assert outputs.unsealed(folder) == ["figures/layers.png", "model.safetensors", "notes.txt"]


def add_link(folder):
    (folder / "link").symlink_to(folder.parent)


STRANGERS = {
    ".git": lambda folder: (folder / ".git").mkdir(),
    ".env": lambda folder: (folder / ".env").write_text("SECRET=1"),
    "checkpoint-900": lambda folder: write_text(folder / "checkpoint-900" / "model.bin", "mine"),
    "thesis.tex": lambda folder: (folder / "thesis.tex").write_text("x"),
    ".mine.lock": lambda folder: (folder / ".mine.lock").write_text("x"),
    "mine.json": lambda folder: (folder / "mine.json").write_text("[1]"),
    "mine.gguf": lambda folder: (folder / "mine.gguf").write_bytes(b"GGUF" + bytes(5000)),
    "figures/mine.png": lambda folder: (folder / "figures" / "mine.png").touch(),
    "other": lambda folder: written(folder / "other"),  # another run
    "empty": lambda folder: (folder / "empty").mkdir(),
    "link": add_link,
    "pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "": lambda folder: (folder / outputs.SEAL).unlink(),  # a folder that no run wrote
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_no_run_wrote_stays(name, tmp_path):
    target = written(tmp_path / "run")
    STRANGERS[name](target)
    before = names(target)
    strange = str(target / name).replace("(", r"\(")
    with (
        pytest.raises(UserError, match=f"no run of this program wrote {strange}, so it is not replaced; .* or move it away"),
        atomic_dir(target, True),
    ):
        pytest.fail("the work began")
    assert names(target) == before and names(tmp_path) == ["run"]


@pytest.mark.parametrize("inside", ["", "model.safetensors", "figures"])
def test_what_a_run_reads_is_not_replaced_whatever_leads_there(inside, tmp_path):
    target = written(tmp_path / "run")
    (tmp_path / "link").symlink_to(target / inside)
    for name in (target / inside, tmp_path / "link"):
        with pytest.raises(UserError, match="run (is|holds) .*, which this run reads"), atomic_dir(target, True, inputs=["", None, name]):
            pytest.fail("the work began")
    with atomic_dir(target, True, inputs=["a/hub-name", tmp_path]):  # what merely lies above may stay
        pass


def make_socket(path):
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


KINDS = {
    "link": (lambda path: path.symlink_to(path.parent), "is a symbolic link"),
    "broken": (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
    "pipe": (os.mkfifo, "a device, pipe or socket"),
    "socket": (make_socket, "a device, pipe or socket"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_files_and_folders_are_replaced(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "x"
    make, said = KINDS[kind]
    make(target)
    before = os.lstat(target)
    with pytest.raises(UserError, match=said), atomic_dir(target, True):
        pytest.fail("the work began")
    with pytest.raises(UserError, match="not a plain file"), atomic_file(target):
        pytest.fail("the work began")
    assert os.path.samestat(os.lstat(target), before)


@pytest.mark.parametrize("place", ["/proc/x", "loop/x", "file/x", "/dev/full", ".", "..", "/"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written|device|not the name|is a symbolic link"), atomic_dir(place, True):
        pytest.fail("the work began")
    assert names(tmp_path) == ["file", "loop"]


def test_the_second_run_of_a_name_fails_at_once(tmp_path):
    with atomic_dir(tmp_path / "new" / "run", overwrite=False) as folder:
        for overwrite in (False, True):
            with pytest.raises(UserError, match="run: another run is writing it; wait for that one, or choose another"):
                with atomic_dir(tmp_path / "new" / "run", overwrite):
                    pytest.fail("the work began")
        (folder / "a").touch()
    assert names(tmp_path / "new") == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_or_changed_meanwhile_is_not_replaced(overwrite, tmp_path):
    target = written(tmp_path / "run") if overwrite else tmp_path / "run"
    with pytest.raises(UserError, match="was made or changed by something else while this run went on"), atomic_dir(target, overwrite):
        target.mkdir(exist_ok=True)
        (target / "mine").write_text("mine")
    assert (target / "mine").read_text() == "mine"
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="was made or changed by something else"), atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
        (tmp_path / "other").write_text("mine")
        (tmp_path / "other").replace(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_is_refused_leaves_no_folder_and_takes_no_leftover(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "a" / "b" / "run", False):
        _ = 1 / 0
    assert names(tmp_path) == []
    written(tmp_path / "run")
    (tmp_path / ".run.abcd1234.partial").mkdir()  # a stopped run that may be gone on with
    with pytest.raises(UserError, match="run exists"), atomic_dir(tmp_path / "run", False):
        pass
    assert names(tmp_path) == [".run.abcd1234.partial", "run"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_right_after_the_final_rename_says_that_all_is_there(
    sent, as_in_a_terminal, tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    replace = outputs._replace

    def interrupted(*paths):
        replace(*paths)
        os.kill(os.getpid(), sent)

    monkeypatch.setattr(outputs, "_replace", interrupted)
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", tiny_folder, "--calibration", text_file, "--eval_data", "none", "--num_examples", 4, "--seq_len", 16]
    assert hf_prune.main([str(flag) for flag in flags]) == 128 + sent
    assert capsys.readouterr().err == "hf_prune.py: interrupted; everything lies in prune_log/llama_prune/\n"
    assert names(tmp_path / "prune_log") == ["llama_prune"] and not (tmp_path / "prune_log/llama_prune/.journal").exists()
    assert outputs.altered(tmp_path / "prune_log/llama_prune") == []


@pytest.mark.parametrize("sealed", [True, False])
def test_an_input_or_a_foreign_folder_is_not_pruned_away(sealed, tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prune_log").mkdir()
    tiny_folder.rename("prune_log/a")
    if sealed:
        outputs.seal(tmp_path / "prune_log/a")
    before = contents(tmp_path / "prune_log/a")
    flags = [
        "--base_model",
        "prune_log/a",
        "--calibration",
        str(text_file),
        "--eval_data",
        "none",
        "--save_ckpt_log_name",
        "a",
        "--overwrite",
    ]
    assert hf_prune.main(flags) == 2
    said = capsys.readouterr().err
    assert (
        "prune_log/a is prune_log/a, which this run reads; choose another --output_dir or --save_ckpt_log_name" in said
        and said.count("\n") == 1
    )
    assert contents(tmp_path / "prune_log/a") == before and names(tmp_path / "prune_log") == ["a"]


@pytest.mark.parametrize("error, way", [(UserError("full"), True), (Recurring("never"), False)])
def test_only_what_may_come_to_an_end_is_to_be_gone_on_with(error, way, tmp_path):
    with pytest.raises(UserError) as caught, atomic_dir(tmp_path / "run", False, worth_keeping=lambda folder: True):
        raise error
    (note,) = caught.value.__notes__
    assert ".partial" in note and ("--resume" in note) == way


def test_saving_replaces_only_what_was_saved(tmp_path, tiny_tokenizer):
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=make_ids())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("a")
    with pytest.raises(UserError, match="no run of this program wrote"):
        slimllm.save(result, tmp_path / "mine", overwrite=True)
    assert contents(tmp_path / "mine") == {"a": b"a"}


FILES = {  # a command that would replace a file -> what it says
    ("export-gguf", "{folder}", "--output", "{folder}/config.json", "--overwrite"): "no run of this program wrote",
    ("export-gguf", "{folder}", "--output", "{folder}/model.safetensors", "--overwrite"): "no run of this program wrote",
    ("export-gguf", "{folder}", "--output", "/dev/full", "--overwrite"): "a device, pipe or socket",
    ("export-transformers", "{folder}", "{folder}", "--overwrite"): "which this run reads",
    ("export-transformers", "{folder}", "{folder}/figures", "--overwrite"): "lies inside DIR",
    ("export-transformers", "{folder}/sealed", "{folder}/figures", "--overwrite"): "no run of this program wrote",
    ("evaluate", "{folder}", "--output", "{folder}/config.json", "--overwrite", "--tasks", "none"): "no run of this program wrote",
    ("evaluate", "{folder}", "--output", "{folder}/figures/pruning.json", "--overwrite", "--tasks", "none"): "no run of this program wrote",
    ("evaluate", "{folder}", "--output", "/dev/full", "--tasks", "none"): "a device, pipe or socket",
    ("evaluate", "{folder}", "--output", "{folder}", "--overwrite", "--tasks", "none"): "no run of this program wrote",
    ("evaluate", "{folder}", "--output", "/proc/x.json", "--tasks", "none"): "cannot be written",
    ("evaluate", "{folder}", "--output", "{folder}/mine.gguf", "--overwrite", "--tasks", "none"): "no run of this program wrote",
    ("evaluate", "{folder}", "--output", "{folder}/sealed", "--overwrite", "--tasks", "none"): "no run of this program wrote",
    ("export-gguf", "{folder}", "--output", "{folder}/eval.json", "--overwrite"): "no run of this program wrote",
    ("latency", "{folder}", "--json", "{folder}/config.json"): "no run of this program wrote",
    ("benchmark", "--json", "{folder}/figures/pruning.json"): "no run of this program wrote",
    ("gpu", "--output", "{folder}/config.json"): "no run of this program wrote",
    ("compare", "--base_model", "{folder}", "--output", "{folder}", "--overwrite"): "not empty, and it holds no results.json",
    ("ablation", "--base_model", "{folder}", "--output", "{folder}", "--overwrite"): "not empty, and it holds no results.json",
}


@pytest.mark.parametrize("command", FILES, ids=" ".join)
def test_no_program_replaces_what_it_did_not_write(command, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = {"format": 1, "config": {}, "layers": [], "environment": {"slimllm": "0"}}
    write_text(tiny_folder / "figures" / "pruning.json", json.dumps(record))
    write_text(tiny_folder / "eval.json", json.dumps({"format": 1, "environment": {"slimllm": "0"}}))
    (tiny_folder / "mine.gguf").write_bytes(b"GGUF" + outputs.GGUF_MARK.encode())  # of other programs than those that would replace it
    written(tiny_folder / "sealed")
    before = contents(tiny_folder)
    monkeypatch.setattr("slimllm.models.source.ModelSource.whole", lambda *_: pytest.fail("the work began"))
    assert slim([part.format(folder=tiny_folder) for part in command]) == 2
    said = capsys.readouterr().err
    assert FILES[command] in said and "another" in said and said.count("\n") == 1
    assert "--overwrite" in command or "--overwrite" not in said
    assert contents(tiny_folder) == before
