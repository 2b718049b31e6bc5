"""The layer adapter, over every family of the table."""

import copy

import pytest
import torch

from slimllm.models.adapter import LayerAdapter, with_multi_head_attention
from slimllm.models.families import FAMILIES
from slimllm.models.shape import shape_of
from slimllm.pruning import pipeline
from tests.conftest import FAMILY_CASES, logits, make_config, make_ids, make_model


@pytest.fixture(params=FAMILY_CASES)
def model(request):
    """A random model of each family of the table, in all its forms."""
    return make_model(request.param)


def test_the_cases_cover_the_table():
    assert {make_model(case).config.model_type for case in FAMILY_CASES} == set(FAMILIES)


def test_the_shape_counts_what_the_model_has(model):
    shape = shape_of(model.config)
    assert shape.decoder_parameters + shape.other_parameters == model.num_parameters()
    assert LayerAdapter(model.config).all_widths(model) == [(shape.heads, shape.kv_heads, shape.channels)] * shape.layers


def test_ratio_zero_leaves_the_logits_unchanged(model):
    ids = make_ids()
    before = logits(model, ids)
    reports = pipeline.prune(model, ids, make_config(shape=shape_of(model.config), pruning_ratio=0.0))
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
    reports = pipeline.prune(
        model, ids, make_config(shape=shape_of(model.config), recovery="none", head_unit=head_unit, layer_ratio="uniform")
    )
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
