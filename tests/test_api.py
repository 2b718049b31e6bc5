"""``slimllm.prune`` and ``slimllm.save``: what hf_prune.py does, as functions."""

import copy
import json

import pytest
import torch
from transformers import AutoTokenizer

import hf_prune
import slimllm
from slimllm.deploy import checkpoint
from slimllm.errors import UserError
from slimllm.settings import methods
from slimllm.settings.pruning import PruneConfig
from tests.conftest import TEXT, count, indices, logits, make_ids, make_model

SMALL = dict(num_examples=8, seq_len=16)


def test_it_prunes_as_the_command_does(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", tiny_folder, "--recipe", "best", "--target_sparsity", "0.3", "--calibration", text_file, "--eval_data", "none"]
    assert hf_prune.main([*map(str, flags), "--num_examples", "8", "--seq_len", "16"]) == 0
    capsys.readouterr()
    model, tokenizer = make_model(), AutoTokenizer.from_pretrained(tiny_folder)
    seen, stages = [], []
    result = slimllm.prune(
        model,
        tokenizer,
        recipe="best",
        target_sparsity=0.3,
        calibration=str(text_file),
        on_layer=lambda layer: seen.append(layer.index),
        progress=lambda stage, done, total: stages.append((stage, done, total)),
        **SMALL,
    )
    slimllm.save(result, "functions")
    assert capsys.readouterr() == ("", "")
    assert seen == [0, 1] and ("prices", 2, 2) in stages
    for name in ("model.safetensors", "calibration.safetensors", "config.json", "modeling.py"):
        assert (tmp_path / "functions" / name).read_bytes() == (tmp_path / "prune_log" / "llama_prune" / name).read_bytes(), name
    record = json.loads((tmp_path / "functions" / "pruning.json").read_text())
    assert record["parameters"]["decoder_removed"] == result.parameters.decoder_removed and record["evaluation"] == []
    assert "# functions" in (tmp_path / "functions" / "README.md").read_text()


def test_calibration_may_be_texts_or_token_ids(tiny_tokenizer):
    from_text = slimllm.prune(make_model(), tiny_tokenizer, calibration=TEXT.splitlines(), pruning_ratio=0.5, **SMALL)
    ids = from_text.calibration.ids
    assert ids.shape == (8, 16)
    from_ids = slimllm.prune(make_model(), calibration=ids, pruning_ratio=0.5)
    assert torch.equal(logits(from_text.model, make_ids()), logits(from_ids.model, make_ids()))


def test_half_of_the_best_recipe_s_samples_are_the_model_s_own(tiny_tokenizer):
    found = [
        slimllm.prune(make_model(), tiny_tokenizer, calibration=TEXT.splitlines(), recovery="least_squares", self_share=share, **SMALL)
        for share in (0.0, 0.5, 1.0)
    ]
    text, half, own = (set(map(tuple, result.calibration.ids.tolist())) for result in found)
    assert [result.calibration.own for result in found] == [0, 4, 8]
    assert len(text & half) == 4 and not text & own and found[1].calibration.ids.shape == (8, 16)
    assert found[1].record().calibration["own"] == 4


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(calibration=make_ids(), target_sparcity=0.2), "target_sparcity: not a setting of prune.*did you mean 'target_sparsity'"),
        (dict(calibration=make_ids(), eval_data="none"), "eval_data: not a setting"),
        (dict(calibration=make_ids(), pruning_ratio=2.0), "--pruning_ratio 2.0"),
        (dict(calibration=make_ids(), target_sparsity=0.99), "can give up at most"),
        (dict(calibration=make_ids() + 100), "outside the model's vocabulary of 97"),
        (dict(calibration=make_ids()[0]), r"\[samples, length\], not \[16\]"),
        (dict(calibration=["some text"]), "tokenizer: needed"),
        (dict(calibration=make_ids(), device="mps"), "Apple's GPU"),
    ],
)
def test_a_mistake_is_an_ordinary_exception(arguments, said):
    model = make_model()
    before = logits(model, make_ids())
    with pytest.raises(slimllm.UserError, match=said):
        slimllm.prune(model, **arguments)
    assert torch.equal(logits(model, make_ids()), before)
    assert issubclass(slimllm.UserError, ValueError)


