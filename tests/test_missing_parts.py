"""Whole attention and feed-forward parts that go: what is left is the model with them skipped."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_prune
from slimllm import api, stages
from slimllm.__main__ import main as slim
from slimllm.deploy import checkpoint, export_gguf, runtimes, verify
from slimllm.deploy.reference import reload_and_compare
from slimllm.errors import UserError
from slimllm.modeling import MISSING, missing_modules
from slimllm.models import families, loading
from slimllm.models.adapter import LayerAdapter
from slimllm.models.depth import shallow_source
from slimllm.models.shape import check_missing, limits_of, shape_of, units_of
from slimllm.pruning import depth, pipeline
from slimllm.run import Run
from slimllm.settings.pruning import PruneConfig
from slimllm.streaming.runner import LayerRunner
from tests.conftest import (
    FAMILY_CASES,
    check_parts_are_the_layers,
    family_config,
    logits,
    make_config,
    make_ids,
    make_model,
    make_shape,
    run_of,
)
from tests.test_export_gguf import bpe_tokenizer

FREE = [case for case in FAMILY_CASES if limits_of("any", make_shape(case)).lacking]


def several(case, layers=4, **sizes):
    return make_model(case, num_hidden_layers=layers, **sizes)


def that_go(shape):
    """By layer, the kinds of parts that go in these tests: the first attention, so that the cache's first layer has none, and others."""
    attention = [index for index, layer in enumerate(shape.layers) if len(layer.parts) > 1]
    gone = {attention[0]: ["attention"], attention[-1]: ["mlp"]} if len(attention) > 1 else {}
    return gone


def skipping(model, gone):
    """A copy of a dense model whose parts in ``gone`` give zeros, behind their norm, too."""
    skipped, adapter = copy.deepcopy(model), LayerAdapter(model.config)
    for index, kinds in gone.items():
        layer = adapter.layers(skipped)[index]
        for part in adapter.parts(layer):
            if part.kind in kinds:
                module = part.post_norm or part.module
                nothing = lambda _, args, output: tuple([output[0] * 0, *output[1:]]) if isinstance(output, tuple) else output * 0  # noqa: E731
                module.register_forward_hook(nothing)
    return skipped


def without(model, gone):
    """The pruned model, in the class that is saved."""
    source = shallow_source(run_source(model), range(len(LayerAdapter(model.config).layers(model))), gone=gone)
    return runtimes.convert_for_runtime(source.model, "any")


def run_source(model):
    return run_of(copy.deepcopy(model), make_ids(), make_config()).source


@pytest.mark.parametrize("case", FREE)
@torch.no_grad()
def test_what_is_left_is_the_model_with_the_others_skipped(case, tmp_path):
    """Saved and read again, with a KV cache and without, padded on the left and not."""
    model, ids = several(case), make_ids(3, 12)
    gone = that_go(shape_of(model.config))
    if not gone:
        pytest.skip("each layer has one part that can go")
    left = without(model, gone)
    assert torch.allclose(logits(left, ids), logits(skipping(model, gone), ids), atol=1e-6, rtol=1e-5)
    assert left.num_parameters() == shape_of(left.config).parameters < model.num_parameters()
    assert [sorted(units) for units in units_of(left.config)] == [sorted(units) for units in LayerAdapter(left.config).units(left)]
    check_parts_are_the_layers(left)
    checkpoint.save(left, None, tmp_path, ids[:2], "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(left, ids)) and type(again).__name__.startswith("Slim")
    reload_and_compare(tmp_path, torch.float32)
    cached = again(ids[:, :5], use_cache=True)
    step = again(ids[:, 5:6], past_key_values=cached.past_key_values, use_cache=True)
    rest = again(ids[:, 6:], past_key_values=step.past_key_values, use_cache=True)
    parts = torch.cat([cached.logits, step.logits, rest.logits], 1)
    assert torch.allclose(parts, logits(again, ids), atol=2e-4, rtol=1e-4)
    assert rest.past_key_values.get_seq_length() == 12
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = again.generate(ids[:1], use_cache=False, **settings)
    assert torch.equal(again.generate(ids[:1], use_cache=True, **settings), plain)
    assert torch.equal(again.generate(ids[:1], use_cache=True, num_beams=2, **settings)[:, :12], ids[:1])
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids[:1]], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), torch.ones_like(ids[:1])], 1)
    if not families.family_of(model.config).is_hybrid:  # whose state spaces see what is padded in some families
        assert torch.equal(again.generate(padded, attention_mask=mask, use_cache=True, **settings)[:, 3:], plain)


