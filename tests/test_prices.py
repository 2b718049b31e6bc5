"""The price list and the solver: what a part costs, and the plan of least predicted loss for any budget."""

import copy
import itertools
import json
import re
from dataclasses import replace

import gguf
import pytest
import torch

import hf_prune
import slimllm
from slimllm.deploy import export_gguf
from slimllm.errors import UserError
from slimllm.models.adapter import LayerAdapter
from slimllm.models.parts import PRUNED_KINDS
from slimllm.models.shape import shape_of
from slimllm.plan import LayerPlan, removed_parameters
from slimllm.pruning.allocation import budget, prices, solver, timing
from slimllm.pruning.allocation.budget import budgets_of, of_parameters
from slimllm.pruning.allocation.inputs import AllocationInputs
from slimllm.pruning.allocation.price_list import NAME, Price, PriceList, curve, levels_of
from slimllm.pruning.allocation.sizing import Sizing
from slimllm.settings.methods import PRICES
from slimllm.streaming.journal import Journal
from tests.conftest import (
    CORE_CASES,
    DISTINCT_CASES,
    TEXT,
    count,
    kept_bytes,
    logits,
    make_config,
    make_ids,
    make_model,
    make_shape,
    prune,
    run_of,
)
from tests.test_export_gguf import bpe_tokenizer, save


@pytest.fixture(autouse=True)
def in_the_model_s_dtype(monkeypatch):
    monkeypatch.setattr(prices, "evaluation_dtype", lambda dtype, device: dtype)


def inputs_of(model, ids, config, **rest):
    run = run_of(model, ids, config, **rest)
    return AllocationInputs(run.shape, config, run)


def divergence(dense, model, ids):
    p = logits(dense, ids).log_softmax(-1)
    return (p.exp() * (p - logits(model, ids).log_softmax(-1))).sum(-1).mean().item()