def test_an_existing_folder_is_replaced_only_on_request(tmp_path, tiny_tokenizer):
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=make_ids())
    slimllm.save(result, tmp_path / "a")
    with pytest.raises(slimllm.UserError, match="a exists"):
        slimllm.save(result, tmp_path / "a")
    slimllm.save(result, tmp_path / "a", overwrite=True)
    assert torch.equal(logits(checkpoint.load(tmp_path / "a"), make_ids()), logits(result.model, make_ids()))


SAVED = ("architectures", "dtype", "auto_map")  # what transformers notes in a config as it saves it


def state_of(model):
    """What tells one model from another, and whether it was moved or given away."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in SAVED}
    return type(model), config, [*model.modules()], {name: p.clone() for name, p in model.named_parameters()}


def same(before, after):
    modules = all(a is b for a, b in zip(before[2], after[2], strict=True))
    weights = before[3].keys() == after[3].keys() and all(torch.equal(before[3][name], after[3][name]) for name in before[3])
    return before[:2] == after[:2] and modules and weights


@pytest.mark.parametrize("case", ["llama_tied", "phi3"])
@pytest.mark.parametrize("when", ["pruning", "layer importance", "on_layer"])
def test_what_is_stopped_leaves_the_model_as_it_was(case, when):
    model = make_model(case)
    before, seen = state_of(model), []

    def stop(*what):
        seen.append(what)
        if when == "on_layer" and len(seen) == 2 or what[0] == when:
            raise KeyboardInterrupt

    arguments = {"on_layer": stop} if when == "on_layer" else {"progress": stop}
    if when == "pruning":
        arguments = {"on_layer": lambda report: report.index and stop("pruning")}
    with pytest.raises(KeyboardInterrupt):
        slimllm.prune(model, calibration=make_ids(), pruning_ratio=0.5, pruned_layers=2, **arguments)
    assert same(before, state_of(model))
    parts = [*model.modules()]
    result = slimllm.prune(model, calibration=make_ids(), pruning_ratio=0.5, pruned_layers=2)  # in place, module by module
    assert (
        result.model is model
        and all(a is b for a, b in zip(parts, model.modules(), strict=True))
        and logits(model, make_ids()).isfinite().all()
    )


def test_a_distillation_that_is_stopped_leaves_the_pruned_model(tiny_tokenizer):
    settings = dict(calibration=make_ids(), pruning_ratio=0.5, distill_examples=10)
    pruned = slimllm.prune(make_model(), **settings).model

    def stop(stage, done, total):
        if stage == "distilling":
            raise KeyboardInterrupt

    for mode in ("scales", "all"):
        model = make_model()
        with pytest.raises(KeyboardInterrupt):
            slimllm.prune(model, distill=mode, progress=stop, **settings)
        assert torch.equal(logits(model, make_ids()), logits(pruned, make_ids())) and not any(
            p.grad is not None for p in model.parameters()
        )


def test_saving_leaves_the_model_and_the_settings_as_they_are(tmp_path, tiny_tokenizer):
    given = PruneConfig(base_model="m", recipe="best", calibration="self", pruning_ratio=0.5, num_examples=4, seq_len=16)
    untouched = copy.deepcopy(given)
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=make_ids(), config=given)
    before, expected = state_of(result.model), logits(result.model, make_ids())
    settings = result.config
    slimllm.save(result, tmp_path / "first")
    slimllm.save(result, tmp_path / "second")
    assert same(before, state_of(result.model)) and torch.equal(logits(result.model, make_ids()), expected)
    assert result.config is settings and vars(given) == vars(untouched)
    names = [json.loads((tmp_path / name / "pruning.json").read_text())["config"]["save_ckpt_log_name"] for name in ("first", "second")]
    assert names == ["first", "second"]
    with pytest.raises(AttributeError, match="seed: settings that are resolved stay as they are"):
        result.config.seed = 1
    deeper = make_model(num_hidden_layers=4)
    again = slimllm.prune(deeper, tiny_tokenizer, calibration=make_ids(), config=given)  # a second use, of another model
    assert again.config.pruned_layers != result.config.pruned_layers and len(again.layers) == 4


def test_a_result_whose_model_was_pruned_again_is_not_saved_as_what_it_was(tmp_path, tiny_tokenizer):
    model, ids = make_model(), make_ids()
    first = slimllm.prune(model, tiny_tokenizer, target_sparsity=0.3, calibration=ids)
    copied = copy.deepcopy(model)
    second = slimllm.prune(model, tiny_tokenizer, target_sparsity=0.2, calibration=ids)
    assert second.parameters.dense == first.parameters.pruned and second.model is first.model is model
    with pytest.raises(UserError, match="result: its model has .* it was changed since; save each result before its model is pruned again"):
        slimllm.save(first, tmp_path / "first")
    assert not list(tmp_path.iterdir())
    slimllm.save(second, tmp_path / "second")
    again = slimllm.prune(copied, tiny_tokenizer, target_sparsity=0.2, calibration=ids)
    assert torch.equal(logits(again.model, ids), logits(second.model, ids))


def test_the_record_says_how_many_samples_there_were(tiny_tokenizer, tmp_path):
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=make_ids(6), recipe="best", pruning_ratio=0.5)
    config = result.record().config
    assert (config["num_examples"], config["self_share"], result.record().calibration["samples"]) == (6, 0.0, 6)
    result.calibration.save(tmp_path)
    file = str(tmp_path / "calibration.safetensors")
    found = slimllm.prune(make_model(), tiny_tokenizer, calibration=file, recipe="best", pruning_ratio=0.5).config
    assert (found.num_examples, found.self_share) == (6, 0.0)
    half = dict(calibration=TEXT.splitlines(), self_share=0.3, pruning_ratio=0.5)
    assert slimllm.prune(make_model(), tiny_tokenizer, **half, **SMALL).config.self_share == 0.3  # as asked for: 2 of 8


def test_the_tokenizer_is_saved_as_it_came(tmp_path, tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.enable_truncation(77, stride=3)
    tiny_tokenizer.backend_tokenizer.enable_padding(length=9, pad_id=2, pad_token="</s>", direction="left")
    tiny_tokenizer.save_pretrained(tmp_path / "before")
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=TEXT.splitlines(), recipe="best", pruning_ratio=0.5, **SMALL)
    slimllm.save(result, tmp_path / "after")
    before, after = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("before", "after"))
    assert after == before and after["truncation"]["max_length"] == 77 and after["padding"]["pad_id"] == 2


# the seams: each of the three choices is one function and one entry


def test_a_method_is_one_function_and_one_entry(monkeypatch):
    """What a user adds to the tables is a flag's value at once, and decides what stays."""
    from slimllm.pruning.allocation import layer_ratios

    def first_heads(statistics, removed):
        size = statistics.units // statistics.groups
        return [unit for unit in range(statistics.units) if unit % size < size - removed]

    def last_channels(statistics):
        return torch.arange(float(statistics.down.shape[1]))

    def first_layer(inputs):
        return layer_ratios.weighted(inputs, [float(inputs.config.pruned_layers), *[0.0] * (len(inputs.shape.layers) - 1)])

    monkeypatch.setitem(methods.HEAD_CHOICES, "first", methods.HeadChoice(first_heads))
    monkeypatch.setitem(methods.CHANNEL_SCORES, "last", methods.ChannelScore(last_channels))
    monkeypatch.setitem(methods.LAYER_RATIOS, "first", methods.LayerRatio(first_layer, {"pruned_layers"}))
    config = PruneConfig(base_model="m", head_choice="first", channel_score="last", layer_ratio="first", pruning_ratio=0.25)
    config.keep_lowest = 0.0
    result = slimllm.prune(make_model("llama_gqa"), calibration=make_ids(), config=config)
    first, second = result.layers
    assert indices(first, "heads") == [0, 2] and indices(first, "channels") == list(range(24, 48)) and count(second, "channels") == 48


