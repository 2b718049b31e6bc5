"""Our scores are stock lm-eval's: same definitions, same rows, one row of tokens a request there, shared contexts here."""

import contextlib
import functools
import json

import datasets
import lm_eval
import lm_eval.tasks
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from slimllm.errors import UserError
from slimllm.evaluation import zero_shot
from slimllm.models.families import FAMILIES
from slimllm.models.shape import window_of
from slimllm.settings.tasks import MATH, TASKS, tasks_named
from slimllm.utils import processes
from tests.conftest import FAMILY_CASES, family_config, make_ids, make_model

CHOICES = {"text": ["red", "a blue one", "green, and more", "no"], "label": ["A", "B", "C", "D"]}
ROWS = {
    "boolq": lambda i: {"idx": i, "passage": f"it is {i} o'clock", "question": f"is it {i % 5}", "label": i % 2},
    "piqa": lambda i: {"goal": f"goal {i}", "sol1": f"do {i} things", "sol2": "wait", "label": i % 2},
    "hellaswag": lambda i: {
        "ind": i,
        "activity_label": "Reading",
        "ctx_a": f"He has {i} books.",
        "ctx_b": "he",
        "ctx": f"He has {i} books. he",
        "endings": ["reads.", "sleeps all day.", "eats [step] one.", "runs away."],
        "label": str(i % 4),
    },
    "winogrande": lambda i: {
        "sentence": f"Ann met Bea {i} times as _ was late.",
        "option1": "Ann",
        "option2": "Bea",
        "answer": str(i % 2 + 1),
    },
    "arc_easy": lambda i: {"id": str(i), "question": f"What is {i}?", "choices": CHOICES, "answerKey": "ABCD"[i % 4]},
    "arc_challenge": lambda i: {"id": str(i), "question": f"Why is {i}?", "choices": CHOICES, "answerKey": "ABCD"[i % 3]},
    "openbookqa": lambda i: {"id": str(i), "question_stem": f"the number {i} is", "choices": CHOICES, "answerKey": "ABCD"[i % 4]},
    "mathqa": lambda i: {  # no two options are the same, or rounding would choose between them
        "Problem": f"{i} plus 1 is ?",
        "options": f"a ) {i} , b ) {i + 1} , c ) 40 , d ) 30 , e ) none",
        "correct": "abcde"[i % 5],
    },
    "mmlu_abstract_algebra": lambda i: {"question": f"What is {i}?", "choices": ["red", "blue", "no", f"{i}"], "answer": i % 4},
}
NUMBER = 12


@pytest.fixture
def model():
    return make_model("llama_gqa", max_position_embeddings=1024)


@pytest.fixture
def data_dir(tmp_path):
    for name, row in ROWS.items():
        for file in (name, f"{name}.dev"):
            (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(NUMBER)))
    return tmp_path


@functools.cache
def stock_tasks():
    """lm-eval's own index of all its tasks."""
    return lm_eval.tasks.TaskManager()


def stock(model, tokenizer, name, monkeypatch):
    """lm-eval as installed, its task as defined; only the hub itself is replaced."""
    asked = []

    def hub(path, name=None, **_):
        asked.append(path)
        rows = [ROWS[task](i) for i in range(NUMBER)]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test", "dev")})

    task = name
    monkeypatch.setattr(datasets, "load_dataset", hub)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3)
    shots = (TASKS | MATH)[name].shots or None
    found = lm_eval.simple_evaluate(lm, tasks=[name], num_fewshot=shots, bootstrap_iters=0, task_manager=stock_tasks())
    monkeypatch.undo()
    assert asked
    return found


@pytest.mark.parametrize("name", ROWS)
def test_scores_are_stock_scores(name, model, tiny_tokenizer, data_dir, monkeypatch):
    theirs = stock(model, tiny_tokenizer, name, monkeypatch)
    seen = {}
    score_choices = zero_shot.score_choices

    def record(model, pairs, longest, bar):
        answers = score_choices(model, pairs, longest, bar)
        seen.update(zip(pairs, answers))
        return answers

    monkeypatch.setattr(zero_shot, "score_choices", record)
    ours = zero_shot.score(model, tiny_tokenizer, name, str(data_dir))
    assert ours["questions"] == NUMBER and ours["version"] == theirs["versions"][name]
    assert ours["metrics"]["acc"] == theirs["results"][name]["acc,none"]
    assert ("acc_norm" in ours["metrics"]) == ("acc_norm,none" in theirs["results"][name])
    if "acc_norm" in ours["metrics"]:
        assert ours["metrics"]["acc_norm"] == theirs["results"][name]["acc_norm,none"]
    assert ours["reported"] in ours["metrics"]
    wanted = sorted(float(answer[0]) for sample in theirs["samples"][name] for (answer,) in sample["resps"])
    assert len(wanted) >= 2 * NUMBER
    assert sorted({a for a, _ in seen.values()}) == pytest.approx(sorted(set(wanted)), rel=1e-4)


