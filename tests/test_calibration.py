import json
import os
import random

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import GenerationConfig

import hf_prune
from slimllm.data import calibration, texts
from slimllm.data.calibration import Calibration
from slimllm.errors import UserError
from slimllm.models import hub
from slimllm.models.loading import WholeModel
from tests.conftest import TEXT, make_config, make_ids, make_model, tiny_tokenizer_of


def load(tokenizer, source=None, seed=42):
    spec = calibration.SampleSpec(4, 16, seed)
    return calibration.load(source, make_model(vocab_size=len(tokenizer)), tokenizer, spec)


def test_text_files_jsonl_and_folders(tmp_path, tiny_tokenizer):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text(TEXT)
    (tmp_path / "d" / "b.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT.splitlines()))
    for name in ("d/a.txt", "d/b.jsonl", "d"):
        samples = load(tiny_tokenizer, str(tmp_path / name))
        assert samples.ids.shape == (4, 16) and samples.ids.dtype == torch.int64
        text = tiny_tokenizer.decode(samples.ids[0], skip_special_tokens=True).replace(" ", "")
        assert text.replace("\n", "") in (TEXT * 2).replace(" ", "").replace("\n", "")


def test_short_texts_are_joined(tmp_path, tiny_tokenizer):
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab"}) for _ in range(40)))
    assert load(tiny_tokenizer, str(path)).ids.shape == (4, 16)


def test_same_seed_same_samples_other_seed_others(text_file, tiny_tokenizer):
    a, b, c = (load(tiny_tokenizer, str(text_file), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.ids, b.ids) and a.sha256 == b.sha256
    assert not torch.equal(a.ids, c.ids) and a.sha256 != c.sha256
    assert len({tuple(row.tolist()) for row in a.ids}) == 4


def test_saved_samples_are_taken_back(tmp_path, text_file, tiny_tokenizer):
    first = load(tiny_tokenizer, str(text_file))
    first.save(tmp_path)
    again = load(tiny_tokenizer, str(tmp_path / "calibration.safetensors"), seed=7)
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256


def test_self_samples_are_deterministic_and_leave_the_random_state_alone(tiny_tokenizer):
    a, b, c = (load(tiny_tokenizer, "self", seed=seed) for seed in (1, 1, 2))
    assert a.ids.shape == (4, 16) and torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids)
    model, state = make_model(vocab_size=len(tiny_tokenizer)), torch.get_rng_state()
    calibration.sample_from_model(model, tiny_tokenizer, calibration.SampleSpec(2, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert not set(tiny_tokenizer.all_special_ids) & set(a.ids.flatten().tolist())


TEMPLATE = (
    "S{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>/{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_share_of_what_the_model_writes_is_conversations(tiny_tokenizer):
    """Before a question, between it and its answer, and after that the template's own words; what ends a turn comes nowhere else."""
    tiny_tokenizer.chat_template = TEMPLATE
    model, end = make_model(vocab_size=len(tiny_tokenizer)), tiny_tokenizer.eos_token_id
    model.generation_config.eos_token_id = end
    with torch.no_grad():
        model.lm_head.weight[end] += 0.3 * model.lm_head.weight.abs().mean()  # so that turns end now and then
    spec = calibration.SampleSpec(24, 96, 3, chat_share=0.75)
    ids = calibration.sample_from_model(model, tiny_tokenizer, spec)
    assert ids.shape == (24, 96) and not (ids[:6] == end).any()
    again = calibration.sample_from_model(model, tiny_tokenizer, spec)
    assert torch.equal(ids, again)
    before, after, between = (tiny_tokenizer(text, add_special_tokens=False).input_ids for text in ("S<user>", "/<user>", "/<assistant>"))
    turns = 0
    for row in ids[6:].tolist():
        assert row[: len(before)] == before
        for number, place in enumerate(i for i, token in enumerate(row) if token == end):
            forced = after if number % 2 else between
            assert row[place + 1 : place + 1 + len(forced)] == forced[: len(row) - place - 1]
            turns += 1
    assert turns > 4 and not set(tiny_tokenizer.all_special_ids) - {end} & set(ids.flatten().tolist())


@pytest.mark.parametrize(
    "template, seq_len, said",
    [
        (None, 64, "--chat_share 0.5: .*no chat template"),
        ("{{ messages[0]['content'] }}", 64, "--chat_share 0.5: .*does not write a question, an answer and a question in turn"),
        (
            "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}",
            64,
            "--chat_share 0.5: .*by one and the same special token",
        ),
        (TEMPLATE, 4, "--seq_len 4: the chat template takes 7 tokens before a question begins"),
    ],
)
def test_a_template_by_which_no_conversation_can_be_written_is_refused(template, seq_len, said, tiny_tokenizer):
    tiny_tokenizer.chat_template = template
    config = make_config(chat_share=0.5, self_share=0.5, seq_len=seq_len)
    with pytest.raises(UserError, match=said):
        calibration.samples_for(config, "self", None, tiny_tokenizer)


def test_unnamed_source_falls_back_to_self_and_says_so(tiny_tokenizer, caplog):
    with caplog.at_level("INFO", logger="slimllm"):
        assert load(tiny_tokenizer).source == "self"
    assert "bookcorpus" in caplog.text and "--calibration self" in caplog.text


def test_where_no_text_can_be_had_the_model_writes_once_and_all_of_it(tiny_tokenizer, monkeypatch):
    model, config = make_model(vocab_size=len(tiny_tokenizer)), make_config(num_examples=6, seq_len=16, self_share=0.5)
    write, asked = calibration.sample_from_model, []

    def counted(model, tokenizer, spec):
        asked.append(spec.num_examples)
        return write(model, tokenizer, spec)

    monkeypatch.setattr(calibration, "sample_from_model", counted)
    with WholeModel(model, torch.device("cpu")) as whole:
        samples = calibration.samples_for(config, None, whole, tiny_tokenizer)
    assert asked == [6] and samples.own == 6 and samples.source == "self"
    assert len({tuple(row) for row in samples.ids.tolist()}) == 6


@pytest.mark.parametrize("name", ["bookcorpus", "c4", "wikitext2"])
def test_hub_sources_join_rows(name, tiny_tokenizer, monkeypatch):
    asked = {}

    def rows(path, column, **kwargs):
        asked.update(path=path, column=column, **kwargs)
        yield from TEXT.splitlines()

    monkeypatch.setattr(hub, "rows", rows)
    samples = load(tiny_tokenizer, name)
    assert samples.source == name and samples.ids.shape == (4, 16)
    assert asked["split"] == "train" and asked["column"] == "text" and "/" in asked["path"]


@pytest.mark.parametrize(
    "name, asked",
    [
        ("hub:a/b", dict(path="a/b", column="text", split="train")),
        ("hub:a/b:story", dict(path="a/b", column="story", split="train")),
        ("hub:a/b.safetensors", dict(path="a/b.safetensors", column="text", split="train")),
        ("hub:a/b/part:story:train_sft", dict(path="a/b", column="story", split="train_sft", name="part")),
    ],
)
def test_any_data_set_of_the_hub_is_named_with_its_column(name, asked, tiny_tokenizer, monkeypatch):
    seen = {}

    def rows(path, column, stream, **kwargs):
        seen.update(path=path, column=column, **kwargs)
        yield from TEXT.splitlines()

    monkeypatch.setattr(hub, "rows", rows)
    calibration.check_source(name)
    assert calibration.characters_of(name) == calibration.MAX_CHARACTERS
    assert load(tiny_tokenizer, name).ids.shape == (4, 16) and seen == asked


def test_conversations_of_the_hub_are_written_by_the_chat_template(tiny_tokenizer, monkeypatch):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    monkeypatch.setattr(hub, "rows", lambda *_, **__: [[{"role": "user", "content": line}] for line in TEXT.splitlines()])
    text = calibration.text_of("hub:a/b:messages", 0, tiny_tokenizer)
    assert text == "\n".join(f"user: {line}\n" for line in TEXT.splitlines())
    assert load(tiny_tokenizer, "hub:a/b:messages").ids.shape == (4, 16)
    monkeypatch.setattr(hub, "rows", lambda *_, **__: [[{"from": "human", "value": "hello"}]])
    assert calibration.text_of("hub:a/b:conversations", 0, tiny_tokenizer) == "user: hello\n"
    for rows, said in (
        ([["a"]], "holds a list, and not of messages"),
        ([[{"role": "user"}]], ": message 1 is not one with a role and a content"),
    ):
        monkeypatch.setattr(hub, "rows", lambda *_, rows=rows, **__: rows)
        with pytest.raises(UserError, match=f"--calibration hub:a/b:x: the column x ?{said}"):
            load(tiny_tokenizer, "hub:a/b:x")
    monkeypatch.setattr(hub, "rows", lambda *_, **__: [7])
    with pytest.raises(UserError, match="--calibration hub:a/b:size: the column size holds a int, neither text nor messages"):
        load(tiny_tokenizer, "hub:a/b:size")


def test_a_column_that_a_data_set_of_the_hub_has_not_is_named_with_those_that_it_has(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", lambda path, **_: iter([{"prompt": "a", "answer": "b"}]))
    with pytest.raises(UserError, match="hub data set a/b: it has no column text, but prompt, answer"):
        load(tiny_tokenizer, "hub:a/b")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: "hub:alpaca", "a data set of the hub is hub:OWNER/NAME, then"),
        (lambda p: "hub:a/b:c:d:e", "a data set of the hub is hub:OWNER/NAME, then"),
        (lambda p: "hub:a/b", "--calibration hub:a/b: hub data set a/b"),
        (lambda p: "bookcorpus", "--calibration bookcorpus: hub data set"),
        (lambda p: "bookcorpsu", "did you mean 'bookcorpus'"),
        (lambda p: p / "missing.txt", "no such file"),
        (lambda p: p / "empty.txt", "0 tokens are too few"),
        (lambda p: p / "short.txt", "too few for 4 samples of 16"),
        (lambda p: p / "bad.jsonl", "bad.jsonl, line 2: not a JSON object with a text field"),
        (lambda p: p / "broken.jsonl", r"broken.jsonl, line 3: not JSON \(Expecting ',' delimiter, at character 13\)"),
        (lambda p: p / "number.jsonl", "number.jsonl, line 2: not a JSON object with a text field that is a string"),
        (lambda p: p / "latin.txt", "not UTF-8"),
        (lambda p: p / "utf16.txt", r"utf16.txt: not UTF-8 text \(byte 1 is zero, as in UTF-16 or a binary file\)"),
        (lambda p: p / "bom16.txt", r"bom16.txt: not UTF-8 text \(byte 0\)"),
        (lambda p: p / "blank.txt", "blank.txt: nothing but blanks"),
        (lambda p: p / "half.jsonl", "half.jsonl, line 2: its text holds half of a surrogate pair"),
        (lambda p: p / "deep.jsonl", "deep.jsonl, line 1: not JSON"),
        (lambda p: p / "pipe.txt", "pipe.txt: a pipe or device, not a plain file"),
        (lambda p: p / "pipe.safetensors", "pipe.safetensors: a pipe or device"),
        (lambda p: p / "pipes", "pipes/a.txt: a pipe or device"),
        (lambda p: p / "links", "links/b.txt: the link leads nowhere"),
        (lambda p: p / "links" / "b.txt", "b.txt: the link leads nowhere"),
        (lambda p: p / "folders", "folders/c.txt: a folder, not a file"),
        (lambda p: p / "locked", "locked/d.txt: Permission denied"),
        (lambda p: p / "nothing", "holds no .txt or .jsonl file"),
        (lambda p: p / "image.png", "not a .txt, .jsonl or .safetensors file"),
        (lambda p: p / "broken.safetensors", "not a calibration file"),
        (lambda p: p / "other.safetensors", "not a calibration file"),
        (lambda p: p / "float.safetensors", "not int64"),
        (lambda p: p / "vocab.safetensors", "outside the model's vocabulary"),
    ],
)
def test_bad_sources_are_named(make, message, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # as for anyone but root
    (tmp_path / "utf16.txt").write_bytes(TEXT.encode("utf-16-le"))
    (tmp_path / "bom16.txt").write_bytes(TEXT.encode("utf-16"))
    (tmp_path / "blank.txt").write_text("\n \n" * 500)
    (tmp_path / "half.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for name in ("pipes", "links", "folders", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "z.txt").write_text(TEXT)
    for name in ("pipe.txt", "pipe.safetensors", "pipes/a.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "links" / "b.txt").symlink_to("nowhere")
    (tmp_path / "folders" / "c.txt").mkdir()
    (tmp_path / "locked" / "d.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n\n{"text": "a"\n')
    (tmp_path / "number.jsonl").write_text('{"text": "good"}\n{"text": 7}\n')
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
        load(tiny_tokenizer, name)


def test_special_tokens_and_the_generation_config_leave_self_samples_alone():
    """Reserved special tokens without a role, several end tokens, penalties: as in Llama-3.1's tokenizer and generation config."""
    tokenizer = tiny_tokenizer_of()
    tokenizer.add_tokens([AddedToken(f"<|reserved_{i}|>", special=True) for i in range(8)], special_tokens=True)
    model = make_model(vocab_size=len(tokenizer) + 3)  # rows without a token, too
    reserved = set(range(len(tokenizer) - 8, len(tokenizer) + 3))
    plain = calibration.sample_from_model(model, tokenizer, calibration.SampleSpec(20, 16))  # more than one batch
    assert plain.shape == (20, 16) and not reserved & set(plain.flatten().tolist())
    common = plain.flatten().mode().values.item()
    model.generation_config = GenerationConfig(
        eos_token_id=[2, common], pad_token_id=len(tokenizer) - 1, repetition_penalty=5.0, top_k=1, max_new_tokens=2, min_length=3
    )
    ids = calibration.sample_from_model(model, tokenizer, calibration.SampleSpec(20, 16))
    assert ids.shape == (20, 16) and not (reserved | {2, common}) & set(ids.flatten().tolist())
    assert len(set(ids.flatten().tolist())) > 16  # no penalty and no top-k narrows what is sampled
    assert model.generation_config.repetition_penalty == 5.0  # and it is the model's own again


@pytest.mark.parametrize("name, streams", [("bookcorpus", True), ("c4", True), ("wikitext2", False)])
def test_small_hub_data_is_downloaded_and_large_data_streamed(name, streams, tiny_tokenizer, monkeypatch):
    """What is downloaded lies in the cache for a node without a network."""
    asked = []
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def load_dataset(path, **kwargs):
        asked.append(kwargs)
        return iter({"text": line} for line in TEXT.splitlines())

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load(tiny_tokenizer, name)
    assert asked[0]["streaming"] is streams
    asked.clear()
    list(hub.rows("yahma/alpaca-cleaned", split="train"))
    assert asked[0]["streaming"] is False


def test_the_hub_is_probed_with_the_client_that_is_used(monkeypatch):
    """Its proxies and certificates are not urllib's."""

    class Session:
        def head(self, url, timeout):
            seen.append((url, timeout))
            if fails:
                raise HTTPError("certificate verify failed")

    seen, fails = [], False
    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    assert hub.reachable() and seen == [(hub.huggingface_hub.constants.ENDPOINT, 5)]
    hub.reachable.cache_clear()
    fails = True
    assert not hub.reachable() and hub.huggingface_hub.constants.HF_HUB_OFFLINE
    hub.reachable.cache_clear()


@pytest.mark.parametrize("case, begins", [("llama_gqa", False), ("gemma2", True), ("gemma3", True)])
def test_every_sample_and_block_begins_as_the_model_expects(case, begins, tiny_tokenizer, text_file):
    """Gemma computes something else where a text does not begin with <bos>; Llama's blocks are the published code's, without."""
    model, spec = make_model(case, vocab_size=len(tiny_tokenizer)), calibration.SampleSpec(6, 12)
    first = texts.first_token(tiny_tokenizer, model.config)
    assert first == (tiny_tokenizer.bos_token_id if begins else None)
    stream = texts.token_ids(text_file.read_text(), tiny_tokenizer, special=False)
    blocks = texts.blocks_of(texts.EvalText("t", text_file.read_text(), "t"), tiny_tokenizer, model.config, 12)
    drawn = calibration.load(str(text_file), model, tiny_tokenizer, spec).ids
    own = calibration.load("self", model, tiny_tokenizer, spec).ids
    for ids in (blocks, drawn, own):
        assert ids.shape[1] == 12 and all((row[0] == tiny_tokenizer.bos_token_id) == begins for row in ids)
        assert (ids[:, int(begins) :] != tiny_tokenizer.bos_token_id).all()
    assert torch.equal(blocks[:, int(begins) :].flatten(), stream[: blocks[:, int(begins) :].numel()])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_of_a_large_file_only_what_is_used_is_read(tmp_path, suffix, monkeypatch):
    lines = [f"{i} caf\u00e9 \u4e2d \U0001f600" for i in range(400)]
    path = tmp_path / f"large{suffix}"
    path.write_text("\n".join(lines if suffix == ".txt" else [json.dumps({"text": line}) for line in lines]))
    small = [texts.read_text(path, 500, random.Random(seed)) for seed in range(3)]
    rngs = [random.Random(seed) for seed in range(3)]
    whole = "\n".join(lines)
    starts = [rng.randrange(len(whole) - 500 + 1) for rng in rngs]
    assert small == [whole[start : start + 500] for start in starts]  # as long as there is room for all of it
    monkeypatch.setattr(texts, "WHOLE_BYTES", 1000)
    if suffix == ".txt":
        monkeypatch.setattr(texts, "_text_of", lambda path, content, start, tokenizer: found.append(len(content)) or content.decode())
    found = []
    for seed in range(40):
        text = texts.read_text(path, 500, random.Random(seed))
        assert text in whole and len(text) == 500
    assert all(size <= 500 * texts.UTF8_BYTES for size in found)


def test_a_large_file_of_one_line_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "WHOLE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}))
    (tmp_path / "a.txt").write_text(TEXT.replace("\n", " "))
    (tmp_path / "bad.txt").write_bytes(b"a" * 1500 + b"\xff" * 3000)
    for name in ("a.jsonl", "a.txt"):
        text = texts.read_text(tmp_path / name, 200, random.Random(1))
        assert len(text) == 200 and text.replace("\n", " ") in TEXT.replace("\n", " ")
    with pytest.raises(UserError, match=r"bad.txt: not UTF-8 text \(byte [0-9]{4}\)"):
        texts.read_text(tmp_path / "bad.txt", 500, random.Random(1))


def test_a_broken_line_in_the_middle_of_a_large_file_is_named_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "WHOLE_BYTES", 1000)
    lines = [json.dumps({"text": "the quick fox"}) for _ in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", *lines]))
    rng = random.Random(1)
    rng.randrange = lambda end: 399 * (len(lines[0]) + 1) - 5
    with pytest.raises(UserError, match="a.jsonl, line 401: not JSON"):
        texts.read_text(tmp_path / "a.jsonl", 500, rng)


@pytest.mark.parametrize("text", ["word " * 1000, "two\nlines"])
def test_a_text_in_place_of_a_name_is_not_repeated(text):
    with pytest.raises(UserError, match="a text of .* give texts as a list") as caught:
        calibration.check_source(text)
    assert len(str(caught.value)) < 200


def test_what_a_model_is_distilled_on_is_as_long_as_the_samples_of_a_file(tiny_folder, text_file, tmp_path, monkeypatch):
    """Whose length no flag says."""
    monkeypatch.chdir(tmp_path)
    Calibration(make_ids(6, 12), "test").save(tmp_path)
    flags = ["--base_model", str(tiny_folder), "--calibration", "calibration.safetensors", "--eval_data", "none", "--recipe", "distilled"]
    assert hf_prune.main([*flags, "--distill_examples", "8", "--target_sparsity", "0.3"]) == 0
    found = load_file(tmp_path / "prune_log/llama_prune/calibration.safetensors")
    assert found["calibration_ids"].shape == (6, 12) and found["distill_ids"].shape == (8, 12)
