"""Prices of whole experts and of their channels, the plans that follow, and mixtures whose layers differ."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_prune
import slimllm
from slimllm.deploy.runtimes import convert_for_runtime
from slimllm.models.adapter import Experts, LayerAdapter
from slimllm.models.shape import shape_of
from slimllm.models.slicing import slice_experts
from slimllm.plan import LayerPlan
from slimllm.pruning.allocation import prices, solver
from slimllm.pruning.allocation.budget import budgets_of
from slimllm.pruning.allocation.inputs import AllocationInputs
from slimllm.pruning.allocation.price_list import PriceList, levels_in
from slimllm.pruning.allocation.sizing import Sizing
from slimllm.pruning.allocation.solver import predicted, solve
from slimllm.streaming.activations import ActivationStore
from slimllm.streaming.sizes import Sizes
from tests.conftest import MIXTURE_CASES, TEXT, family_config, logits, make_config, make_ids, make_model, make_shape, prune, run_of
from tests.test_export_gguf import bpe_tokenizer

CASES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_moe", "cohere2_moe", "qwen3_5_moe")


@pytest.fixture(autouse=True)
def in_the_model_s_dtype(monkeypatch):
    monkeypatch.setattr(prices, "evaluation_dtype", lambda dtype, device: dtype)


def inputs_of(model, ids, **settings):
    shape = shape_of(model.config)
    settings = {"target_sparsity": 0.2, "layer_ratio": "auto", "recovery": "least_squares", "look_back": 0.0, **settings}
    run = run_of(model, ids, make_config(len(shape.layers), shape, **settings))
    return AllocationInputs(run.shape, run.config, run)


def small(case, scale=0.05):
    """A random model whose experts give so little that second order is all there is."""
    model = make_model(case)
    with torch.no_grad():
        for part in LayerAdapter(model.config).all_parts(model):
            if isinstance(part, Experts):
                for expert in range(part.units["experts"]):
                    part.projection(expert)[0].mul_(scale)
    return model


@pytest.mark.parametrize("how", ["gradient", "streams"])
@pytest.mark.parametrize("case", CASES)
def test_every_level_of_experts_has_a_price_and_the_model_stays_as_it_is(case, how):
    model, ids = make_model(case), make_ids(8)
    before = logits(model, ids)
    inputs = inputs_of(model, ids, prune="experts", prices=how)
    found = prices.measured(inputs)
    wanted = [
        (index, "experts", level.units)
        for index, layer in enumerate(inputs.shape.layers)
        for _, level in levels_in(layer.parts, inputs.config, True)
    ]
    assert [(price.layer, price.part, price.units) for price in found.prices] == wanted and len(wanted) in (4, 8)
    assert all(price.nats >= 0 for price in found.prices) and any(price.nats > 0 for price in found.prices)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("prune_what", ["experts", "both"])
@pytest.mark.parametrize("how", ["gradient", "streams"])
def test_the_stores_of_experts_are_in_the_forecast_of_memory(how, prune_what, monkeypatch):
    kept, most = [], 0
    append, close = ActivationStore.append, ActivationStore.close

    def counted(store, tensor):
        nonlocal most
        kept.append((store, tensor.nbytes))
        most = max(most, sum(size for _, size in kept))
        append(store, tensor)

    def closed(store):
        kept[:] = [entry for entry in kept if entry[0] is not store]
        close(store)

    monkeypatch.setattr(ActivationStore, "append", counted)
    monkeypatch.setattr(ActivationStore, "close", closed)
    inputs = inputs_of(make_model("qwen3_moe"), make_ids(512, 16), prune=prune_what, prices=how)
    prices.measured(inputs)
    assert most == pytest.approx(prices.activation_bytes(inputs.run, Sizes(4, 4, 4, 4, tokens=8192)), rel=0.25)


@pytest.mark.parametrize("prune_what", ["experts", "channels", "both"])
def test_a_price_is_what_pruning_this_part_alone_costs(prune_what):
    """To second order, over the labels that are drawn: the divergence of the model in which this part alone is pruned."""
    model, ids = small("qwen3_moe"), make_ids(96, 32)
    inputs = inputs_of(model, ids, prune=prune_what, num_examples=96)
    by_gradient = prices.measured(inputs).prices
    by_streams = prices.measured(inputs_of(model, ids, prune=prune_what, prices="streams")).prices
    assert [price.units for price in by_gradient] == [price.units for price in by_streams]
    logs = [torch.tensor([price.nats for price in found]).clamp_min(1e-12).log() for found in (by_gradient, by_streams)]
    assert torch.corrcoef(torch.stack(logs))[0, 1] > 0.9 and (logs[0] - logs[1]).abs().median() < 0.7


def test_experts_that_do_nothing_cost_nothing_and_go_first():
    """In one layer alone: the plan takes from it what it can, and no more from the other than it must."""
    model, ids = make_model("qwen3_moe"), make_ids(24)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(1e-3)
    inputs = inputs_of(model, ids, prune="experts", target_sparsity=0.25)
    found = prices.measured(inputs)
    first, last = (max(price.nats for price in found.of_part(index, "experts")) for index in (0, 1))
    assert first < 0.01 * last
    [budget] = budgets_of(inputs)
    plans = solve(found, Sizing(inputs.shape, inputs.config), budget)
    kept = [plan.units["experts"]["experts"] for plan in plans]
    assert kept[0] < kept[1] and budget.removed(plans) == pytest.approx(budget.target, abs=0.51 * (3 * 32 * 16 + 32))


@pytest.mark.parametrize("prune_what, count", [("experts", 7), ("both", 7 * 2)])
def test_no_other_plan_of_two_layers_is_predicted_to_lose_less(prune_what, count, monkeypatch):
    """By the list alone, with nothing that keeps parts even; nearly so where channels go too, which free less where experts are gone."""
    monkeypatch.setattr(solver, "EVENNESS", 0.0)
    monkeypatch.setattr(solver, "EVENNESS_OF_MIXTURES", 0.0)
    inputs = inputs_of(make_model("qwen3_moe"), make_ids(24), prune=prune_what, target_sparsity=0.2)
    found, sizing = prices.measured(inputs), Sizing(inputs.shape, inputs.config)
    [budget] = budgets_of(inputs)
    plans = solve(found, sizing, budget)
    step = 0.51 * inputs.shape.layers[0].parts[1].parameters() / 8
    widths = [8, 16] if prune_what == "both" else [16]
    options = [{"experts": experts, "channels": width} for experts in range(2, 9) for width in widths]
    assert len(options) == count
    losses = []
    for one in options:
        for other in options:
            tried = [LayerPlan(0.0, layer.units | {"experts": units}) for layer, units in zip(inputs.shape.layers, (one, other))]
            if abs(budget.removed(tried) - budget.target) <= step:
                losses.append(predicted(found, sizing, tried))
    assert abs(budget.removed(plans) - budget.target) <= 2 * step
    assert losses and predicted(found, sizing, plans) <= 1.5 * min(losses) + 1e-3


def test_layers_that_are_read_from_files_are_read_anew_and_never_copied(tmp_path, monkeypatch):
    from slimllm.models import loading

    model, ids = make_model("deepseek_v3"), make_ids(8)
    wanted = prices.measured(inputs_of(model, ids, prune="experts")).prices
    model.save_pretrained(tmp_path)
    source = loading.open_source(str(tmp_path), torch.float32)
    monkeypatch.setattr(prices, "copy", None)
    found = prices.measured(inputs_of_source(source, ids))
    assert [price.units for price in found.prices] == [price.units for price in wanted]
    assert [price.nats for price in found.prices] == pytest.approx([price.nats for price in wanted], rel=1e-3)


def inputs_of_source(source, ids):
    shape = shape_of(source.config)
    config = make_config(2, shape, target_sparsity=0.2, layer_ratio="auto", recovery="least_squares", look_back=0.0, prune="experts")
    run = run_of(source, ids, config)
    return AllocationInputs(run.shape, run.config, run)


def test_a_list_of_prices_is_read_again_and_is_of_what_goes(tmp_path):
    inputs = inputs_of(make_model("qwen3_moe"), make_ids(8), prune="both")
    found = prices.measured(inputs)
    found.write(tmp_path)
    assert PriceList.read(tmp_path / "price_list.json", inputs.shape, inputs.config).prices == found.prices
    channels = inputs_of(make_model("qwen3_moe"), make_ids(8), prune="channels")
    assert PriceList.read(tmp_path / "price_list.json", channels.shape, channels.config)
    prices.measured(channels).write(tmp_path)
    with pytest.raises(slimllm.errors.UserError, match="layer 0: its experts has no usable price"):
        PriceList.read(tmp_path / "price_list.json", inputs.shape, inputs.config)


@pytest.mark.parametrize("ratio, uneven", [("uniform", False), ("importance", True), ("auto", True)])
def test_layers_lose_different_numbers_where_they_are_spread(ratio, uneven):
    model = make_model("qwen3_moe", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(0.05)
    config = make_config(3, shape_of(model.config), target_sparsity=0.25, layer_ratio=ratio, prune="experts", recovery="least_squares")
    reports = prune(model, make_ids(24), config)
    kept = [report.units["experts"]["experts"] for report in reports]
    assert (len(set(kept)) > 1) == uneven
    before, ids = type(model), make_ids()
    wanted = logits(model, ids)
    convert_for_runtime(model, "any")
    assert (type(model) is not before) == uneven and torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("case", [case for case in MIXTURE_CASES if case != "gemma4_moe"])
def test_layers_with_different_numbers_of_experts_are_saved_and_loaded(case, tmp_path):
    model, ids = make_model(case), make_ids()
    parts = [part for part in LayerAdapter(model.config).all_parts(model) if isinstance(part, Experts)]
    slice_experts(parts[0], {"experts": [0, 2, 4, 6]})
    wanted = logits(model, ids)
    convert_for_runtime(model, "any")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), wanted)
    assert [layer["experts"]["experts"] for layer in LayerAdapter(loaded.config).units(loaded) if "experts" in layer][0] == 4
    assert shape_of(loaded.config).units == LayerAdapter(loaded.config).units(loaded)
    own = sum(tensor.numel() for layer in LayerAdapter(loaded.config).layers(loaded) for tensor in layer.parameters())
    assert shape_of(loaded.config).decoder_parameters == own


@pytest.mark.parametrize(
    "case, flags, even", [("deepseek_v3", [], False), ("qwen3_moe", ["--runtime", "gguf", "--layer_ratio", "auto"], True)]
)
def test_a_mixture_is_pruned_by_prices_from_the_command_line(case, flags, even, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = bpe_tokenizer()
    sizes = dict(norm_topk_prob=True, moe_intermediate_size=32) if case == "qwen3_moe" else {}
    make_model(case, vocab_size=len(tokenizer), num_hidden_layers=3, **sizes).save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "text.txt").write_text(TEXT)
    common = ["--base_model", "model", "--calibration", "text.txt", "--num_examples", "8", "--seq_len", "16", "--eval_data", "none"]
    common += ["--recipe", "best", "--self_share", "0", "--target_sparsity", "0.2", "--output_dir", "pruned", *flags]
    assert hf_prune.main(common) == 0, capsys.readouterr().err
    layers = json.loads((tmp_path / "pruned/pruning.json").read_text())["layers"]
    kept = [len(layer["kept"]["experts"]["experts"]) for layer in layers if "experts" in layer["kept"]]
    assert min(kept) < 8 and (not even or len(set(kept)) == 1)
    assert "predicted loss: " in capsys.readouterr().out
    assert hf_prune.main([*common, "--overwrite", "--dry_run"]) == 0


def test_a_mixture_whose_class_has_one_number_of_experts_keeps_one():
    """Gemma 4's settings of each layer stand where those of a pruned model's layers would."""
    shape = make_shape("gemma4_moe")
    assert make_config(2, shape, recipe="best", target_sparsity=0.1).layer_ratio == "uniform"
    assert family_config("gemma4_moe").num_experts == 8