@pytest.mark.parametrize("case, recovery", [("llama_mha", "none"), *((case, "least_squares") for case in DISTINCT_CASES)])
def test_streams_measure_the_divergence_that_one_pruned_part_makes(case, recovery):
    dense, ids = make_model(case, num_hidden_layers=3), make_ids(samples=8)
    shape = shape_of(dense.config)
    config = make_config(layers=3, shape=shape, layer_ratio="auto", recovery=recovery, prices="streams")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    found = prices.measured(inputs_of(dense, ids, config))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    kinds = PRUNED_KINDS[config.prune]
    assert {(price.layer, price.part) for price in found.prices} == {
        (index, part.kind) for index, layer in enumerate(shape.layers) for part in layer.parts if part.kind in kinds
    }
    for price in (found.prices[0], found.prices[len(found.prices) // 2], found.prices[-1]):
        plans = [LayerPlan(0.0, layer.units) for layer in shape.layers]
        plans[price.layer].units[price.part] = price.units
        pruned = copy.deepcopy(dense)
        prune(pruned, ids, config, plans=plans)
        assert price.nats == pytest.approx(divergence(dense, pruned, ids), rel=2e-3, abs=1e-7)


def outputs_and_gradients(model, ids, uniform):
    """Of the whole model at once: input, output and gradient of the likelihood, for each part's output projection."""
    caught, hooks = {}, []
    for index, layer in enumerate(LayerAdapter(model.config).layers(model)):
        for part in LayerAdapter(model.config).parts(layer):
            hook = part.output.register_forward_hook(
                lambda _, args, output, key=(index, part.kind): caught.update({key: (args[0].detach(), output)})
            )
            hooks.append(hook)
    log_p = model(ids, use_cache=False).logits.log_softmax(-1)
    labels = (log_p.exp().cumsum(-1) < uniform[..., None]).sum(-1).clamp_max(log_p.shape[-1] - 1)
    gradients = torch.autograd.grad(log_p.gather(-1, labels[..., None]).sum(), [y for _, y in caught.values()])
    for hook in hooks:
        hook.remove()
    return {key: (x, y.detach(), g) for (key, (x, y)), g in zip(caught.items(), gradients)}


@pytest.mark.parametrize("case", DISTINCT_CASES)
def test_a_gradient_price_is_half_the_mean_square_of_gradient_times_change(case, monkeypatch):
    dense, ids = make_model(case, num_hidden_layers=3), make_ids(samples=6)
    config = make_config(layers=3, shape=shape_of(dense.config), layer_ratio="auto", recovery="least_squares")
    options, plain = {}, prices.Fits.options

    def watched(fits, layer, index, hidden):
        options[index] = plain(fits, layer, index, hidden)
        return options[index]

    monkeypatch.setattr(prices.Fits, "options", watched)
    found = prices.measured(inputs_of(dense, ids, config))
    assert not any(parameter.grad is not None for parameter in dense.parameters())
    at = outputs_and_gradients(dense, ids, torch.rand(ids.shape, generator=torch.Generator().manual_seed(config.seed)))
    wanted = []
    for index in range(3):
        for option in options[index]:
            x, y, g = at[index, option.part]
            d = torch.nn.functional.linear(x[..., option.columns], option.recovered.weight, option.recovered.bias) - y
            wanted.append(float((g * d).sum(-1).square().mean() / 2))
    assert [price.nats for price in found.prices] == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("case", CORE_CASES)
def test_gradient_and_streams_put_the_parts_in_the_same_order(case):
    dense, ids = make_model(case, num_hidden_layers=4, intermediate_size=96), make_ids(samples=32, length=32)
    shape = shape_of(dense.config)
    by_way = []
    for way in ("gradient", "streams"):
        config = make_config(layers=4, shape=shape, layer_ratio="auto", recovery="least_squares", prices=way)
        by_way.append(torch.tensor([price.nats for price in prices.measured(inputs_of(dense, ids, config)).prices]))
    ranks = torch.stack([values.argsort().argsort().double() for values in by_way])
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    assert 0.5 < by_way[0].sum() / by_way[1].sum() < 2


def test_a_stopped_run_does_not_fit_again_what_it_priced(tmp_path, monkeypatch):
    dense, ids = make_model(num_hidden_layers=4), make_ids(samples=8)
    config = make_config(layers=4, layer_ratio="auto", recovery="least_squares")
    whole = prices.measured(inputs_of(dense, ids, config))
    plain, fitted = prices.Fits.options, []

    def stopping(fits, layer, index, hidden):
        fitted.append(index)
        if len(fitted) == 3:
            raise KeyboardInterrupt
        return plain(fits, layer, index, hidden)

    monkeypatch.setattr(prices.Fits, "options", stopping)
    with pytest.raises(KeyboardInterrupt):
        prices.measured(inputs_of(dense, ids, config, journal=Journal(tmp_path)))
    again = prices.measured(inputs_of(dense, ids, config, journal=Journal(tmp_path)))
    assert fitted == [3, 2, 1, 1, 0] and again.prices == whole.prices


def random_list(shape, config, seed=0):
    generator, listed = torch.Generator().manual_seed(seed), []
    for index, layer in enumerate(shape.layers):
        for part in layer.parts:
            steps, scale = part.steps(config.head_unit), float(torch.rand((), generator=generator)) + 0.05
            for kept in levels_of(steps):
                gone = 1 - kept / steps.count
                listed.append(Price(index, part.kind, steps.units(kept), gone, scale * gone**1.4))
    return PriceList.of(shape, config, "", 0, listed, 0.0)


def solved(shape, config, seed=0):
    found, sizing, budget = random_list(shape, config, seed), Sizing(shape, config), of_parameters(shape, config)
    return found, sizing, budget, solver.solve(found, sizing, budget)


def total(found, budget, plans):
    """What the solver minimises, written out."""
    evenness, loss = solver.EVENNESS * found.mean * budget.share, 0.0
    for index, layer in enumerate(budget.shape.layers):
        for part in layer.parts:
            scale, exponent = curve(found.of_part(index, part.kind))
            gone = 1 - plans[index].units[part.kind][part.sorts[0]] / part.units[part.sorts[0]]
            loss += scale * gone**exponent + evenness * gone**2 + solver.STEEP * max(gone - solver.MOST, 0)
    return loss


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_no_other_plan_that_frees_as_much_is_predicted_to_lose_less(seed, share):
    shape = make_shape("llama_mha", num_hidden_layers=2, intermediate_size=20)
    config = make_config(layers=2, shape=shape, layer_ratio="auto", target_sparsity=share, recovery="none")
    found, sizing, budget, plans = solved(shape, config, seed)
    best, freed = total(found, budget, plans), budget.removed(plans)
    for a, b, c, d in itertools.product(range(1, 5), range(1, 21), range(1, 5), range(1, 21)):
        units = [{"attention": {"heads": a, "kv_heads": a}, "mlp": {"channels": b}}, {"attention": {"heads": c, "kv_heads": c}}]
        units[1]["mlp"] = {"channels": d}
        other = [LayerPlan(0.0, layer) for layer in units]
        if budget.removed(other) >= freed:
            assert total(found, budget, other) >= best * 0.97  # heads come in steps: a little is left on the table


SEVERAL = [
    {"target_sparsity": 0.2, "target_speedup": 1.3},
    {"target_sparsity": 0.25, "target_speedup": 1.3},
    {"target_sparsity": 0.3, "target_speedup": 1.35},
    {"target_sparsity": 0.3, "target_speedup": 1.05},
    {"target_sparsity": 0.1, "fit": 0.75, "target_speedup": 1.2},
    {"fit": 0.75, "target_speedup": 1.3},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", SEVERAL)
def test_several_budgets_are_all_met_and_no_other_plan_that_does_so_loses_less(settings, seed, monkeypatch):
    shape = make_shape("llama_mha", num_hidden_layers=2, intermediate_size=24, hidden_size=32, head_dim=8)
    monkeypatch.setattr(timing, "by_parameters", lambda shape: timing.Times({"attention": (1e-3, 8e-3), "mlp": (1e-3, 1e-5)}, 2e-3))
    monkeypatch.setattr(solver, "EVENNESS", 0.0)
    if "fit" in settings:
        whole = bytes_of([LayerPlan(0.0, layer.units) for layer in shape.layers], shape, 64)
        settings = settings | {"fit": f"{settings['fit'] * whole / 1e6:.6f}MB", "context": 64, "gguf_type": "f16"}
    config = make_config(layers=2, shape=shape, layer_ratio="auto", **{"target_sparsity": None, **settings, "recovery": "none"})
    found, sizing, budgets = random_list(shape, config, seed), Sizing(shape, config), budgets_of(AllocationInputs(shape, config))
    assert len(budgets) == sum(settings.get(name) is not None for name in ("target_sparsity", "fit", "target_speedup"))
    plans = solver.solve_all(found, sizing, budgets)
    channel = [budget.frees(sizing.fine[0], 23) for budget in budgets]
    assert all(budget.removed(plans) >= budget.target - 1.01 * step for budget, step in zip(budgets, channel))
    best = solver.predicted(found, sizing, plans)
    for heads, channels in itertools.product(itertools.product(range(1, 5), repeat=2), itertools.product(range(3, 25), repeat=2)):
        other = [LayerPlan(0.0, {"attention": {"heads": h, "kv_heads": h}, "mlp": {"channels": c}}) for h, c in zip(heads, channels)]
        if all(budget.removed(other) >= budget.target for budget in budgets):
            assert solver.predicted(found, sizing, other) >= 0.9 * best  # heads come in steps


@pytest.mark.parametrize("case", ["llama_mha", "llama_gqa", "llama_biases", "qwen3"])
@pytest.mark.parametrize("settings", [{}, {"round_to": 4}, {"runtime": "vllm"}, {"runtime": "transformers"}, {"prune": "channels"}])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.4])
def test_the_target_is_met_to_within_one_step(case, settings, share):
    shape = make_shape(case, num_hidden_layers=6, intermediate_size=100)
    config = make_config(layers=6, shape=shape, layer_ratio="auto", target_sparsity=share, recovery="least_squares", **settings)
    _, sizing, budget, plans = solved(shape, config)
    step = (3 * shape.hidden + 2) * config.round_to * (6 if sizing.limits.same_channels else 1)
    biases = 6 * 2 * (shape.hidden + 100) if settings.get("runtime") == "transformers" else shape.hidden
    assert abs(removed_parameters(shape, plans, config) - share * shape.decoder_parameters) <= step + biases
    kept = [count(p, "channels") for p in plans]
    assert all(channels % config.round_to == 0 for channels in kept)
    if sizing.limits.same_heads:
        assert len({count(p, "heads") for p in plans}) == 1
    if sizing.limits.same_channels:
        assert len(set(kept)) == 1


def test_dear_parts_keep_more_and_an_even_list_is_cut_evenly():
    shape = make_shape("llama_mha", num_hidden_layers=4, intermediate_size=100)
    config = make_config(layers=4, shape=shape, layer_ratio="auto", target_sparsity=0.3)
    _, _, _, plans = solved(shape, config)
    found = random_list(shape, config)
    scale = [curve(found.of_part(index, "mlp"))[0] for index in range(4)]
    kept = [count(p, "channels") for p in plans]
    assert [kept[i] for i in sorted(range(4), key=scale.__getitem__)] == sorted(kept)
    even = solver.solve(PriceList.alike(shape, config), Sizing(shape, config), of_parameters(shape, config))
    assert max(count(p, "channels") for p in even) - min(count(p, "channels") for p in even) <= 1


def test_what_cannot_be_freed_is_said():
    shape = make_shape(num_hidden_layers=2)
    config = make_config(layers=2, shape=shape, layer_ratio="auto", target_sparsity=0.99)
    with pytest.raises(UserError, match=r"--target_sparsity 0.99: all 2 layers can give up at most 0.\d+ of the decoder's parameters"):
        solved(shape, config)


@pytest.mark.parametrize("exponent", [1.0, 1.4, 2.5])
def test_the_curve_goes_through_prices_that_lie_on_one(exponent):
    listed = [Price(0, "mlp", {}, share, 0.3 * share**exponent) for share in (0.125, 0.25, 0.5, 0.75)]
    assert curve(listed) == pytest.approx((0.3, exponent))


def best(model, ids, **settings):
    return slimllm.prune(copy.deepcopy(model), calibration=ids, **{"recipe": "best", "target_sparsity": 0.3, **settings})


def test_a_price_list_answers_any_budget_with_nothing_measured_again(tmp_path, monkeypatch):
    model, ids = make_model(num_hidden_layers=4), make_ids(samples=8)
    config = make_config(layers=4, layer_ratio="auto", recovery="least_squares", keep_lowest=0.0)
    prices.measured(inputs_of(copy.deepcopy(model), ids, config)).write(tmp_path)
    usual = best(model, ids)
    monkeypatch.setattr(prices, "measured", None)
    file = str(tmp_path / NAME)
    again = best(model, ids, price_list=file)
    assert [layer.units for layer in again.layers] == [layer.units for layer in usual.layers]
    fewer = best(model, ids, price_list=file, target_sparsity=0.1)
    assert fewer.parameters.decoder_removed == pytest.approx(0.1, abs=0.003)


def with_first(text, more=False, **values):
    """The list with the first of its prices changed, or with that besides."""
    content = json.loads(text)
    first = content["prices"][0] | values
    return json.dumps({**content, "prices": [*content["prices"], first] if more else [first, *content["prices"][1:]]})


@pytest.mark.parametrize("dearer, smaller", [(1e8, 1.0), (1e8, 1e-12), (1e-6, 1e6)])
def test_a_plan_does_not_depend_on_the_units_of_prices_and_targets(dearer, smaller, monkeypatch):
    monkeypatch.setattr(solver, "STEEP", 0.0)  # it is in nats
    shape = make_shape(num_hidden_layers=3)
    config = make_config(layers=3, layer_ratio="auto", target_sparsity=0.3).having(base_model="m")
    found, asked, sizing = PriceList.alike(shape, config), of_parameters(shape, config), Sizing(shape, config)
    cheap, dear = (replace(found, prices=[replace(p, nats=by * p.nats * (1 + p.layer)) for p in found.prices]) for by in (1, dearer))
    scaled = replace(asked, target=smaller * asked.target, measure=lambda *args: smaller * asked.measure(*args))
    assert solver.solve(dear, sizing, scaled) == solver.solve(cheap, sizing, asked)


def test_a_price_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setitem(PRICES, "gradient", lambda inputs, fits, ids: [Price(1, "mlp", {"channels": 8}, 0.5, float("nan"))])
    with pytest.raises(UserError, match="layer 1: its mlp costs nan nats per token; try --dtype float32"):
        prices.measured(inputs_of(make_model(num_hidden_layers=2), make_ids(), make_config(layers=2, layer_ratio="auto")))


def test_a_list_of_another_model_of_the_same_widths_is_named(tmp_path, caplog):
    shape, config = make_shape(num_hidden_layers=2), make_config(layers=2, layer_ratio="auto").having(base_model="here/mine")
    found = PriceList.alike(shape, config)
    found.write(tmp_path)
    with caplog.at_level("INFO", "slimllm"):
        PriceList.read(tmp_path / NAME, shape, config)
        assert not caplog.text
        PriceList.read(tmp_path / NAME, shape, config.having(base_model="there/other"))
    assert "it was made of mine" in caplog.text


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: "{", "not a price list"),
        (lambda text: "[]", "not a price list"),
        (lambda text: json.dumps({**json.loads(text), "prices": []}), "layer 0: its attention has no usable price"),
        (lambda text: text.replace('"nats": 0.', '"nats": -0.'), "layer 0: its attention has no usable price"),
        (lambda text: with_first(text, nats=1e300), "layer 0: its attention has no usable price"),
        (lambda text: with_first(text, nats=float("nan")), "layer 0: its attention has no usable price"),
        (lambda text: with_first(text, share=0.9), "layer 0: its attention has no usable price"),
        *(
            (lambda text, change=change: with_first(text, **change, more=True), "is of nothing that this model has")
            for change in (dict(layer=9), dict(layer=-1), dict(part="experts"), dict(units=[1]), dict(units={"heads": 4, "kv_heads": 2}))
        ),
        (lambda text: json.dumps({**json.loads(text), "units": []}), "a model of other widths"),
        (lambda text: text.replace('"recovery": "least_squares"', '"recovery": "linear"'), "was made with --recovery linear"),
    ],
)
def test_a_file_that_is_no_price_list_of_this_model_is_refused(change, said, tmp_path):
    model, ids = make_model(num_hidden_layers=2), make_ids(samples=8)
    config = make_config(layers=2, layer_ratio="auto", recovery="least_squares", keep_lowest=0.0)
    prices.measured(inputs_of(copy.deepcopy(model), ids, config)).write(tmp_path)
    (tmp_path / NAME).write_text(change((tmp_path / NAME).read_text()))
    with pytest.raises(UserError, match="--price_list .*" + said):
        best(model, ids, price_list=str(tmp_path / NAME))


