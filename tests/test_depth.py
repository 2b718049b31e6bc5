"""Whole layers that go: what is left is the model with them skipped, in its own class."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_prune
from slimllm import api, stages
from slimllm.commands import COMMANDS
from slimllm.errors import UserError
from slimllm.models import depth as models_depth
from slimllm.models import loading
from slimllm.models.depth import shallow_source
from slimllm.models.shape import shape_of
from slimllm.pruning import depth, pipeline
from slimllm.streaming.runner import LayerRunner
from tests.conftest import DISTINCT_CASES, logits, make_config, make_ids, make_model, run_of


def saved(case, folder, layers=6):
    """A random model of ``layers`` layers, of which the kinds follow each other where the family has several."""
    model = make_model(case, num_hidden_layers=layers)
    model.save_pretrained(folder)
    return model


def skipping(source, ids, kept):
    """The logits of the model with only the layers ``kept`` run."""
    runner = LayerRunner(source, ids, split=False)
    states = runner.embed()
    for index, layer in runner.visit():
        if index in kept:
            runner.advance(states, layer, index)
    norm, head = runner.output_modules()
    return runner.adapter.logits(head, norm(torch.cat(list(states))))


@pytest.mark.parametrize("case", [*DISTINCT_CASES, "lfm2_moe", "deepseek_v3", "gemma4", "gemma4_unified"])
@torch.no_grad()
def test_what_is_left_is_the_model_with_the_others_skipped(case, tmp_path):
    saved(case, tmp_path / "dense")
    source, kept = loading.open_source(str(tmp_path / "dense"), "auto"), [0, 2, 3, 5]
    shallow_source(source, kept).whole().save_pretrained(tmp_path / "left")
    left, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "left").eval(), make_ids(2, 12)
    assert left.config.model_type == source.config.model_type and left.config.num_hidden_layers == 4
    assert torch.equal(logits(left, ids), skipping(source, ids, kept))
    assert torch.allclose(left(ids, use_cache=True).logits, logits(left, ids), atol=1e-5)


def test_a_hybrid_keeps_a_layer_with_attention(tmp_path):
    saved("qwen3_5", tmp_path)
    source = loading.open_source(str(tmp_path), "auto")
    of = source.config.layer_types
    with pytest.raises(UserError, match="--drop_layers: of what is left: layer_types: none of its layers has attention"):
        shallow_source(source, [index for index, kind in enumerate(of) if kind == "linear_attention"])


def test_keys_and_values_that_layers_share_keep_a_layer_that_makes_them(tmp_path):
    saved("gemma4_unified", tmp_path)  # the last two layers read those of earlier ones
    source = loading.open_source(str(tmp_path), "auto")
    of = source.config.layer_types
    with pytest.raises(UserError, match="of what is left: the last 2 layers .* read keys .*, and none is of full_attention"):
        shallow_source(source, [*(index for index, kind in enumerate(of[:-2]) if kind == "sliding_attention"), len(of) - 2, len(of) - 1])


def test_a_layer_that_would_become_another_one_is_refused(tmp_path, monkeypatch):
    saved("gemma2", tmp_path)
    source = loading.open_source(str(tmp_path), "auto")
    cut = models_depth.shallow_config

    def forgetful(config, kept):
        found = cut(config, kept)
        found.layer_types = config.layer_types[: len(kept)]
        return found

    monkeypatch.setattr(models_depth, "shallow_config", forgetful)
    with pytest.raises(UserError, match=r"layer 2 would become layer 1, where its class gives it another self_attn\.\w+ "):
        shallow_source(source, [0, 2, 4])


def test_a_family_whose_layers_go_by_their_numbers_is_refused(tmp_path):
    saved("jamba", tmp_path)
    with pytest.raises(UserError, match="layer 2 would become layer 1, where its class gives it another feed_forward"):
        shallow_source(loading.open_source(str(tmp_path), "auto"), [0, 2, 3, 5])


@pytest.fixture
def folder(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved("llama_gqa", tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path


def flags(text_file, *more):
    usual = "dense --num_examples 8 --seq_len 16 --eval_data none --prompt none --output_dir out --calibration"
    return [*usual.split(), str(text_file), *map(str, more)]


def record():
    return json.loads(open("out/pruning.json").read())


def test_layers_go_and_nothing_else(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--drop_layers", 2)) == 0
    gone = json.loads(f"[{re.search(r'gone whole: layers ([0-9, ]+);', capsys.readouterr().out)[1]}]")
    source = loading.open_source("dense", "auto")
    cosine = [layer["cosine"] for layer in record()["layers"]]
    assert len(gone) == 2 and sorted(gone) == sorted(sorted(range(6), key=lambda index: -cosine[index])[:2])
    left = AutoModelForCausalLM.from_pretrained("out")
    assert type(left).__name__ == "LlamaForCausalLM" and not (folder / "out" / "modeling.py").exists()
    kept = [index for index in range(6) if index not in gone]
    assert torch.equal(logits(left, make_ids()), skipping(source, make_ids(), kept))
    layers = record()["layers"]
    assert [index for index, layer in enumerate(layers) if not layer["kept"]["mlp"]["channels"]] == gone
    assert [layer["index"] for layer in layers] == list(range(6))
    share = record()["parameters"]
    assert share["decoder_removed"] == pytest.approx(2 / 6) and share["pruned"] == left.num_parameters()
    assert "2 of 6 layers" in (folder / "out" / "README.md").read_text()
    assert COMMANDS["verify"].run("verify", ["out", "--text", str(text_file), "--seq_len", "16"]) == 0


def test_an_amount_counts_the_layers_and_the_same_plan_gives_the_same_model(folder, text_file, tmp_path):
    amount = ("--drop_layers", 2, "--target_sparsity", 0.5, "--recovery", "least_squares", "--layer_ratio", "uniform", "--pruned_layers", 4)
    assert hf_prune.main(flags(text_file, *amount)) == 0
    assert record()["parameters"]["decoder_removed"] == pytest.approx(0.5, abs=0.01)
    before = (tmp_path / "out" / "pruning.json").rename(tmp_path / "plan.json")
    assert hf_prune.main(flags(text_file, "--overwrite", "--plan", before, "--recovery", "none")) == 0
    planned = json.loads(before.read_text())["layers"]
    assert [layer["kept"] for layer in record()["layers"]] == [layer["kept"] for layer in planned]


def test_what_asks_for_less_than_the_layers_take_goes_no_further(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--drop_layers", 3, "--smaller", 0.01, "--recipe", "best")) == 0
    assert "with the layers that go the model meets that" in capsys.readouterr().out
    assert record()["parameters"]["decoder_removed"] == pytest.approx(0.5)


def test_the_dry_run_counts_them(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--drop_layers", 2, "--target_sparsity", 0.5, "--dry_run")) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| layers +\| 6 +\| 4 +\|", said) and re.search(r"decoder parameters .*\((49|50)\.\d+% less\)", said)


@pytest.mark.parametrize("count", [1, 2, 4])
@torch.no_grad()
def test_replaceme_takes_the_row_of_layers_that_turns_its_input_least(count):
    model, ids = make_model(num_hidden_layers=6), make_ids(4, 12)
    states = model(ids, output_hidden_states=True).hidden_states  # the last with the final norm
    states = [
        *states[:-1],
        model.model.layers[-1](states[-2], position_embeddings=model.model.rotary_emb(states[-2], torch.arange(12)[None])),
    ]
    nearest = [torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(states, states[count:])]
    begin = max(range(1, 7 - count), key=lambda index: nearest[index])
    run = run_of(model, ids, make_config(6 - count, shape_of(model.config), method="replaceme", target_sparsity=count / 6))
    kept = [index for index in range(6) if not begin <= index < begin + count]
    assert depth.least_turning(run, nothing_to_measure)["staying"] == run.shape.with_layers(kept).staying


def nothing_to_measure(source, blocks):
    pytest.fail("one way only, and yet it is measured")


@torch.no_grad()
@pytest.mark.parametrize("better", ["one by one", "in a row", "one by one: the other cannot be"])
def test_layers_go_in_a_row_where_a_refit_loses_less_by_that(better, monkeypatch):
    model, ids = make_model(num_hidden_layers=6), make_ids(8, 12)
    for index in (1, 4):  # the two that hardly turn their input do not stand in a row
        for linear in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
            linear.weight.data *= 0.01
    settings = dict(drop_layers=2, target_sparsity=0.5, pruned_layers=4)
    run = run_of(model, ids, make_config(4, shape_of(model.config), recovery="least_squares", **settings))
    alone = run_of(model, ids, make_config(4, shape_of(model.config), recovery="none", **settings))
    one_by_one = depth.least_turning(alone, nothing_to_measure)["staying"]
    row = run.shape.with_layers(depth._in_a_row(run, 2)[0]).staying
    assert one_by_one == run.shape.with_layers([0, 2, 3, 5]).staying != row
    fitted, real = [], depth.bridged

    def bridged(run, staying, ids):
        fitted.append((staying, len(ids)))
        if better.endswith("cannot be") and staying == row:
            raise UserError("its class cannot")
        return real(run, staying, ids)

    def measure(source, blocks):
        assert len(source) == 4 and torch.equal(blocks, ids[-2:])
        return 2.0 if (fitted[-1][0] == row) == (better == "in a row") else 3.0

    monkeypatch.setattr(depth, "bridged", bridged)
    assert depth.least_turning(run, measure)["staying"] == (row if better == "in a row" else one_by_one)
    assert fitted == [(one_by_one, 6), (row, 6)]
    few = run_of(model, ids[:3], run.config)
    assert (
        depth.least_turning(few, nothing_to_measure)["staying"]
        == depth.least_turning(run_of(model, ids[:3], alone.config), None)["staying"]
    )


@pytest.mark.parametrize(
    "amount, layers", [(("--target_sparsity", 0.2), 5), (("--target_sparsity", 0.5), 3), (("--pruning_ratio", 0.3), 4)]
)
def test_shortgpt_takes_as_many_layers_as_come_nearest_and_nothing_else(amount, layers, folder, text_file):
    assert hf_prune.main(flags(text_file, "--method", "shortgpt", *amount)) == 0
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == layers
    assert {len(layer["kept"]["mlp"]["channels"]) for layer in record()["layers"]} == {0, 48}


REFUSED = {
    ("--drop_layers", 6): "--drop_layers 6: the model has 6 layers, and one at least must stay",
    ("--drop_layers", 0): "--drop_layers 0: must be",
    ("--drop_layers", 2, "--plan", "p.json"): "--plan and --drop_layers both say what to remove",
    ("--drop_layers", 2, "--pruned_layers", 5): "--pruned_layers 5: the model has 4 layers",
    ("--method", "shortgpt", "--drop_layers", 2): "--method shortgpt and --drop_layers 2 both say what goes whole",
    ("--method", "shortgpt", "--fit", "1MB"): "it takes whole layers by their number",
}


@pytest.mark.parametrize("more", REFUSED, ids=lambda more: " ".join(map(str, more)))
def test_what_makes_no_sense_is_refused_in_one_line(more, folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, *more)) == 2
    error = capsys.readouterr().err
    assert REFUSED[more] in error and error.count("\n") == 1 and not (folder / "out").exists()


@pytest.mark.parametrize("settings", [{}, {"recovery": "least_squares", "target_sparsity": 0.5}], ids=str)
@pytest.mark.parametrize("case", ["llama_gqa", "llama_tied", "gemma3", "qwen3_5"])
def test_a_model_in_memory_loses_the_layers_that_its_files_lose(case, settings, tmp_path):
    model, ids = saved(case, tmp_path, layers=4 if case == "qwen3_5" else 6), make_ids(16, 16)
    settings = {"drop_layers": 1, "pruned_layers": len(model.model.layers) - 1} | settings
    whole = logits(model, ids)
    of_files = loading.open_source(str(tmp_path), "auto")
    run = run_of(of_files, ids, make_config(4, shape_of(of_files.config), **settings))
    run.shape = run.shape.with_fewer_layers(1)
    work = stages.Work(run, folder=tmp_path)
    stages.drop(work)
    pipeline.prune(run, pipeline.allocate(run))
    result = api.prune(model, calibration=ids, **settings)
    assert len(result.layers) == len(of_files) and len(model.model.layers) == model.config.num_hidden_layers == len(of_files) - 1
    kept = [index for index, layer in enumerate(result.layers) if layer.kept["mlp"]["channels"]]
    assert kept == [index for index, kinds in enumerate(work.staying) if kinds is not None] and not torch.equal(logits(model, ids), whole)
    assert torch.allclose(model(ids, use_cache=True).logits, logits(model, ids), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama_gqa", "granite", "phi", "starcoder2", "gemma2"])
def test_what_stands_before_a_gap_makes_up_for_it(case, tmp_path):
    """The states behind the gap come nearer to the dense model's; behind a norm (Gemma 2) nothing is fitted."""
    saved(case, tmp_path)
    source, kept, ids = loading.open_source(str(tmp_path), "auto"), [0, 1, 4], make_ids(16, 16)
    shape = shape_of(source.config)
    config = make_config(6, shape, drop_layers=3, recovery="least_squares", target_sparsity=0.5, pruned_layers=3)
    run = run_of(source, ids, config)
    fitted = depth.bridged(run, shape.with_layers(kept).staying, ids)
    assert sum(name.endswith("weight") for name in fitted) == (0 if case == "gemma2" else 2)
    dense = torch.cat(list(LayerRunner(source, ids).last_states()))
    errors = []
    for changed in ({}, fitted):
        states = torch.cat(list(LayerRunner(shallow_source(source, kept, changed), ids).last_states()))
        errors.append(float((states - dense).square().mean()))
    assert errors[1] <= errors[0] if case == "gemma2" else errors[1] < 0.9 * errors[0]
