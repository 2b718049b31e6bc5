"""The end of a run: what came out, what the models answer, and report.html."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

import hf_prune
from slimllm.__main__ import main as slimllm_main
from slimllm.evaluation import answers
from slimllm.reporting import page, summary, tables
from slimllm.reporting.record import PruningRecord
from tests.conftest import make_model
from tests.test_export_gguf import bpe_tokenizer


@pytest.fixture
def run(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    """Runs hf_prune.py on the tiny model. Returns (what it printed, the record)."""
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", tiny_folder, "--calibration", text_file, "--num_examples", "8", "--seq_len", "16", "--max_seq_len", "16"]
    flags += ["--eval_data", f"fox={text_file}", "--eval_limit", "4", "--output_dir", "here/smaller"]

    def run(*more):
        assert hf_prune.main([*map(str, flags), *more]) == 0
        return capsys.readouterr().out, PruningRecord.read(tmp_path / "here/smaller")

    return run


def test_the_end_of_a_run_says_what_came_out_and_what_to_do_next(run):
    out, record = run("--prompt", "a b c", "d e")
    end = out[out.index("| parameters") :]
    assert f"{record.parameters.removed:.2%} less" in end and "nats per token" in end and "* limited" in end
    assert [entry["prompt"] for entry in record.answers] == ["a b c", "d e"]
    for entry in record.answers:
        assert f"> {entry['prompt']}" in end and set(entry["pruned"]) == {"text", "fault"}
    assert "chat here/smaller --beside" in end and "everything lies in here/smaller/" in end
    assert ("--recipe best --output_dir here/smaller_best" in end) == (summary.nats_lost(record) >= summary.NOTHING)
    assert all(len(line) <= summary.WIDTH or "slimllm" in line for line in end.splitlines()), end
    assert re.search(r"\[1 of 5\] calibration samples\n(.*\n)*\[5 of 5\] how good the pruned model is\n", out)
    assert max(len(line) for line in out.splitlines() if line.startswith("layer ")) <= 100


@pytest.mark.parametrize("takes", [True, False])
def test_an_export_is_suggested_where_it_would_not_be_refused(takes, run, tiny_folder, tmp_path):
    if takes:
        bpe_tokenizer().save_pretrained(tiny_folder)
        make_model(vocab_size=320).save_pretrained(tiny_folder)
    out, _ = run("--eval_data", "none", "--prompt", "none")
    page = (tmp_path / "here/smaller/report.html").read_text()
    assert ("export-gguf here/smaller" in out) == ("export-gguf here/smaller" in page) == takes
    assert slimllm_main(["export-gguf", "here/smaller"]) == (0 if takes else 2)


def test_a_paper_run_without_text_measures_and_asks_nothing(run):
    out, record = run("--eval_data", "none")
    assert record.answers == [] and summary.nats_lost(record) is None
    assert "nats per token lost" not in out and "how good" not in out and "next:" in out


def test_verdicts_go_by_the_nats_lost():
    found = [summary.verdict(lost)[0] for lost in (-0.1, 0.01, 0.1, 0.4, 1.0, 5.0)]
    assert found == [
        "no loss on these texts",
        "hardly any loss",
        "a moderate loss",
        "a clear loss",
        "a heavy loss",
        "hardly the same model",
    ]


def test_a_model_that_falls_silent_is_pointed_at(run):
    _, record = run("--prompt", "a b c")
    whole, silent = {"text": "well", "fault": None}, {"text": "", "fault": answers.STOPS}
    record.answers = [{"prompt": "p", "dense": whole, "pruned": silent}, {"prompt": "q", "dense": silent, "pruned": silent}]
    assert "warning: the pruned model stops at once on 1 of 2 prompts, and the dense one does not" in summary.answered(record)


def test_the_page_is_one_file_that_asks_nothing_of_the_network(run, tmp_path):
    _, record = run("--prompt", "<script>alert(1)</script>")
    text = (tmp_path / "here/smaller" / page.FILE).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:|//)""", text) and len(text) < 1_500_000
    layer = record.layers[1]
    assert f"layer 1: {len(layer['kept']['mlp']['channels'])} of 48 channels stay</title>" in text
    assert "of the output&#x27;s variance missed before recovery" in text and " chat here/smaller --beside" in text


