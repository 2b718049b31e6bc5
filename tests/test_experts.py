"""Mixtures of experts: whole experts go, the same number in all layers, and what is saved is the family's own class."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import hf_prune
import slimllm
from slimllm.deploy import checkpoint, runtimes
from slimllm.errors import UserError
from slimllm.evaluation import latency
from slimllm.evaluation.perplexity import perplexities, perplexity
from slimllm.models import loading
from slimllm.models.adapter import LayerAdapter
from slimllm.models.families import FAMILIES
from slimllm.models.shape import limits_of, shape_of
from slimllm.models.skeleton import in_float32
from slimllm.models.source import stored_tensors
from slimllm.models.weights import Tensors, weight_files
from slimllm.plan import LayerPlan, removed_parameters
from slimllm.pruning import experts_run as experts_run_module
from slimllm.pruning.allocation.budget import of_bytes
from slimllm.pruning.allocation.layer_ratios import without_scores
from slimllm.pruning.allocation.plan_file import read_plan
from slimllm.pruning.allocation.sizing import Sizing
from slimllm.pruning.importance.experts import ExpertStatistics
from slimllm.pruning.layer import LayerPruner
from slimllm.pruning.part_run import part_runs
from slimllm.pruning.recovery import Recovered
from slimllm.reporting.tables import layer_line
from slimllm.run import Run
from slimllm.settings.methods import EXPERT_SCORES, RECOVERIES, Recovery
from slimllm.settings.pruning import PruneConfig
from slimllm.streaming.runner import LayerRunner
from tests.conftest import (
    MIXTURE_CASES,
    TEXT,
    check_parts_are_the_layers,
    family_config,
    kept_bytes,
    logits,
    make_config,
    make_ids,
    make_model,
    make_shape,
    prune,
    run_cli,
)
from tests.test_export_gguf import bpe_tokenizer


@pytest.fixture(params=MIXTURE_CASES)
def case(request):
    """Each family of mixtures, in all its forms; all have 8 experts, of which a token is routed to 2."""
    return request.param


def config_of(case, **settings):
    shape = make_shape(case)
    return make_config(len(shape.layers), shape, **settings)


def mixture_layers(model):
    adapter = LayerAdapter(model.config)
    return [adapter.part(layer, "experts") for layer in adapter.layers(model) if any(p.kind == "experts" for p in adapter.parts(layer))]


def row_of(case):
    return FAMILIES[MIXTURE_CASES[case][0]].part("experts")


CHANNELS = [case for case in MIXTURE_CASES if len(row_of(case).sizes) > 1]  # of whose experts channels can go


def fitted(case, recovery="least_squares"):
    """The recovery, or none where experts cannot be refitted."""
    return recovery if row_of(case).fits else "none"


def least_of(case):
    return next(part.least for layer in make_shape(case).layers for part in layer.parts if part.kind == "experts")


def kept_experts(reports):
    return [report.kept["experts"]["experts"] for report in reports if "experts" in report.kept]


def test_the_shape_counts_what_the_model_has(case):
    model = make_model(case)
    shape = shape_of(model.config)
    assert shape.is_mixture and shape.decoder_parameters + shape.other_parameters == model.num_parameters()
    assert LayerAdapter(model.config).units(model) == shape.units
    assert all(part.units["experts"] == 8 for part in mixture_layers(model))
    if case in CHANNELS:
        width = getattr(model.config, row_of(case).sizes[1])
        assert all(part.units["channels"] == width for part in mixture_layers(model))
    idle = sum(6 * part.expert for layer in shape.layers for part in layer.parts if part.kind == "experts")
    assert shape.active_parameters() == model.num_parameters() - idle > 0


def test_ratio_zero_leaves_the_logits_unchanged(case):
    model, ids = make_model(case), make_ids()
    before = logits(model, ids)
    reports = prune(model, ids, config_of(case, pruning_ratio=0.0))
    assert torch.equal(logits(model, ids), before) and not any(report.errors for report in reports)


def without(part, gone):
    """The part, in place, with the router's logits of these experts at minus infinity."""
    forward, linear = part.router.forward, functional.linear

    def masked(states, weight, bias=None):
        found = linear(states, weight, bias)
        return found.index_fill(-1, torch.tensor(gone, dtype=torch.long), -torch.inf) if found.shape[-1] == 8 else found

    def route(*args, **kwargs):
        functional.linear = masked
        try:
            return forward(*args, **kwargs)
        finally:
            functional.linear = linear

    part.router.forward = route
    for _, name, tensor, axis in part.tensors():
        if name in ("e_score_correction_bias", "expert_bias"):
            tensor.data.index_fill_(axis, torch.tensor(gone, dtype=torch.long), -torch.inf)