@pytest.mark.parametrize("case", ["llama_gqa", "gemma2", "cohere", "qwen3_5", "olmo_hybrid"])
def test_nothing_gone_changes_nothing(case):
    model, ids = several(case), make_ids(2, 12)
    left = shallow_source(run_source(model), range(4)).model
    assert torch.equal(logits(left, ids), logits(model, ids)) and type(left) is type(model)


@pytest.mark.parametrize("case", ["llama_gqa", "gemma2"])
def test_it_loads_in_another_process_by_the_code_beside_it_alone(case, tmp_path):
    model, ids = several(case), make_ids(2, 12)
    left = without(model, that_go(shape_of(model.config)))
    checkpoint.save(left, None, tmp_path / "m", ids, "dense")
    torch.save(ids, tmp_path / "ids.pt")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM; torch.set_num_threads(1); assert 'slimllm' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained('m', trust_remote_code=True).eval()\n"
        "torch.save(model(torch.load('ids.pt'), use_cache=False).logits.detach(), 'logits.pt'); model.save_pretrained('again')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, env={"PATH": "/usr/bin", "HF_HOME": str(tmp_path)})
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), logits(left, ids), atol=1e-6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, ids), logits(left, ids))


@pytest.mark.parametrize("case", ["llama_gqa", "gemma2", "cohere", "stablelm_parallel"])
def test_gradients_pass_it(case):
    model = several(case)
    left = without(model, that_go(shape_of(model.config))).requires_grad_()
    left(make_ids(2, 8), labels=make_ids(2, 8)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in left.parameters())


def test_each_part_is_ranked_by_how_little_it_turns_the_states():
    model, ids = several("llama_gqa", 6), make_ids(8, 16)
    run = run_of(model, ids, make_config(6, shape_of(model.config), drop_parts=3))
    caught = {}

    def note(name):
        return lambda _, args, output: caught.update({name: (args, output)})

    adapter = LayerAdapter(model.config)
    for index, layer in enumerate(adapter.layers(model)):
        layer.register_forward_hook(note((index, "layer")))
        layer.self_attn.register_forward_hook(note((index, "attention")))
        layer.mlp.register_forward_hook(note((index, "mlp")))
    with torch.no_grad():
        found = depth._cosines(run.runner(ids))[1]
    logits(model, ids)
    for index in range(6):
        before, after = caught[index, "layer"][0][0], caught[index, "layer"][1]
        middle = before + caught[index, "attention"][1][0]
        for kind, a, b in (("attention", before, middle), ("mlp", middle, after)):
            assert found[index, kind] == pytest.approx(float(torch.cosine_similarity(a, b, dim=-1).mean()), abs=1e-5)
    staying = depth.least_turning(run, None)["staying"]
    gone = [(index, kind) for index, kinds in enumerate(staying) for kind in ("attention", "mlp") if kinds is None or kind not in kinds]
    assert sorted(gone) == sorted(sorted(found, key=found.get)[-3:])


