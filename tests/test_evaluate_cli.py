"""``python -m slimllm.evaluation``: one file of results, completed by later runs, and the paper's table of it."""

import json

import lm_eval
import lm_eval.models.huggingface
import pytest
from peft import LoraConfig, get_peft_model

from slimllm.__main__ import main as slim
from slimllm.data import texts
from slimllm.deploy import checkpoint
from slimllm.errors import UserError
from slimllm.evaluation import generation, zero_shot
from slimllm.evaluation.perplexity import perplexity
from slimllm.reporting import paper_table, record
from slimllm.settings.evaluate import EvalConfig
from tests.conftest import make_model, prune_to, tiny_tokenizer_of
from tests.test_zero_shot import NUMBER, ROWS


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """A pruned checkpoint, a folder with two tasks, a text; the working folder is empty. Returns the flags."""
    folder = prune_to(tmp_path / "pruned", tiny_tokenizer_of(), max_position_embeddings=256)
    data = tmp_path / "tasks"
    data.mkdir()
    for name in ("piqa", "openbookqa"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(ROWS[name](i)) + "\n" for i in range(NUMBER)))
    (tmp_path / "text.txt").write_text("it is a far, far better thing that I do. " * 40)
    monkeypatch.chdir(tmp_path)
    return [str(folder), "--data_dir", str(data), "--eval_data", "book=text.txt", "--max_seq_len", "32", "--dtype", "float32"]


def results(name="pruned"):
    return json.loads(open(f"eval_log/{name}.json").read())


def test_a_run_and_its_file(setting, capsys):
    assert slim(["evaluate", *setting, "--limit", "10"]) == 0
    found = results()
    assert set(found["tasks"]) == {"piqa", "openbookqa"}
    assert found["tasks"]["openbookqa"]["reported"] == "acc_norm" and {"acc", "acc_norm"} <= set(found["tasks"]["openbookqa"]["metrics"])
    assert found["tasks"]["piqa"]["questions"] == 10 and found["tasks"]["piqa"]["limited"] and found["environment"]["lm_eval"]
    (figure,) = found["perplexity"]
    model = checkpoint.load("pruned")
    (text,) = texts.load_texts(("book=text.txt",))
    blocks = texts.blocks_of(text, tiny_tokenizer_of(), model.config, 32)
    assert figure["perplexity"] == pytest.approx(perplexity(model, blocks), rel=1e-5)
    out = capsys.readouterr().out
    assert "w/o tune" not in out.split("Ratio")[0] and "(2 tasks)" in out and "* limited" in out


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not JSON (Expecting property name"),
        ("[" * 100_000, "not JSON ("),
        ("[1]", "not a record of format"),
        ('{"format": FORMAT, "config": []}', "not the record of a pruning run (config is a list, not a dict)"),
        ('{"format": FORMAT}', "not the record of a pruning run ('config')"),
    ],
)
def test_a_broken_record_of_a_pruning_is_named(content, said, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tiny_folder / "pruning.json").write_text(content.replace("FORMAT", str(record.FORMAT)))
    assert slim(["evaluate", str(tiny_folder), "--eval_data", "python_manual", "--tasks"]) == 2
    err = capsys.readouterr().err
    assert f"pruning.json: {said}" in err and err.endswith("; copy it again, or remove it\n") and len(err.splitlines()) == 1
    assert not (tmp_path / "eval_log").exists()


def test_a_stopped_run_goes_on(setting, monkeypatch, capsys):
    score = zero_shot.score
    done = []

    def stops(model, tokenizer, name, *rest):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(name)
        return score(model, tokenizer, name, *rest)

    monkeypatch.setattr(zero_shot, "score", stops)
    assert slim(["evaluate", *setting]) == 130
    assert "goes on with the rest" in capsys.readouterr().err
    first = results()
    assert list(first["tasks"]) == done and len(first["perplexity"]) == 1
    monkeypatch.setattr(zero_shot, "score", lambda m, t, name, *r: done.append(name) or score(m, t, name, *r))
    assert slim(["evaluate", *setting]) == 0
    assert len(done) == 2 and results()["tasks"][done[0]] == first["tasks"][done[0]]
    assert slim(["evaluate", *setting]) == 0 and len(done) == 2  # nothing left to do
    with open("tasks/piqa.jsonl", "a") as file:
        file.write(json.dumps(ROWS["piqa"](0)) + "\n")
    assert slim(["evaluate", *setting]) == 0 and done[2:] == ["piqa"]  # of other questions now


def test_a_group_of_tasks_without_a_figure_is_named(monkeypatch):
    found = {"results": {"group": {"alias": "group"}, "a": {"acc,none": 0.5}}, "n-samples": {"a": {"effective": 1}, "b": {"effective": 1}}}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *_, **__: found)
    monkeypatch.setattr(lm_eval.models.huggingface, "HFLM", lambda **_: None)
    monkeypatch.setattr(generation, "_manager", lambda path: None)
    with pytest.raises(UserError, match="task group: it has no figure of its own; name what it stands for: a, b"):
        generation.score(None, None, "group", EvalConfig(model="m"))