def test_amounts_of_the_whole_model_are_met():
    model, ids = make_model(num_hidden_layers=4), make_ids(samples=8)
    assert best(model, ids, target_sparsity=None, smaller=0.2).parameters.removed == pytest.approx(0.2, abs=0.003)
    kept = best(model, ids, target_sparsity=None, target_params="35K", recipe="paper").parameters.pruned
    assert kept == pytest.approx(35_000, abs=200)
    for settings in (dict(smaller=0.9), dict(target_params="1M"), dict(target_params="1K")):
        with pytest.raises(UserError, match=r"the model has 0.0 M parameters, 0.0 M in its embeddings, which stay"):
            best(model, ids, target_sparsity=None, **settings)
    with pytest.raises(UserError, match="--target_params five: must be a number followed by one of K, M, B, T, such as 5.4B"):
        best(model, ids, target_sparsity=None, target_params="five")
    with pytest.raises(UserError, match="--target_sparsity and --smaller both say how much to remove"):
        best(model, ids, smaller=0.2)
    with pytest.raises(UserError, match="--pruning_ratio and --fit both say how much to remove"):
        best(model, ids, target_sparsity=None, pruning_ratio=0.2, fit="1MB")


def bytes_of(layers, shape, context):
    """Bytes of a q8_0 file's weights and of the KV cache, written out: 34 bytes per 32 weights."""
    total = (1 if shape.tied else 2) * shape.vocab * shape.hidden * 34 / 32 + 4 * shape.hidden
    for layer, dense in zip(layers, shape.layers):
        heads, kv_heads, channels = (count(layer, sort) for sort in ("heads", "kv_heads", "channels"))
        size = dense.parts[0].head_dim
        weights = shape.hidden * (2 * heads + 2 * kv_heads) * size + 3 * shape.hidden * channels
        total += weights * 34 / 32 + 4 * dense.uncut_parameters + context * 2 * 2 * kv_heads * size
    return total


