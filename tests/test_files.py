"""Folders that appear whole or not at all, and what killed runs leave behind."""

import fcntl
import os

import pytest

from slimllm.errors import UserError
from slimllm.utils.outputs import atomic_dir


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_run_left_is_cleared_and_said(tmp_path, caplog):
    left = tmp_path / ".run.abcd1234.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (tmp_path / ".other.abcd1234.partial").mkdir()
    with caplog.at_level("INFO", logger="slimllm"), atomic_dir(tmp_path / "run", overwrite=False) as folder:
        (folder / "a").write_text("whole")
    assert names(tmp_path) == [".other.abcd1234.partial", "run"] and str(left) in caplog.text and "killed" in caplog.text


def test_a_run_of_the_same_name_that_is_alive_keeps_its_folder(tmp_path):
    alive = tmp_path / ".run.abcd1234.partial"
    alive.mkdir()
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with atomic_dir(tmp_path / "run", overwrite=False):
        assert alive.exists() and len(list(tmp_path.glob(".run.*.partial"))) == 2
    os.close(descriptor)
    with atomic_dir(tmp_path / "run", overwrite=True):
        assert not alive.exists()


def test_a_folder_that_was_set_aside_when_its_run_was_killed_comes_back(tmp_path, caplog):
    aside = tmp_path / ".run.abcd1234.old" / "run"
    aside.mkdir(parents=True)
    (aside / "a").write_text("old")
    with caplog.at_level("INFO", logger="slimllm"), pytest.raises(UserError, match="run exists"), atomic_dir(tmp_path / "run", False):
        pass
    assert (tmp_path / "run" / "a").read_text() == "old" and names(tmp_path) == ["run"] and "put back" in caplog.text


def test_what_fails_leaves_the_old_folder(tmp_path):
    with atomic_dir(tmp_path / "run", overwrite=False) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "run", overwrite=True) as folder:
        (folder / "a").write_text("new")
        _ = 1 / 0
    assert (tmp_path / "run" / "a").read_text() == "old" and names(tmp_path) == ["run"]
