"""slimllm evidence: steps that are commands of other programs, a record that goes on, a page with each protocol in its own table."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from slimllm.__main__ import main as slim
from slimllm.commands import COMMANDS, evaluate, evidence
from slimllm.models.shape import shape_of
from slimllm.pruning import pipeline
from slimllm.reporting import evidence as page
from slimllm.reporting.published import ARENA_COLUMNS, ARENA_ROWS, PUBLISHED
from slimllm.reporting.record import PruningRecord
from slimllm.settings.evidence import EvidenceConfig
from slimllm.settings.tasks import MATH, MMLU_MATH, TASKS
from tests.conftest import TEXT, family_config, make_model
from tests.test_conversations import TEMPLATE
from tests.test_export_gguf import bpe_tokenizer
from tests.test_resume import stopping_at
from tests.test_zero_shot import ROWS

ECHO = """
task: echo
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["x"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture
def flags(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(max_position_embeddings=2048).save_pretrained("tiny")
    tiny_tokenizer.save_pretrained("tiny")
    (tmp_path / "text.txt").write_text(TEXT)
    rows = [{"question": "a b c", "choices": {"text": ["d", "e f"], "label": ["A", "B"]}, "answerKey": "A", "id": str(i)} for i in range(4)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--calibration", "text.txt", "--num_examples", "4", "--eval_data", "fox=text.txt", "--eval_limit", "1"]
    data += ["--tasks", "arc_easy", "--data_dir", "tasks", "--limit", "2", "--repeats", "1", "--batch_size", "1", "--length", "16"]
    return ["tiny", "--shares", "0.3", "--recipes", "paper", *data, "--output", "out"]


def steps():
    return json.loads(open("out/evidence.json").read())["steps"]


def test_one_page_with_each_protocol_in_its_own_table(flags, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"question": "a b", "answer": "c"}\n' * 3)
    (tmp_path / "more/echo.yaml").write_text(ECHO.replace("ROWS", str(tmp_path / "rows.jsonl")))
    written = ["--generation", "echo", "--include_path", "more"]
    assert slim(["evidence", *flags, *written]) == 0
    names = ["perplexity at 128", "perplexity at 2048", "tasks", "echo"]
    dense, pruned = ([f"{row}, {name}" for name in names] for row in ("dense", "paper_30"))
    assert list(steps()) == ["paper_30, pruning", *dense, *pruned, "paper_30, latency"]
    text, page_of_html = open("out/evidence.md").read(), open("out/evidence.html").read()
    for shown in (text, html.unescape(page_of_html)):
        for heading in ("128 tokens per block (LLM-Pruner, SlimLLM)", "2048 tokens per block (SliceGPT, Wanda)", "Multiple choice"):
            assert heading in shown
        assert "4096 tokens per block (Týr): beyond the model's context of 2048 tokens" in shown
        assert "whole model removed" in shown and "echo: exact_match" in shown and "paper, 30 %: fox (4 samples)" in shown
        assert all(f"{one.wikitext2:.2f}" in shown and one.source in shown for one in PUBLISHED)
    assert "<svg" in page_of_html and not re.search(r"(src|href)=\"(?!#)", page_of_html)  # it asks nothing of the network
    at_128 = text.split("## Perplexity at 128")[1].split("##")[0]
    assert at_128.count("\n|") == 4 and "dense" in at_128 and "paper, 30 %" in at_128 and "SlimLLM |" not in at_128
    (figure,) = [f for f in json.load(open("out/measured/dense.json"))["perplexity"] if f["seq_len"] == 2048]
    assert f"{figure['perplexity']:.2f}*" in text.split("## Perplexity at 2048")[1].split("##")[0]
    assert json.load(open("out/models/paper_30/pruning.json"))["command"].startswith("slimllm prune tiny --recipe paper")
    before = steps()
    assert slim(["evidence", *flags, *written]) == 0
    assert steps() == before  # with the seconds that each took
    assert slim(["evidence", *flags, "--seed", "7"]) == 2
    assert "another seed" in capsys.readouterr().err


def test_speeds_in_llama_cpp_a_chat_and_rows_for_a_leaderboard(flags, tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("tiny")
    make_model(vocab_size=320, max_position_embeddings=2048).save_pretrained("tiny")
    (tmp_path / "long.txt").write_text(20 * TEXT)
    for number, name in enumerate((*TASKS, *MATH)):
        row, several = ROWS["mmlu_abstract_algebra" if name in MMLU_MATH else name], 6 + number % 3
        (tmp_path / f"tasks/{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(several)))
        (tmp_path / f"tasks/{name}.dev.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(5)))
    for flag in ("--eval_limit", "--limit"):
        at = flags.index(flag)
        del flags[at : at + 2]
    flags += ["--eval_data", "wikitext2=long.txt", "c4=long.txt", "--tasks", "lowrankarena"]
    flags += ["--protocols", "2048", "--no_latency", "--runtimes", "llama_cpp"]
    assert slim(["evidence", *flags]) == 0
    assert list(steps())[-3:] == ["dense, export", "paper_30, export", "paper_30, speed in llama.cpp"]
    text = open("out/evidence.md").read()
    sections = {part.partition("\n")[0]: part for part in text.split("## ")}
    assert " x)" in sections["Speed in llama.cpp"] and sections["Speed in llama.cpp"].count("\n|") == 3
    assert "Chat" not in sections  # the paper's recipe asks nothing
    measured = json.loads(Path("out/measured/paper_30.json").read_text())
    tasks, perplexities = measured["tasks"], [f"{figure['perplexity']:.2f}" for figure in measured["perplexity"]]
    keep = 1 - PruningRecord.read("out/models/paper_30").parameters.decoder_removed
    header, dense, pruned = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in sections["Rows for LowRankArena"].splitlines()
        if line.count("|") > 9 and "---" not in line
    )
    assert header == list(ARENA_COLUMNS) and dense[:2] == ["100%", "Dense FP"] and dense[-1] == "1.000"
    assert pruned[:4] == [f"{keep:.0%}", "SlimLLM, paper", *perplexities]
    accuracies = {name: task["metrics"].get("acc_norm", task["metrics"]["acc"]) for name, task in tasks.items()}
    right = sum(round(accuracies[name] * tasks[name]["questions"]) for name in MMLU_MATH)
    of_math = [accuracies["mathqa"], right / sum(tasks[name]["questions"] for name in MMLU_MATH)]
    assert pruned[12:14] == [f"{value:.3f}" for value in of_math]
    assert float(pruned[11]) == pytest.approx(sum(accuracies[name] for name in TASKS) / 7, abs=0.0006)
    assert "MathQA" in sections["Multiple choice"] and "mmlu_abstract_algebra" in sections["Multiple choice"]


def test_what_is_kept_follows_the_leaderboard_s_own_rows():
    columns, dense = ["model", *ARENA_COLUMNS], {}
    for row in (dict(zip(columns, row)) for row in ARENA_ROWS):
        figures = {name: float(row[name]) for name in ARENA_COLUMNS[2:-1] if row[name] != "-"}
        dense.setdefault(row["model"], figures)
        kept = page._retention(dense[row["model"]], figures)
        assert (kept is None) == (row["Q. Ret."] == "-")
        assert kept is None or kept == pytest.approx(float(row["Q. Ret."]), abs=0.0015)


def test_how_a_model_chats_stands_on_the_page(flags):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("tiny")
    make_model(vocab_size=320, max_position_embeddings=2048).save_pretrained("tiny")
    assert slim(["evidence", *flags, "--recipes", "best", "--tasks", "none", "--protocols", "128", "--no_latency"]) == 0
    chat = next(part for part in open("out/evidence.md").read().split("## ") if part.startswith("Chat"))
    assert chat.count(" of 40 ") == 2 and "| Chat faults" in chat


def test_what_needs_a_model_that_could_not_be_exported_is_passed_over(flags):
    flags = [*flags, "--tasks", "none", "--no_latency", "--protocols", "128", "--runtimes", "llama_cpp"]
    assert slim(["evidence", *flags]) == 1
    failed = {name: step["failed"] for name, step in steps().items() if "failed" in step}
    assert list(failed) == ["dense, export", "paper_30, export", "paper_30, speed in llama.cpp"]
    assert "tokenizer" in failed["paper_30, export"] and "no model" in failed["paper_30, speed in llama.cpp"]


def test_a_stopped_run_goes_on(flags, monkeypatch, capsys):
    """In the middle of a pruning, and between two measurements."""
    whole, evaluated, real = pipeline.LayerPruner, [], evaluate.run

    def stops(config):
        evaluated.append(config.output)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return real(config)

    flags = [*flags, "--recipes", "best", "--tasks", "none", "--no_latency"]
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(1))
    assert slim(["evidence", *flags]) == 130 and not steps()
    said = capsys.readouterr().err
    assert said.endswith("interrupted; what is finished is kept; the same command goes on with the rest\n") and "--resume" not in said
    seen = []
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(None, seen))
    monkeypatch.setattr(evaluate, "run", stops)
    assert slim(["evidence", *flags]) == 130
    assert seen == [1] and list(steps()) == ["best_30, pruning", "dense, perplexity at 128"]
    seconds = [step["seconds"] for step in steps().values()]
    assert slim(["evidence", *flags]) == 0
    assert len(evaluated) == 5 and [step["seconds"] for step in steps().values()][:2] == seconds
    monkeypatch.setattr(pipeline, "LayerPruner", whole)
    assert slim(["evidence", *flags, "--overwrite", "--seed", "7"]) == 0
    assert len(evaluated) == 9 and "--seed 7" in open("out/evidence.md").read()


def test_a_pruning_that_cannot_go_on_begins_anew(flags, monkeypatch, capsys):
    flags = [*flags, "--recipes", "best", "--tasks", "none", "--no_latency", "--protocols", "128"]
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(1))
    assert slim(["evidence", *flags]) == 130
    for file in Path("out/models").glob(".best_30.*.partial/.journal/*.json"):
        file.write_text("[1]")
    seen = []
    monkeypatch.setattr(pipeline, "LayerPruner", stopping_at(None, seen))
    assert slim(["evidence", *flags]) == 0
    assert seen == [0, 1] and "start anew without the flag" in capsys.readouterr().out


def test_a_step_that_fails_is_a_line_and_the_rest_goes_on(flags, monkeypatch, capsys):
    prune = pipeline.prune

    def fails(run, allocation):
        if run.config.recipe == "best":
            raise MemoryError("no room")
        return prune(run, allocation)

    monkeypatch.setattr(pipeline, "prune", fails)
    flags = [*flags, "--recipes", "best", "paper", "--tasks", "none", "--no_latency", "--protocols", "128"]
    assert slim(["evidence", *flags]) == 1
    failed = {name: step["failed"] for name, step in steps().items() if "failed" in step}
    assert failed == {"best_30, pruning": "MemoryError: no room", "best_30, perplexity at 128": failed["best_30, perplexity at 128"]}
    assert "no model" in failed["best_30, perplexity at 128"] and "no room" in open("out/evidence.html").read()
    assert "Traceback" in open("out/log.txt").read() and "Traceback" not in capsys.readouterr().out
    monkeypatch.setattr(pipeline, "prune", prune)
    assert slim(["evidence", *flags]) == 0
    assert not any("failed" in step for step in steps().values()) and "best, 30 %" in open("out/evidence.md").read()


def test_a_text_of_the_hub_that_cannot_be_had_is_left_out(flags):
    flags = [*flags, "--eval_data", "fox=text.txt", "c4", "--tasks", "none", "--no_latency", "--protocols", "128"]
    assert slim(["evidence", *flags]) == 1
    assert "give a local file as c4=FILE" in open("out/evidence.md").read()
    assert not any("failed" in step for step in steps().values())


def test_a_text_too_short_for_a_protocol_is_left_out_of_that_one(flags, tmp_path, tiny_tokenizer):
    (tmp_path / "short.txt").write_text(TEXT[:600])
    (tmp_path / "shorter.txt").write_text(TEXT[:20])
    (tmp_path / "long.txt").write_text(20 * TEXT)
    config = EvidenceConfig("tiny", eval_data=("fox=long.txt", "short.txt", "shorter.txt"), tasks=("none",), latency=False)
    texts, left_out = evidence.long_enough(config.eval_data, [128, 2048], "tiny", family_config("llama_gqa"))
    assert texts == {128: ("fox=long.txt", "short.txt"), 2048: ("fox=long.txt",)}
    assert left_out == [
        "--eval_data short: it is too short for one block of 2048 tokens",
        "--eval_data shorter: it is too short for one block of 128 tokens",
        "--eval_data shorter: it is too short for one block of 2048 tokens",
    ]
    steps = evidence.measurements(config, evidence.rows_of(config)[:1], {**texts, 4096: ("none",)}, 4096)
    named = {step.name: step.words[step.words.index("--eval_data") + 1 : step.words.index("--max_seq_len")] for step in steps}
    assert named == {"dense, perplexity at 128": ("fox=long.txt", "short.txt"), "dense, perplexity at 2048": ("fox=long.txt",)}


def test_what_other_flags_left_stays_and_what_changed_or_broke_is_named(flags, capsys):
    flags = [*flags, "--tasks", "none", "--no_latency"]
    assert slim(["evidence", *flags]) == 0
    before, page_before = steps(), open("out/evidence.md").read()
    assert slim(["evidence", *flags, "--shares", "0.5", "--protocols", "128"]) == 0
    assert steps().keys() > before.keys() and "paper, 30 %" not in open("out/evidence.md").read()
    (file := Path("out/measured/paper_30.json")).write_text("")
    assert slim(["evidence", *flags]) == 2
    assert f"{file}: not JSON" in (err := capsys.readouterr().err) and "remove it, and the same command makes it anew" in err
    file.unlink()
    assert slim(["evidence", *flags]) == 0
    assert {name for name in before if steps()[name] != before[name]} <= {f"paper_30, perplexity at {n}" for n in (128, 2048)}
    tables = [text.split("## Commands")[0].partition("## ")[2] for text in (page_before, open("out/evidence.md").read())]
    assert tables[0] == tables[1]  # both perplexities, which stand in the file that was removed
    with open("text.txt", "a") as file:
        file.write("more")
    assert slim(["evidence", *flags]) == 2
    assert "holds results of another file text.txt" in capsys.readouterr().err


def test_a_file_where_a_folder_should_be_is_a_line(flags):
    assert slim(["evidence", *flags, "--recipes", "paper", "--tasks", "none", "--no_latency", "--eval_data", "none"]) == 0
    shutil.rmtree("out/models")
    Path("out/models").write_text("")
    assert slim(["evidence", *flags, "--recipes", "paper", "--tasks", "none", "--no_latency", "--eval_data", "none"]) == 1
    assert steps()["paper_30, pruning"]["failed"] == "out/models/paper_30/pruning.json: cannot be written (File exists)"


def test_a_model_that_was_pruned_before_is_not_shown_as_dense():
    measured = {"fingerprint": {"pruning": {"of": "tiny", "removed": 0.3}}, "parameters": 1}
    given = page.Found(page.Row("dense", "tiny_30"), None, measured, {}, {})
    assert any("was pruned before: tiny without 30.00 %" in note for note in page._models([given]).notes)
    whole = {"tasks": {}, "perplexity": [{"data": "wikitext2", "seq_len": 2048, "limited": False, "perplexity": 9.0}]}
    rows = [len(page._arena([page.Found(given.row, None, one, {}, {})]).rows) for one in (whole, whole | measured)]
    assert rows == [2, 1]  # a leaderboard's row is one of a dense model


def test_shares_are_shown_as_they_were_asked_for():
    assert [page.Row("", "", "paper", share).title for share in (0.2, 0.125, 0.005)] == ["paper, 20 %", "paper, 12.5 %", "paper, 0.5 %"]


def test_a_metric_that_is_not_finite_is_a_dash():
    tasks = {"echo": {"metrics": {"bleu": None, "acc": 0.5}, "questions": 2, "limited": True, "chat_template": False}}
    found = [page.Found(page.Row("dense", "m"), None, {"generation": tasks}, {}, {})]
    assert page._generation(found).rows[1][3:] == ["-", "0.5000*"]


def test_files_for_llama_cpp_are_counted_on_the_disk(flags, capsys):
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16)
    config.save_pretrained("big")
    gigabytes = []
    for more in ([], ["--runtimes", "llama_cpp"]):
        assert slim(["evidence", "big", *flags[1:], "--dry_run", *more]) == 0
        gigabytes.append(float(re.search(r"([\d.]+) GB of models stay", capsys.readouterr().out)[1]))
    shape = shape_of(config)
    written = 2 * shape.parameters - 0.3 * shape.decoder_parameters  # the dense model and the pruned one
    assert gigabytes[1] - gigabytes[0] == pytest.approx(2 * written / 1e9, abs=0.02)


def test_lora_trains_what_was_distilled(flags, tmp_path):
    rows = [{"instruction": "say", "input": "", "output": "yes"}] * 12
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = [*flags, "--recipes", "lora", "--tune", "rows.json", "--distill_examples", "4", "--tasks", "none", "--no_latency"]
    assert slim(["evidence", *flags, "--protocols", "128"]) == 0
    assert list(steps()) == ["distilled_30, pruning", "lora_30, training", "dense, perplexity at 128", "lora_30, perplexity at 128"]
    assert "distilled, then LoRA, 30 %" in open("out/evidence.md").read()
    (figure,) = json.load(open("out/models/lora_30/merged/pruning.json"))["evaluation"]
    (result,) = ModelCard.load("out/models/lora_30/merged/README.md").data.eval_results
    assert result.metric_value == pytest.approx(figure["tuned"], abs=1e-3)  # not that of the model before it was trained


def test_a_dry_run_lists_commands_that_their_programs_take(flags, tmp_path, capsys):
    (tmp_path / "rows.json").write_text("[]")
    flags = [*flags, "--recipes", "paper", "distilled", "lora", "--tune", "rows.json", "--generation", "gsm8k", "--dry_run"]
    flags += ["--length", "16", "2040"]
    assert slim(["evidence", *flags]) == 0
    out = capsys.readouterr().out
    commands = re.findall(r"^\S*slimllm (prune|train|evaluate|latency) (.*)$", out, re.M)
    assert f"dry run: {len(commands)} steps" in out and not (tmp_path / "out").exists()
    for name, words in commands:
        known = {option for action in COMMANDS[name].parser(name)._actions for option in action.option_strings}
        assert {word for word in words.split() if word.startswith("--")} <= known
    assert "| paper, 30 %" in out and "GB" in out and "not foreseen" in out and "Týr): beyond the model's context" in out
    assert "latency at 2040 tokens: with those that follow, beyond the model's context of 2048" in out and "at 16 tokens" not in out


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--recipes", "bets"], "did you mean 'best'?"),
        (["--recipes", "lora"], "name some with --tune"),
        (["--shares", "20"], "must be above 0 and below 1"),
        (["--protocols", "512"], "not one of 128, 2048, 4096"),
        (["--generation", "humaneval"], "--confirm_run_unsafe_code"),
        (["--generation", "gsm9k"], "--generation gsm9k: lm-eval has no such task; did you mean 'gsm8k'?"),
        (["--generation", "ai2_arc"], "--generation ai2_arc: a name for several tasks"),
        (["--calibration", "nowhere.txt"], "--calibration nowhere.txt: no such file"),
        (["--eval_data", "nowhere.txt"], "--eval_data nowhere.txt: no such file"),
        (["--eval_data", "text.txt", "tasks/text.txt"], "two texts are called text"),
        (["--recipes", "lora", "--tune", "nowhere.json"], "--tune nowhere.json: no such file"),
        (["--runtimes", "vllm", "--vllm", "tasks"], "--vllm tasks: no such interpreter"),
    ],
)
def test_mistakes(flags, wrong, said, capsys):
    shutil.copy("text.txt", "tasks/text.txt")
    assert slim(["evidence", *flags, *wrong]) == 2
    assert said in capsys.readouterr().err


def test_speeds_in_llama_cpp_of_a_model_that_takes_one_width_there_want_models_pruned_for_it(flags, capsys):
    make_model("gemma3", max_position_embeddings=2048).save_pretrained("tiny")
    flags += ["--runtimes", "llama_cpp", "--dry_run"]
    assert slim(["evidence", *flags]) == 2
    assert "--runtimes llama_cpp: llama.cpp takes a gemma3_text with one width" in capsys.readouterr().err
    assert slim(["evidence", *flags, "--runtime", "gguf"]) == 0
    assert "slimllm prune tiny --recipe paper --target_sparsity 0.3 --runtime gguf" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["gemma4", "qwen3_moe", "llama_gqa"])
def test_models_that_llama_cpp_takes_as_they_are_pruned_want_no_other_runtime(case, flags):
    make_model(case, max_position_embeddings=2048).save_pretrained("tiny")
    assert slim(["evidence", *flags, "--runtimes", "llama_cpp", "--dry_run"]) == 0
