"""Layers as lists of parts: models whose layers differ, and models that were pruned before."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hf_prune
import slimllm
from slimllm.data.calibration import Calibration
from slimllm.deploy.runtimes import as_slim_model
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.adapter import LayerAdapter
from slimllm.models.families import FAMILIES, Family, in_turn
from slimllm.models.shape import RUNTIMES, limits_of, shape_of
from slimllm.plan import LayerPlan, LayerReport, removed_parameters
from slimllm.pruning.importance.taylor import saliencies
from slimllm.pruning.part_run import part_runs
from slimllm.reporting.record import PruningRecord
from slimllm.streaming.runner import LayerRunner
from tests.conftest import (
    DISTINCT_CASES,
    ODD_CASES,
    SIZES,
    count,
    logits,
    make_config,
    make_ids,
    make_model,
    prune,
    prune_to,
    runtimes_of,
)


def masked(dense, reports):
    """The model with the columns of removed units set to zero in its output projections."""
    model, adapter = copy.deepcopy(dense), LayerAdapter(dense.config)
    for layer, report in zip(adapter.layers(model), reports, strict=True):
        for part in adapter.parts(layer):
            mask = torch.zeros(part.output.in_features)
            mask[part.columns(report.kept[part.kind])] = 1
            part.output.weight.data *= mask
    return model


def decoder_parameters(model):
    return sum(p.numel() for p in LayerAdapter(model.config).layers(model).parameters())


# models whose layers differ in their parts


class PartlyConfig(LlamaConfig):
    """A Llama some of whose layers have no attention, and whose layers differ in width."""

    model_type = "partly"

    def __init__(self, has_attention=(), ffn_sizes=(), query_heads=(), **kwargs):
        self.has_attention, self.ffn_sizes, self.query_heads = list(has_attention), list(ffn_sizes), list(query_heads)
        super().__init__(**kwargs)


class PartlyLayer(LlamaDecoderLayer):
    def __init__(self, config, index):
        own = copy.copy(config)
        own.intermediate_size, own.num_attention_heads = config.ffn_sizes[index], config.query_heads[index]
        super().__init__(own, index)
        if not config.has_attention[index]:
            self.self_attn = self.input_layernorm = None

    def forward(self, hidden_states, **kwargs):
        if self.self_attn is not None:
            return super().forward(hidden_states, **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Partly(LlamaForCausalLM):
    config_class = PartlyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = torch.nn.ModuleList(PartlyLayer(config, i) for i in range(config.num_hidden_layers))


LISTS = dict(has_attention=[True, False, True, True], ffn_sizes=[48, 64, 32, 48], query_heads=[4, 4, 8, 2])


@pytest.fixture
def partly(monkeypatch):
    """A random model of layers that differ, and its row of the table."""
    attention = dict(sizes=("query_heads", "num_key_value_heads"), layers="has_attention")
    row = Family("partly", "a test", "llama", steps=in_turn(attention, {"sizes": ("ffn_sizes",)}))
    monkeypatch.setitem(FAMILIES, "partly", row)
    AutoConfig.register("partly", PartlyConfig, exist_ok=True)
    AutoModelForCausalLM.register(PartlyConfig, Partly, exist_ok=True)
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2}
    model = Partly(PartlyConfig(**sizes, **LISTS)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_(0, 0.3)
    return model


def test_the_shape_of_a_model_whose_layers_differ_is_what_it_has(partly):
    shape = shape_of(partly.config)
    assert shape.parameters == partly.num_parameters() and shape.decoder_parameters == decoder_parameters(partly)
    assert shape.units == LayerAdapter(partly.config).units(partly)
    assert [list(layer) for layer in shape.units] == [["attention", "mlp"], ["mlp"], ["attention", "mlp"], ["attention", "mlp"]]


@pytest.mark.parametrize("layer_ratio", ["importance", "uniform", "middle", "ranking", "auto"])
@pytest.mark.parametrize("parts", ["both", "heads", "channels"])
def test_a_model_whose_layers_differ_is_pruned_as_any_other(layer_ratio, parts, partly):
    dense, ids, shape = copy.deepcopy(partly), make_ids(12), shape_of(partly.config)
    target = 0.1 if parts == "heads" else 0.3
    settings = dict(layer_ratio=layer_ratio, prune=parts, target_sparsity=target, recovery="none", pruned_layers=4)
    config = make_config(4, shape, **settings)
    reports = prune(partly, ids[:9], config)
    torch.testing.assert_close(logits(partly, ids), logits(masked(dense, reports), ids), rtol=1e-4, atol=1e-4)
    removed = 1 - decoder_parameters(partly) / shape.decoder_parameters
    assert removed == pytest.approx(target, abs=0.05 if parts == "heads" else 0.01)
    assert LayerAdapter(partly.config).units(partly) == [report.units for report in reports]


@pytest.mark.parametrize("recovery", ["linear", "least_squares"])
def test_a_recovery_lowers_the_error_of_each_part_of_a_model_whose_layers_differ(recovery, partly):
    reports = prune(partly, make_ids(12), make_config(4, shape_of(partly.config), recovery=recovery, layer_ratio="uniform"))
    assert [set(report.errors) <= set(report.kept) for report in reports] == [True] * 4 and any(report.errors for report in reports)
    assert all(after <= before * (1 + 1e-4) for report in reports for before, after in report.errors.values())


def test_gradients_of_a_model_whose_layers_differ(partly):
    found = saliencies(LayerRunner(partly, make_ids(6)))
    assert [{kind: {sort: len(v) for sort, v in own.items()} for kind, own in layer.items()} for layer in found] == shape_of(
        partly.config
    ).units


def test_runtimes_that_want_layers_alike_refuse_a_model_that_has_them_not(partly):
    with pytest.raises(UserError, match="--runtime transformers: it needs layers alike, and in this model layers .* differ"):
        prune(partly, make_ids(), make_config(4, shape_of(partly.config), runtime="transformers"))
    with pytest.raises(UserError, match="model_type partly: its class is not one of transformers"):
        slimllm.prune(partly, calibration=make_ids(), pruning_ratio=0.3)


@pytest.mark.parametrize("case", ODD_CASES)
@torch.no_grad()
def test_the_parts_of_an_odd_layer_run_one_by_one_are_the_layer(case):
    runner = LayerRunner(make_model(case), make_ids())
    whole, by_parts = runner.embed(), runner.embed()
    for index, layer in runner.visit():
        for step in runner.adapter.steps(layer):
            [run] = part_runs(runner, by_parts, step, index)
            run.take()
            run.join()
        runner.advance(whole, layer, index)
        for expected, states in zip(whole, by_parts):
            torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", ["any", "transformers"])
@pytest.mark.parametrize("case", ODD_CASES)
def test_layers_of_one_part_each_or_with_settings_of_their_own(case, runtime, tmp_path):
    dense, ids = make_model(case), make_ids(12)
    shape = shape_of(dense.config)
    settings = dict(calibration=ids, target_sparsity=0.15, layer_ratio="uniform", pruned_layers=len(shape.layers))
    assert shape.parameters == dense.num_parameters() and shape.units == LayerAdapter(dense.config).units(dense)
    assert [list(layer) for layer in shape.units] == [[], ["mlp"], ["attention"], ["mlp"]] or case.startswith("gemma4")
    result = slimllm.prune(copy.deepcopy(dense), recovery="none", runtime=runtime, **settings)
    torch.testing.assert_close(logits(result.model, ids), logits(masked(dense, result.layers), ids), rtol=1e-4, atol=1e-4)
    assert result.parameters.pruned == result.model.num_parameters() < dense.num_parameters()
    again = slimllm.prune(dense, recovery="least_squares", runtime=runtime, new_bias=False, **settings)
    assert all(after <= before * (1 + 1e-4) for layer in again.layers for before, after in layer.errors.values())
    slimllm.save(again, tmp_path / "saved")
    assert torch.equal(logits(loading.load_model(str(tmp_path / "saved"), torch.float32), ids), logits(again.model, ids))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=runtime == "any").eval()
    assert torch.equal(logits(reloaded, ids), logits(again.model, ids))
    one, other = (reloaded.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(one, other)


@pytest.mark.parametrize("case", ODD_CASES)
def test_the_program_prunes_odd_layers_from_their_files(case, tmp_path, tiny_tokenizer, text_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(case).save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    flags = ["--base_model", "model", "--calibration", str(text_file), "--eval_data", "none", "--num_examples", "4", "--seq_len", "16"]
    flags += ["--target_sparsity", "0.1", "--output_dir", "out"]
    assert hf_prune.main([*flags, "--dry_run"]) == 0 and hf_prune.main(flags) == 0
    assert "the same logits" in capsys.readouterr().out
    assert PruningRecord.read("out").parameters.pruned == loading.load_model("out", "auto").num_parameters()


# parts side by side


def test_parts_side_by_side_read_the_same_state():
    """Cohere's: one norm, attention and feed-forward part of what it gives, both added to the residual."""
    dense = make_model("cohere")
    config = dense.config
    shape = shape_of(config)
    assert shape.decoder_parameters == decoder_parameters(dense)
    for recovery in ("none", "least_squares"):
        model, ids = copy.deepcopy(dense), make_ids(12)
        reports = prune(model, ids, make_config(shape=shape, recovery=recovery, layer_ratio="uniform"))
        if recovery == "none":
            torch.testing.assert_close(logits(model, ids), logits(masked(dense, reports), ids), rtol=1e-4, atol=1e-4)
        # the second layer's errors are of what the pruned first one gives, both parts of the very same state
        states, outputs = {}, {}
        layer, whole = model.model.layers[1], dense.model.layers[1]
        layer.register_forward_pre_hook(lambda _, args, into=states: into.update(x=args[0]))
        layer.mlp.register_forward_hook(lambda _, args, output, into=outputs: into.update(mlp=output))
        logits(model, ids)
        with torch.no_grad():
            wanted = whole.mlp(whole.input_layernorm(states["x"])).flatten(0, 1)
        error = (outputs["mlp"].flatten(0, 1) - wanted).square().mean(0).sum() / wanted.var(0, correction=0).sum()
        assert reports[1].errors["mlp"][1] == pytest.approx(error.item(), rel=1e-3)


