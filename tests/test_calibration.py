import json

import pytest
import torch
from safetensors.torch import save_file

from slimllm import calibration, hub
from slimllm.cli import UserError
from tests.conftest import TEXT, make_config, make_model


def load(tokenizer, **settings):
    return calibration.load(make_config(num_examples=4, seq_len=16, **settings), make_model(vocab_size=len(tokenizer)), tokenizer)


def test_text_files_jsonl_and_folders(tmp_path, tiny_tokenizer):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text(TEXT)
    (tmp_path / "d" / "b.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT.splitlines()))
    for name in ("d/a.txt", "d/b.jsonl", "d"):
        samples = load(tiny_tokenizer, calibration=str(tmp_path / name))
        assert samples.ids.shape == (4, 16) and samples.ids.dtype == torch.int64
        text = tiny_tokenizer.decode(samples.ids[0], skip_special_tokens=True).replace(" ", "")
        assert text.replace("\n", "") in (TEXT * 2).replace(" ", "").replace("\n", "")


def test_short_texts_are_joined(tmp_path, tiny_tokenizer):
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab"}) for _ in range(40)))
    assert load(tiny_tokenizer, calibration=str(path)).ids.shape == (4, 16)


def test_same_seed_same_samples_other_seed_others(text_file, tiny_tokenizer):
    a, b, c = (load(tiny_tokenizer, calibration=str(text_file), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.ids, b.ids) and a.sha256 == b.sha256
    assert not torch.equal(a.ids, c.ids) and a.sha256 != c.sha256
    assert len({tuple(row.tolist()) for row in a.ids}) == 4


def test_saved_samples_are_taken_back(tmp_path, text_file, tiny_tokenizer):
    first = load(tiny_tokenizer, calibration=str(text_file))
    first.save(tmp_path)
    again = load(tiny_tokenizer, calibration=str(tmp_path / "calibration.safetensors"), seed=7)
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256


def test_self_samples_are_deterministic_and_leave_the_random_state_alone(tiny_tokenizer):
    a, b, c = (load(tiny_tokenizer, calibration="self", seed=seed) for seed in (1, 1, 2))
    assert a.ids.shape == (4, 16) and torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids)
    model, state = make_model(vocab_size=len(tiny_tokenizer)), torch.get_rng_state()
    calibration.sample_from_model(model, tiny_tokenizer, make_config(num_examples=2, seq_len=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert not set(tiny_tokenizer.all_special_ids) & set(a.ids.flatten().tolist())


def test_held_back_samples_are_no_calibration_samples(tiny_tokenizer):
    model, config = make_model(vocab_size=len(tiny_tokenizer)), make_config(num_examples=8, seq_len=16, calibration="self")
    held = calibration.held_back(model, tiny_tokenizer, config)
    samples = calibration.load(config, model, tiny_tokenizer).ids.tolist()
    assert held.shape == (4, 16) and not any(row in samples for row in held.tolist())


def test_unnamed_source_falls_back_to_self_and_says_so(tiny_tokenizer, caplog):
    with caplog.at_level("INFO", logger="slimllm"):
        assert load(tiny_tokenizer).source == "self"
    assert "bookcorpus" in caplog.text and "--calibration self" in caplog.text


@pytest.mark.parametrize("name", ["bookcorpus", "c4", "wikitext2"])
def test_hub_sources_join_rows(name, tiny_tokenizer, monkeypatch):
    asked = {}

    def rows(path, column, **kwargs):
        asked.update(path=path, column=column, **kwargs)
        yield from TEXT.splitlines()

    monkeypatch.setattr(hub, "rows", rows)
    samples = load(tiny_tokenizer, calibration=name)
    assert samples.source == name and samples.ids.shape == (4, 16)
    assert asked["split"] == "train" and asked["column"] == "text" and "/" in asked["path"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: "bookcorpus", "--calibration bookcorpus: hub data set"),
        (lambda p: "bookcorpsu", "did you mean 'bookcorpus'"),
        (lambda p: p / "missing.txt", "no such file"),
        (lambda p: p / "empty.txt", "0 tokens are too few"),
        (lambda p: p / "short.txt", "too few for 4 samples of 16"),
        (lambda p: p / "bad.jsonl", "bad.jsonl, line 2: not a JSON object with a text field"),
        (lambda p: p / "latin.txt", "not UTF-8"),
        (lambda p: p / "nothing", "holds no .txt or .jsonl file"),
        (lambda p: p / "image.png", "not a .txt, .jsonl or .safetensors file"),
        (lambda p: p / "broken.safetensors", "not a calibration file"),
        (lambda p: p / "other.safetensors", "not a calibration file"),
        (lambda p: p / "float.safetensors", "not int64"),
        (lambda p: p / "vocab.safetensors", "outside the model's vocabulary"),
    ],
)
def test_bad_sources_are_named(make, message, tmp_path, tiny_tokenizer):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txet": 1}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors at all")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"calibration_ids": torch.zeros(4, 4)}, tmp_path / "float.safetensors")
    save_file({"calibration_ids": torch.full((4, 4), 10**6)}, tmp_path / "vocab.safetensors")
    with pytest.raises(UserError, match=message):
        name = str(make(tmp_path))
        calibration.check_source(name)
        load(tiny_tokenizer, calibration=name)
