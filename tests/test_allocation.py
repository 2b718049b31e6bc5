import math

import pytest

from slimllm.errors import UserError
from slimllm.models.shape import shape_of
from slimllm.plan import removed_parameters
from tests.conftest import FAMILY_CASES, channel_parameters, count, make_config, make_model, part_shape, plan

COSINE = [0.1, 0.9, 0.95, 0.5, 0.92, 0.93]


def shape(case="llama_gqa", **sizes):
    model = make_model(case, num_hidden_layers=6, **sizes)
    return shape_of(model.config), model


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_parameter_counts_are_the_model_s(case):
    counted, model = shape(case)
    assert counted.decoder_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert counted.decoder_parameters + counted.other_parameters == model.num_parameters()


def test_ratio_is_rounded_layer_by_layer_as_published():
    counted, _ = shape("llama_mha", intermediate_size=1536, num_attention_heads=8, num_key_value_heads=8, hidden_size=64)
    plans = plan(counted, COSINE, make_config(layers=6, pruned_layers=4, pruning_ratio=0.25, alpha=10))
    weights = [math.exp(10 * c) for c in (0.9, 0.95, 0.92, 0.93)]
    ratios = dict(zip((1, 2, 4, 5), (0.25 * 4 * w / sum(weights) for w in weights)))
    for index, p in enumerate(plans):
        r = ratios.get(index, 0)
        assert (p.ratio, count(p, "heads"), count(p, "channels")) == (pytest.approx(r), 8 - round(r * 8), 1536 - round(r * 1536))
    assert plans[0].ratio == plans[3].ratio == 0


@pytest.mark.parametrize("case", ["llama_mha", "llama_gqa", "llama_biases", "qwen3"])
@pytest.mark.parametrize("head_unit", ["group", "query"])
@pytest.mark.parametrize("recovery", ["none", "linear"])
@pytest.mark.parametrize("target", [0.0, 0.05, 0.2, 0.37, 0.5])
@pytest.mark.parametrize("layer_ratio", ["importance", "auto"])
def test_target_sparsity_is_met_to_within_one_channel(case, head_unit, recovery, target, layer_ratio):
    counted, _ = shape(case, intermediate_size=100)
    config = make_config(layers=6, target_sparsity=target, head_unit=head_unit, recovery=recovery, layer_ratio=layer_ratio)
    plans = plan(counted, COSINE, config)
    removed = removed_parameters(counted, plans, config)
    assert abs(removed - target * counted.decoder_parameters) <= channel_parameters(counted)
    for p in plans:
        assert count(p, "heads") >= 1 and count(p, "channels") >= 1 and count(p, "heads") % count(p, "kv_heads") == 0


@pytest.mark.parametrize("layers", [2, 3])
def test_heads_that_go_at_one_scale_in_several_layers_are_made_up_for(layers):
    counted = shape_of(make_model("llama_gqa", num_hidden_layers=layers, head_dim=64, intermediate_size=96).config)
    step = channel_parameters(counted)
    for share in range(2, 40):
        config = make_config(layers, target_sparsity=share / 100, pruned_layers=layers, head_unit="group")
        plans = plan(counted, [0.9, 0.901, 0.902][:layers], config)
        assert abs(removed_parameters(counted, plans, config) - share / 100 * counted.decoder_parameters) <= step


@pytest.mark.parametrize("layer_ratio, runtime", [("importance", "vllm"), ("uniform", "vllm"), ("uniform", "transformers")])
def test_where_nothing_is_asked_for_nothing_goes_to_pay_for_biases(layer_ratio, runtime):
    counted, _ = shape()
    plans = plan(counted, COSINE, make_config(6, counted, target_sparsity=0.0, layer_ratio=layer_ratio, runtime=runtime, recovery="linear"))
    assert [p.units for p in plans] == counted.units