# a model that was pruned before


def pruned_before(case, **settings):
    """A random model of layers of different widths."""
    sizes = dict(num_hidden_layers=3, intermediate_size=64)
    settings = {"target_sparsity": 0.2, "pruned_layers": 2, "recovery": "least_squares", **settings}
    return slimllm.prune(make_model(case, **sizes), calibration=make_ids(), **settings).model


@pytest.mark.parametrize("case", DISTINCT_CASES)
def test_a_pruned_model_is_pruned_again(case, tmp_path, tiny_tokenizer):
    """It is counted from the model given; slicing equals masking; saved, it loads again."""
    before = pruned_before(case)
    shape, given, ids = shape_of(before.config), copy.deepcopy(before), make_ids(12)
    assert shape.parameters == before.num_parameters() and shape.units == LayerAdapter(before.config).units(before)
    settings = dict(target_sparsity=0.3, layer_ratio="uniform", pruned_layers=3)
    result = slimllm.prune(before, tiny_tokenizer, calibration=ids, recovery="none", **settings)
    torch.testing.assert_close(logits(result.model, ids), logits(masked(given, result.layers), ids), rtol=1e-4, atol=1e-4)
    assert result.parameters.dense == given.num_parameters()
    assert result.parameters.decoder_removed == pytest.approx(0.3, abs=0.01)
    dtype = result.model.config.dtype
    slimllm.save(result, tmp_path / "twice")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True).eval()
    assert torch.equal(logits(reloaded, ids), logits(result.model, ids))
    assert result.model.config.dtype == dtype  # a saved model is as it was, and can be pruned once more
    slimllm.prune(result.model, calibration=ids, target_sparsity=0.1, layer_ratio="uniform", prune="channels")
    again = slimllm.prune(copy.deepcopy(given), calibration=ids, recovery="least_squares", **settings)
    assert all(after <= error * (1 + 1e-4) for layer in again.layers for error, after in layer.errors.values())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_pruned_model_is_pruned_again_for_a_runtime(runtime):
    """A regular one stays regular; one whose layers differ is refused where they may not."""
    before = pruned_before("llama_gqa", runtime=runtime, round_to=1)
    shape, ids = shape_of(before.config), make_ids(12)
    model = slimllm.prune(before, calibration=ids, target_sparsity=0.2, runtime=runtime, round_to=1, recovery="least_squares").model
    limits, units = limits_of(runtime, shape), LayerAdapter(model.config).units(model)
    assert not limits.same_heads or len({count(own, "heads") for own in units}) == 1
    assert not limits.same_channels or all(own == units[0] for own in units)
    irregular = pruned_before("llama_gqa")
    if limits.same_channels:
        with pytest.raises(UserError, match=f"--runtime {runtime}: it needs layers alike"):
            slimllm.prune(irregular, calibration=ids, target_sparsity=0.2, runtime=runtime)