@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_a_cut_model_is_the_dense_one_that_routes_to_no_expert_that_went(case, ratio):
    model, ids = make_model(case), make_ids()
    dense = copy.deepcopy(model)
    reports = prune(model, ids, config_of(case, pruning_ratio=ratio, recovery="none"))
    for part, kept in zip(mixture_layers(dense), kept_experts(reports), strict=True):
        assert len(kept) == (6 if ratio == 0.25 else least_of(case))  # as many stay as a token is routed to
        without(part, [expert for expert in range(8) if expert not in kept])
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    assert [report.units for report in reports] == LayerAdapter(model.config).units(model)
    assert all(report.clipped == (ratio == 0.9) for report in reports if "experts" in report.kept)


def test_the_parts_run_one_by_one_are_the_layer(case):
    check_parts_are_the_layers(make_model(case))


@pytest.mark.parametrize(
    "case", [case for case in MIXTURE_CASES if case not in ("gpt_oss", "aria_text", "nemotron_h_moe", "minimax_m3")]
)  # whose experts compute something else
@torch.no_grad()
def test_the_statistics_are_those_of_single_experts(case):
    """Tokens and norms, from the weights of each expert alone."""
    model = make_model(case)
    runner = LayerRunner(model, make_ids(3))
    hidden = runner.embed()
    for index, layer in runner.visit():
        for step in runner.adapter.steps(layer):
            runs = part_runs(runner, hidden, step, index)
            for run in runs:
                if run.part.kind == "experts":
                    run.take({"routed_output"})
                    check_statistics(run, hidden)
                else:
                    run.take()
            for run in runs:
                run.join()


def check_statistics(run, hidden):
    states, seen = torch.cat([run.part.read(states).flatten(0, 1) for states in hidden]), []
    act = getattr(run.part.experts, "act_fn", functional.silu)
    hook = run.part.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    run.part.give(torch.cat(list(hidden)))
    hook.remove()
    _, chosen, weights = seen[0]
    for expert in range(8):
        gate, up = functional.linear(states, run.part.experts.gate_up_proj[expert]).chunk(2, -1)
        given = functional.linear(act(gate) * up, run.part.experts.down_proj[expert])
        share = (weights * (chosen == expert)).sum(1)
        assert run.tokens[expert] == (chosen == expert).sum()
        torch.testing.assert_close(run.norms[expert], (given * share[:, None]).norm(dim=1).sum(), rtol=1e-3, atol=1e-3)


def test_the_scores():
    statistics = ExpertStatistics(torch.tensor([4.0, 0.0, 2.0]), torch.tensor([2.0, 0.0, 3.0]), seed=1)
    scores = {name: score(statistics).tolist() for name, score in EXPERT_SCORES.items()}
    assert scores["routed"] == [2, 0, 3] and scores["reap"] == [0.5, 0, 1.5] and scores["frequency"] == [4, 0, 2]
    assert scores["random"] == EXPERT_SCORES["random"](statistics).tolist()


@pytest.mark.parametrize("score", EXPERT_SCORES)
def test_the_experts_of_the_highest_score_stay(score):
    case, ids = "qwen3_moe", make_ids()
    model = make_model(case)
    with torch.no_grad():
        runner = LayerRunner(model, ids)
        attention, experts = (step[0] for step in runner.adapter.steps(runner.adapter.layers(model)[0]))
        hidden = runner.embed()
        for part in (attention, experts):
            [run] = part_runs(runner, hidden, [part], 0)
            run.take({"routed_output"} if part is experts else frozenset())
            if part is attention:
                run.join()
    config = config_of(case, expert_score=score)
    wanted = EXPERT_SCORES[score](ExpertStatistics(run.tokens, run.norms, config.seed))
    kept = kept_experts(prune(model, ids, config))[0]
    assert kept == sorted(wanted.argsort(descending=True, stable=True)[:4].tolist())


@pytest.mark.parametrize("recovery", ["none", "bias", "linear", "least_squares"])
def test_a_recovery_never_raises_the_error_of_the_experts_output(case, recovery):
    model = make_model(case)
    what = "both" if case in ("mixtral", "gpt_oss") else "experts"
    recovery = fitted(case, recovery)
    reports = prune(model, make_ids(24, 32), config_of(case, target_sparsity=0.2, recovery=recovery, prune=what))
    errors = [report.errors["experts"] for report in reports if report.errors]
    assert errors and all(after == before if recovery in ("none", "bias") else after < before for before, after in errors)


@torch.no_grad()
def experts_run(case, ids, kept, dtype=torch.float32):
    """The run of the experts of the first layer that has some, with those cut that are not ``kept``; and these experts before that."""
    model = make_model(case).to(dtype)
    runner = LayerRunner(model, ids)
    hidden = runner.embed()
    for index, layer in runner.visit():
        for run in part_runs(runner, hidden, runner.adapter.parts(layer), index):
            run.take()
            if run.part.kind == "experts":
                run.cut({"experts": kept})
                return run
            run.join()


