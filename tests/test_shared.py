"""Layers that are given something for each token besides the state, and layers that read the keys and values of others (Gemma 4)."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import hf_prune
import slimllm
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.adapter import LayerAdapter
from slimllm.models.shape import shape_of
from slimllm.models.vocabulary import trimmed_source
from slimllm.plan import removed_parameters
from slimllm.pruning.allocation import timing
from slimllm.pruning.importance.taylor import saliencies
from slimllm.pruning.layer import LayerPruner
from slimllm.streaming import runner as runner_module
from slimllm.streaming.runner import LayerRunner
from tests.conftest import family_config, logits, make_config, make_ids, make_model, make_shape, plan, run_of

CASES = ("gemma4_inputs", "gemma4_shared", "gemma4_unified")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two samples each, so that what belongs to one batch cannot stand for another's."""
    monkeypatch.setattr(runner_module, "TOKENS_PER_BATCH", 32)


@pytest.mark.parametrize("case", [*CASES, "gemma4_moe"])
@torch.no_grad()
def test_layers_one_at_a_time_give_what_the_whole_model_gives(case):
    model, ids = make_model(case), make_ids()
    runner = LayerRunner(model, ids)
    norm, _ = runner.output_modules()
    found = torch.cat([norm(states) for states in runner.last_states()])
    torch.testing.assert_close(found, LayerAdapter(model.config).last_states(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_one_layer_at_a_time_are_those_of_the_whole_model(case):
    """Through the keys and values that later layers share, too."""
    model, ids = make_model(case), make_ids()
    found = saliencies(LayerRunner(copy.deepcopy(model), ids))
    rows = logits_with_gradients(model, ids)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(rows, ids[:, 1:].flatten()).backward()
    for layer, own in zip(model.model.layers, found, strict=True):
        gate, up, down = (part.weight * part.weight.grad for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
        expected = gate.abs().sum(1) + up.abs().sum(1) + down.abs().sum(0)
        torch.testing.assert_close(own["mlp"]["channels"], expected, rtol=1e-3, atol=1e-6)


def logits_with_gradients(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("settings", [dict(layer_ratio="auto"), dict(layer_ratio="auto", prices="streams"), dict(method="llm_pruner")])
def test_what_goes_by_prices_and_gradients_runs_to_the_end(settings):
    result = slimllm.prune(make_model("gemma4_shared"), calibration=make_ids(), target_sparsity=0.1, look_back=0.3, **settings)
    assert result.parameters.pruned == result.model.num_parameters() == shape_of(result.model.config).parameters


def test_the_time_of_what_is_never_cut_is_measured_where_a_layer_has_several_such_parts(monkeypatch):
    monkeypatch.setattr(timing, "REPEATS", 2)
    model = make_model("gemma4_shared")
    times = timing.measured(run_of(model, make_ids(), make_config(4, shape_of(model.config))))
    assert times.rest > 0 and set(times.parts) == {"mlp"}


@pytest.mark.parametrize("stop", [2, 3, 4])  # the second layer is the last that keeps keys and values
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(stop, tmp_path, tiny_tokenizer, text_file, monkeypatch):
    make_model("gemma4_shared").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", "model", "--calibration", text_file, "--eval_data", "none", "--num_examples", 6, "--seq_len", 16]
    flags = [str(flag) for flag in (*flags, "--target_sparsity", 0.1, "--recipe", "best", "--distill", "none", "--look_back", 0.3)]
    assert hf_prune.main([*flags, "--output_dir", "whole"]) == 0
    whole, calls = LayerPruner.prune, []

    def stops(self, *args):
        calls.append(args)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(LayerPruner, "prune", stops)
    assert hf_prune.main([*flags, "--output_dir", "stopped"]) != 0
    assert hf_prune.main([*flags, "--output_dir", "stopped", "--resume"]) == 0
    assert len(calls) == 5  # what was finished was not done again
    for name in ("model.safetensors", "config.json", "reference.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


ALONE = """
import json, sys
sys.modules["slimllm"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 15)[None]
padded, mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1), torch.tensor([[0] * 5 + [1] * 12])
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        cached, plain = (model.generate(ids, use_cache=use, **how)[:, 12:] for use in (True, False))
        behind = model.generate(padded, attention_mask=mask, **how)[:, 17:]
        assert torch.equal(cached, plain) and torch.equal(cached, behind)
        print(json.dumps([type(model).__name__, model(ids).logits.flatten().tolist()]))
"""


def test_stock_transformers_loads_what_is_saved(tmp_path):
    models = {}
    for case in (*CASES, "gemma4_moe"):
        result = slimllm.prune(make_model(case), calibration=make_ids(), target_sparsity=0.1, recovery="least_squares")
        slimllm.save(result, tmp_path / case)
        models[case] = result.model
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *(tmp_path / case for case in models)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for (case, model), line in zip(models.items(), done.stdout.splitlines(), strict=True):
        name, found = json.loads(line)
        assert name == type(make_model(case)).__name__
        torch.testing.assert_close(torch.tensor(found), logits(model, torch.arange(3, 15)[None]).flatten(), rtol=1e-5, atol=1e-5)


def test_a_layer_that_its_class_makes_twice_as_wide_stays_so():
    model = make_model("gemma4_shared")
    assert [units["mlp"]["channels"] for units in shape_of(model.config).units] == [48, 48, 96, 96]
    result = slimllm.prune(model, calibration=make_ids(), target_sparsity=0.1)
    width = result.model.config.intermediate_size
    assert width < 48 and [report.units["mlp"]["channels"] for report in result.layers] == [width, width, 2 * width, 2 * width]


def test_the_size_that_was_asked_for_is_met_where_layers_are_twice_as_wide():
    shape = make_shape("gemma4_shared")
    step = 3 * shape.hidden * (1 + 1 + 2 + 2)  # one channel of the config
    for target in (0.05, 0.08, 0.11, 0.14, 0.17):
        config = make_config(4, shape, target_sparsity=target, recovery="none")
        gone = removed_parameters(shape, plan(shape, [0.0] * 4, config), config)
        assert abs(gone - target * shape.decoder_parameters) <= step / 2


def test_fewer_tokens_are_fewer_rows_of_the_table_too(tmp_path):
    make_model("gemma4_shared").save_pretrained(tmp_path)
    source, kept = loading.open_source(str(tmp_path), torch.float32), list(range(0, 97, 2))
    smaller = trimmed_source(source, kept)
    ids = torch.arange(8)[None] + torch.arange(3)[:, None] * 5
    expected = logits(source.whole(), torch.tensor(kept)[ids])[..., kept]
    torch.testing.assert_close(logits(smaller.whole(), ids), expected, rtol=1e-5, atol=1e-5)
    assert shape_of(source.config).with_tokens(len(kept)).parameters == smaller.whole().num_parameters()


def test_what_cannot_be_run_or_counted_is_refused_in_one_line(tmp_path):
    for settings, said in (
        (dict(vocab_size_per_layer_input=80), "vocab_size_per_layer_input 80 is not vocab_size 97"),
        (dict(hidden_size_per_layer_input=0), "num_kv_shared_layers without hidden_size_per_layer_input"),
    ):
        family_config("gemma4_shared", **settings).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=said):
            loading.load_config(str(tmp_path))
    shape = make_shape("gemma4_inputs")
    for cut in (lambda: shape.with_fewer_layers(1), lambda: shape.with_layers([0, 1, 3])):
        with pytest.raises(UserError, match="no whole layer of this model can go, since all take inputs from one table"):
            cut()


@pytest.mark.parametrize("case", [*CASES, "gemma4_moe"])
def test_a_model_that_keeps_all_gives_the_same_logits(case):
    model, ids = make_model(case), make_ids()
    before = logits(model, ids)
    result = slimllm.prune(model, calibration=ids, pruning_ratio=0.0)
    assert torch.equal(logits(result.model, ids), before) and result.parameters.removed == 0
