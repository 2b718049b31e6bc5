import math

import pytest
import torch

from slimllm.data import texts
from slimllm.errors import UserError
from slimllm.evaluation.perplexity import continuations, perplexity
from slimllm.models import checked, hub, loading
from tests.conftest import TEXT, family_config, logits, make_ids, make_model


def test_perplexity_is_the_exponential_of_the_mean_loss():
    model, blocks = make_model(), make_ids(7, 20)
    loss = torch.nn.functional.cross_entropy(logits(model, blocks)[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    assert perplexity(model, blocks) == pytest.approx(math.exp(loss), rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch(monkeypatch):
    model, blocks = make_model(), make_ids(7, 20)
    expected = perplexity(model, blocks)
    monkeypatch.setattr("slimllm.streaming.runner.TOKENS_PER_BATCH", 40)
    monkeypatch.setattr("slimllm.evaluation.perplexity.MIN_ACTIVATION_BYTES", 3 * 20 * 32 * 4)  # three blocks at a time
    monkeypatch.setattr("slimllm.evaluation.perplexity.LOGIT_ROWS", 3)
    assert perplexity(model, blocks) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite_is_an_error():
    model = make_model()
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        perplexity(model, make_ids(2, 20))


def test_evaluating_casts_weights_only_for_a_while(monkeypatch):
    model, ids = make_model("llama_tied"), make_ids()
    before = logits(model, ids)
    monkeypatch.setattr(loading, "evaluation_dtype", lambda dtype, device: torch.bfloat16)
    with loading.placed_for_evaluation(model, torch.device("cpu")):
        assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not torch.equal(logits(model, ids).float(), before)
    assert torch.equal(logits(model, ids), before)


def test_wikitext_file_is_joined_as_the_hub_s_rows(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = Title = \n \n A sentence . \n")
    (text,) = texts.load_texts((str(path),))
    assert text.name == "wikitext2" and text.text == "\n\n".join(["", " = Title = \n", "", " A sentence . \n"])
    (named,) = texts.load_texts((f"wikitext2={path}",))
    assert named.sha256 == text.sha256


def test_ptb_file_is_joined_sentence_by_sentence(tmp_path):
    path = tmp_path / "ptb.valid.txt"
    path.write_text(" one <unk> \n two N \n")
    (text,) = texts.load_texts((str(path),))
    assert text.name == "ptb" and text.text == "one <unk>\n\ntwo N"


def test_hub_texts_are_joined_as_who_measured_before_joined_them(monkeypatch):
    asked = {}

    def rows(path, column, **source):
        asked[path] = (column, source)
        return ["one", "two"]

    monkeypatch.setattr(texts.hub, "rows", rows)
    wiki, c4 = texts.load_texts(("wikitext2", "c4"))
    assert (wiki.text, c4.text) == ("one\n\ntwo", "one two") and [text.name for text in texts.load_texts(None)] == ["wikitext2", "ptb"]
    column, source = asked["allenai/c4"]
    assert column == "text" and source["split"] == "validation[:1100]" and set(source) == {"data_files", "split"}


def test_any_text_is_taken_as_it_is(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("a\nb\n")
    (text,) = texts.load_texts((str(path),))
    assert (text.name, text.text) == ("novel", "a\nb\n")


def test_blocks_are_cut_from_one_stream_and_limited(tiny_tokenizer):
    text = texts.EvalText("t", TEXT, "x")
    ids = tiny_tokenizer(TEXT).input_ids
    blocks = texts.blocks_of(text, tiny_tokenizer, family_config("llama_gqa"), 16)
    assert blocks.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert len(texts.blocks_of(text, tiny_tokenizer, family_config("llama_gqa"), 16, limit=3)) == 3


def test_nothing_named_and_no_hub_takes_the_python_manual(caplog):
    with caplog.at_level("INFO", logger="slimllm"):
        (text,) = texts.load_texts(None)
    assert text.name == "python_manual" and len(text.text) > 100_000 and "Python" in text.split
    assert "--eval_data python_manual" in caplog.text


def test_nothing_named_takes_both_sets_of_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "rows", lambda path, column, **kwargs: iter([f"{kwargs['split']} {column}", "b"]))
    assert [(t.name, t.text) for t in texts.load_texts(None)] == [("wikitext2", "test text\n\nb"), ("ptb", "validation sentence\n\nb")]
    assert texts.load_texts(("none",)) == []


@pytest.mark.parametrize(
    "item, message",
    [
        ("wikitext", "did you mean 'wikitext2'"),
        ("missing.txt", "no such file"),
        ("ptb=missing", "no such file"),
        ("wikitext2", "give a local file as wikitext2=FILE"),
        ("empty.txt", "the file is empty"),
    ],
)
def test_bad_texts_are_named(item, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=message):
        texts.load_texts((item,))


def test_a_text_shorter_than_a_block_is_an_error(tiny_tokenizer):
    with pytest.raises(UserError, match="too short for one block"):
        texts.blocks_of(texts.EvalText("t", "abc", "x"), tiny_tokenizer, family_config("llama_gqa"), 16)


def test_continuations_are_deterministic_by_seed(tiny_tokenizer):
    model = make_model()
    assert continuations(model, tiny_tokenizer, seed=5) == continuations(model, tiny_tokenizer, seed=5)
    greedy = continuations(model, tiny_tokenizer, temperature=0.0)
    assert len(greedy) == 3


def test_a_token_that_the_model_lacks_is_named_before_a_layer_runs(tiny_tokenizer):
    tiny_tokenizer.add_tokens(["zebra"])
    config, size = family_config("llama_gqa", vocab_size=len(tiny_tokenizer) - 1), len(tiny_tokenizer) - 1
    text = texts.EvalText("animals", TEXT + "zebra" * 40, "x")
    with pytest.raises(UserError, match=f"animals: token id {size} is outside the model's vocabulary of {size}$"):
        texts.blocks_of(text, tiny_tokenizer, config, 16)
    assert len(texts.blocks_of(text, tiny_tokenizer, config, 16, limit=8)) == 8  # it does not occur there
    with pytest.raises(UserError, match="is outside the model's vocabulary of 60"):
        continuations(make_model(vocab_size=60), tiny_tokenizer)


def test_more_tokens_than_the_model_was_made_for_are_said_in_one_line(caplog):
    config = family_config("llama_gqa")
    checked.warn_of_length(config, seq_len=64, max_seq_len=64)
    assert not caplog.records
    checked.warn_of_length(config, seq_len=65, max_seq_len=128)
    assert caplog.messages == [
        "--seq_len 65 and --max_seq_len 128: the model was made for at most 64 tokens at a time (max_position_embeddings)"
    ]