@pytest.mark.parametrize("context", [16, 256])
@pytest.mark.parametrize("share", [0.9, 0.75])
def test_a_file_fits_with_its_cache(context, share):
    model = make_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=32, intermediate_size=512)
    shape = shape_of(model.config)
    whole = [LayerPlan(0.0, layer.units) for layer in shape.layers]
    asked = share * bytes_of(whole, shape, context)
    settings = dict(target_sparsity=None, fit=f"{asked / 1e6:.6f}MB", context=context, head_unit="group", recovery="none", look_back=0.0)
    run = run_of(model, make_ids(8), make_config(layers=2, shape=shape, layer_ratio="auto", **settings))
    found = prices.measured(AllocationInputs(shape, run.config, run))
    [budget] = budgets_of(AllocationInputs(shape, run.config))
    plans = solver.solve(found, Sizing(shape, run.config), budget)
    assert bytes_of(plans, shape, context) == pytest.approx(asked, rel=0.02)
    with pytest.raises(UserError, match=r"--fit 0.001MB: with a part of each layer left it takes 0.\d+ MB at least; raise it"):
        config = make_config(layers=2, shape=shape, layer_ratio="auto", **{**settings, "fit": "0.001MB"})
        solver.solve(found, Sizing(shape, config), *budgets_of(AllocationInputs(shape, config)))


