"""What is added to the tables of settings/methods.py while a program runs works wherever those that are there do."""

import json

import pytest
import torch

import slimllm
from slimllm.__main__ import main as slim
from slimllm.experiments import ablation, trials
from slimllm.pruning.recovery import Recovered
from slimllm.reporting import figures
from slimllm.settings import methods
from slimllm.settings.methods import ChannelScore, HeadChoice, Method, Recovery
from tests.conftest import indices, make_ids, make_model

TABLES = (methods.HEAD_CHOICES, methods.CHANNEL_SCORES, methods.LAYER_RATIOS, methods.RECOVERIES)
PARTS = [(kind, name) for kind, table in enumerate(TABLES) for name in table]


@pytest.fixture
def added(monkeypatch):
    """A head choice, a channel score and a recovery that need everything they can, and a method of them; what each was given."""
    given = {}

    def heads(statistics, removed):
        given["heads"] = statistics
        size = statistics.units // statistics.groups
        return [unit for unit in range(statistics.units) if unit % size >= removed]

    def score(statistics):
        given["score"] = statistics
        return -statistics.input_variance

    def recovery(weight, bias, keep, moments, covariance, ridge, shift=None):
        given["covariance"] = covariance
        return Recovered(weight[:, keep] * 0.5, None)

    monkeypatch.setitem(methods.HEAD_CHOICES, "my_heads", HeadChoice(heads, HeadChoice.CAN_NEED))
    monkeypatch.setitem(methods.CHANNEL_SCORES, "my_score", ChannelScore(score, ChannelScore.CAN_NEED))
    monkeypatch.setitem(methods.RECOVERIES, "my_recovery", Recovery(recovery, Recovery.CAN_NEED, adds_bias=False, title="My recovery"))
    mine = Method(
        "my_heads", "my_score", "uniform", "my_recovery", all_layers=True, title="My method", source="[Mine](https://example.org)"
    )
    monkeypatch.setitem(methods.METHODS, "mine", mine)
    return given


@pytest.fixture
def legends(monkeypatch):
    """The names of the lines in each picture that is drawn."""
    found, saved = [], figures._saved

    def kept(figure, path):
        found.append([text.get_text() for text in figure.axes[0].get_legend().get_texts()])
        return saved(figure, path)

    monkeypatch.setattr(figures, "_saved", kept)
    return found


@pytest.mark.parametrize("kind, name", PARTS)
def test_every_entry_of_the_package_is_there(kind, name):
    assert callable(methods._imported(TABLES[kind][name].function))


def test_what_an_entry_needs_it_is_given_and_nothing_else_is_taken(added, monkeypatch):
    dense, settings = make_model(), dict(calibration=make_ids(), method="mine", target_sparsity=0.3)
    result = slimllm.prune(make_model(), **settings)
    given = vars(added["heads"]) | vars(added["score"])
    assert given.pop("spectrum") is None  # known beforehand of experts alone
    assert all(value is not None for value in given.values()) and added["covariance"]
    assert all(layer.mlp.down_proj.bias is None for layer in result.model.model.layers)
    assert result.parameters.decoder_removed == pytest.approx(0.3, abs=3 * 32 / result.parameters.dense_decoder)
    for index, report in enumerate(result.layers):
        kept = dense.model.layers[index].mlp.down_proj.weight[:, indices(report, "channels")]
        torch.testing.assert_close(result.model.model.layers[index].mlp.down_proj.weight, kept * 0.5)
    for table, kind, name in zip(TABLES, (HeadChoice, ChannelScore, None, Recovery), ("my_heads", "my_score", None, "my_recovery")):
        if kind:
            monkeypatch.setitem(table, name, kind(table[name].function))
    monkeypatch.setattr("slimllm.pruning.importance.taylor.saliencies", lambda runner: pytest.fail("gradients were taken"))
    with pytest.raises(TypeError, match="NoneType"):  # -None: the score is not given the variance
        slimllm.prune(make_model(), **settings)
    heads, score = added["heads"], added["score"]
    assert heads.input_norm is None and heads.saliency is None
    assert score.output_covariance is None and score.input_variance is None and score.saliency is None
    slimllm.prune(make_model(), channel_score="magnitude", **settings)
    assert added["covariance"] is None


def test_a_need_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="needs 'input_norms': a HeadChoice can need input_norm, gradients; did you mean 'input_norm'"):
        HeadChoice(len, {"input_norms"})


