"""The layer adapter: every family of the table, and rows for layers that no family of the table has yet."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Phi3Config

from slimllm.models import families
from slimllm.models.adapter import LayerAdapter, with_multi_head_attention
from slimllm.models.families import FAMILIES, Family
from slimllm.models.shape import shape_of
from slimllm.pruning import pipeline
from tests.conftest import FAMILY_CASES, SIZES, logits, make_config, make_ids, make_model

# Layers of other kinds: fused projections, norms after the blocks, soft caps, multipliers of the residual and the logits.
OTHER_ROWS = {
    "phi3": (
        Family("phi3", head_inputs=("qkv_proj",), channel_inputs=("gate_up_proj",), qkv_bias=False, o_bias=False),
        Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    ),
    "gemma2": (
        Family(
            "gemma2",
            attention_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
            logits_softcap="final_logit_softcapping",
        ),
        Gemma2Config(**SIZES, num_key_value_heads=2, final_logit_softcapping=5.0, query_pre_attn_scalar=8, sliding_window=6),
    ),
    "granite": (
        Family("granite", residual_multiplier="residual_multiplier", logits_divisor="logits_scaling", mlp_bias="mlp_bias"),
        GraniteConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.3, logits_scaling=4.0, embedding_multiplier=3.0),
    ),
}


@pytest.fixture(params=[*FAMILY_CASES, *OTHER_ROWS])
def model(request, monkeypatch):
    """A random model of each family of the table, in all its forms, and of the rows above."""
    if request.param in FAMILY_CASES:
        return make_model(request.param)
    family, config = OTHER_ROWS[request.param]
    monkeypatch.setitem(families.FAMILIES, family.model_type, family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    return model


def test_the_cases_cover_the_table():
    assert {make_model(case).config.model_type for case in FAMILY_CASES} == set(FAMILIES)


def test_the_shape_counts_what_the_model_has(model):
    shape = shape_of(model.config)
    assert shape.decoder_parameters + shape.other_parameters == model.num_parameters()
    assert LayerAdapter(model.config).all_widths(model) == [(shape.heads, shape.kv_heads, shape.channels)] * shape.layers


def test_ratio_zero_leaves_the_logits_unchanged(model):
    ids = make_ids()
    before = logits(model, ids)
    reports = pipeline.prune(model, ids, make_config(pruning_ratio=0.0))
    assert torch.equal(logits(model, ids), before)
    assert all(len(r.channels) == 48 and r.mlp_error is None for r in reports)


def masked(dense, reports):
    """The dense model with the columns of removed heads and channels set to zero in its output projections."""
    model, adapter = copy.deepcopy(dense), LayerAdapter(dense.config)
    for (attention, mlp), report in zip(adapter.blocks(model), reports):
        mask = torch.zeros(attention.output.in_features).view(-1, adapter.head_dim)
        mask[report.heads] = 1
        attention.output.weight.data *= mask.flatten()
        mask = torch.zeros(mlp.output.in_features)
        mask[report.channels] = 1
        mlp.output.weight.data *= mask
    return model


@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_slicing_equals_masking(model, head_unit):
    dense, ids = copy.deepcopy(model), make_ids()
    reports = pipeline.prune(model, ids, make_config(recovery="none", head_unit=head_unit, layer_ratio="uniform"))
    torch.testing.assert_close(logits(model, ids), logits(masked(dense, reports), ids), rtol=1e-4, atol=1e-4)
    adapter = LayerAdapter(model.config)
    found = adapter.all_widths(model)
    assert found == [(len(r.heads), len(r.kv_heads), len(r.channels)) for r in reports] and found[0][2] < 48
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())


def test_blocks_and_head_add_up_to_the_model(model):
    """Norm, block, post-norm, multiplier, final norm, head, divisor and cap, put together as the adapter says, are the model."""
    adapter, ids, seen = LayerAdapter(model.config), make_ids(), {}
    expected = logits(model, ids)
    layers = list(adapter.layers(model))
    hooks = [layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.update(start=args[0]), with_kwargs=True)]
    for index, layer in enumerate(layers):
        for part, block in enumerate((adapter.attention(layer), adapter.mlp(layer))):
            hooks.append(block.output.register_forward_hook(lambda _, args, output, key=(index, part): seen.update({key: output})))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    states = seen["start"]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for part, block in enumerate((adapter.attention(layer), adapter.mlp(layer))):
                states = block.join(states, seen[index, part])
        found = adapter.logits(adapter.head(model), adapter.final_norm(model)(states))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_repeating_kv_heads_leaves_the_logits_unchanged():
    model, ids = make_model("qwen2"), make_ids()
    before = logits(model, ids)
    with_multi_head_attention(model)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    assert shape_of(model.config).kv_heads == 4