@pytest.fixture
def folder(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    several("llama_gqa", 6).save_pretrained("dense")
    tiny_tokenizer.save_pretrained("dense")
    return tmp_path


def flags(text_file, *more):
    usual = "dense --num_examples 8 --seq_len 16 --eval_data none --prompt none --output_dir out --calibration"
    return [*usual.split(), str(text_file), *map(str, more)]


def record(folder="out"):
    return json.loads(open(f"{folder}/pruning.json").read())


def empty_parts(layers):
    return [(index, kind) for index, layer in enumerate(layers) for kind, kept in layer["kept"].items() if not any(kept.values())]


def test_parts_go_and_nothing_else(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--drop_parts", 3)) == 0
    assert re.search(r"gone whole: (attention|feed-forward) of layer", said := capsys.readouterr().out) and "without attention" in said
    gone, left = empty_parts(record()["layers"]), AutoModelForCausalLM.from_pretrained("out")
    assert len(gone) == 3 and all(layer["cosine"] is not None for layer in record()["layers"])
    dense, by_layer = AutoModelForCausalLM.from_pretrained("dense"), {}
    for index, kind in gone:
        by_layer.setdefault(index, []).append(kind)
    assert torch.allclose(logits(left, make_ids()), logits(skipping(dense, by_layer), make_ids()), atol=1e-6)
    parameters = record()["parameters"]
    assert parameters["pruned"] == left.num_parameters() and parameters["dense"] == dense.num_parameters()
    assert COMMANDS_verify("out", text_file) == 0
    page = (folder / "out" / "report.html").read_text()
    assert re.search(r"the (attention|feed-forward) part of \d layers?", (folder / "out" / "README.md").read_text()) and page


def COMMANDS_verify(folder, text_file, *files):
    return slim(["verify", folder, *files, "--text", str(text_file), "--seq_len", "16"])


def test_only_attention_goes_where_only_heads_may(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--drop_parts", 4, "--prune", "heads")) == 0
    assert {kind for _, kind in empty_parts(record()["layers"])} == {"attention"}
    model = AutoModelForCausalLM.from_pretrained("out")
    assert hf_prune.main(flags(text_file, "--drop_parts", 4, "--prune", "heads", "--dry_run")) == 0
    said = capsys.readouterr().out
    assert f"{model.num_parameters() / 1e6:.2f} M" in said and re.search(r"\| whole parts +\| 12 +\| 8 +\|", said)


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_an_amount_counts_the_parts_and_the_same_plan_gives_the_same_model(recipe, folder, text_file):
    amount = ("--drop_parts", 3, "--target_sparsity", 0.5, "--recipe", recipe, "--recovery", "none")
    amount += ("--look_back", 0) if recipe == "best" else ()
    assert hf_prune.main(flags(text_file, *amount)) == 0
    assert record()["parameters"]["decoder_removed"] == pytest.approx(0.5, abs=0.01)
    before = (folder / "out").rename(folder / "first")
    assert hf_prune.main(flags(text_file, "--plan", before / "pruning.json", "--recovery", "none")) == 0
    planned = record("first")["layers"]
    assert len(empty_parts(planned)) == 3 and [layer["kept"] for layer in record()["layers"]] == [layer["kept"] for layer in planned]
    first, second = (AutoModelForCausalLM.from_pretrained(name) for name in ("first", "out"))
    assert torch.allclose(logits(first, make_ids()), logits(second, make_ids()), atol=1e-5)


def test_layers_and_parts_go_together(folder, text_file):
    assert hf_prune.main(flags(text_file, "--drop_layers", 2, "--drop_parts", 2, "--recovery", "least_squares")) == 0
    gone = empty_parts(record()["layers"])
    assert len(gone) == 6 and COMMANDS_verify("out", text_file) == 0


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_llm_drop_takes_as_many_parts_as_come_nearest(share, folder, text_file):
    assert hf_prune.main(flags(text_file, "--method", "llm_drop", "--target_sparsity", share)) == 0
    shape = make_shape("llama_gqa", num_hidden_layers=6)
    largest = max(part.parameters() for part in shape.layers[0].parts) + shape.hidden
    assert abs(record()["parameters"]["decoder_removed"] - share) <= largest / shape.decoder_parameters / 2 + 1e-6
    lengths = {len(layer["kept"]["mlp"]["channels"]) for layer in record()["layers"]}
    assert lengths <= {0, 48} and empty_parts(record()["layers"])


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(folder, text_file, monkeypatch):
    amount = ("--drop_parts", 3, "--target_sparsity", 0.5, "--recovery", "least_squares", "--pruned_layers", 6)
    assert hf_prune.main(flags(text_file, *amount)) == 0
    expected = (folder / "out").rename(folder / "expected")
    real, calls = pipeline.LayerPruner.prune, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(pipeline.LayerPruner, "prune", stops)
    assert hf_prune.main(flags(text_file, *amount)) == 130
    measured = monkeypatch.setattr(depth, "least_turning", lambda *given: pytest.fail("measured again"))
    assert measured is None and hf_prune.main(flags(text_file, *amount, "--resume")) == 0
    assert (folder / "out" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (folder / "out" / "config.json").read_bytes() == (expected / "config.json").read_bytes()


def test_what_lacks_parts_is_pruned_again(folder, text_file):
    """More parts, a share of what is left, and whole layers; from the files and in memory."""
    assert hf_prune.main(flags(text_file, "--drop_parts", 3)) == 0
    (folder / "out").rename(folder / "first")
    for more in (("--drop_parts", 2), ("--target_sparsity", 0.3), ("--drop_layers", 2), ("--recipe", "best", "--target_sparsity", 0.3)):
        again = ["first", *flags(text_file, *more, "--overwrite")[1:]]
        assert hf_prune.main(again) == 0, more
        assert COMMANDS_verify("out", text_file) == 0, more
    left = AutoModelForCausalLM.from_pretrained("first")
    assert sum(map(len, map(missing_modules, left.model.layers))) == 6  # each part with its norm
    result = api.prune(left, calibration=make_ids(8, 16), drop_parts=2, target_sparsity=0.6)
    assert result.parameters.pruned == left.num_parameters() and result.parameters.decoder_removed == pytest.approx(0.6, abs=0.02)
    assert len(left.model.layers) == 5 and sum(map(len, map(missing_modules, left.model.layers))) in (6, 8)


@pytest.mark.parametrize("settings", [{"target_sparsity": 0.0}, {"recovery": "least_squares", "target_sparsity": 0.5}], ids=str)
@pytest.mark.parametrize("case", ["llama_gqa", "llama_mha", "gemma2", "cohere", "qwen3_5", "olmo_hybrid"])
def test_a_model_in_memory_loses_the_parts_that_its_files_lose(case, settings, tmp_path):
    model, ids = several(case, 6), make_ids(16, 16)
    model.save_pretrained(tmp_path)
    of_files = loading.open_source(str(tmp_path), "auto")
    run = run_of(of_files, ids, make_config(6, shape_of(of_files.config), drop_parts=3, **settings))
    run.shape = run.config.without_parts(run.shape, run.shape.likely_order())
    work = stages.Work(run, folder=tmp_path)
    stages.drop(work)
    work.layers = pipeline.prune(run, pipeline.allocate(run))
    result = api.prune(model, calibration=ids, drop_parts=3, pruned_layers=6, **settings)
    assert [layer.kept for layer in result.layers] == [layer.kept for layer in stages.all_layers(work)]
    gone = empty_parts([{"kept": layer.kept} for layer in result.layers])
    assert len(gone) == 3 and result.parameters.pruned == model.num_parameters()
    assert torch.allclose(model(ids, use_cache=True).logits, logits(model, ids), atol=1e-4)
    api.save(result, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval(), ids), logits(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama_gqa", "granite", "phi", "cohere", "starcoder2", "gemma2"])
def test_what_stands_before_a_part_that_went_makes_up_for_it(case, tmp_path):
    """The states behind the gap come nearer to the dense model's; behind a norm (Gemma 2) nothing is fitted."""
    model, ids = several(case), make_ids(16, 16)
    shape = shape_of(model.config)
    config = make_config(4, shape, drop_parts=2, recovery="least_squares", target_sparsity=0.5, pruned_layers=4)
    run = run_of(model, ids, config)
    gone = {1: ["mlp"], 3: ["attention"]}
    staying = [[kind for kind in layer.units if kind not in gone.get(index, ())] for index, layer in enumerate(shape.layers)]
    fitted = depth.bridged(run, staying, ids)
    layers = sorted(int(name.split(".")[2]) for name in fitted if name.endswith("weight"))
    side_by_side = case in ("phi", "cohere")
    assert layers == ([] if case == "gemma2" else [1, 3] if side_by_side else [1, 2])
    dense = torch.cat(list(LayerRunner(model, ids).last_states()))
    errors = []
    for changed in ({}, fitted):
        source = shallow_source(run.source, range(4), changed, gone)
        errors.append(float((torch.cat(list(LayerRunner(source, ids).last_states())) - dense).square().mean()))
    assert errors[1] <= errors[0] if case == "gemma2" else errors[1] < 0.9 * errors[0]


def save_for(case, folder, gone, runtime="any"):
    model = several(case, 4, vocab_size=320, hidden_size=64, intermediate_size=96)
    source = shallow_source(run_source(model), range(4), gone=gone)
    left = runtimes.convert_for_runtime(source.model, runtime)
    checkpoint.save(left, bpe_tokenizer(), folder, make_ids(2, 8, 300), "dense")
    return left


@pytest.mark.parametrize("case", ["llama_gqa", "llama_mha", "llama3_rope", "granite", "phi3", "qwen2"])
def test_llama_cpp_computes_layers_without_attention(case, tmp_path, text_file, capsys):
    save_for(case, tmp_path / "m", {1: ["attention"], 3: ["attention"]})
    export_gguf.export(tmp_path / "m", tmp_path / "m.gguf", "f32")
    assert COMMANDS_verify(str(tmp_path / "m"), text_file, str(tmp_path / "m.gguf")) == 0


@pytest.mark.parametrize(
    "case, gone, says",
    [
        ("llama_gqa", {2: ["mlp"]}, "layer 2 has no feed-forward part: llama.cpp leaves the attention of such a layer out as well"),
        (
            "llama_gqa",
            {0: ["attention"]},
            "layer 0 has no attention part: llama.cpp takes no first layer without one; prune with --runtime gguf$",
        ),
        ("qwen3", {2: ["attention"]}, "layer 2 has no attention part: no architecture of llama.cpp holds this model with a layer that"),
        ("gemma2", {2: ["attention"]}, "layer 2 has no attention part: no architecture of llama.cpp holds this model with a layer that"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_not_exported(case, gone, says, tmp_path):
    save_for(case, tmp_path, gone)
    with pytest.raises(UserError, match=says):
        export_gguf.check(tmp_path)


def test_vllm_is_told_what_a_layer_lacks(tmp_path):
    left = save_for("llama_gqa", tmp_path, {1: ["attention"], 2: ["mlp"]}, "vllm")
    config = AutoConfig.from_pretrained(tmp_path)
    blocks = [(block.attention.no_op, block.ffn.no_op) for block in config.block_configs]
    assert blocks == [(False, False), (True, False), (False, True), (False, False)]
    assert config.block_configs[1].attention.n_heads_in_group is None and config.block_configs[2].ffn.intermediate_size is None
    names = set(left.state_dict())
    assert not any(name.startswith(("model.layers.1.self_attn", "model.layers.1.input_layernorm")) for name in names)
    assert not any(name.startswith(("model.layers.2.mlp", "model.layers.2.post_attention_layernorm")) for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["DeciLMForCausalLM"]


@pytest.mark.parametrize("runtime", ["vllm", "gguf"])
def test_the_first_attention_stays_where_the_runtime_needs_it(runtime):
    shape = make_shape("llama_gqa", num_hidden_layers=4)
    left = shape.without_parts([(0, "attention"), (1, "attention"), (2, "mlp")], 1, first=True)
    assert left.staying[0] == ("attention", "mlp") and left.staying[1] == ("mlp",)
    check_missing(left, runtime)
    with pytest.raises(UserError, match="layer 0 has no attention part: .* takes no first layer without one; keep it"):
        check_missing(shape.without_parts([(0, "attention")], 1), runtime)


def test_for_llama_cpp_attention_alone_goes(folder, text_file):
    bpe_tokenizer().save_pretrained("dense")
    several("llama_gqa", 6, vocab_size=320, hidden_size=64, intermediate_size=96).save_pretrained("dense")
    amount = ("--drop_parts", 2, "--target_sparsity", 0.4, "--recovery", "least_squares", "--runtime", "gguf")
    assert hf_prune.main(flags(text_file, *amount)) == 0
    assert {kind for _, kind in empty_parts(record()["layers"])} == {"attention"}
    export_gguf.export(folder / "out", folder / "out.gguf", "f32")
    assert COMMANDS_verify("out", text_file, "out.gguf") == 0


REFUSED = {
    ("--drop_parts", 11): "--drop_parts 11: 10 parts of this model can go, since one of each kind has to stay",
    ("--drop_parts", 0): "--drop_parts 0: must be",
    ("--drop_parts", 2, "--plan", "p.json"): "--plan and --drop_parts both say what to remove",
    ("--method", "llm_drop", "--drop_parts", 2): "--method llm_drop and --drop_parts 2 both say what goes whole",
    ("--method", "llm_drop", "--drop_layers", 2): "--method llm_drop and --drop_layers 2 both say what goes whole",
    ("--method", "llm_drop", "--target_sparsity", 0.9): "--target_sparsity 0.9: the parts that --method llm_drop can take come to 0.833",
    ("--method", "llm_drop", "--prune", "heads", "--smaller", 0.4): "--smaller 0.4: the parts that --method llm_drop can take come to 0.",
    ("--method", "llm_drop", "--fit", "1MB"): "it takes whole parts by their number",
    ("--drop_parts", 2, "--runtime", "transformers"): "--drop_parts 2: no class of transformers holds this model with a layer that lacks",
    ("--method", "llm_drop", "--runtime", "transformers"): "--method llm_drop: no class of transformers holds this model",
    ("--drop_parts", 2, "--runtime", "gguf", "--prune", "channels"): "--drop_parts 2: llama.cpp leaves the attention of such a layer out",
}


@pytest.mark.parametrize("more", REFUSED, ids=lambda more: " ".join(map(str, more)))
def test_what_makes_no_sense_is_refused_in_one_line(more, folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, *more)) == 2
    error = capsys.readouterr().err
    assert REFUSED[more] in error and error.count("\n") == 1 and not (folder / "out").exists()


def test_the_message_counts_what_can_go_in_words():
    shape = make_shape("llama_gqa", num_hidden_layers=2)
    with pytest.raises(UserError, match="--drop_parts 2: 1 part of this model can go, since .*; lower it"):
        shape.without_parts([(0, "attention"), (1, "attention")], 2)
    with pytest.raises(UserError, match="--drop_parts 1: no part of this model can go, since .*; leave it out"):
        shape.with_layers([0]).without_parts([(0, "attention")], 1)


def test_a_dry_run_shows_what_the_dense_model_has_and_what_the_layers_then_lack(folder, text_file, capsys):
    """Also where the first layer lacks its attention, and nothing but whole parts goes."""
    assert hf_prune.main(flags(text_file, "--drop_parts", 2, "--prune", "heads", "--dry_run")) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "channels" in line and line.startswith("|")]
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["heads / KV heads / channels", "4 / 2 / 48", "0 / 0 / 48"]
    checkpoint.save(without(several("llama_gqa", 6), {0: ["attention"]}), None, folder / "first", make_ids(), "dense")
    assert hf_prune.main(["first", *flags(text_file, "--pruning_ratio", 0.25, "--dry_run")[1:]]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "channels" in line and line.startswith("|")]
    assert [cell.strip() for cell in row.split("|")[1:3]] == ["heads / KV heads / channels", "4 / 2 / 48, 0 / 0 / 48"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"drop_parts": 1}, "^--drop_parts 1: no part of this model can go, .*; leave it out$"),
        ({"method": "llm_drop"}, "^--pruning_ratio 0.25: .* come to 0.000 .*; name another method$"),
    ],
)
def test_a_model_of_which_no_part_can_go_is_refused_beforehand(settings, says):
    with pytest.raises(UserError, match=says):
        Run.of(PruneConfig(base_model="m", **settings), family_config("falcon_h1"))


@pytest.mark.parametrize("case", ["qwen3_moe", "gemma4"])
def test_a_model_that_no_class_holds_without_a_part_is_refused_before_its_weights_are_read(case, folder, text_file, capsys):
    make_model(case).save_pretrained("dense")
    (folder / "dense" / "model.safetensors").unlink()
    assert hf_prune.main(flags(text_file, "--drop_parts", 1)) == 2
    error = capsys.readouterr().err
    assert "--drop_parts 1: no class holds such a model with a layer that lacks a part" in error and error.count("\n") == 1


def test_a_plan_with_an_empty_part_is_refused_where_the_runtime_has_none(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--drop_parts", 2, "--prune", "channels")) == 0
    for runtime, says in (("transformers", "no class of transformers holds"), ("gguf", "llama.cpp leaves the attention of such a layer")):
        (folder / "out" / "pruning.json").replace(folder / "plan.json") if not (folder / "plan.json").exists() else None
        assert hf_prune.main(flags(text_file, "--overwrite", "--plan", "plan.json", "--runtime", runtime)) == 2
        assert says in (error := capsys.readouterr().err) and "has no feed-forward part" in error and error.count("\n") == 1
    assert hf_prune.main(["out", *flags(text_file, "--overwrite", "--runtime", "transformers")[1:]]) == 2
    assert "has no feed-forward part: no class of transformers" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [[["self_attn"]], [["lm_head"], [], [], []], [1, [], [], []], "mlp"], ids=str)
def test_a_config_that_names_no_parts_is_refused(missing, tmp_path):
    left = without(several("llama_gqa"), {1: ["mlp"]})
    left.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {MISSING: missing}))
    with pytest.raises(UserError, match=MISSING):
        loading.load_config(str(tmp_path))


def test_the_proof_of_verify_sees_another_part_than_the_record_s(folder, text_file, capsys):
    assert hf_prune.main(flags(text_file, "--drop_parts", 2)) == 0
    changed = record()
    index, kind = empty_parts(changed["layers"])[0]
    changed["layers"][index]["kept"][kind] = {sort: [0] for sort in changed["layers"][index]["kept"][kind]}
    (folder / "out" / "pruning.json").write_text(json.dumps(changed))
    planned, own = verify.planned_units(folder / "out"), LayerAdapter(AutoConfig.from_pretrained("out")).units
    assert planned != own(AutoModelForCausalLM.from_pretrained("out"))
