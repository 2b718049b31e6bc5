"""Rival methods against ten plain lines each, on random two-layer models."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from slimllm.errors import UserError
from slimllm.pruning.importance.taylor import saliencies
from slimllm.settings.methods import METHODS
from slimllm.settings.pruning import PruneConfig
from slimllm.streaming.runner import LayerRunner
from tests.conftest import CORE_CASES, DISTINCT_CASES, indices, logits, make_ids, make_model, make_shape, plan, prune

CASES = ("llama_mha", "llama_gqa", "qwen2")


def settings(method, case="llama_gqa", **more):
    return PruneConfig(base_model="test", method=method, **more).resolved(make_shape(case))


def inputs_of(model, ids):
    """What each o_proj and down_proj of a model is given on the ids, [tokens, n], by layer."""
    seen = {}
    hooks = [
        linear.register_forward_hook(lambda _, args, __, key=(i, what): seen.update({key: args[0].flatten(0, 1)}))
        for i, layer in enumerate(model.model.layers)
        for what, linear in (("heads", layer.self_attn.o_proj), ("channels", layer.mlp.down_proj))
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def keep_highest(scores, removed, groups):
    """Indices of a [units] tensor whose lowest ``removed`` of each of the equal ``groups`` go."""
    size, kept = len(scores) // groups, []
    for group in range(groups):
        order = sorted(range(size), key=lambda i: float(scores[group * size + i]))
        kept += [group * size + i for i in order[removed:]]
    return sorted(kept)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.takes_whole])
@pytest.mark.parametrize("case, recovery", [*((case, None) for case in DISTINCT_CASES), *((case, "least_squares") for case in CORE_CASES)])
def test_every_method_meets_the_sparsity_and_gives_a_model_that_runs(method, case, recovery):
    shape, model = make_shape(case), make_model(case)
    config = PruneConfig(base_model="test", method=method, target_sparsity=0.3, recovery=recovery, **_all_layers(method)).resolved(shape)
    prune(model, make_ids(), config)
    left = sum(p.numel() for p in model.model.layers.parameters())
    assert abs(shape.decoder_parameters * 0.7 - left) <= 3 * 32 + 2 * 48  # a channel, and the biases that could not be foreseen
    assert torch.isfinite(logits(model, make_ids(2))).all()


def _all_layers(method):
    return {} if METHODS[method].all_layers else {"pruned_layers": 2}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_llm_pruner(case, head_unit):
    """One backward of the mean loss; E = |W * dL/dW|; sums over the rows and columns that go together."""
    model, ids, reference = make_model(case), make_ids(), make_model(case)
    out = reference(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    cross_entropy(out, ids[:, 1:].flatten()).backward()
    E = {name: (p * p.grad).abs() for name, p in reference.named_parameters() if "proj.weight" in name}
    config = settings("llm_pruner", case, pruning_ratio=0.5, pruned_layers=2, head_unit=head_unit)
    reports = prune(model, ids, config)
    kv, size = reference.config.num_key_value_heads, 8
    for index, report in enumerate(reports):
        e = {name.split(".")[4]: value for name, value in E.items() if f"layers.{index}." in name}
        heads = e["q_proj"].sum(1).view(4, size).sum(1) + e["o_proj"].sum(0).view(4, size).sum(1)
        if head_unit == "group" or kv == 4:
            groups = heads.view(kv, -1).sum(1) + (e["k_proj"].sum(1) + e["v_proj"].sum(1)).view(kv, size).sum(1)
            assert indices(report, "kv_heads") == keep_highest(groups, kv // 2, 1)
        else:
            assert indices(report, "heads") == keep_highest(heads, 4 // kv // 2, kv)
        channels = e["gate_proj"].sum(1) + e["up_proj"].sum(1) + e["down_proj"].sum(0)
        assert indices(report, "channels") == keep_highest(channels, 24, 1)


def test_gradients_layer_by_layer_are_those_of_one_backward_pass():
    model, ids = make_model("qwen3"), make_ids(9)
    out = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    cross_entropy(out, ids[:, 1:].flatten()).backward()
    wanted = [(layer.mlp.down_proj.weight * layer.mlp.down_proj.weight.grad).abs().sum(0) for layer in model.model.layers]
    rest = [(w.weight * w.weight.grad).abs().sum(1) for layer in model.model.layers for w in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    model.zero_grad()
    runner = LayerRunner(model, ids)
    runner.batch = 2
    found = saliencies(runner)
    for index in range(2):
        torch.testing.assert_close(found[index]["mlp"]["channels"], wanted[index] + rest[2 * index] + rest[2 * index + 1])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_llm_pruner_leaves_the_first_and_last_layers_whole():
    shape = make_shape("llama_mha", num_hidden_layers=32)
    for ratio, first, last in ((0.25, 4, 2), (0.55, 1, 1)):
        config = PruneConfig(base_model="test", method="llm_pruner", pruning_ratio=ratio).resolved(shape)
        ratios = [one.ratio for one in plan(shape, [0.0] * 32, config)]
        assert ratios == [0] * first + [ratio] * (32 - first - last) + [0] * last


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_unit", ["group", "query"])
def test_flap(case, head_unit):
    """Fluctuation of the dense stream, standardised within layers, one global ranking by cost; bias = sum over removed of mean_j W_:,j."""
    model, ids, dense = make_model(case), make_ids(), make_model(case)
    seen, heads, channels = inputs_of(dense, ids), [], []
    for index, layer in enumerate(dense.model.layers):
        s = [
            seen[index, what].var(0, correction=0) * linear.weight.square().sum(0)
            for what, linear in (("heads", layer.self_attn.o_proj), ("channels", layer.mlp.down_proj))
        ]
        s[0] = s[0] ** 2
        s = [(part - part.mean()) / part.std() for part in s]
        heads.append(s[0])
        channels.append(s[1])
    kv, size = dense.config.num_key_value_heads, 8
    of_heads = torch.stack(heads).view(2, 4, size).mean(-1)
    if head_unit == "group" or kv == 4:
        steps, cost = of_heads.view(2, kv, -1).mean(-1), (2 * (4 // kv) + 2) * size / 3
    else:
        steps, cost = of_heads.view(2, kv, -1).sort(-1).values.mean(1), 2 * kv * size / 3
    entries = [(float(v), cost, i, "heads") for i in range(2) for v in steps[i].sort().values[:-1]]
    entries += [(float(v), 1.0, i, "channels") for i in range(2) for v in channels[i].sort().values[:-1]]
    share, gone, total = 0.4 * 2 * (steps.shape[1] * cost + 48), {}, 0.0
    for _, price, index, what in sorted(entries):
        if abs(total + price - share) > abs(total - share):
            break
        total += price
        gone[index, what] = gone.get((index, what), 0) + 1
    reports = prune(model, ids, settings("flap", case, pruning_ratio=0.4, head_unit=head_unit))
    for index, report in enumerate(reports):
        assert indices(report, "channels") == keep_highest(channels[index], gone.get((index, "channels"), 0), 1)
        removed = gone.get((index, "heads"), 0)
        if head_unit == "group" or kv == 4:
            assert indices(report, "kv_heads") == keep_highest(of_heads[index].view(kv, -1).mean(-1), removed, 1)
        else:
            assert indices(report, "heads") == keep_highest(of_heads[index], removed, kv)
        left = torch.tensor([c for c in range(48) if c not in indices(report, "channels")], dtype=torch.long)
        down = dense.model.layers[index].mlp.down_proj.weight
        torch.testing.assert_close(model.model.layers[index].mlp.down_proj.weight, down[:, indices(report, "channels")])
        if len(left):
            bias = down[:, left] @ seen[index, "channels"].mean(0)[left]
            torch.testing.assert_close(model.model.layers[index].mlp.down_proj.bias, bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["wanda_sp", "magnitude"])
def test_wanda_sp_and_magnitude(case, method):
    """Scores of the layer's own inputs (of the pruned layers before it), the lowest of each layer, nothing recovered."""
    model, ids, dense = make_model(case), make_ids(), make_model(case)
    reports = prune(model, ids, settings(method, case, pruning_ratio=0.5))
    kv, size = dense.config.num_key_value_heads, 8
    first = inputs_of(dense, ids)[0, "heads"]
    second = inputs_of(model, ids)  # of the second layer's kept parts only
    for index, report in enumerate(reports):
        o, down = dense.model.layers[index].self_attn.o_proj.weight, dense.model.layers[index].mlp.down_proj.weight
        if method == "magnitude":
            assert indices(report, "channels") == keep_highest(down.norm(dim=0), 24, 1)
            assert indices(report, "heads") == keep_highest(
                o.norm(dim=0).view(4, size).sum(1), 4 // kv // 2 if kv < 4 else 2, kv if kv < 4 else 1
            )
        elif index == 0:
            scores = (o.abs().mean(0) * first.norm(dim=0)).view(4, size).sum(1)
            assert indices(report, "heads") == keep_highest(scores, 4 // kv // 2 if kv < 4 else 2, kv if kv < 4 else 1)
        else:
            x = second[index, "channels"]
            kept = down[:, indices(report, "channels")].abs().mean(0) * x.norm(dim=0)
            full = _channels_of(dense, model, index, ids)
            gone = [c for c in range(48) if c not in indices(report, "channels")]
            assert kept.min() >= (down.abs().mean(0) * full.norm(dim=0))[gone].max()
        torch.testing.assert_close(model.model.layers[index].mlp.down_proj.weight, down[:, indices(report, "channels")])


def _channels_of(dense, pruned, index, ids):
    """The input that a dense layer's down_proj has where everything before its feed-forward part is pruned."""
    seen = {}
    hook = pruned.model.layers[index].mlp.register_forward_hook(lambda _, args, __: seen.update(x=args[0]))
    logits(pruned, ids)
    hook.remove()
    mlp = dense.model.layers[index].mlp
    with torch.no_grad():
        return (mlp.act_fn(mlp.gate_proj(seen["x"])) * mlp.up_proj(seen["x"])).flatten(0, 1)


def test_one_ranking_is_not_for_a_runtime_that_wants_layers_alike():
    with pytest.raises(UserError, match="--layer_ratio ranking and --runtime vllm"):
        plan(make_shape(), [0.0] * 2, settings("flap", runtime="vllm", target_sparsity=0.3))


def test_random_is_another_choice_with_another_seed():
    found = []
    for seed in (1, 1, 2):
        found.append([indices(r, "channels") for r in prune(make_model(), make_ids(), settings("random", pruning_ratio=0.5, seed=seed))])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]
