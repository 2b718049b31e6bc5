"""What --dry_run says of the time that a run takes: what it counts, at speeds that are given."""

from types import MappingProxyType

import pytest

import hf_prune
from slimllm import forecast
from slimllm.footprint import sizes_of
from slimllm.pruning.allocation.layer_ratios import without_scores
from slimllm.pruning.allocation.price_list import NAME, PriceList
from slimllm.run import Run
from slimllm.settings.pruning import PruneConfig
from tests.conftest import family_config, make_model


def counted(monkeypatch, speeds=None, sizes=MappingProxyType({}), **settings):
    """Seconds of each stage of a run on a tiny Llama, with one multiplication a second and matrices without eigenvectors."""
    monkeypatch.setattr(forecast, "speeds", lambda run, rows: speeds or forecast.Speeds(1.0, 1.0, 1.0, 1.0, 0.0))
    run = Run.of(PruneConfig(base_model="m", calibration="wikitext2", **settings), family_config("llama_mha", **sizes))
    run.dtype = make_model("llama_mha").dtype
    plans = without_scores(run).plans
    return run, forecast.seconds(run, plans, sizes_of(run, run.dtype, run.dtype))


def test_what_is_multiplied_is_counted(monkeypatch):
    settings = dict(pruning_ratio=0.5, pruned_layers=2, num_examples=4, seq_len=8, eval_data=("a", "b"), eval_limit=3, max_seq_len=16)
    run, seconds = counted(monkeypatch, recovery="none", **settings)
    layers, head, tokens, hidden = sum(layer.parameters for layer in run.shape.layers), 97 * 32, 32, 32
    assert seconds.keys() == {"pruning", "evaluation", "the rest"}  # the hub's text, no distillation, no prices
    assert seconds["evaluation"] == 2 * (2 * 3 * 16) * (layers + head)  # the dense and the pruned model read every block
    per_layer = tokens * 32**2 + 2 * tokens * 16 * hidden  # heads: the input's covariance, then half of the columns
    per_layer += tokens * hidden**2 + 2 * tokens * 24 * hidden  # channels: the output's covariance
    assert seconds["pruning"] == 2 * tokens * layers + 2 * per_layer  # importance, then the pruned layers in order


def test_each_ingredient_takes_time(monkeypatch):
    settings = dict(target_sparsity=0.3, num_examples=64, seq_len=16, eval_data=())
    paper, best, distilled = (counted(monkeypatch, recipe=name, **settings)[1] for name in ("paper", "best", "distilled"))
    assert "prices" not in paper and best["prices"] > 0 and best["pruning"] > paper["pruning"] and best["own text"] > 0
    assert distilled["distillation"] > 0 and distilled["prices"] == best["prices"]
    assert counted(monkeypatch, recipe="best", **settings | {"num_examples": 128})[1]["own text"] == 2 * best["own text"]


@pytest.mark.parametrize(
    "settings, measured",
    [
        ({"drop_layers": 1, "target_sparsity": 0.0}, True),
        ({"drop_parts": 1, "target_sparsity": 0.0}, True),
        ({"method": "shortgpt", "target_sparsity": 0.5}, True),
        ({"method": "replaceme", "target_sparsity": 0.5}, True),
        ({"method": "llm_drop", "target_sparsity": 0.2}, True),
        ({"target_sparsity": 0.0}, False),
    ],
)
def test_what_goes_whole_takes_passes_of_its_own(settings, measured, monkeypatch):
    run, seconds = counted(monkeypatch, num_examples=4, seq_len=8, eval_data=("a",), eval_limit=3, max_seq_len=16, **settings)
    dense, left = (sum(layer.parameters for layer in layers) for layers in (run.shape.given_layers, run.shape.layers))
    assert (left < dense) == measured
    passes = dense + (dense + left) * (run.config.recovery == "least_squares")  # to make up for what is gone
    assert seconds.get("layers and parts to go", 0) == 32 * passes * measured
    assert seconds["evaluation"] == 3 * 16 * (dense + left + 2 * 97 * 32)


def test_two_ways_to_go_are_both_tried(monkeypatch):
    settings = dict(num_examples=4, seq_len=8, eval_data=(), target_sparsity=0.0, recovery="least_squares")
    one, two = (counted(monkeypatch, drop_layers=count, sizes={"num_hidden_layers": 6}, **settings) for count in (1, 2))
    for (run, seconds), tried in ((one, 0), (two, 2)):
        dense, left = (sum(layer.parameters for layer in layers) for layers in (run.shape.given_layers, run.shape.layers))
        passes = 32 * dense + 32 * (dense + left) + tried * (24 * (dense + left) + 8 * left)
        assert seconds["layers and parts to go"] == passes


def test_gradients_take_passes_of_their_own(monkeypatch):
    settings = dict(pruning_ratio=0.5, num_examples=4, seq_len=8, eval_data=("none",), layer_ratio="middle", recovery="none")
    run, by_gradients = counted(monkeypatch, method="llm_pruner", **settings)
    others = counted(monkeypatch, method="magnitude", **settings)[1]
    forward = 32 * sum(layer.parameters for layer in run.shape.layers)
    assert by_gradients["pruning"] - others["pruning"] == pytest.approx(4 * forward, abs=forward / 2)


def test_the_machine_is_asked_for_its_speeds():
    run = Run.of(PruneConfig(base_model="m", pruning_ratio=0.5), family_config("llama_mha"))
    run.dtype = make_model("llama_mha").dtype
    assert all(value > 0 for value in vars(forecast.speeds(run, 8)).values())


def test_a_dry_run_says_the_time_and_by_a_price_list_the_loss(tiny_folder, tmp_path, capsys):
    flags = [str(tiny_folder), "--recipe", "best", "--target_sparsity", "0.3", "--dry_run"]
    assert hf_prune.main(flags) == 0
    said = capsys.readouterr().out
    assert "| time here, at the speed that it has now, about" in said and "predicted loss" not in said
    config = PruneConfig(base_model=str(tiny_folder), recipe="best", target_sparsity=0.3)
    run = Run.of(config, family_config("llama_gqa"))
    prices = PriceList.alike(run.shape, run.config)
    prices.write(tmp_path)
    assert hf_prune.main([*flags, "--price_list", str(tmp_path / NAME)]) == 0
    said = capsys.readouterr().out
    run = Run.of(PruneConfig(str(tiny_folder), recipe="best", target_sparsity=0.3, price_list=str(tmp_path / NAME)), run.model_config)
    loss = without_scores(run).predicted_loss
    assert f"dry run, the plan of least loss by {tmp_path / NAME} over" in said and f"{loss:.3f}" in said and loss > 0


@pytest.mark.parametrize("seconds, shown", [(30, "30 s (a 30)"), (600, "10 min (a 10.0)"), (9000, "2.5 h (a 2.5)")])
def test_times_are_said_in_units_that_fit(seconds, shown):
    from slimllm.reporting.tables import _time

    assert _time({"a": seconds}) == shown