@pytest.mark.parametrize("layer_ratio", ["importance", "uniform", "ranking", "auto"])
@pytest.mark.parametrize("parts", ["heads", "channels"])
@pytest.mark.parametrize("runtime", ["any", "vllm"])
@pytest.mark.parametrize("amount", [{"target_sparsity": 0.1}, {"pruning_ratio": 0.4}])
def test_one_part_alone_is_pruned(layer_ratio, parts, runtime, amount):
    if (layer_ratio, runtime) == ("ranking", "vllm"):
        return  # refused: it decides of each head by itself
    counted, _ = shape("llama_mha", num_attention_heads=8, num_key_value_heads=8, hidden_size=64, intermediate_size=100)
    config = make_config(6, counted, layer_ratio=layer_ratio, prune=parts, runtime=runtime, recovery="none", pruned_layers=6, **amount)
    plans = plan(counted, COSINE, config)
    assert all(count(p, "channels") == 100 for p in plans) == (parts == "heads") and all(count(p, "heads") == 8 for p in plans) == (
        parts == "channels"
    )
    if "target_sparsity" in amount:
        head = 4 * counted.hidden * part_shape(counted, "attention").head_dim * (6 if runtime == "vllm" else 1)
        allowed = head / 2 if parts == "heads" else channel_parameters(counted)
        assert abs(removed_parameters(counted, plans, config) - 0.1 * counted.decoder_parameters) <= allowed
    else:
        left = [count(p, "heads") / 8 if parts == "heads" else count(p, "channels") / 100 for p in plans]
        assert sum(left) / 6 == pytest.approx(0.6, abs=0.07)


def test_heads_that_cannot_go_are_left():
    counted, _ = shape("olmo2")
    assert make_config(6, counted).prune == "channels" and make_config(6, shape()[0]).prune == "both"
    assert all(count(p, "heads") == 4 for p in plan(counted, COSINE, make_config(6, counted, target_sparsity=0.3)))
    for parts in ("heads", "both"):
        with pytest.raises(UserError, match=f"--prune {parts}: no head of this model can go .*normed over all heads together"):
            make_config(6, counted, prune=parts)
    with pytest.raises(UserError, match="--prune heads: no head of this model can go .with --runtime gguf"):
        make_config(6, shape("glm")[0], prune="heads", runtime="gguf")


def test_target_beyond_reach_says_how_much_is_possible():
    counted, _ = shape()
    with pytest.raises(UserError, match=r"--target_sparsity 0.9: 2 pruned layers can give up at most 0\.\d+"):
        plan(counted, COSINE, make_config(layers=6, target_sparsity=0.9, pruned_layers=2))


def test_a_layer_keeps_a_head_group_and_a_channel():
    counted, _ = shape()
    plans = plan(counted, COSINE, make_config(layers=6, pruning_ratio=0.9, pruned_layers=6, alpha=10))
    clipped = [p for p in plans if p.clipped]
    assert clipped and all(count(p, "heads") >= 1 and count(p, "kv_heads") >= 1 and count(p, "channels") >= 1 for p in plans)


def test_round_to_keeps_multiples():
    counted, _ = shape(intermediate_size=100)
    for settings in (dict(pruning_ratio=0.4), dict(target_sparsity=0.3)):
        plans = plan(counted, COSINE, make_config(layers=6, round_to=16, **settings))
        for p in plans:
            assert count(p, "channels") % 16 == 0 or count(p, "channels") == 100
            assert count(p, "heads") * part_shape(counted, "attention").head_dim % 16 == 0
    removed = removed_parameters(counted, plans, make_config(layers=6))
    assert abs(removed - 0.3 * counted.decoder_parameters) <= 16 * channel_parameters(counted)


@pytest.mark.parametrize("round_to", [7, 101])
def test_round_to_that_cannot_be(round_to):
    with pytest.raises(UserError, match=f"--round_to {round_to}: the model's 4 heads of size 8 and 100 channels"):
        plan(shape(intermediate_size=100)[0], COSINE, make_config(layers=6, round_to=round_to))


@pytest.mark.parametrize(
    "case, unit, steps, units, groups",
    [
        ("llama_mha", "group", 4, 4, 1),
        ("llama_mha", "query", 4, 4, 1),
        ("llama_gqa", "group", 2, 2, 1),
        ("llama_gqa", "query", 2, 4, 2),
        ("llama_mqa", "group", 1, 1, 1),
        ("llama_mqa", "query", 4, 4, 1),
    ],
)
def test_steps_of_heads(case, unit, steps, units, groups):
    found = part_shape(shape(case)[0], "attention").steps(unit)
    assert (found.count, found.candidates, found.runs) == (steps, units, groups)


@pytest.mark.parametrize(
    "layers, ratio, pruned, alpha", [(32, 0.25, 26, 10), (32, 0.55, 30, 7), (30, 0.25, 24, 10), (30, 0.55, 28, 7), (2, 0.25, 2, 10)]
)
def test_depth_defaults_are_the_paper_s_scaled(layers, ratio, pruned, alpha):
    config = make_config(layers=layers, pruned_layers=None, pruning_ratio=ratio)
    assert (config.pruned_layers, config.alpha) == (pruned, alpha)