# the second has biases and stores its weights transposed, the third scales what its experts give together
@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "minimax_m3"])
@torch.no_grad()
def test_least_squares_is_that_of_the_equation(case, monkeypatch):
    """One sweep, from the normal equations of the weighted inputs of each expert in turn."""
    monkeypatch.setattr(experts_run_module, "SWEEPS", 1)
    run, ridge = experts_run(case, make_ids(24, 32), [0, 2, 3, 6, 7]), 0.1
    wanted, routes, expected = torch.cat(list(run.outputs)), [], []
    hook = run.part.experts.register_forward_pre_hook(lambda _, args: routes.append(args))
    missing = wanted - torch.cat([run.part.give(states).flatten(0, -2) for states in run.hidden])
    hook.remove()
    read, routed, weights = (torch.cat(tensors) for tensors in zip(*routes))
    for expert in range(5):
        rows, places = torch.where(routed == expert)
        weight, bias = run.part.projection(expert)
        ones = torch.ones(len(rows), int(bias is not None))
        inputs = torch.cat([run.part.activations(expert, read[rows]), ones], 1) * weights[rows, places, None] * run.part.scale
        gram = inputs.T @ inputs
        pull = ridge * gram.diagonal().median() * torch.eye(len(gram))
        change = torch.linalg.solve(gram + pull, inputs.T @ missing[rows])
        missing[rows] -= inputs @ change
        expected.append((weight + change[: weight.shape[1]].T, None if bias is None else bias + change[-1]))
    run.recover("least_squares", lambda tokens: ridge, True)
    for expert, (weight, bias) in enumerate(expected):
        found, its_bias = run.part.projection(expert)
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)
        assert (bias is None) == (its_bias is None)
        if bias is not None:
            torch.testing.assert_close(its_bias, bias, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_linear_scales_the_rows_of_all_experts_alike():
    run = experts_run("qwen2_moe", make_ids(), [0, 2, 3, 6, 7])
    before = [run.part.projection(expert)[0].clone() for expert in range(5)]
    (error, after), starved = run.recover("linear", lambda tokens: 1.0, True)
    scales = [run.part.projection(expert)[0] / weight for expert, weight in enumerate(before)]
    assert after < error and not starved
    for scale in scales:
        torch.testing.assert_close(scale, scales[0][:, :1].expand_as(scale))


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_in_16_bits_the_error_does_not_rise_either(case):
    run = experts_run(case, make_ids(24, 32), [0, 2, 3, 6, 7], torch.bfloat16)
    (before, after), _ = run.recover("least_squares", lambda tokens: 1.0, True)
    assert after < before


@torch.no_grad()
def test_a_fit_that_would_raise_the_error_is_not_taken(monkeypatch):
    def worse(weight, bias, keep, *rest):
        return Recovered(2 * weight, None)

    monkeypatch.setitem(RECOVERIES, "least_squares", Recovery(worse, RECOVERIES["least_squares"].needs))
    run = experts_run("mixtral", make_ids(24, 32), [0, 2, 3, 6, 7])
    (before, after), starved = run.recover("least_squares", lambda tokens: 1.0, True)
    assert after == before and not starved


@torch.no_grad()
def test_an_expert_that_saw_few_tokens_stays_as_it_is():
    run = experts_run("mixtral", make_ids(8, 16), [0, 2, 3, 6, 7])  # 256 routes; 48 inputs each
    before = [run.part.projection(expert)[0].clone() for expert in range(5)]
    _, starved = run.recover("least_squares", lambda tokens: 1.0, True)
    same = [torch.equal(run.part.projection(expert)[0], weight) for expert, weight in enumerate(before)]
    assert 0 < starved < 5 and sum(same) == starved


def test_the_log_says_how_many_experts_saw_too_few_tokens(caplog):
    shape = make_shape("mixtral")
    reports = prune(make_model("mixtral"), make_ids(3), config_of("mixtral", recovery="least_squares"))
    assert reports[0].starved and f"(too few tokens to refit {reports[0].starved} of its experts)" in layer_line(reports[0], shape)


def test_target_sparsity_is_met_to_within_one_expert_of_each_layer(case):
    model, shape = make_model(case), make_shape(case)
    dense, config = model.num_parameters(), config_of(case, target_sparsity=0.2, recovery=fitted(case))
    reports = prune(model, make_ids(), config)
    plans = [LayerPlan(0.0, report.units) for report in reports]
    gone = dense - model.num_parameters()
    step = sum(part.expert + part.router for layer in shape.layers for part in layer.parts if part.kind == "experts")
    assert removed_parameters(shape, plans, config) == gone
    assert abs(gone - 0.2 * shape.decoder_parameters) <= step / 2 and len({len(kept) for kept in kept_experts(reports)}) == 1


@pytest.mark.parametrize("what", ["channels", "both"])
@pytest.mark.parametrize("case", CHANNELS)
def test_channels_of_experts_meet_the_target_to_within_half_a_step(case, what):
    model, shape = make_model(case), make_shape(case)
    dense, config = model.num_parameters(), config_of(case, target_sparsity=0.2, prune=what, recovery="least_squares")
    reports = prune(model, make_ids(), config)
    plans, gone = [LayerPlan(0.0, report.units) for report in reports], dense - model.num_parameters()
    step = sum(8 * part.unit_parameters() for layer in shape.layers for part in layer.parts if part.kind == "experts")
    assert removed_parameters(shape, plans, config) == gone and 0 < gone
    assert abs(gone - 0.2 * shape.decoder_parameters) <= step / 2
    units = [report.units["experts"] for report in reports if "experts" in report.kept]
    assert all(each == units[0] and each["channels"] % 8 == 0 for each in units) and LayerAdapter(model.config).units(model)
    assert [report.units for report in reports] == LayerAdapter(model.config).units(model)
    runtimes.convert_for_runtime(model)
    assert shape_of(model.config).units == [report.units for report in reports] and type(model) is type(make_model(case))


@pytest.mark.parametrize("what", ["channels", "both"])
@pytest.mark.parametrize("case", CHANNELS)
def test_cut_channels_are_those_of_which_the_dense_model_adds_nothing(case, what):
    model, ids = make_model(case), make_ids()
    dense = copy.deepcopy(model)
    reports = prune(model, ids, config_of(case, target_sparsity=0.2, prune=what, recovery="none"))
    kept = [report.kept["experts"] for report in reports if "experts" in report.kept]
    for part, own in zip(mixture_layers(dense), kept, strict=True):
        without(part, [expert for expert in range(8) if expert not in own["experts"]])
        listed = own["channels"] if isinstance(own["channels"][0], list) else [own["channels"]] * len(own["experts"])
        for expert, channels in zip(own["experts"], listed, strict=True):
            gone = [channel for channel in range(part.units["channels"]) if channel not in channels]
            part.projection(expert)[0][:, gone] = 0
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)