def test_what_is_never_cut_is_counted_as_the_file_has_it(tmp_path):
    """Linear attention, most of which the file holds in blocks."""
    sizes = dict(hidden_size=64, num_hidden_layers=4, vocab_size=320, linear_key_head_dim=32, linear_value_head_dim=32)
    folder = save("qwen3_5", tmp_path, bpe_tokenizer(), pruned=False, sizes=sizes)
    path = export_gguf.export(folder, tmp_path / "out.gguf", "q8_0")
    shape = make_shape("qwen3_5", **sizes)
    counted = 1 + budget.of_bytes(shape, make_config(4, shape, fit="1", context=1, layer_ratio="auto"), 0).target
    kept = kept_bytes(make_model("qwen3_5", **sizes))
    assert sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors) + sum(kept) == counted


def test_what_a_part_takes_in_a_file_follows_the_blocks():
    assert [budget.gguf_bytes(2, 64, kind) for kind in ("q8_0", "f16", "f32")] == [2 * 2 * 34, 256, 512]
    assert budget.gguf_bytes(2, 63, "q8_0") == 2 * 63 * 2  # rows that fill no blocks stay f16


def test_a_speed_is_planned_from_the_times_of_the_parts(monkeypatch):
    model, ids = make_model(num_hidden_layers=4), make_ids(8)
    times = timing.Times({"attention": (1e-3, 1e-4), "mlp": (1e-3, 1e-3)}, 5e-3)
    monkeypatch.setattr(timing, "measured", lambda run: times)
    result = best(model, ids, target_sparsity=None, target_speedup=1.5)
    took = [sum(1e-3 + 1e-4 * count(r, "heads") + 1e-3 + 1e-3 * count(r, "channels") for r in layers) + 5e-3 for layers in (result.layers,)]
    dense = 4 * (1e-3 + 4e-4 + 1e-3 + 48e-3) + 5e-3
    assert dense / took[0] == pytest.approx(1.5, rel=0.02)
    with pytest.raises(UserError, match="--target_speedup 9.0: all 4 layers can give up at most .* ms that a token takes"):
        best(model, ids, target_sparsity=None, target_speedup=9.0)