@pytest.mark.parametrize("case, runtime", [(case, name) for case in DISTINCT_CASES for name in runtimes_of(case) if name != "any"])
def test_biases_of_an_earlier_pruning_that_a_runtime_has_no_place_for_are_refused_before_any_work(case, runtime, tmp_path):
    before = pruned_before(case, runtime="transformers", prune="channels", target_sparsity=0.3, round_to=1, new_bias=False)
    for part in LayerAdapter(before.config).all_parts(before):  # as a recovery without --runtime gives them
        if part.output.bias is None:
            part.output.bias = torch.nn.Parameter(torch.ones(part.output.out_features))
    before = as_slim_model(before)
    given, ids = copy.deepcopy(before), make_ids(12)
    settings = dict(calibration=ids, target_sparsity=0.1, round_to=1, prune="channels", runtime=runtime, recovery="least_squares")
    plan = tmp_path / "plan.json"
    shape = shape_of(before.config)
    whole = [LayerReport.of_whole(index, layer, LayerPlan(0.0, layer.units)) for index, layer in enumerate(shape.layers)]
    plan.write_text(json.dumps({"layers": [{"kept": report.kept} for report in whole]}))
    if runtime == "gguf" and shape.gguf is None:
        with pytest.raises(UserError, match="--runtime gguf: llama.cpp has no architecture"):
            slimllm.prune(before, **settings)
    elif shape.foreign_bias and not limits_of(runtime, shape).new_bias:
        for how in (settings, {"calibration": ids, "runtime": runtime, "plan": str(plan)}):
            with pytest.raises(UserError, match="--runtime any"):
                slimllm.prune(before, **how)
        assert torch.equal(logits(before, ids), logits(given, ids)) and type(before) is type(given)
    else:
        slimllm.prune(before, **settings)