def test_what_experts_cannot_lose_is_refused_by_name():
    with pytest.raises(UserError, match="--prune channels: no channels of this model's experts can go.*--prune experts"):
        config_of("deepseek_v3", prune="channels")
    with pytest.raises(UserError, match="--recovery least_squares: the experts of this model cannot be refitted; --recovery none"):
        config_of("nemotron_h_moe", recovery="least_squares")
    assert config_of("nemotron_h_moe", recipe="best").recovery == "none"


@torch.no_grad()
def test_the_statistics_of_channels_are_those_of_the_tokens_routed_to_each_expert():
    run, calls = experts_run("gpt_oss", make_ids(), [0, 2, 3, 6, 7]), []
    run.take_channels({"output_covariance", "input_variance"})
    hook = run.part.experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    for states in run.hidden:
        run.part.give(states)
    hook.remove()
    read, routed, weights = (torch.cat(tensors) for tensors in zip(*calls))
    for expert in range(5):
        rows, places = torch.where(routed == expert)
        inputs = run.part.activations(expert, read[rows]) * weights[rows, places, None]
        torch.testing.assert_close(run.input_norms[expert].norm(), inputs.norm(dim=0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.read_norms[expert].norm(), read[rows].norm(dim=0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.input_variances[expert].var_x, inputs.var(0, correction=0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run.output_covariance.matrix(), torch.cat(list(run.outputs)).T.cov(correction=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("score", ["feature_space", "unweighted", "wanda", "fluctuation", "magnitude", "random"])
def test_each_expert_keeps_the_channels_of_its_highest_scores(score):
    model = make_model("mixtral")
    reports = prune(model, make_ids(), config_of("mixtral", pruning_ratio=0.5, prune="channels", channel_score=score, keep_lowest=0.0))
    for report in reports:
        assert {len(channels) for channels in report.kept["experts"]["channels"]} == {24} and len(report.kept["experts"]["channels"]) == 8
    assert report.kept["experts"]["channels"][0] != report.kept["experts"]["channels"][1]


def test_an_expert_that_no_token_is_routed_to_keeps_as_many_channels():
    model, config = make_model("mixtral"), config_of("mixtral", pruning_ratio=0.5, prune="channels", channel_score="fluctuation")
    for part in mixture_layers(model):
        without(part, [3])
    assert all(len(report.kept["experts"]["channels"][3]) == 24 for report in prune(model, make_ids(), config))


def test_a_useless_channel_goes_first():
    """One that adds nothing and reads nothing, another in each expert."""
    model = make_model("mixtral")
    for part in mixture_layers(model):
        for expert in range(8):
            part.experts.gate_up_proj.data[expert, [expert, 48 + expert]] = 0
            part.projection(expert)[0][:, expert] = 0
    for report in prune(model, make_ids(24), config_of("mixtral", pruning_ratio=0.2, prune="channels", keep_lowest=0.0)):
        assert all(expert not in channels for expert, channels in enumerate(report.kept["experts"]["channels"]))


def test_more_than_can_go_is_refused_from_the_config_alone():
    config = config_of("mixtral", target_sparsity=0.9)
    with pytest.raises(UserError, match="all 2 layers can give up at most 0.6.*each keeps as many experts as a token is routed to"):
        without_scores(Run(config, family_config("mixtral")))


def file_bytes(model, row, context=0):
    """Bytes of the tensors of a q8_0 file, one by one, and of what is kept of a text: 34 bytes per 32 weights of a row, or 64 where rows
    are no multiple of 32; vectors, routers and what is no matrix in float32.
    """
    total, modules, experts = 0, dict(model.named_modules()), mixture_layers(model)[0].units["experts"]
    for name, tensor in model.named_parameters():
        holder, _, own = name.rpartition(".")
        is_matrix = own == "weight" and isinstance(modules[holder], torch.nn.Linear | torch.nn.Embedding) and len(tensor) > 1
        if own in row.stacked and tensor.dim() == 3:
            *_, columns = tensor.mT.shape if row.transposed else tensor.shape
        elif is_matrix and not (len(tensor) == experts and ("gate" in name or "router" in name)):
            columns = tensor.shape[1]
        else:
            total += 4 * tensor.numel()
            continue
        total += tensor.numel() * 34 // 32 if columns % 32 == 0 else 2 * tensor.numel()
    return total + sum(kept_bytes(model, context))


@pytest.mark.parametrize("case", MIXTURE_CASES)
@pytest.mark.parametrize("width", [24, 32])
def test_a_file_is_counted_tensor_by_tensor(case, width):
    sizes = {name: width for name in row_of(case).sizes[1:]}
    model, config = make_model(case, **sizes), make_config(2, make_shape(case), fit="1", context=6, prune="experts")
    assert of_bytes(shape_of(model.config), config, 0).target + 1 == file_bytes(model, row_of(case), config.context)


FIT = dict(
    hidden_size=64, moe_intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, mlp_only_layers=[0], num_hidden_layers=3
)


@pytest.mark.parametrize(
    "what, share, kept, more",
    [
        ("experts", 0.7, {"experts": 4}, dict(num_experts=5)),
        ("channels", 0.7, {"channels": 64}, dict(moe_intermediate_size=96)),
        ("heads", 0.9, {"heads": 4, "kv_heads": 2}, dict(num_attention_heads=6, num_key_value_heads=3)),
    ],
)
def test_as_many_stay_as_fit_with_their_cache(what, share, kept, more):
    case, context = "qwen3_moe", 256
    model, row = make_model(case, **FIT), row_of(case)
    asked = int(share * file_bytes(model, row, context))
    config = make_config(3, shape_of(model.config), fit=str(asked), context=context, prune=what, head_unit="group")
    reports = prune(model, make_ids(), config)
    assert all(kept.items() <= {**report.units["attention"], **report.units["experts"]}.items() for report in reports[1:])
    assert file_bytes(model, row, context) <= asked < file_bytes(make_model(case, **FIT | more), row, context)


@pytest.mark.parametrize("share", [0.85, 0.7, 0.4])
def test_of_experts_and_channels_no_more_of_either_fits_and_experts_lose_thrice_the_share(share):
    row, context = row_of("qwen3_moe"), 1
    bytes_of = {
        (experts, width): file_bytes(make_model("qwen3_moe", **FIT | dict(num_experts=experts, moe_intermediate_size=width)), row, context)
        for experts in range(2, 9)
        for width in (32, 64, 96, 128)
    }
    asked = int(share * bytes_of[8, 128])
    fit = {counts for counts, taken in bytes_of.items() if taken <= asked}
    maximal = [(experts, width) for experts, width in fit if not fit & {(experts + 1, width), (experts, width + 32)}]
    best = min(maximal, key=lambda counts: abs((1 - counts[0] / 8) - 3 * (1 - counts[1] / 128)))
    plans = plans_of_fit(str(asked), prune="both")
    assert len(maximal) > 1 and plans[0].units["mlp"]["channels"] == 48
    assert {tuple(plan.units["experts"].values()) for plan in plans[1:]} == {best}


def plans_of_fit(fit, **settings):
    """The plans of the model of FIT, from its config alone."""
    config = family_config("qwen3_moe", **FIT)
    return without_scores(Run(make_config(3, shape_of(config), fit=fit, context=1, **settings), config)).plans


def test_what_cannot_fit_is_refused_with_the_least_that_can():
    smallest = make_model("qwen3_moe", **FIT | dict(num_experts=2))
    asked = file_bytes(smallest, row_of("qwen3_moe"), context=1)
    assert plans_of_fit(str(asked))[1].units["experts"]["experts"] == 2
    with pytest.raises(UserError, match=f"--fit {asked - 1}: .* it takes {asked / 1e6:.4g} MB at least; raise it"):
        plans_of_fit(str(asked - 1))


@pytest.mark.parametrize("sparsity, fit, kept", [(0.3, "1GB", 5), (0.3, "330KB", 4), (0.6, "330KB", 3)])
def test_a_size_and_a_file_that_fits_are_both_met(sparsity, fit, kept):
    assert [plan.units["experts"]["experts"] for plan in plans_of_fit(fit, target_sparsity=sparsity)[1:]] == [kept, kept]


def test_a_size_is_met_where_more_would_fit_better():
    """120 channels stay f16, and take more than all 128 do in q8_0."""
    whole = file_bytes(make_model("qwen3_moe", **FIT), row_of("qwen3_moe"), context=1)
    plans = plans_of_fit(str(whole), target_sparsity=0.04, prune="channels", round_to=8)
    assert {plan.units["experts"]["channels"] for plan in plans[1:]} == {96}


def test_nothing_goes_from_a_mixture_that_fits_as_it_is():
    assert [plan.units for plan in plans_of_fit("1GB")] == make_shape("qwen3_moe", **FIT).units


def test_the_plan_of_a_mixture_that_fits_is_shown_without_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = bpe_tokenizer()
    family_config("qwen3_moe", **FIT, vocab_size=len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    flags = ["--base_model", "model", "--recipe", "best", "--context", "16", "--dry_run"]
    assert hf_prune.main([*flags, "--fit", "400KB"]) == 0
    assert "8 / 4 / 48, 8 / 4 / 5 / 128" in capsys.readouterr().out
    assert hf_prune.main([*flags, "--fit", "10KB"]) == 2
    assert "--fit 10KB: " in capsys.readouterr().err


def test_heads_may_go_in_place_of_experts():
    model, ids, shape = make_model("mixtral"), make_ids(), make_shape("mixtral")
    config = config_of("mixtral", prune="heads", recovery="least_squares", head_unit="group")
    reports = prune(model, ids, config)
    assert all(report.units == {"attention": {"heads": 2, "kv_heads": 1}, "experts": {"experts": 8, "channels": 48}} for report in reports)
    assert not limits_of("any", shape).new_bias and not any(
        part.output.bias is not None for part in LayerAdapter(model.config).projected_parts(model)
    )
    runtimes.convert_for_runtime(model)
    assert type(model) is type(make_model("mixtral")) and shape_of(model.config).units == [report.units for report in reports]


@pytest.mark.parametrize(
    "case, settings, message",
    [
        ("mixtral", dict(prune="channels", round_to=12), "^--round_to 12: channels of experts come in multiples of 8"),
        ("mixtral", dict(prune="both", channel_score="taylor"), "^--channel_score taylor.*gradients is not taken of experts"),
        ("olmoe", dict(prune="heads"), "^--prune heads: no head of this model can go .* --prune experts"),
        ("llama_gqa", dict(prune="experts"), "^--prune experts: this model has none"),
        ("mixtral", dict(layer_ratio="ranking"), "^--layer_ratio ranking: of a mixture of experts name uniform, importance, auto"),
        (
            "mixtral",
            dict(layer_ratio="importance", runtime="transformers"),
            "^--layer_ratio importance and --runtime transformers: all layers of this model lose the same there",
        ),
        ("mixtral", dict(layer_ratio="importance", fit="1MB"), "^--fit 1MB: it goes by a price list"),
        ("mixtral", dict(target_speedup=1.5), "^--target_speedup 1.5: a token takes as long however many experts stay"),
        ("mixtral", dict(vocab="auto", smaller=0.2), "^--vocab auto: it goes by a price list"),
        ("phimoe", dict(runtime="gguf"), "^--runtime gguf: llama.cpp has no architecture"),
    ],
)
def test_what_a_mixture_cannot_lose_is_refused_in_one_line(case, settings, message):
    with pytest.raises(UserError, match=message):
        config_of(case, **settings)


def test_the_number_of_experts_of_a_token_may_be_a_list():
    assert make_shape("hunyuan_v1_moe", moe_topk=[2, 2]) == make_shape("hunyuan_v1_moe", moe_topk=2)


def test_widths_are_multiples_only_where_they_change():
    """llama.cpp wants blocks of 32, and these experts have 16 channels: they may go whole."""
    shape = make_shape("qwen3_moe")
    assert not Sizing(shape, make_config(2, shape, runtime="gguf", target_sparsity=0.2)).fine
    with pytest.raises(
        UserError, match="^--round_to 32: the model's 4 heads of size 8 and 8 experts of 16 channels allow no such multiple"
    ):
        Sizing(shape, make_config(2, shape, runtime="gguf", target_sparsity=0.2, prune="channels"))


@pytest.mark.parametrize(
    "settings, found",
    [
        ({}, "auto"),
        (dict(recipe="paper"), "uniform"),
        (dict(runtime="transformers"), "uniform"),
        (dict(runtime="gguf"), "uniform"),
        (dict(runtime="gguf", layer_ratio="auto"), "auto"),
        (dict(fit="1MB", pruning_ratio=None), "uniform"),
        (dict(fit="1MB", pruning_ratio=None, layer_ratio="auto"), "auto"),
        (dict(recipe="paper", price_list="p.json"), "auto"),
        (dict(vocab="auto", smaller=0.2, pruning_ratio=None), "auto"),
    ],
)
def test_the_recipe_goes_by_prices_where_layers_may_differ(settings, found):
    assert config_of("qwen3_moe", **{"recipe": "best", "pruning_ratio": 0.5} | settings).layer_ratio == found


def test_where_layers_are_alike_the_recipe_is_uniform_and_says_so():
    config = config_of("mixtral", recipe="best", expert_score="reap", keep_lowest=0.1, runtime="transformers")
    assert (config.layer_ratio, config.prune, config.recovery, config.look_back) == ("uniform", "experts", "least_squares", 0.3)
    assert config.remarks() == [
        "--keep_lowest has no effect: no channel is chosen",
        "layer ratio uniform, not auto: all layers of this mixture of experts lose the same",
    ]


def test_a_plan_file_names_experts(tmp_path):
    shape, path = make_shape("qwen3_moe"), tmp_path / "plan.json"
    whole = {"attention": {"heads": [0, 1, 2, 3], "kv_heads": [0, 1]}}
    all_alike, own = list(range(8)), [list(range(first, first + 8)) for first in range(3)]
    for kept, channels, message in (
        ([0, 5, 6], {}, None),
        ([0, 5, 6], {"channels": all_alike}, None),
        ([0, 5, 6], {"channels": own}, None),
        ([3], {}, "at least 2 of the 8 experts must stay"),
        ([0, 9], {}, "different whole numbers from 0 to 7"),
        ([0, 5], {"channels": own}, "as many channels: one list for all of them, or one for each"),
        ([0, 5, 6], {"channels": list(range(12))}, "channels of experts come in multiples of 8"),
        ([0, 5, 6], {"channels": [*own[:2], [20] * 8]}, "different whole numbers from 0 to 15"),
    ):
        path.write_text(json.dumps({"layers": [{"kept": {**whole, "experts": {"experts": kept, **channels}}}] * 2}))
        if message is None:
            config = PruneConfig(base_model="test", plan=str(path)).resolved(shape)
            reports = prune(make_model("qwen3_moe"), make_ids(), config, read_plan(str(path), shape)[1])
            assert kept_experts(reports) == [kept] * 2
            assert [report.kept["experts"]["channels"] for report in reports] == [channels.get("channels", list(range(16)))] * 2
        else:
            with pytest.raises(UserError, match=message):
                read_plan(str(path), shape)
    path.write_text(json.dumps({"layers": [{"kept": {**whole, "experts": {"experts": list(range(n))}}} for n in (3, 4)]}))
    with pytest.raises(UserError, match="needs them alike"):
        read_plan(str(path), shape, "transformers")
    assert [plan.units["experts"]["experts"] for plan in read_plan(str(path), shape)[1]] == [3, 4]


LOAD_ALONE = """
import json, sys
sys.modules["slimllm"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(12)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=True)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False))
        print(json.dumps([type(model).__name__, model(ids).logits.flatten().tolist()]))
"""


def stored_shapes(folder):
    tensors = Tensors(weight_files(folder))
    return {name: tensors.shape(name) for name in tensors.names}


def test_stock_transformers_loads_what_is_saved_and_the_other_way_round(tmp_path, tiny_tokenizer):
    models, ids = {case: make_model(case) for case in MIXTURE_CASES}, torch.arange(12)[None]
    for number, (case, model) in enumerate(models.items()):
        what = ("experts", "channels", "both")[number % 3] if case in CHANNELS else "experts"
        prune(model, make_ids(), config_of(case, target_sparsity=0.15, prune=what, recovery=fitted(case)))
        runtimes.convert_for_runtime(model)
        checkpoint.save(model, tiny_tokenizer, tmp_path / case, make_ids(2, 6), "dense")
    folders = [tmp_path / case for case in models]
    done = subprocess.run([sys.executable, "-I", "-c", LOAD_ALONE, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for (case, model), line in zip(models.items(), done.stdout.splitlines(), strict=True):
        name, found = json.loads(line)
        assert name == type(model).__name__ == type(make_model(case)).__name__
        torch.testing.assert_close(torch.tensor(found), logits(model, ids).flatten(), rtol=1e-5, atol=1e-5)
        for form in (True, False):  # a tensor for each expert, as hub checkpoints have them, and all in one
            model.save_pretrained(tmp_path / "theirs", save_original_format=form)
            assert torch.equal(logits(loading.load_model(str(tmp_path / "theirs"), torch.float32), ids), logits(model, ids))
            assert not form or stored_shapes(tmp_path / case) == stored_shapes(tmp_path / "theirs")


@pytest.mark.parametrize("case", ["glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_what_transformers_keeps_in_float32_is_never_rounded(case, computed, tmp_path, tiny_tokenizer, text_file):
    make_model(case).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    exact = {name: tensor for name, tensor in stored_tensors(stock).items() if tensor.dtype == torch.float32}
    assert exact and exact.keys() == in_float32(stock.config, torch.bfloat16) & stored_tensors(stock).keys()
    assert torch.equal(logits(loading.load_model(str(tmp_path / "dense"), torch.bfloat16), make_ids()), logits(stock, make_ids()))
    flags = ["--base_model", tmp_path / "dense", "--calibration", text_file, "--eval_data", "none", "--num_examples", 4, "--seq_len", 16]
    flags += ["--target_sparsity", 0.15, "--dtype", computed, "--save_dtype", "bfloat16", "--output_dir", tmp_path / "out"]
    assert hf_prune.main(list(map(str, flags))) == 0
    pruned = stored_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    whole = stored_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    layers = json.loads((tmp_path / "out" / "pruning.json").read_text())["layers"]
    for name in exact:
        rows = torch.tensor(layers[int(name.split(".")[2])]["kept"]["experts"]["experts"])
        assert pruned[name].dtype == torch.float32
        assert torch.equal(pruned[name], whole[name].index_select(list(whole[name].shape).index(8), rows))


def test_a_missing_expert_is_named(tmp_path):
    make_model("qwen3_moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for count, message in ((9, "9, .* by config.json|weights are missing"), (7, "of which the model that config.json describes has none")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": count}))
        with pytest.raises(UserError, match=message):
            loading.open_source(str(tmp_path), torch.float32)


def test_the_perplexity_from_files_is_that_of_the_model(case, tmp_path):
    model, texts = make_model(case), [make_ids(5, 20), make_ids(3, 20, seed=2)]
    model.save_pretrained(tmp_path)
    source = loading.open_source(str(tmp_path), torch.float32)
    assert perplexities(source, texts, ["a", "b"]) == pytest.approx([perplexity(model, ids) for ids in texts], rel=1e-6)


def test_macs_of_a_token_are_those_of_its_experts():
    model = make_model("qwen3_moe")
    size, shape = latency.size_of(model), shape_of(model.config)
    experts = sum(2 * part.expert + 8 * part.router for layer in shape.layers for part in layer.parts if part.kind == "experts")
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert size["linear_macs"] == linears + experts


@pytest.mark.parametrize("case, what", [("qwen3_moe_dense_first", "experts"), ("mixtral", "both")])
def test_a_run_ends_in_a_stock_model_and_says_what_a_token_is_computed_with(case, what, tmp_path, tiny_tokenizer):
    folder, text = tmp_path / case, tmp_path / "text.txt"
    make_model(case).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    text.write_text(TEXT)
    flags = ["--base_model", folder, "--target_sparsity", 0.3, "--calibration", text, "--num_examples", 4, "--seq_len", 32]
    flags += ["--prune", what, "--recovery", "least_squares", "--eval_data", text, "--max_seq_len", 32, "--output_dir", tmp_path / "out"]
    planned = run_cli(*flags, "--dry_run", cwd=tmp_path)
    assert planned.returncode == 0 and "parameters that a token is computed with" in planned.stdout, planned.stderr[-2000:]
    done = run_cli(*flags, cwd=tmp_path)
    assert done.returncode == 0 and "saved, loaded again and compared: the same logits" in done.stdout, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and type(model) is type(make_model(case))
    active = record["parameters"]["active"]
    assert record["parameters"]["pruned"] == model.num_parameters() and active["pruned"] == shape_of(model.config).active_parameters()
    assert f"{active['pruned'] / 1e6:.1f} M of them" in (tmp_path / "out" / "README.md").read_text()
    assert "experts" in done.stdout and not list((tmp_path / "out").glob("*.py"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    [count] = {len(kept) for kept in kept_experts_of(record)}
    assert {written[name] for name in ("num_experts", "num_local_experts") if name in written} == {count}


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path, tiny_tokenizer, text_file, monkeypatch):
    make_model("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", "model", "--calibration", text_file, "--eval_data", "none", "--num_examples", 4, "--seq_len", 16]
    flags = [str(flag) for flag in (*flags, "--target_sparsity", 0.3)]
    assert hf_prune.main([*flags, "--output_dir", "whole"]) == 0
    whole, calls = LayerPruner.prune, []

    def stops(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(LayerPruner, "prune", stops)
    assert hf_prune.main([*flags, "--output_dir", "stopped"]) != 0
    assert hf_prune.main([*flags, "--output_dir", "stopped", "--resume"]) == 0
    assert len(calls) == 5  # the first two layers were not done again
    for name in ("model.safetensors", "model.safetensors.index.json", "config.json", "reference.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.mark.parametrize("case", ["mixtral", "minimax_m2"])  # the second has a number for each expert in a buffer
def test_a_model_in_memory_is_pruned_and_pruned_again(case):
    model, left = make_model(case), [8]
    for _ in range(2):
        result = slimllm.prune(model, calibration=make_ids(), target_sparsity=0.3)
        model = result.model
        left.append(len(kept_experts(result.layers)[0]))
        assert logits(model, make_ids()).isfinite().all()
        assert result.parameters.pruned == model.num_parameters() == shape_of(model.config).parameters
    assert left == sorted(set(left), reverse=True)


@pytest.mark.parametrize("mode", ["scales", "all"])
def test_a_pruned_mixture_is_distilled(mode):
    result = slimllm.prune(make_model("mixtral"), calibration=make_ids(), target_sparsity=0.3, distill=mode, distill_examples=4)
    assert result.distillation.after <= result.distillation.before


def kept_experts_of(record):
    return [layer["kept"]["experts"]["experts"] for layer in record["layers"] if "experts" in layer["kept"]]


def test_all_families_of_mixtures_are_cases():
    assert {model_type for model_type, _ in MIXTURE_CASES.values()} == {name for name, family in FAMILIES.items() if family.is_mixture}
