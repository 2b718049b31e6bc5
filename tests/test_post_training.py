"""LoRA post-training: the data as it is learned, and the command line on tiny models."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainingArguments

import post_training
from slimllm.commands import COMMANDS, train
from slimllm.deploy import checkpoint
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.settings.training import TrainConfig
from slimllm.training import data, trainer
from slimllm.training.data import IGNORED
from slimllm.utils import outputs
from tests.conftest import ROOT, make_ids, make_model, prune_to

ROWS = [{"instruction": f"say {i}", "input": "now" if i % 3 else "", "output": f"the number {i} it is, {i}."} for i in range(24)]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def pruned_folder(tmp_path, tiny_tokenizer):
    """A tiny grouped-query checkpoint with layers of different widths."""
    return prune_to(tmp_path / "pruned", tiny_tokenizer, max_position_embeddings=512)


def settings(**kwargs):
    return TrainConfig(**{"prune_model": "x", **kwargs})


def post_train(*args, cwd, launcher=(sys.executable,), env=None):
    flags = [str(a) for a in args]
    return subprocess.run(
        [*launcher, str(ROOT / "post_training.py"), *flags],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Runs ``post_training.py`` in this process, in the test's folder. Returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        status = post_training.main([str(flag) for flag in flags])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def quick(folder, rows, *more):
    """Flags of a run of 8 steps on rows; held-out rows and texts left out unless ``more`` asks for them."""
    base = ["--prune_model", folder, "--data_path", rows, "--output_dir", "out", "--val_set_size", 0, "--extra_val_dataset", "none"]
    return [*base, "--batch_size", 6, "--micro_batch_size", 3, "--learning_rate", 5e-3, "--cutoff_len", 280, *more]


def losses(folder):
    record = json.loads((folder / "post_training.json").read_text())
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


# data


def test_the_prompt_is_not_learned_and_the_response_is(tiny_tokenizer):
    row = data.tokenize(ROWS[1], tiny_tokenizer, settings(cutoff_len=400, add_eos_token=False))
    learned = [token for token, label in zip(row["input_ids"], row["labels"]) if label != IGNORED]
    assert tiny_tokenizer.decode(learned).replace(" ", "") == ROWS[1]["output"].replace(" ", "")
    assert [label for label in row["labels"] if label != IGNORED] == learned
    everything = data.tokenize(ROWS[1], tiny_tokenizer, settings(cutoff_len=400, train_on_inputs=True, add_eos_token=False))
    assert everything["labels"] == everything["input_ids"] == row["input_ids"]


def test_an_input_changes_the_prompt(tiny_tokenizer):
    def prompt(i, name):
        return tiny_tokenizer.decode(
            data.tokenize(ROWS[i], tiny_tokenizer, settings(cutoff_len=400, prompt_template_name=name))["input_ids"]
        )

    assert "I n p u t" in prompt(1, "alpaca") and "I n p u t" not in prompt(0, "alpaca")
    assert len(prompt(1, "alpaca_short")) < len(prompt(1, "alpaca"))


def test_each_row_ends_with_the_end_of_text_where_it_fits(tiny_tokenizer):
    """As in the published recovery stage: without it the model never learns to stop."""

    def ends(*flags):
        return data.tokenize(ROWS[0], tiny_tokenizer, COMMANDS["train"].parsed("train", ["x", *flags]))["input_ids"][-1]

    end = tiny_tokenizer.eos_token_id
    assert ends("--cutoff_len", "400") == end and data.tokenize(ROWS[0], tiny_tokenizer, settings(cutoff_len=400))["labels"][-1] == end
    assert ends("--cutoff_len", "400", "--no_add_eos_token") != end and ends("--cutoff_len", "20") != end


@pytest.mark.parametrize("flag", [True, False])
def test_plain_text_is_learned_whole(tiny_tokenizer, tmp_path, flag):
    (tmp_path / "t.jsonl").write_text('{"text": "abc def"}\n{"text": "ghi"}\n{"text": "x"}\n')
    kind = dict(no_instruction=flag, val_set_size=1, add_eos_token=False)
    train, held_out, _ = data.load_data(settings(data_path=str(tmp_path / "t.jsonl"), **kind), tiny_tokenizer, 97)
    assert len(train) == 1 and len(held_out) == 1  # one token alone has nothing to learn
    assert all(row["labels"] == row["input_ids"] for row in [*train, *held_out])


def test_held_out_rows_are_not_trained_on_and_the_seed_decides_them(tiny_tokenizer, rows_file):
    def split(**kwargs):
        return data.load_data(settings(data_path=str(rows_file), cutoff_len=400, **kwargs), tiny_tokenizer, 97)

    train, held_out, digest = split()
    assert (len(train), len(held_out)) == (22, 2) and all(row not in train for row in held_out)
    assert split()[2] == digest and list(split(seed=1)[1]) != list(held_out)
    with pytest.raises(UserError, match="--val_set_size 24.*24 usable"):
        split(val_set_size=24)


def test_tokens_are_cached_by_what_the_rows_say(tiny_tokenizer, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    config = settings(data_path=str(rows_file), cutoff_len=400, cache_dataset=True)
    *_, first = data.load_data(config, tiny_tokenizer, 97)
    monkeypatch.setattr(data, "tokenize", None)
    os.utime(rows_file, (2e9, 2e9))  # a copy of the file is the same data
    assert data.load_data(config, tiny_tokenizer, 97)[2] == first
    rows_file.write_text(json.dumps(ROWS[1:]))
    with pytest.raises(TypeError):
        data.load_data(config, tiny_tokenizer, 97)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", None, "no such file"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[]", "empty"),
        ("a.jsonl", '{"text": "a"}\n\nx\n', r"a.jsonl, line 3: not JSON \(Expecting value, at character 1\)"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": 3}\n', "a.jsonl, line 3: without text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "\\ud800"}\n', "a.jsonl, line 3: it holds half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.json", '[{"instruction": "a"}]', "row 1: without instruction and output"),
        ("a.json", '[{"txet": "a"}, {"text": "b"}]', "row 1: without text"),
        ("a.json", '[{"text": "a"}, {"text": 3}]', "row 2: without text"),
        ("a.txt", "text", "not a .json or .jsonl"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        data.read_rows(settings(data_path=str(tmp_path / name)))


def test_rows_come_from_the_hub_by_name(monkeypatch, tmp_path):
    """Up to the libraries' own door: what ``datasets`` would give of the default data set, from a cache that is not empty."""
    asked = {}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no data set is in the cache"):
        data.read_rows(settings())
    (tmp_path / "some___data").mkdir()

    def load_dataset(path, **kwargs):
        asked.update(path=path, **kwargs)
        return iter(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    config = settings()
    assert list(data.read_rows(config).values()) == ROWS and asked["path"] == config.data_path and asked["split"] == "train"


def test_a_line_of_json_may_hold_any_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\u2028line"}, ensure_ascii=False) + "\n")
    assert data.read_rows(settings(data_path=str(tmp_path / "a.jsonl"))) == {"line 1": {"text": "one\u2028line"}}


def test_collate_pads_what_is_not_learned():
    batch = data.collate([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(prune_model=None), "--prune_model is required"),
        (dict(batch_size=10, micro_batch_size=4), "multiple of --micro_batch_size"),
        (dict(prompt_template_name="alpacca"), "did you mean 'alpaca'"),
        (dict(learning_rate=0), "above 0"),
        (dict(lora_dropout=1), "below 1"),
        (dict(wandb_project="p"), "wandb is not installed"),
        (dict(overwrite=True, resume_from_checkpoint="last"), "anew or continues"),
    ],
)
def test_settings_are_checked(wrong, said):
    with pytest.raises(UserError, match=said):
        settings(**wrong)


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(tmp_dir="x"), "--tmp_dir has no effect: only a --teacher"),
        (dict(no_instruction=True, train_on_inputs=True), "--train_on_inputs has no effect: with --no_instruction"),
        (dict(eval_limit=3, extra_val_dataset=("none",)), "--eval_limit has no effect: no text is measured on"),
    ],
)
def test_what_changes_nothing_is_said(flags, said):
    (line,) = settings(**flags).remarks()
    assert line.startswith(said) and not settings(teacher="x", tmp_dir="x", train_on_inputs=True, eval_limit=3).remarks()


