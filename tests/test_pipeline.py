import copy

import pytest
import torch

from slimllm.errors import UserError
from slimllm.experiments import plain
from slimllm.models.adapter import LayerAdapter
from slimllm.settings.methods import RECOVERIES
from slimllm.settings.pruning import HEAD_UNITS
from slimllm.streaming.activations import ActivationMemory
from tests.conftest import DISTINCT_CASES, FAMILY_CASES, count, indices, logits, make_config, make_ids, make_model, make_shape, prune


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("head_unit", HEAD_UNITS)
@pytest.mark.parametrize("case", DISTINCT_CASES)
def test_every_recovery_lowers_the_error_of_each_part(case, head_unit, recovery):
    model, ids = make_model(case), make_ids(samples=12)
    for report in prune(model, ids, make_config(shape=make_shape(case), recovery=recovery, head_unit=head_unit, layer_ratio="uniform")):
        for before, after in report.errors.values():
            assert after <= before * (1 + 1e-4)
    assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize("recovery", ["linear", "least_squares"])
def test_reported_error_is_the_layer_s_real_error(recovery):
    """The streamed error of the last layer's feed-forward part, against running the module on the same input."""
    dense, ids = make_model("llama_mha"), make_ids(samples=12)
    model = copy.deepcopy(dense)
    report = prune(model, ids, make_config(recovery=recovery))[-1]
    seen = {}
    model.model.layers[-1].mlp.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    logits(model, ids)
    wanted = dense.model.layers[-1].mlp(seen["x"]).flatten(0, 1)
    error = (seen["y"].flatten(0, 1) - wanted).square().mean(0).sum() / wanted.var(0, correction=0).sum()
    assert report.errors["mlp"][1] == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_the_pipeline_decides_as_the_plain_transcription(ratio, seed):
    model, ids = make_model("llama_mha", seed=seed, num_hidden_layers=4), make_ids(samples=12, seed=seed)
    twin = copy.deepcopy(model)
    cosine, kept = plain.prune(twin, ids, ratio, 3, 2.0)
    reports = prune(model, ids, make_config(layers=4, pruned_layers=3, pruning_ratio=ratio, alpha=2.0, keep_lowest=0.01))
    assert [r.cosine for r in reports] == pytest.approx(cosine, abs=1e-5)
    for index, (heads, channels) in kept.items():
        assert indices(reports[index], "heads") == heads and indices(reports[index], "channels") == channels
    torch.testing.assert_close(logits(model, ids), logits(twin, ids), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_samples_in_batches_and_on_disk_decide_the_same(where, monkeypatch):
    """float32 in memory. On disk it is bfloat16, which a bfloat16 model has anyway: its decisions are the same to the last one."""
    model, ids = make_model(), make_ids(samples=10)
    if where == "disk":
        model = model.bfloat16()
        model.model.rotary_emb = make_model().model.rotary_emb
    twin = copy.deepcopy(model)
    batch = 48 if where == "memory" else 2048
    reports = prune(model, ids, make_config(recovery="least_squares"))
    monkeypatch.setattr("slimllm.streaming.runner.TOKENS_PER_BATCH", batch)
    if where == "disk":
        monkeypatch.setattr("slimllm.streaming.runner.ActivationMemory", lambda limit, folder: ActivationMemory(0, folder))
    again = prune(twin, ids, make_config(recovery="least_squares"))
    assert [r.kept for r in reports] == [r.kept for r in again]
    torch.testing.assert_close(logits(model, ids), logits(twin, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = make_model().to(dtype), make_ids()
    prune(model, ids, make_config(recovery="least_squares"))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model, ids).isfinite().all()


def test_values_that_are_not_finite_are_named():
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer 1 gives values that are not finite"):
        prune(model, make_ids(), make_config())


def test_an_unpruned_layer_between_pruned_ones_is_left_whole():
    model, ids = make_model(num_hidden_layers=4), make_ids()
    weights = copy.deepcopy(model.state_dict())
    reports = prune(model, ids, make_config(layers=4, pruned_layers=2))
    whole = [r.index for r in reports if not r.ratio]
    assert len(whole) == 2
    for index in whole:
        for name, value in model.model.layers[index].state_dict().items():
            assert torch.equal(value, weights[f"model.layers.{index}.{name}"])


def test_heads_that_stay_while_channels_go():
    """A small ratio can round to no head at all; the feed-forward part is pruned all the same."""
    model, ids = make_model("llama_gqa"), make_ids()
    reports = prune(model, ids, make_config(pruning_ratio=0.1, layer_ratio="uniform"))
    assert all(count(r, "heads") == 4 and "attention" not in r.errors and count(r, "channels") < 48 for r in reports)
    assert model.model.layers[0].self_attn.o_proj.bias is None


def outputs_of(model, ids, module):
    seen = []
    hook = module.register_forward_hook(lambda _, args, output: seen.append(output))
    logits(model, ids)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_layers_run_as_in_the_whole_model(case):
    """Masks (sliding windows too) and positions are the model's own: cosines and the first attention's error say so."""
    dense, ids = make_model(case), make_ids(samples=12)
    model = copy.deepcopy(dense)
    reports = prune(model, ids, make_config(shape=make_shape(case), layer_ratio="uniform"))
    states = [outputs_of(dense, ids, module) for module in (dense.model.embed_tokens, *dense.model.layers)]
    cosine = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(states, states[1:])]
    assert [r.cosine for r in reports] == pytest.approx(cosine, abs=1e-5)
    if "attention" in reports[0].errors:
        adapter = LayerAdapter(dense.config)
        wanted, found = (outputs_of(m, ids, adapter.all_parts(m)[0].output).flatten(0, 1) for m in (dense, model))
        error = (wanted - found).square().mean(0).sum() / wanted.var(0, correction=0).sum()
        assert reports[0].errors["attention"][1] == pytest.approx(error.item(), rel=1e-3)