def test_card_and_table_name_an_added_method_and_one_that_is_not_known(added, tmp_path, monkeypatch, tiny_tokenizer, text_file, capsys):
    monkeypatch.chdir(tmp_path)
    slimllm.save(slimllm.prune(make_model(), tiny_tokenizer, calibration=make_ids(), method="mine"), "pruned")
    assert "- method: [Mine](https://example.org)\n" in (tmp_path / "pruned" / "README.md").read_text()
    flags = ["evaluate", "pruned", "--tasks", "none", "--eval_data", f"fox={text_file}", "--max_seq_len", "32"]
    assert slim(flags) == 0
    assert "| My method, paper: my_recovery, uniform " in capsys.readouterr().out
    del methods.METHODS["mine"], methods.RECOVERIES["my_recovery"]
    assert slim(flags) == 0 and slim(["report", "eval_log/pruned.json"]) == 0 and slim(["report", "pruned"]) == 0
    assert capsys.readouterr().out.count("| mine, paper: my_recovery, uniform ") == 2


def test_pictures_show_an_added_method_and_one_that_is_not_known(added, legends, tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "SEQ_LEN", 32)
    text_file.write_text(4 * text_file.read_text())
    flags = ["compare", "--base_model", str(tiny_folder), "--target_sparsity", "0.3", "--calibration", str(text_file), "--recipes", "none"]
    flags += ["--eval_data", f"fox={text_file}", "--eval_limit", "2", "--tasks", "none", "--output", "out"]
    assert slim([*flags, "--methods", "mine", "random"]) == 0
    del methods.METHODS["mine"]
    assert slim([*flags, "--methods", "random"]) == 0
    assert legends == [
        ["random, as published", "My method, as published", "dense", "dense, in fewer bits"],
        ["random, as published", "mine, as published", "dense", "dense, in fewer bits"],
    ]
    assert len({row["name"] for row in json.loads((tmp_path / "out/results.json").read_text())["rows"]}) == 5


def test_the_picture_of_recoveries_shows_an_added_one(added, legends, tmp_path):
    rows = [
        {"settings": trial.settings, "removed": trial.share, "perplexity": [{"data": "fox", "pruned": 10 + trial.share}]}
        for trial in ablation.cases(())
        if set(trial.settings) <= {"recovery"}
    ]
    figures.recovery_curves(rows, tmp_path)
    del methods.RECOVERIES["my_recovery"]
    figures.recovery_curves(rows, tmp_path)
    known = ["none", "bias", "linear (the paper)", "least squares", "rotation"]
    assert legends == [[*known, "My recovery"], [*known, "my_recovery"]]


@pytest.mark.parametrize(
    "kept, said",
    [
        (lambda s, removed: [2, 0, 1, 3][: s.units - 2 * removed], "it keeps the heads"),
        (lambda s, removed: [0], r"it keeps the heads \[0\]; it is to keep 2 of 4, as a list"),
        (lambda s, removed: torch.tensor([0, 2]), "it keeps the heads tensor"),
        (lambda s, removed: [0, 1], "each of the kept KV heads must keep the same number"),
        (lambda s, removed: [0, 9], "it keeps the heads"),
    ],
)
def test_a_choice_that_gives_something_else_than_units_is_named(kept, said, monkeypatch):
    """Or query heads would belong to other KV heads in silence."""
    monkeypatch.setitem(methods.HEAD_CHOICES, "odd", HeadChoice(kept))
    with pytest.raises(slimllm.UserError, match=f"^--head_choice odd, layer 0: .*{said}"):
        slimllm.prune(make_model(), calibration=make_ids(), pruning_ratio=0.5, head_choice="odd", layer_ratio="uniform")


@pytest.mark.parametrize("scores", [lambda s: torch.zeros(32), lambda s: torch.full((48,), float("nan")), lambda s: torch.zeros(48, 2)])
def test_a_score_of_another_shape_or_without_numbers_is_named(scores, monkeypatch):
    monkeypatch.setitem(methods.CHANNEL_SCORES, "odd", ChannelScore(scores))
    with pytest.raises(slimllm.UserError, match="^--channel_score odd, layer 0: it gives scores of shape .* one number for each of 48"):
        slimllm.prune(make_model(), calibration=make_ids(), pruning_ratio=0.5, channel_score="odd", layer_ratio="uniform")


def test_a_method_that_names_what_there_is_not_is_named(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "mine", Method("greedy", "trcae", "uniform", "none"))
    with pytest.raises(slimllm.UserError, match="--method mine: channel_score trcae: not one of"):
        slimllm.prune(make_model(), calibration=make_ids(), method="mine")