@pytest.mark.parametrize("runtime", ["any", "vllm", "transformers"])
@pytest.mark.parametrize("case", ["llama_gqa", "llama_biases", "qwen2", "phi3"])
def test_what_is_counted_of_a_model_pruned_again_is_what_it_has(case, runtime):
    before = pruned_before(case, runtime=runtime)
    shape = shape_of(before.config)
    result = slimllm.prune(copy.deepcopy(before), calibration=make_ids(), target_sparsity=0.3, runtime=runtime, recovery="least_squares")
    assert removed_parameters(shape, result.layers, result.config) == before.num_parameters() - result.model.num_parameters()


@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_zeros_beside_biases_of_an_earlier_pruning_are_counted(runtime):
    """A flag of the config that one bias needs gives the part's other projections biases too, though nothing is removed of it."""
    before = pruned_before("llama_gqa", prune="channels", layer_ratio="uniform", pruned_layers=3, target_sparsity=None, pruning_ratio=0.3)
    shape = shape_of(before.config)
    assert all(not part.input_bias for layer in shape.layers for part in layer.parts)
    settings = dict(target_sparsity=0.1, prune="heads", layer_ratio="uniform", pruned_layers=3)
    for recovery in ("least_squares", "none"):
        result = slimllm.prune(copy.deepcopy(before), calibration=make_ids(), runtime=runtime, recovery=recovery, **settings)
        assert removed_parameters(shape, result.layers, result.config) == before.num_parameters() - result.model.num_parameters()


