"""The layer adapter, over every family of the table."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.adapter import LayerAdapter, Mixer, with_multi_head_attention
from slimllm.models.families import FAMILIES, TEXT_MODELS, family_of
from slimllm.models.refused import UNSUPPORTED, WRAPPERS
from slimllm.models.shape import shape_of
from slimllm.streaming.runner import LayerRunner
from tests.conftest import (
    EXPERTS,
    FAMILY_CASES,
    MIXTURE_CASES,
    ODD_CASES,
    ROUTED,
    SIZES,
    check_parts_are_the_layers,
    count,
    logits,
    make_config,
    make_ids,
    make_model,
    make_shape,
    part_shape,
    prune,
)


@pytest.fixture(params=FAMILY_CASES)
def model(request):
    """A random model of each family of the table, in all its forms."""
    return make_model(request.param)


def test_the_cases_cover_the_table():
    assert {make_model(case).config.model_type for case in (*FAMILY_CASES, *MIXTURE_CASES, *ODD_CASES)} == set(FAMILIES)


def test_the_shape_counts_what_the_model_has(model):
    shape = shape_of(model.config)
    assert shape.decoder_parameters + shape.other_parameters == model.num_parameters()
    assert LayerAdapter(model.config).units(model) == shape.units


def test_ratio_zero_leaves_the_logits_unchanged(model):
    ids = make_ids()
    before = logits(model, ids)
    reports = prune(model, ids, make_config(shape=shape_of(model.config), pruning_ratio=0.0))
    assert torch.equal(logits(model, ids), before)
    assert all(count(r, "channels") == 48 and not r.errors for r in reports)


def masked(dense, reports):
    """The dense model with the columns of removed heads and channels set to zero in its output projections."""
    model, adapter = copy.deepcopy(dense), LayerAdapter(dense.config)
    for layer, report in zip(adapter.layers(model), reports):
        for part in adapter.parts(layer):
            mask = torch.zeros(part.output.in_features)
            mask[part.columns(report.kept[part.kind])] = 1
            part.output.weight.data *= mask
    return model


@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_slicing_equals_masking(model, head_unit):
    dense, ids = copy.deepcopy(model), make_ids()
    reports = prune(model, ids, make_config(shape=shape_of(model.config), recovery="none", head_unit=head_unit, layer_ratio="uniform"))
    torch.testing.assert_close(logits(model, ids), logits(masked(dense, reports), ids), rtol=1e-4, atol=1e-4)
    adapter = LayerAdapter(model.config)
    found = adapter.units(model)
    assert found == [r.units for r in reports] and count(found[0], "channels") < 48
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())


def test_parts_and_head_add_up_to_the_model(model):
    """Norm, part, post-norm, multiplier, final norm, head, divisor and cap, put together as the adapter says, are the model."""
    adapter, ids, seen = LayerAdapter(model.config), make_ids(), {}
    expected = logits(model, ids)
    layers = list(adapter.layers(model))
    hooks = [layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.update(start=args[0]), with_kwargs=True)]
    for index, layer in enumerate(layers):
        for part in adapter.parts(layer):
            key = (index, part.kind)
            hooks.append(part.output.register_forward_hook(lambda _, args, output, key=key: seen.update({key: output})))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    states, runner = seen["start"], LayerRunner(model, ids)
    runner.prepare()
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for part in (part for step in adapter.steps(layer) for part in step):
                if isinstance(part, Mixer):
                    states = part.after(states, runner.arguments[index])
                else:
                    states = part.join(states, seen[index, part.kind])
        found = adapter.logits(adapter.head(model), adapter.final_norm(model)(states))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_parts_run_one_by_one_are_the_layer(model):
    """Which norm a part reads through, in what order parts come, and which read the same state: as pruning runs them."""
    check_parts_are_the_layers(model)


def test_repeating_kv_heads_leaves_the_logits_unchanged():
    model, ids = make_model("qwen2"), make_ids()
    before = logits(model, ids)
    with_multi_head_attention(model)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    assert part_shape(shape_of(model.config), "attention").kv_heads == 4


def test_a_form_of_a_family_that_does_not_fit_is_refused_with_the_reason():
    with pytest.raises(UserError, match="^model_type hyperclovax with use_post_norm False: .* has not been verified"):
        make_shape("hyperclovax", use_post_norm=False)


def test_every_type_of_transformers_is_pruned_or_refused_with_its_reason():
    """All causal types, and all that make text of text and images, sound or film."""
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wrappers = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() | auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()
    assert not [name for name in (*causal, *sorted(wrappers)) if name not in FAMILIES.keys() | UNSUPPORTED.keys() | WRAPPERS.keys()]
    assert not FAMILIES.keys() & UNSUPPORTED.keys() and not WRAPPERS.keys() & (FAMILIES.keys() | UNSUPPORTED.keys())
    assert all(TEXT_MODELS.get(text, text) in FAMILIES or text in UNSUPPORTED for text in WRAPPERS.values())


@pytest.mark.parametrize("name, message", [("from_2030", "not known: of a newer transformers"), ("llava", "names no text model")])
def test_a_type_that_is_in_no_table_is_not_known(name, message):
    with pytest.raises(UserError, match=f"model_type {name}: .*{message}"):
        family_of(SimpleNamespace(model_type=name))


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_the_text_model_inside_another_is_the_family_that_it_is_taken_for(kind):
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict()
    heads = {"num_key_value_heads": 2, "first_k_dense_replace": 1, "pad_token_id": 0}
    settings = {name: value for name, value in {**SIZES, **ROUTED, **EXPERTS, **heads}.items() if name in known}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if "glm" in kind:
        rope |= {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    elif "granite" not in kind:
        rope |= {"mrope_section": [2, 1, 1]}
    config = config_class(**settings, rope_parameters=rope)
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    inside = next(c for c in vars(module).values() if str(c).endswith("TextModel'>") and c.config_class is config_class)
    torch.manual_seed(0)
    theirs = inside(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = AutoModel.from_config(loading._as_text_model(config)).eval()
    assert not any(ours.load_state_dict(theirs.state_dict(), strict=False))
    assert torch.equal(ours(make_ids()).last_hidden_state, theirs(make_ids()).last_hidden_state)