def test_results_of_something_else_are_not_mixed(setting, capsys):
    assert slim(["evaluate", *setting, "--tasks", "piqa"]) == 0
    assert slim(["evaluate", *setting, "--limit", "3"]) == 2
    assert "holds results of another limit" in capsys.readouterr().err
    assert not results()["tasks"]["piqa"]["limited"]
    assert slim(["evaluate", *setting, "--limit", "3", "--overwrite", "--tasks", "piqa"]) == 0
    assert results()["tasks"]["piqa"]["questions"] == 3
    open("eval_log/pruned.json", "w").write("{")
    assert slim(["evaluate", *setting]) == 2
    assert "not a file of results" in capsys.readouterr().err


def test_an_adapter_changes_the_figures(setting, tmp_path):
    assert slim(["evaluate", *setting, "--tasks", "none"]) == 0
    model = get_peft_model(checkpoint.load("pruned"), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert slim(["evaluate", *setting, "--tasks", "none", "--adapter", "adapter"]) == 0
    before, after = (results(name)["perplexity"][0]["perplexity"] for name in ("pruned", "pruned_tuned"))
    assert after != pytest.approx(before, rel=1e-3)
    both = model.get_base_model()
    (text,) = texts.load_texts(("book=text.txt",))
    assert after == pytest.approx(perplexity(both, texts.blocks_of(text, tiny_tokenizer_of(), both.config, 32)), rel=1e-4)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--tasks", "piqqa"], "did you mean 'piqa'"),
        (["--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (["--adapter", "."], "no adapter_config.json"),
        (["--limit", "0"], "--limit 0"),
        (["--tasks", "boolq"], "none of boolq.jsonl"),
    ],
)
def test_mistakes(setting, wrong, said, capsys):
    assert slim(["evaluate", *setting, *wrong]) == 2
    assert said in capsys.readouterr().err


def row(removed=None, tuned=None, model="llama-7b-hf", tasks=(), perplexity=()):
    pruning = removed and {"of": "m", "removed": removed, "recipe": "paper", "recovery": "linear", "layer_ratio": "importance"}
    scores = {
        name: {"metrics": {"acc": value, "acc_norm": value / 2}, "reported": zero_shot.TASKS[name].reported, "limited": False}
        for name, value in tasks
    }
    texts = [{"data": name, "seq_len": 128, "perplexity": value, "limited": False} for name, value in perplexity]
    return {"fingerprint": {"model": model, "pruning": pruning, "adapter": tuned}, "tasks": scores, "perplexity": texts}


def test_the_paper_s_layout():
    every = [(name, 0.5) for name in zero_shot.TASKS]
    given = [row(0.497, "abc", "x_50", every[:1]), row(0.2, None, "x_20"), row(None, None, "tiny", every, [("ptb", 22.0)])]
    header, *rows = paper_table.paper_cells(given)
    assert header == ["Ratio", "Method", "PTB", "BoolQ", "PIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "Average"]
    assert [cells[0] for cells in rows] == ["0 %", "20 % w/o tune", "50 % w/ tune"]
    assert rows[0][2:] == ["22.00", "50.00", "50.00", "25.00", "50.00", "50.00", "25.00", "25.00", "39.29"]
    assert rows[2][-1] == "50.00 (1 task)" and rows[2][3:5] == ["50.00", "-"]
    assert len(paper_table.latex([header, *rows]).splitlines()) == 2 + 1 + 1 + 3 + 2 and r"20 \% w/o tune" in paper_table.latex(
        [header, *rows]
    )


def test_perplexities_of_blocks_of_two_lengths_have_a_column_each():
    both = row(None, None, "tiny", (), [("ptb", 22.0)])
    both["perplexity"].append(both["perplexity"][0] | {"seq_len": 2048, "perplexity": 9.0})
    header, cells = paper_table.paper_cells([both])
    assert header[2:4] == ["PTB, 128 tokens", "PTB, 2048 tokens"] and cells[2:4] == ["22.00", "9.00"]


def test_the_paper_s_rows_stand_beside_llama_7b():
    header, *rows = paper_table.paper_cells([row(None, None, "llama-7b-hf")])
    assert header[2:4] == ["WikiText2", "PTB"] and len(rows) == 6
    averages = [cells[-1] for cells in rows[1:]]
    assert averages == ["63.25", "61.22", "62.41", "50.10", "53.16"]  # as the paper prints them


def test_tables_are_written_from_result_files(setting, capsys):
    assert slim(["evaluate", *setting, "--tasks", "piqa"]) == 0
    assert slim(["report", "eval_log/pruned.json", "--output", "tables"]) == 0
    assert json.loads(open("tables/table.json").read())["rows"][0]["PIQA"] in open("tables/table.md").read()
    assert open("tables/table.tex").read().startswith(r"\begin{tabular}")
    assert slim(["report", "missing.json"]) == 2


def test_a_dense_model_has_no_pruning(setting, tmp_path, tiny_folder):
    make_model(max_position_embeddings=256).save_pretrained(tiny_folder)
    assert slim(["evaluate", str(tiny_folder), *setting[1:], "--tasks", "none"]) == 0
    assert results("tiny")["fingerprint"]["pruning"] is None
