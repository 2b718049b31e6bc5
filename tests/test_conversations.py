"""Conversations: rows of messages as calibration text and as training data, by the model's chat template."""

import json

import pytest

import hf_prune
from slimllm.commands import COMMANDS
from slimllm.data import conversations
from slimllm.data.texts import load_texts, read_text
from slimllm.errors import UserError
from slimllm.training import data

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TALK = [
    {"role": "user", "content": "the quick fox"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "who jumps"},
    {"role": "assistant", "content": "the fox"},
]


@pytest.fixture
def chatty(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    return tiny_tokenizer


def rows(folder, *conversations):
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def test_text_and_answers(chatty):
    text, found = conversations.answers_in(chatty, TALK)
    assert [text[begin:end] for begin, end in found] == ["a dog</s>", "the fox</s>"]
    assert conversations.as_text(chatty, TALK[:1], answer_next=True).endswith("</s><assistant>")


def test_calibration_text_is_written_by_the_template(chatty, tmp_path):
    path = rows(tmp_path, TALK[:2], TALK[2:])
    expected = "\n".join(conversations.as_text(chatty, part) for part in (TALK[:2], TALK[2:]))
    assert read_text(path, tokenizer=chatty) == expected
    chatty.chat_template = None
    with pytest.raises(UserError, match="chat.jsonl, line 1: rows of messages: the model has no chat template"):
        read_text(path, tokenizer=chatty)
    with pytest.raises(UserError, match="chat.jsonl, line 1: a row of messages, where perplexity is measured on plain text; give rows"):
        load_texts((str(path),))


def test_a_run_takes_conversations(tiny_folder, chatty, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chatty.save_pretrained(tiny_folder)
    flags = ["--calibration", rows(tmp_path, *[TALK] * 80), "--num_examples", "4", "--seq_len", "16", "--eval_data", "none"]
    assert hf_prune.main([str(tiny_folder), *map(str, flags)]) == 0
    chatty.chat_template = "{{ raise_exception('only with a system message') }}"
    chatty.save_pretrained(tiny_folder)
    assert hf_prune.main([str(tiny_folder), *map(str, flags), "--overwrite"]) == 2
    assert "line 1: the model's chat template does not take these messages (only with a system message)" in capsys.readouterr().err


def test_only_answers_are_learned(chatty, tmp_path):
    def tokens(*flags):
        config = COMMANDS["train"].parsed("train", ["x", "--data_path", str(rows(tmp_path, TALK)), "--cutoff_len", "200", *flags])
        (row,) = data.read_rows(config).values()
        return data.tokenize(row, chatty, config)

    found = tokens()
    learned = [token for token, label in zip(found["input_ids"], found["labels"]) if label == token]
    written = chatty("a dog</s>", add_special_tokens=False).input_ids + chatty("the fox</s>", add_special_tokens=False).input_ids
    assert learned == written and set(found["labels"]) - set(learned) == {data.IGNORED}
    assert tokens("--train_on_inputs")["labels"] == found["input_ids"]
    assert len(tokens("--cutoff_len", "9")["input_ids"]) == 9


@pytest.mark.parametrize(
    "messages, template, said",
    [
        ([{"role": "user"}], TEMPLATE, "line 2: message 1 is not one with a role and a content that are text"),
        (TALK, "{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}", "cut each row after its first answer"),
        (TALK, None, "line 1: rows of messages: the model has no chat template"),
        (TALK[1:], TEMPLATE, "line 2: a conversation begins with an answer"),
    ],
)
def test_rows_that_cannot_be_learned(chatty, tmp_path, messages, template, said):
    chatty.chat_template = template
    config = COMMANDS["train"].parsed("train", ["x", "--data_path", str(rows(tmp_path, TALK, messages)), "--no_add_eos_token"])
    with pytest.raises(UserError, match=said) as error:
        data.load_data(config, chatty, 10_000)
    assert str(error.value).startswith("--data_path ")


@pytest.mark.parametrize(
    "first, second, said",
    [
        ([{"role": "user", "content": None}, TALK[1]], TALK, "line 1: message 1 is not one with a role and a content that are text"),
        (None, TALK, "line 1: without messages, which other rows have"),
        (TALK[:1], TALK[2:3], "chat.jsonl: no row has an answer of the assistant to learn; add them, or"),
    ],
)
def test_rows_of_messages_are_known_by_all_rows(first, second, said, chatty, tmp_path):
    config = COMMANDS["train"].parsed("train", ["x", "--data_path", str(rows(tmp_path, first, second)), "--no_add_eos_token"])
    with pytest.raises(UserError, match=said):
        data.load_data(config, chatty, 10_000)


def test_sharegpt_s_rows_are_read_as_messages(chatty, tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[message["role"]], "value": message["content"], "weight": 1} for message in TALK]
    path = tmp_path / "shared.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": "system", "value": "be short"}, *shared]}))
    messages = [{"role": "system", "content": "be short"}, *TALK]
    assert read_text(path, tokenizer=chatty) == conversations.as_text(chatty, messages)
    config = COMMANDS["train"].parsed("train", ["x", "--data_path", str(path)])
    (row,) = data.read_rows(config).values()
    assert json.loads(row["messages"]) == messages
    path.write_text(json.dumps({"conversations": [{"from": "human", "content": "hi"}]}))
    with pytest.raises(UserError, match="shared.jsonl, line 1: message 1 is not one with a from and a value that are text"):
        data.read_rows(config)


def test_an_odd_message_is_named_in_calibration_text(chatty, tmp_path):
    with pytest.raises(UserError, match="chat.jsonl, line 2: message 2 is not one with a role and a content"):
        read_text(rows(tmp_path, TALK, [TALK[0], {"role": "assistant"}]), tokenizer=chatty)


def test_questions_alone_are_learned_on_request(chatty, tmp_path):
    flags = ["x", "--data_path", str(rows(tmp_path, TALK[:1], TALK[2:3])), "--no_add_eos_token", "--train_on_inputs", "--val_set_size", "0"]
    trained, _, _ = data.load_data(COMMANDS["train"].parsed("train", flags), chatty, 10_000)
    assert len(trained) == 2


def asks(condition):
    return f"{{% if {condition} %}}{{{{ raise_exception('not so') }}}}{{% endif %}}{{{{ messages[-1]['content'] }}}}"


@pytest.mark.parametrize(
    "template, flags, way",
    [
        (asks("messages[0]['role'] != 'system'"), [], "say something with --system"),
        (asks("messages[0]['role'] == 'system'"), ["--system", "Be short"], "leave --system out"),
        (asks("true"), [], "correct its chat template"),
    ],
)
def test_a_template_that_chat_cannot_use_is_named_with_the_way_out(template, flags, way, tiny_folder, tiny_tokenizer, capsys):
    tiny_tokenizer.chat_template = template
    tiny_tokenizer.save_pretrained(tiny_folder)
    assert COMMANDS["chat"].run("chat", [str(tiny_folder), *flags]) == 2
    assert f"MODEL {tiny_folder}: the model's chat template does not take these messages (not so); {way}\n" in capsys.readouterr().err
