"""What models answer, what is plainly wrong with it, and how likely another model finds it."""

import math

import pytest
import torch

import hf_prune
from slimllm.evaluation import answers
from slimllm.evaluation.perplexity import nats_after
from slimllm.models import loading
from slimllm.reporting import summary
from slimllm.reporting.record import PruningRecord
from slimllm.reporting.trial_tables import chat_cells
from tests.conftest import make_model
from tests.test_conversations import TEMPLATE


@pytest.mark.parametrize(
    "tokens, found",
    [
        ([1, 2, 3] + 12 * [4], True),
        (7 * [4, 5], True),
        ([0] + 2 * [1, 2, 3, 4, 5, 6, 7, 8], True),
        (list(range(40)), False),
        (5 * [4], False),
        (3 * [1, 2, 3] + [9], False),
        ([], False),
    ],
)
def test_a_loop_is_a_piece_written_again_and_again(tokens, found):
    assert answers.loops(tokens) is found


def test_models_answer_all_prompts_at_once_as_they_answer_each(tiny_tokenizer):
    model = make_model().double()
    prompts = ["a", "the quick fox jumps", "b c"]
    together = answers.answers(model, tiny_tokenizer, prompts)
    assert together == [answers.answers(model, tiny_tokenizer, [prompt])[0] for prompt in prompts]
    assert all(entry["text"] for entry in together)


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, [5]), (torch.bfloat16, [1, 1, 3])])
def test_below_float32_what_is_shown_is_answered_alone(dtype, groups, tiny_tokenizer, monkeypatch):
    write, rows = answers._written, []

    def counted(model, asked, settings):
        rows.append(len(asked))
        return write(model, asked, settings)

    monkeypatch.setattr(answers, "_written", counted)
    assert len(answers.answers(make_model().to(dtype), tiny_tokenizer, ["a", "b"], ["c", "a b", "b c"])) == 5
    assert rows == groups


def test_nats_after_a_text_are_those_of_its_own_tokens():
    model = make_model()
    pairs = [([1, 2, 3], [4, 5]), ([7], [8, 9, 10, 11])]
    losses = []
    for first, then in pairs:
        chances = model(torch.tensor([first + then])).logits[0].log_softmax(-1).detach()
        losses += [-float(chances[len(first) + at - 1, token]) for at, token in enumerate(then)]
    assert nats_after(model, pairs) == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_only_answers_without_fault_are_judged(tiny_tokenizer):
    model = make_model()
    tiny_tokenizer.chat_template = TEMPLATE
    entries = [{"text": "the quick fox" if at < 2 else "a b", "fault": None} for at in range(len(answers.CHAT))]
    whole = answers.chat_quality(entries, model, tiny_tokenizer)
    assert (whole.prompts, whole.faults) == (len(answers.CHAT), 0) and whole.nats > 0
    faulty = [{"text": "", "fault": answers.STOPS}, {"text": "c c c", "fault": answers.LOOPS}]
    worse = answers.chat_quality([*faulty, *entries[2:]], model, tiny_tokenizer)
    assert (worse.stops, worse.loops, worse.faults) == (1, 1, 2) and worse.nats != whole.nats
    none = answers.chat_quality(faulty[:1] * len(answers.CHAT), model, tiny_tokenizer)
    assert none.nats is None and chat_cells(vars(none)) == [f"{len(answers.CHAT)} of {len(answers.CHAT)}", "-"]


def test_a_run_asks_a_model_with_a_template_and_the_next_run_reads_what_the_dense_one_answered(
    tiny_folder, text_file, tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_model(max_position_embeddings=256).save_pretrained(tiny_folder)
    tiny_tokenizer.chat_template = TEMPLATE
    tiny_tokenizer.save_pretrained(tiny_folder)
    flags = [tiny_folder, "--num_examples", "8", "--seq_len", "16", "--prompt", "a b c", "--eval_data", f"fox={text_file}"]
    flags = [*map(str, flags), "--max_seq_len", "16", "--recipe", "best", "--target_sparsity", "0.2"]
    assert hf_prune.main([*flags, "--calibration", str(text_file), "--output_dir", "first"]) == 0
    record = PruningRecord.read("first")
    assert list(record.chat) == ["dense", "pruned"] and len(record.answers) == 1
    assert all(quality["prompts"] == len(answers.CHAT) for quality in record.chat.values())
    assert record.chat["dense"]["nats"] is None or math.isfinite(record.chat["dense"]["nats"])
    sentence = summary.chatted(record)
    assert sentence.startswith("chat, 40 prompts: ") and sentence in " ".join(capsys.readouterr().out.split())
    assert sentence in open("first/report.html").read()
    monkeypatch.setattr(loading.WholeModel, "model", None)  # of the dense model nothing is asked again
    monkeypatch.setattr(loading, "SMALL", 0)
    assert hf_prune.main([*flags, "--calibration", "first/calibration.safetensors", "--output_dir", "second"]) == 0
    assert PruningRecord.read("second").chat == {"dense": record.chat["dense"]}