@pytest.mark.parametrize(
    "case", [case for case in FAMILY_CASES if window_of(family_config(case)) is None and not FAMILIES[FAMILY_CASES[case][0]].is_hybrid]
)
def test_shared_contexts_change_no_number(case):
    model = make_model(case)
    ids = make_ids(3, 9)
    pairs = [(tuple(row[:n].tolist()), tuple(row[n : n + m].tolist())) for row in ids for n, m in ((4, 1), (4, 3), (4, 5), (6, 2))]
    found = zero_shot.score_choices(model, pairs, longest=12)
    for (context, continuation), (likelihood, greedy) in zip(pairs, found):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        alone = logits[torch.arange(len(continuation)), torch.tensor(continuation)].sum()
        assert likelihood == pytest.approx(float(alone), rel=1e-4)
        assert greedy == bool((logits.argmax(-1) == torch.tensor(continuation)).all())


def test_two_processes_share_the_questions(monkeypatch):
    """One after the other: each leaves its answers, and both come to the whole list."""
    model, ids = make_model(), make_ids(5, 9)
    pairs = [(tuple(row[:n].tolist()), tuple(row[n : n + m].tolist())) for row in ids for n, m in ((4, 1), (6, 2), (4, 3))]
    expected, left = zero_shot.score_choices(model, pairs, longest=12), {}
    monkeypatch.setattr(processes, "count", lambda: 2)
    for rank in (0, 1, 0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "from_all", lambda value, rank=rank: left.update({rank: value}) or [left.get(i, []) for i in (0, 1)])
        complete = len(left) == 2
        with contextlib.nullcontext() if complete else contextlib.suppress(StopIteration):  # the other one's answers are not there yet
            found = zero_shot.score_shares(model, pairs, 12)
        if complete:
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            assert [likelihood for likelihood, _ in found] == pytest.approx([likelihood for likelihood, _ in expected], rel=1e-5)
    assert len(left[0]) + len(left[1]) == len(pairs) and left[0] and left[1]


@pytest.mark.parametrize("case", ["mistral_window", "qwen2_window", "qwen3_5"])
def test_what_a_mask_does_not_keep_apart_is_left_to_lm_eval(case, tiny_tokenizer, data_dir, monkeypatch):
    model = make_model(case, max_position_embeddings=256)
    theirs = stock(model, tiny_tokenizer, "piqa", monkeypatch)["results"]["piqa"]
    monkeypatch.setattr(zero_shot, "score_choices", None)
    ours = zero_shot.score(model, tiny_tokenizer, "piqa", str(data_dir))
    assert ours["metrics"]["acc"] == theirs["acc,none"]


def test_limit(model, tiny_tokenizer, data_dir):
    assert zero_shot.score(model, tiny_tokenizer, "piqa", str(data_dir), limit=5)["questions"] == 5


@pytest.mark.parametrize("case", ["llama_gqa", "mistral_window"])
def test_no_bar_is_drawn_where_there_is_no_terminal(case, tiny_tokenizer, data_dir, capfd):
    zero_shot.score(make_model(case, max_position_embeddings=256), tiny_tokenizer, "piqa", str(data_dir), limit=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content, said",
    [(None, "no piqa.jsonl"), ("", "empty"), ("{\n", "line 1: not JSON"), ("[1]\n", "not a JSON object"), ('{"goal": "x"}\n', "schema")],
)
def test_bad_data_is_named(model, tiny_tokenizer, tmp_path, content, said):
    if content is not None:
        (tmp_path / "piqa.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        zero_shot.score(model, tiny_tokenizer, "piqa", str(tmp_path))


def test_solved_examples_need_a_file_of_their_own(model, tiny_tokenizer, data_dir):
    (data_dir / "mmlu_abstract_algebra.dev.jsonl").unlink()
    with pytest.raises(UserError, match="no mmlu_abstract_algebra.dev.jsonl"):
        zero_shot.score(model, tiny_tokenizer, "mmlu_abstract_algebra", str(data_dir))


def test_a_leaderboard_names_all_its_tasks():
    assert tasks_named(["lowrankarena,piqa"]) == (*TASKS, *MATH)
    assert tasks_named(["piqa,none", "", "mathqa"]) == ("piqa", "mathqa")
    with pytest.raises(UserError, match="--tasks lowrankarema: .*did you mean 'lowrankarena'"):
        tasks_named(["lowrankarema"])


def test_an_unreachable_hub_is_said(model, tiny_tokenizer):
    with pytest.raises(UserError, match="piqa.*--data_dir"):
        zero_shot.score(model, tiny_tokenizer, "piqa")


def test_a_question_with_a_token_that_the_model_lacks_is_one_line():
    with pytest.raises(UserError, match="zero-shot questions: token id 97 is outside the model's vocabulary of 97"):
        zero_shot.score_choices(make_model(), [((1, 2), (3,)), ((1, 97), (3,))], longest=12)