def test_the_program_prunes_what_it_pruned_and_says_both_names(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--calibration", str(text_file), "--eval_data", f"t={text_file}", "--num_examples", "8", "--seq_len", "16"]
    flags += ["--max_seq_len", "16", "--target_sparsity", "0.2"]
    assert hf_prune.main(["--base_model", str(tiny_folder), *flags, "--save_ckpt_log_name", "a"]) == 0
    assert hf_prune.main(["--base_model", "prune_log/a", *flags, "--dry_run"]) == 0
    assert hf_prune.main(["--base_model", "prune_log/a", *flags, "--save_ckpt_log_name", "b"]) == 0
    one, two = (PruningRecord.read(f"prune_log/{name}") for name in "ab")
    assert (two.model.name, two.model.pruned_from) == ("a", "tiny") and one.model.pruned_from is None
    assert two.parameters.dense == one.parameters.pruned and two.parameters.decoder_removed == pytest.approx(0.2, abs=0.02)
    assert two.model.shape["layers"] == [
        {kind: {sort: len(kept) for sort, kept in own.items()} for kind, own in layer["kept"].items()} for layer in one.layers
    ]
    assert "itself pruned from tiny" in (tmp_path / "prune_log/b/README.md").read_text()
    dense = json.loads((tmp_path / "prune_log/a/pruning.json").read_text())["evaluation"][0]["pruned"]
    assert two.evaluation[0]["dense"] == pytest.approx(dense)
    plan = flags[:-2] + ["--plan", "prune_log/b/pruning.json", "--save_ckpt_log_name", "c"]
    assert hf_prune.main(["--base_model", str(tiny_folder), *plan]) == 2  # what it counts are units of a
    assert "it counts the units of a, a model of other widths; give that one as --base_model" in capsys.readouterr().err
    assert hf_prune.main(["--base_model", "prune_log/a", *plan]) == 0
    same = [PruningRecord.read(f"prune_log/{name}").layers for name in "bc"]
    assert [layer["kept"] for layer in same[0]] == [layer["kept"] for layer in same[1]]
    model = loading.load_model("prune_log/b", "auto")
    assert model.num_parameters() == two.parameters.pruned
    capsys.readouterr()


LEAST = {"attention": {"heads": [0], "kv_heads": [0]}, "mlp": {"channels": [3]}}


@pytest.mark.parametrize("settings", [dict(method="flap"), dict(layer_ratio="auto"), {}, dict(prune="heads"), dict(method="llm_pruner")])
@pytest.mark.parametrize("amount", [dict(pruning_ratio=0.5), dict(target_sparsity=0.3)])
def test_a_model_of_which_the_least_is_left_gives_no_more(settings, amount, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"layers": [{"kept": LEAST}] * 2}))
    samples = Calibration(make_ids(8), "test")
    model = slimllm.prune(make_model(), calibration=samples, plan=str(tmp_path / "plan.json")).model
    assert LayerAdapter(model.config).units(model) == [{"attention": {"heads": 1, "kv_heads": 1}, "mlp": {"channels": 1}}] * 2
    if "target_sparsity" in amount:
        with pytest.raises(UserError, match="can give up at most 0.000"):
            slimllm.prune(model, calibration=samples, **settings, **amount)
    else:
        again = slimllm.prune(model, calibration=samples, **settings, **amount)
        assert again.parameters.removed == 0


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("num_attention_heads_per_layer", lambda v: v[:-1] + ["4"], "num_attention_heads_per_layer"),
        ("num_attention_heads_per_layer", lambda v: [3, *v[1:]], "layer 0 has 3 heads, no multiple of its 2 KV heads"),
        ("num_key_value_heads_per_layer", lambda v: [0, *v[1:]], "num_key_value_heads_per_layer holds 0, not a whole number of at least 1"),
        ("intermediate_size_per_layer", lambda v: [True, *v[1:]], "intermediate_size_per_layer"),
        ("intermediate_size_per_layer", lambda v: v[:1], "intermediate_size_per_layer has 1 entries"),
        ("intermediate_size_per_layer", lambda v: None, "intermediate_size_per_layer"),
        ("o_proj_bias_per_layer", lambda v: [1, *v[1:]], "o_proj_bias_per_layer holds 1, not true or false"),
        ("down_proj_bias_per_layer", lambda v: "yes", "down_proj_bias_per_layer"),
    ],
)
def test_a_pruned_model_s_config_that_makes_no_sense_is_named(name, change, said, tmp_path, tiny_tokenizer):
    folder = prune_to(tmp_path / "pruned", tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config[name] = change(config[name])
    if config[name] is None:
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        loading.load_config(str(folder))


def test_a_width_that_a_class_derives_from_others_stands_in_the_config(tmp_path):
    """LFM2's feed-forward part is two thirds of what its config says, rounded: pruned models say what they have."""
    settings = dict(block_auto_adjust_ff_dim=True, block_multiple_of=16, block_ffn_dim_multiplier=1.1, intermediate_size=100)
    dense = make_model("lfm2", **settings)
    assert dense.model.layers[0].feed_forward.w1.out_features == 80 and dense.config.intermediate_size == 100
    dense.save_pretrained(tmp_path / "dense")
    read = loading.load_config(str(tmp_path / "dense"))
    assert (read.intermediate_size, read.block_auto_adjust_ff_dim) == (80, False)
    assert shape_of(read).parameters == dense.num_parameters()
    ids = make_ids(12)
    result = slimllm.prune(dense, calibration=ids, target_sparsity=0.3, layer_ratio="uniform")
    slimllm.save(result, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", trust_remote_code=True).eval()
    assert torch.equal(logits(again, ids), logits(result.model, ids))


@pytest.mark.parametrize("case, kind", [("qwen3_5", "linear_attention"), ("lfm2", "conv"), ("granitemoehybrid", "linear_attention")])
def test_a_hybrid_without_attention_is_refused_before_any_weight(case, kind, tmp_path):
    make_model(case, layer_types=[kind] * 2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="layer_types: none of its layers has attention"):
        loading.load_config(str(tmp_path))