def test_unknown_target_modules_are_named():
    with pytest.raises(UserError, match="q_prj.*did you mean 'q_proj'"):
        trainer.target_modules(make_model(), settings(lora_target_modules="q_prj"))
    assert set(trainer.target_modules(make_model(), settings())) >= {"q_proj", "down_proj"}


def checkpoint_at(folder, step, value=0.0, best=None):
    """A checkpoint-N folder as the Trainer leaves it, as far as its files are looked at."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(100)}, path / name)
    save_file({"a": torch.full((4, 4), value)}, path / "adapter_model.safetensors")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_model_checkpoint": best and str(best)}))
    return path


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    assert trainer.last_checkpoint(tmp_path) is None
    for step in (2, 9, 10):
        checkpoint_at(tmp_path, step)
    (checkpoint_at(tmp_path, 11) / "trainer_state.json").write_text('{"glo')
    (checkpoint_at(tmp_path, 12) / "trainer_state.json").unlink()
    assert trainer.last_checkpoint(tmp_path).name == "checkpoint-10"


def test_a_checkpoint_with_numbers_that_are_not_finite_is_never_the_last_good_one(tmp_path):
    good = checkpoint_at(tmp_path, 2)
    checkpoint_at(tmp_path, 4, value=float("nan"))
    with pytest.raises(UserError, match=f"step 5: the loss is not finite.*the last good checkpoint is {good}$"):
        trainer.Watch(settings()).check(SimpleNamespace(fp16=False, output_dir=tmp_path, world_size=1), 5, float("nan"), 0.0)
    model = make_model().requires_grad_(False)
    arguments, state = SimpleNamespace(fp16=False, output_dir=tmp_path, world_size=1), SimpleNamespace(global_step=6)
    trainer.Watch(settings()).on_train_end(arguments, state, None, model=model)
    model.lm_head.weight.requires_grad_(True).data[0, 0] = float("nan")  # by the last step, which no loss shows
    with pytest.raises(UserError, match="step 6: the loss is not finite"):
        trainer.Watch(settings()).on_train_end(arguments, state, None, model=model)


BROKEN = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json")


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("how", ["cut", "empty", "missing", "altered"])
def test_a_broken_file_of_a_checkpoint_is_named_and_an_earlier_one_taken(tmp_path, name, how):
    good, bad = checkpoint_at(tmp_path, 2), checkpoint_at(tmp_path, 4)
    content = (bad / name).read_bytes()
    if how == "missing":
        (bad / name).unlink()
    elif how == "altered":
        middle = len(content) // 2
        (bad / name).write_bytes(content[:middle] + b"\xff" * 8 + content[middle + 8 :])
    else:
        (bad / name).write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    assert trainer.last_checkpoint(tmp_path) == good and trainer.fault_of(good) is None
    assert str(bad / name) in trainer.fault_of(bad)


def test_a_checkpoint_of_other_processes_or_with_a_broken_best_one_is_not_gone_on_with(tmp_path):
    best = checkpoint_at(tmp_path, 2)
    last = checkpoint_at(tmp_path, 4, best=best)
    assert "rng_state_0.pth is missing, as after a run of another number" in trainer.fault_of(last, 2)
    (best / "adapter_model.safetensors").write_bytes(b"x")
    assert trainer.fault_of(last) == f"{best / 'adapter_model.safetensors'} is missing or broken"


def test_going_on_from_a_broken_checkpoint_is_one_line(pruned_folder, rows_file, tmp_path, here):
    (tmp_path / "out").mkdir()
    bad = checkpoint_at(tmp_path / "out", 4)
    (bad / "optimizer.pt").write_bytes(b"PK")
    for point, way in (("last", "is broken); start anew"), (bad, "is broken; go on from an earlier checkpoint, or start anew")):
        status, _, err = here(*quick(pruned_folder, rows_file, "--resume_from_checkpoint", point))
        assert status == 2 and len(err.strip().splitlines()) == 1 and "optimizer.pt " + way in err


@pytest.mark.parametrize(
    "said", ["PytorchStreamWriter failed writing file data/0", "[enforce fail at inline_container.cc:672] . unexpected pos 704"]
)
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_is_one_line(pruned_folder, rows_file, tmp_path, here, monkeypatch, said):
    save = torch.save

    def full(thing, path):
        if "optimizer" in str(path):
            raise RuntimeError(said)  # torch's own words
        save(thing, path)

    monkeypatch.setattr(torch, "save", full)
    status, _, err = here(*quick(pruned_folder, rows_file))
    assert status == 2 and len(err.strip().splitlines()) == 1 and "out: cannot be written (the disk is full" in err
    assert trainer.last_checkpoint(tmp_path / "out") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 1, "model": []}', "[" * 100_000, '{"format": 2}'])
def test_a_broken_record_is_found_before_the_training(pruned_folder, rows_file, tmp_path, here, content):
    (pruned_folder / "pruning.json").write_text(content)
    status, _, err = here(*quick(pruned_folder, rows_file, "--merge"))
    assert status == 2 and len(err.strip().splitlines()) == 1 and "pruning.json: broken (" in err and "--merge takes" in err
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_learned_are_named(tiny_tokenizer, rows_file, tmp_path):
    def load(vocab_size=97, **kwargs):
        data.load_data(settings(data_path=str(rows_file), **kwargs), tiny_tokenizer, vocab_size)

    with pytest.raises(UserError, match="none of its 24 rows has a token to learn within --cutoff_len 20; raise it"):
        load(cutoff_len=20)
    with pytest.raises(UserError, match=r"rows.json, row 1: token id \d+ is outside the model's vocabulary of 40"):
        load(vocab_size=40)
    rows_file.write_text(json.dumps([*ROWS, {"instruction": "a", "output": "\ud800"}]))
    with pytest.raises(UserError, match="row 25: it holds half of a surrogate pair"):
        load()
    rows_file.unlink()
    os.mkfifo(rows_file)
    with pytest.raises(UserError, match="rows.json: a pipe or device, not a plain file"):
        load()


def test_a_tokenizer_without_an_end_of_text_token_is_said(tiny_tokenizer, rows_file):
    tiny_tokenizer.eos_token = None
    with pytest.raises(UserError, match="--prune_model x: its tokenizer has no end-of-text token .*--no_add_eos_token"):
        data.load_data(settings(data_path=str(rows_file), cutoff_len=400), tiny_tokenizer, 97)
    train, *_ = data.load_data(settings(data_path=str(rows_file), cutoff_len=400, add_eos_token=False), tiny_tokenizer, 97)
    assert len(train)


# the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """One whole run on a pruned tiny model: (working folder, finished process, pruned model's folder)."""
    from tests.conftest import tiny_tokenizer_of

    home = tmp_path_factory.mktemp("trained")
    folder = prune_to(home / "pruned", tiny_tokenizer_of(), max_position_embeddings=512)
    (home / "rows.json").write_text(json.dumps(ROWS))
    (home / "text.txt").write_text("the number 7 it is, 7. " * 60)
    flags = quick(folder, home / "rows.json", "--val_set_size", 6, "--extra_val_dataset", "seven=text.txt", "--merge", "--num_epochs", 8)
    return home, post_train(*flags, cwd=home), folder


def test_a_run_learns_and_says_so(trained):
    home, done, _ = trained
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((home / "out" / "post_training.json").read_text())
    (figure,) = record["evaluation"]
    assert figure["data"] == "seven" and figure["after"] < 0.7 * figure["before"]
    assert record["validation"]["after"] < 0.7 * record["validation"]["before"]
    assert record["data"] | {"sha256": 0} == {"name": str(home / "rows.json"), "rows": 18, "held_out": 6, "sha256": 0}
    assert "held-out rows" in done.stdout and "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert (home / "out" / "figures" / "loss.png").stat().st_size > 5000
    assert (home / "out" / "log.txt").read_text().count("validation loss") >= 5


def test_merged_is_model_and_adapter(trained):
    from peft import PeftModel

    home, _, folder = trained
    ids = make_ids(2, 24)
    with torch.no_grad():
        merged = checkpoint.load(home / "out" / "merged")(ids).logits
        dense = checkpoint.load(folder)
        before = dense(ids).logits
        both = PeftModel.from_pretrained(dense, home / "out" / "adapter")(input_ids=ids).logits
    assert torch.allclose(merged, both, atol=1e-4 * float(both.abs().max())) and not torch.allclose(merged, before, atol=0.05)
    names = {path.name for path in (home / "out" / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "modeling.py", "tokenizer.json"} <= names and not any("adapter" in name for name in names)


def test_merged_loads_without_the_package(trained):
    home, _, _ = trained
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(model(torch.arange(8)[None]).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, home / "out" / "merged", home / "l.pt"], cwd=home, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.allclose(torch.load(home / "l.pt"), checkpoint.load(home / "out" / "merged")(torch.arange(8)[None]).logits, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_losses(pruned_folder, rows_file, tmp_path, here):
    flags = quick(pruned_folder, rows_file, "--num_epochs", 3)  # 12 steps, a checkpoint every 2
    assert here(*flags, "--output_dir", "whole")[0] == 0
    code = (
        "import os, signal, sys; sys.path.insert(0, %r)\n"
        "import post_training; from slimllm.training import trainer\n"
        "def on_step_end(self, args, state, control, **kw):\n"
        "    if state.global_step == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "trainer.Watch.on_step_end = on_step_end\n"
        "post_training.main(sys.argv[1:])" % str(ROOT)
    )
    killed = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=tmp_path, capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL
    status, _, err = here(*flags)
    assert status == 2 and "go on with --resume_from_checkpoint last" in err
    assert here(*flags, "--resume_from_checkpoint", "last")[0] == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole") and len(losses(tmp_path / "out")) == 12
    a, b = (Path(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("out", "whole"))
    assert a == b


def test_two_processes_learn_what_one_learns(pruned_folder, rows_file, tmp_path, here):
    flags = quick(pruned_folder, rows_file, "--lora_dropout", 0, "--num_epochs", 1)
    assert here(*flags, "--output_dir", "one")[0] == 0
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")  # a free port
    two = post_train(*flags, "--output_dir", "two", cwd=tmp_path, launcher=launcher)
    assert two.returncode == 0, two.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert two.stdout.count("adapter:") == 1
    assert json.loads((tmp_path / "two" / "post_training.json").read_text())["processes"] == 2


@pytest.mark.parametrize("lost, said", [(float("nan"), "the loss is not finite"), (1e3, "1000.00, twice the first one")])
def test_a_lost_loss_stops_the_run_and_keeps_the_checkpoint(pruned_folder, rows_file, tmp_path, here, monkeypatch, lost, said):
    """From the fifth step on the loss that the Trainer reports is replaced: no processor's arithmetic decides when it blows up."""
    on_log = trainer.Watch.on_log

    def spoiled(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and state.global_step == 5:
            logs["loss"] = lost
        on_log(self, args, state, control, logs, **kwargs)

    monkeypatch.setattr(trainer.Watch, "on_log", spoiled)
    status, _, err = here(*quick(pruned_folder, rows_file, "--num_epochs", 3))
    assert status == 2 and said in err and "step 5" in err and "lower --learning_rate (0.005)" in err
    assert len(err.strip().splitlines()) == 1 and f"the last good checkpoint is {Path('out') / 'checkpoint-4'}" in err
    assert not (tmp_path / "out" / "adapter").exists()


def test_steps_that_float16_skips_are_not_a_lost_loss(tmp_path):
    """The loss scale starts too large and is halved at each overflow; a gradient that never becomes finite is one."""
    arguments = SimpleNamespace(fp16=True, output_dir=tmp_path, world_size=1)
    watch = trainer.Watch(settings())
    for step in range(trainer.MAX_SKIPPED_STEPS):
        watch.check(arguments, step, 2.0, float("inf"))
    with pytest.raises(UserError, match="not finite"):
        watch.check(arguments, step, 2.0, float("inf"))
    with pytest.raises(UserError, match="not finite"):
        trainer.Watch(settings()).check(SimpleNamespace(fp16=False, output_dir=tmp_path, world_size=1), 0, 2.0, float("inf"))


def test_without_a_launcher_one_gpu_is_used(monkeypatch):
    """Where the Trainer found eight, and the user named the fourth. No GPU is touched here: the libraries' doors are stood in for."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = TrainingArguments(output_dir="x", use_cpu=True)
    arguments._n_gpu = 8
    trainer.stay_on(arguments, torch.device("cuda:3"))
    assert arguments.n_gpu == 1 and arguments.device == torch.device("cuda:3") == chosen[-1] and arguments.train_batch_size == 8


def test_the_trained_model_is_gone_before_the_merged_one_is_read(pruned_folder, rows_file, here, monkeypatch):
    """Else --merge needs memory for both."""
    loaded, alive = [], []
    load_model = loading.load_model

    def watched(*args):
        gc.collect()
        alive.append(sum(model() is not None for model in loaded))
        model = load_model(*args)
        loaded.append(weakref.ref(next(model.parameters())))
        return model

    monkeypatch.setattr(loading, "load_model", watched)
    assert here(*quick(pruned_folder, rows_file, "--merge", "--num_epochs", 1))[0] == 0
    assert alive == [0, 0]


def test_mistakes_are_one_line(pruned_folder, rows_file, tmp_path, here):
    for flags, said in (
        (["--prune_model", "nowhere/at/all", "--data_path", rows_file], "--prune_model nowhere/at/all"),
        (quick(pruned_folder, rows_file, "--resume_from_checkpoint", "last"), "holds no finished checkpoint"),
        (quick(pruned_folder, rows_file, "--lora_rank", 4), "--lora_rank"),
    ):
        status, _, err = here(*flags)
        assert status == 2 and said in err and len(err.strip().splitlines()) == 1, err
    (tmp_path / "out").mkdir()
    outputs.seal(tmp_path / "out", train.FILES, train.PARTS)
    (tmp_path / "out" / "log.txt").write_text("old")
    assert here(*quick(pruned_folder, tmp_path / "no.json", "--overwrite"))[0] == 2
    assert (tmp_path / "out" / "log.txt").read_text() == "old"


@pytest.mark.parametrize("name", [".git/HEAD", ".env", "checkpoint-900/model.bin", "thesis.tex", "adapter/mine.txt"])
@pytest.mark.parametrize("more", [["--overwrite"], ["--resume_from_checkpoint", "last"]])
def test_what_no_run_wrote_is_not_trained_over(pruned_folder, rows_file, tmp_path, here, name, more):
    for path in (tmp_path / "out" / name, tmp_path / "out" / "checkpoint-2" / "trainer_state.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{} ")
    status, _, err = here(*quick(pruned_folder, rows_file, *more))
    assert status == 2 and "no run of this program wrote" in err or "holds no finished checkpoint" in err
    outputs.seal(tmp_path / "out", train.FILES, train.PARTS)  # a run's folder, in which someone put something
    if more == ["--overwrite"]:
        status, _, err = here(*quick(pruned_folder, rows_file, *more))
        assert status == 2 and err.count("\n") == 1 and f"no run of this program wrote out/{name.partition('/')[0]}" in err
    assert (tmp_path / "out" / name).read_text() == "{} "


def test_the_model_that_is_trained_is_not_deleted(pruned_folder, rows_file, tmp_path, here):
    """``--prune_model out/merged --output_dir out --overwrite``."""
    (tmp_path / "out").mkdir()
    outputs.seal(pruned_folder)
    pruned_folder.rename(tmp_path / "out" / "merged")
    outputs.seal(tmp_path / "out", train.FILES, train.PARTS)
    before = (tmp_path / "out/merged/model.safetensors").read_bytes()
    status, _, err = here(*quick("out/merged", rows_file, "--overwrite"))
    assert status == 2 and "out holds out/merged, which this run reads; choose another --output_dir" in err
    assert (tmp_path / "out/merged/model.safetensors").read_bytes() == before


def test_a_run_is_gone_on_with_only_with_its_own_data_and_model(pruned_folder, rows_file, tmp_path, here, monkeypatch, tiny_tokenizer):
    def stop(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Watch, "on_step_end", stop, raising=False)
    flags = quick(pruned_folder, rows_file)
    assert here(*flags)[0] == 130
    resume = ["--resume_from_checkpoint", "last"]
    for change, said in ((["--seed", 7], "--seed 42, this one has 7"), (["--lora_r", 4], "--lora_r 8, this one has 4")):
        status, _, err = here(*flags, *resume, *change)
        assert status == 2 and f"--resume_from_checkpoint: the stopped run had {said}" in err and err.count("\n") == 1
    rows_file.write_text(json.dumps(ROWS[::-1]))
    status, _, err = here(*flags, *resume)
    assert status == 2 and "the stopped run had the training data" in err
    rows_file.write_text(json.dumps(ROWS))
    prune_to(pruned_folder, tiny_tokenizer, max_position_embeddings=512, seed=1)
    status, _, err = here(*flags, *resume)
    assert status == 2 and "the stopped run had the file model.safetensors" in err
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()


def test_the_perplexity_beside_a_teacher_is_the_text_s_own(pruned_folder, rows_file, tmp_path, here, tiny_folder, monkeypatch):
    monkeypatch.setattr("slimllm.training.teacher.distillation_dtype", lambda dtype, device: torch.float32)
    monkeypatch.setattr(train, "training_dtype", lambda device, dtype: torch.float32)
    found = {}
    for name, more in (("alone", []), ("taught", ["--teacher", tiny_folder])):
        flags = quick(pruned_folder, rows_file, "--val_set_size", 5, "--num_epochs", 1, *more)
        assert here(*flags, "--output_dir", name)[0] == 0
        found[name] = json.loads((tmp_path / name / "post_training.json").read_text())
    alone, taught = found["alone"]["validation"]["before"], found["taught"]["validation"]
    assert taught["before"] == pytest.approx(alone, rel=1e-5)
    first = next(entry for entry in found["taught"]["history"] if "eval_loss" in entry)
    assert first["eval_loss"] > first["eval_text_loss"] + 0.1


def test_the_tokenizer_is_handed_on_as_it_came(pruned_folder, rows_file, tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.enable_truncation(33)
    before = tiny_tokenizer.backend_tokenizer.to_str()
    data.load_data(settings(data_path=str(rows_file)), tiny_tokenizer, 97)
    assert tiny_tokenizer.backend_tokenizer.to_str() == before


def test_a_dense_model_can_be_trained_too(tiny_folder, tmp_path, here):
    (tmp_path / "t.jsonl").write_text('{"text": "abc def ghi"}\n' * 8)
    assert here(*quick(tiny_folder, tmp_path / "t.jsonl", "--merge", "--num_epochs", 1))[0] == 0
    assert outputs.foreign(tmp_path / "out") is None and not outputs.altered(tmp_path / "out") + outputs.altered(tmp_path / "out/merged")
    (tmp_path / "out" / "mine.txt").touch()  # it is not taken for the run's, whatever that does
    assert here(*quick(tiny_folder, tmp_path / "t.jsonl", "--num_epochs", 1, "--resume_from_checkpoint", "last"))[0] == 0
    assert outputs.foreign(tmp_path / "out").name == "mine.txt"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").config.model_type == "llama"
    assert loading.load_model(str(tmp_path / "out" / "merged"), "auto").dtype == torch.float32


@pytest.mark.parametrize("weight, average", [(1.0, True), (0.0, False)])
def test_a_teacher_s_divergence_joins_the_loss(pruned_folder, rows_file, tmp_path, here, tiny_folder, weight, average, monkeypatch):
    """The first loss is the divergence over the learned tokens, plus the weighted ordinary loss; it falls."""
    monkeypatch.setattr("slimllm.training.teacher.distillation_dtype", lambda dtype, device: torch.float32)
    monkeypatch.setattr(train, "training_dtype", lambda device, dtype: torch.float32)
    flags = quick(pruned_folder, rows_file, "--lora_dropout", 0, "--batch_size", 24, "--micro_batch_size", 12 if average else 24)
    status, out, err = here(*flags, "--teacher", tiny_folder, "--instruction_weight", weight, "--num_epochs", 8)
    assert status == 0, err
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]
    tokenizer = loading.load_tokenizer(str(tiny_folder))
    student, dense = (loading.load_model(str(folder), torch.float32) for folder in (pruned_folder, tiny_folder))
    divergence = ordinary = count = 0.0
    for row in ROWS:
        row = data.tokenize(row, tokenizer, settings(cutoff_len=280))
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            q, p = (model(ids).logits[0, :-1].log_softmax(-1)[labels != IGNORED] for model in (student, dense))
        divergence += float((p.exp() * (p - q)).sum())
        ordinary -= float(q.gather(1, labels[labels != IGNORED][:, None]).sum())
        count += len(q)
    assert found[0] == pytest.approx((divergence + weight * ordinary) / count, rel=1e-3)


def test_held_out_rows_are_measured_beside_a_teacher(pruned_folder, rows_file, tmp_path, here, tiny_folder, monkeypatch):
    """``eval_text_loss`` is the ordinary loss, ``eval_loss`` the divergence and its weighted share, both over batches of 3 and 2 rows."""
    monkeypatch.setattr("slimllm.training.teacher.distillation_dtype", lambda dtype, device: torch.float32)
    monkeypatch.setattr(train, "training_dtype", lambda device, dtype: torch.float32)
    flags = ["--val_set_size", 5, "--teacher", tiny_folder, "--instruction_weight", 0.5, "--num_epochs", 1]
    assert here(*quick(pruned_folder, rows_file, *flags))[0] == 0
    record = json.loads((tmp_path / "out" / "post_training.json").read_text())
    tokenizer = loading.load_tokenizer(str(tiny_folder))
    student, dense = (loading.load_model(str(folder), torch.float32) for folder in (pruned_folder, tiny_folder))
    _, held_out, _ = data.load_data(settings(data_path=str(rows_file), val_set_size=5, cutoff_len=280), tokenizer, 97)
    text = divergence = 0.0
    for start in (0, 3):
        batch = data.collate(list(held_out)[start : start + 3])
        labels = batch.pop("labels")[:, 1:]
        learned = labels != IGNORED
        with torch.no_grad():
            q, p = (model(**batch).logits[:, :-1].log_softmax(-1)[learned] for model in (student, dense))
        text -= float(q.gather(1, labels[learned][:, None]).mean()) * len(labels) / 5
        divergence += float((p.exp() * (p - q)).sum(-1).mean()) * len(labels) / 5
    first, *_, last = (entry for entry in record["history"] if "eval_loss" in entry)
    assert first["eval_text_loss"] == pytest.approx(text, rel=1e-4)
    assert first["eval_loss"] == pytest.approx(divergence + 0.5 * text, rel=1e-4)
    assert last["eval_loss"] < first["eval_loss"] and record["validation"]["before"] == pytest.approx(math.exp(text), rel=1e-4)


def test_what_the_record_says_of_held_out_rows():
    """Their perplexity before, and after the step whose adapter is kept: the one with the lowest loss that is trained on."""
    found = [(3.0, 2.0), (2.0, 1.5), (2.5, 1.0)]
    history = [{"eval_loss": loss, "eval_text_loss": text} for loss, text in found]
    assert train.losses_of([{"loss": 1.0}, *history])["validation"] == {"before": math.exp(2.0), "after": math.exp(1.5)}
    alone = [{"eval_loss": loss} for loss, _ in found]
    assert train.losses_of(alone)["validation"] == {"before": math.exp(3.0), "after": math.exp(2.0)}
    assert train.losses_of([{"loss": 1.0}])["validation"] is None


def test_a_teacher_of_another_vocabulary_is_refused(pruned_folder, rows_file, tmp_path, here, tiny_folder, tiny_tokenizer):
    tiny_tokenizer.add_tokens(["new"])
    tiny_tokenizer.save_pretrained(tiny_folder)
    status, _, err = here(*quick(pruned_folder, rows_file, "--teacher", tiny_folder))
    assert status == 2 and "its vocabulary is not that of" in err
    status, _, err = here(*quick(pruned_folder, rows_file, "--instruction_weight", 0))
    assert status == 2 and "name one" in err