def test_a_browser_shows_the_page(run, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed to open report.html in")
    run("--prompt", "a b c")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "here/smaller/report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "What they answer" in done.stdout and "<svg" in done.stdout and "CONSOLE" not in done.stderr


def test_two_models_answer_in_the_terminal(tiny_folder, tmp_path, tiny_tokenizer, monkeypatch, capsys):
    make_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c\n\n/new\nd e\n/quit\nnever\n"))
    flags = ["--beside", str(tmp_path / "other"), "--new_tokens", "5"]
    assert slimllm_main(["chat", str(tiny_folder), *flags]) == 0
    out = capsys.readouterr().out
    assert out.count(f"[{tiny_folder.name}: ") == 2 == out.count("[other: ") and "per second]" in out
    assert "has no chat template" in out


def test_chat_names_what_is_missing(capsys):
    assert slimllm_main(["chat"]) == 2 == slimllm_main(["chat", "nowhere"])
    err = capsys.readouterr().err.splitlines()
    assert "name a model: slimllm chat" in err[0] and len(err) == 2


def test_a_client_talks_to_the_page(tiny_folder, tiny_tokenizer, tmp_path):
    from gradio_client import Client

    from slimllm.commands import chat, chat_page
    from slimllm.settings.chat import ChatConfig

    make_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    config = ChatConfig(str(tiny_folder), beside=str(tmp_path / "other"), new_tokens=6)
    partners = [chat._partner(name, "MODEL", config) for name in (config.model, config.beside)]
    app = chat_page.page(partners, config)
    _, address, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        client = Client(address, verbose=False)
        left, first, second, *speeds = client.predict("a b c", [], [], api_name="/say")
        expected = ["".join(partner.pieces([{"role": "user", "content": "a b c"}], config)) for partner in partners]
        assert left == "" and [chat_page._plain(talk)[1]["content"] for talk in (first, second)] == expected
        assert all("tokens, " in speed and "per second" in speed for speed in speeds)
        _, again, _, *_ = client.predict("d e", first, second, api_name="/say")
        assert [message["role"] for message in again] == ["user", "assistant"] * 2
    finally:
        app.close()


def test_a_port_that_is_taken_is_said(tiny_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert slimllm_main(["chat", str(tiny_folder), "--browser", "--port", str(port)]) == 2
    assert f"--port {port}: the page cannot be served" in capsys.readouterr().err


def test_an_answer_ends_where_it_is_no_longer_read(tiny_folder):
    from slimllm.commands import chat
    from slimllm.settings.chat import ChatConfig

    config = ChatConfig(str(tiny_folder), new_tokens=10_000)
    pieces = chat._partner(config.model, "MODEL", config).pieces([{"role": "user", "content": "a b c"}], config)
    next(pieces)
    pieces.close()  # waits for the model, which has stopped writing


def test_a_conversation_longer_than_the_model_s_positions_loses_its_oldest_turns(tiny_folder, tiny_tokenizer, monkeypatch, capsys):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tiny_tokenizer.save_pretrained(tiny_folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c d e\n" * 4 + "a " * 70 + "\na b\n"))
    assert slimllm_main(["chat", str(tiny_folder), "--new_tokens", "9", "--system", "be"]) == 0  # 64 positions
    out = capsys.readouterr().out
    assert "the conversation is too long for the model's 64 positions; its first 2 messages are left out" in out
    assert re.search(r"the message comes to \d+ tokens, and the model was made for 64 with its answer; shorten it", out)
    assert out.count("per second]") == 5


def test_the_next_commands_are_whole_ones():
    command = "slimllm prune 'my model' --recipe best --output_dir a --smaller=0.2 --overwrite --resume"
    assert (
        summary.again(command, "distilled", "a_distilled")
        == "slimllm prune 'my model' --smaller=0.2 --recipe distilled --output_dir a_distilled"
    )
    assert summary.again("python hf_prune.py m --save_ckpt_log_name=x", "best", "b") == "python hf_prune.py m --recipe best --output_dir b"
    last = summary.again("slimllm prune --eval_data none --overwrite m", "best", "b")
    assert last == "slimllm prune --eval_data none --base_model m --recipe best --output_dir b"


def test_names_are_drawn_as_they_are(run, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m$_{$")
    run("--base_model", str(tmp_path / "m$_{$"), "--overwrite", "--prompt", "none")


@pytest.mark.parametrize("typed, said", [("hi \udcff\n", "not UTF-8 text"), ("/help\n", None)])
def test_what_is_typed(typed, said, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert slimllm_main(["chat", str(tiny_folder), "--new_tokens", "3"]) == (2 if said else 0)
    assert said is None or said in capsys.readouterr().err


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_an_answer_and_sigterm_the_program(sent, status, as_in_a_terminal, tiny_folder, monkeypatch, capsys):
    from slimllm.evaluation.partner import Partner

    def pieces(*_):
        yield "well"
        os.kill(os.getpid(), sent)
        yield " then"

    monkeypatch.setattr(Partner, "pieces", pieces)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    assert slimllm_main(["chat", str(tiny_folder)]) == status
    out, err = capsys.readouterr()
    assert "well" in out and "then" not in out and ("slimllm chat: interrupted" in err) == bool(status)


def test_an_empty_prompt_is_said_before_the_run(tiny_folder, capsys):
    assert slimllm_main(["prune", str(tiny_folder), "--prompt", ""]) == 2 == slimllm_main(["prune", "a", "--base_model", "b"])
    err = capsys.readouterr().err
    assert "--prompt: a prompt is empty" in err and "a and --base_model both name the same" in err


def test_a_mixture_whose_layers_differ_says_where_it_runs():
    def layer(experts, channels):
        return {"kept": {"experts": {"experts": list(range(experts)), "channels": [list(range(channels))] * experts}, "attention": {}}}

    dense = {"kept": {"mlp": {"channels": [0, 1]}}}  # such as the first layer of DeepSeek
    assert tables.uneven_experts([dense, layer(3, 4), layer(3, 4)]) is None and tables.uneven_experts([dense]) is None
    for other in (layer(2, 4), layer(3, 2)):
        assert "--runtime gguf" in tables.uneven_experts([dense, layer(3, 4), other])