# plans


def test_a_plan_given_back_prunes_exactly_that(tmp_path, tiny_tokenizer):
    dense = make_model(num_hidden_layers=4)
    first = slimllm.prune(copy.deepcopy(dense), tiny_tokenizer, calibration=make_ids(), target_sparsity=0.3, recovery="least_squares")
    slimllm.save(first, tmp_path / "first")
    plan = str(tmp_path / "first" / "pruning.json")
    again = slimllm.prune(copy.deepcopy(dense), calibration=make_ids(), plan=plan, recovery="least_squares")
    assert torch.equal(logits(again.model, make_ids()), logits(first.model, make_ids()))
    other = slimllm.prune(copy.deepcopy(dense), calibration=make_ids(), plan=plan, recovery="none")
    assert [r.kept for r in other.layers] == [r.kept for r in first.layers]
    assert all(error[1] >= first.layers[-1].errors[kind][1] for kind, error in other.layers[-1].errors.items())


EVERYTHING = {"heads": [0, 1, 2, 3], "kv_heads": [0, 1], "channels": list(range(48))}


@pytest.mark.parametrize(
    "layers, said",
    [
        ([EVERYTHING], "it has 1 layers, the model 2"),
        ("no", "not a JSON object with a list of layers|it has no list of layers"),
        ([EVERYTHING, 7], "layer 1: not a JSON object"),
        ([EVERYTHING, {**EVERYTHING, "channels": [0, 48]}], "layer 1: channels must be different whole numbers from 0 to 47"),
        (
            [{"kept": {"mlp": {"channels": [0]}}}, EVERYTHING],
            "layer 0: it lists mlp, and the layer's parts are attention, mlp",
        ),
        ([{"kept": {"mlp": [0], "attention": 3}}, EVERYTHING], "layer 0: attention: not a JSON object"),
        ([{"kept": {}}, EVERYTHING], "layer 0: it lists nothing, and the layer's parts are attention, mlp"),
        ([{"kept": 3}, EVERYTHING], "layer 0: it lists 3"),
        ([EVERYTHING, {**EVERYTHING, "heads": [0, 0]}], "layer 1: heads must be different"),
        ([EVERYTHING, {**EVERYTHING, "heads": [0, 1, 2]}], "each of the kept KV heads must keep the same number of its 2 query heads"),
        ([EVERYTHING, {**EVERYTHING, "kv_heads": [0]}], "no other head may stay"),
        ({"a": 1}, "layers"),
    ],
)
def test_a_plan_that_is_none_is_named(layers, said, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
    with pytest.raises(slimllm.UserError, match=f"--plan .*({said})"):
        slimllm.prune(make_model(), calibration=make_ids(), plan=str(tmp_path / "plan.json"))


@pytest.mark.parametrize("none, module", [(dict(heads=[], kv_heads=[]), "self_attn"), (dict(channels=[]), "mlp")])
def test_a_plan_may_keep_nothing_of_a_part(none, module, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"layers": [EVERYTHING, {**EVERYTHING, **none}]}))
    dense = make_model()
    getattr(dense.model.layers[1], module).register_forward_hook(
        lambda _, args, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
    )
    expected = logits(dense, make_ids())
    result = slimllm.prune(make_model(), calibration=make_ids(), plan=str(tmp_path / "plan.json"), recovery="none")
    assert module in result.model.config.missing_modules_per_layer[1] and not result.model.config.missing_modules_per_layer[0]
    assert torch.allclose(logits(result.model, make_ids()), expected, atol=1e-5)
    slimllm.save(result, tmp_path / "smaller")


def test_a_plan_must_fit_the_runtime(tmp_path):
    fewer = {**EVERYTHING, "channels": list(range(40))}
    for layers, runtime, said in (
        ([EVERYTHING, fewer], "transformers", "--runtime transformers needs them alike"),
        ([EVERYTHING, {**EVERYTHING, "heads": [0, 2]}], "vllm", "--runtime vllm needs them alike"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
        with pytest.raises(slimllm.UserError, match=said):
            slimllm.prune(make_model(), calibration=make_ids(), plan=str(tmp_path / "plan.json"), runtime=runtime)
    (tmp_path / "plan.json").write_text(json.dumps({"layers": [EVERYTHING, fewer]}))
    model = slimllm.prune(make_model(), calibration=make_ids(), plan=str(tmp_path / "plan.json"), runtime="vllm", recovery="bias").model
    assert model.config.block_configs[1].ffn.intermediate_size == 40