def test_times_are_of_each_part_whole_and_halved():
    run = run_of(make_model(), make_ids(2), make_config(layer_ratio="auto"))
    found = timing.measured(run)
    assert found.parts.keys() == {"attention", "mlp"} and found.rest > 0
    assert all(fixed >= 0 and by_unit >= 0 and fixed + by_unit > 0 for fixed, by_unit in found.parts.values())


@pytest.mark.parametrize("case", CORE_CASES)
def test_looking_back_ends_nearer_to_the_dense_model_s_states(case):
    dense, ids = make_model(case, num_hidden_layers=4), make_ids(samples=24)
    shape, ends = shape_of(dense.config), []
    for look_back in (0.0, 0.3):
        settings = dict(layer_ratio="uniform", recovery="least_squares", target_sparsity=0.3, pruned_layers=4, ridge=0.01)
        config = make_config(layers=4, shape=shape, look_back=look_back, **settings)
        model = copy.deepcopy(dense)
        prune(model, ids, config)
        ends.append(model.model(ids, use_cache=False).last_hidden_state.detach())
    wanted = dense.model(ids, use_cache=False).last_hidden_state.detach()
    plain, looking = ((wanted - end).square().mean().item() for end in ends)
    assert looking < plain


def test_the_exported_file_and_its_cache_take_what_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = bpe_tokenizer()
    sizes = dict(hidden_size=64, intermediate_size=256, num_attention_heads=8, vocab_size=len(tokenizer))
    make_model(num_hidden_layers=4, **sizes).save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--base_model", "model", "--calibration", "text.txt", "--num_examples", "8", "--seq_len", "16", "--eval_data", "none"]
    flags += ["--recipe", "best", "--gguf_type", "f16", "--context", "128", "--head_unit", "group"]
    assert hf_prune.main([*flags, "--fit", "450KB"]) == 0
    file = export_gguf.export("prune_log/llama_prune", tmp_path / "out.gguf", "f16")
    kept = json.loads((tmp_path / "prune_log/llama_prune/pruning.json").read_text())["layers"]
    cache = sum(2 * 2 * 8 * 128 * len(layer["kept"]["attention"]["kv_heads"]) for layer in kept)
    assert file.stat().st_size + cache == pytest.approx(450_000, rel=0.01)
    gone, whole = re.search(
        r"--fit 450KB: the plan removes ([\d.]+) of the ([\d.]+) MB that the model takes", capsys.readouterr().out
    ).groups()
    assert float(whole) - float(gone) == pytest.approx(0.45, abs=0.11)
