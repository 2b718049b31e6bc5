"""The scripts that run a whole grid, on a tiny model."""

import json
import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT, make_model
from tests.test_post_training import ROWS as TRAINING_ROWS
from tests.test_zero_shot import NUMBER, ROWS

FOLDERS = ("prune_log", "tune_log", "eval_log")


@pytest.fixture
def name():
    """A prefix for what the scripts write below the repository, removed afterwards."""
    name = f"test-{os.getpid()}"
    yield name
    for folder in FOLDERS:
        for path in (ROOT / folder).glob(f"{name}*"):
            shutil.rmtree(path)


def test_paper_tables(tiny_folder, tmp_path, name):
    make_model(max_position_embeddings=512).save_pretrained(tiny_folder)
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(ROWS["piqa"](i)) + "\n" for i in range(NUMBER)))
    (tmp_path / "rows.json").write_text(json.dumps(TRAINING_ROWS))
    (tmp_path / "text.txt").write_text("it was the best of times, it was the worst of times. " * 60)
    environment = {
        **os.environ,
        "NAME": name,
        "EVALUATE": f"--data_dir {tmp_path} --eval_data book={tmp_path}/text.txt --max_seq_len 32",
        "TRAIN": f"--data_path {tmp_path}/rows.json --num_epochs 1 --cutoff_len 280 --batch_size 8 --micro_batch_size 8",
    }
    calibration = ["--calibration", str(tmp_path / "text.txt"), "--seq_len", "32", "--num_examples", "8"]
    command = ["bash", str(ROOT / "script" / "paper_tables.sh"), str(tiny_folder), *calibration]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads((ROOT / "eval_log" / name / "table.json").read_text())["rows"]
    assert [row["Ratio"].split()[-2:] for row in table] == [["0", "%"], ["w/o", "tune"], ["w/", "tune"], ["w/o", "tune"], ["w/", "tune"]]
    assert all(float(row["book"]) > 1 and float(row["PIQA"]) >= 0 for row in table)
    results = {path: path.read_bytes() for path in (ROOT / "eval_log" / name).glob("*.json") if path.name != "table.json"}
    again = subprocess.run(command, env={**environment, "TUNE": "0"}, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0 and again.stdout.count("0 tasks and 0 texts to do") == 3
    assert {path: path.read_bytes() for path in results} == results
