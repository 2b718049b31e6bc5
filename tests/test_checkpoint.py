import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimllm import modeling
from slimllm.deploy import checkpoint, reference, runtimes
from slimllm.errors import UserError
from slimllm.models.adapter import LayerAdapter
from slimllm.models.families import family_of
from slimllm.settings.methods import RECOVERIES
from slimllm.utils import outputs
from tests.conftest import CORE_CASES, DISTINCT_CASES, FAMILY_CASES, logits, make_config, make_ids, make_model, make_shape, prune


def pruned(case="llama_gqa", **settings):
    model = make_model(case)
    settings = {"recovery": "least_squares", "layer_ratio": "uniform", **settings}
    prune(model, make_ids(), make_config(shape=make_shape(case), **settings))
    return runtimes.as_slim_model(model)


@pytest.mark.parametrize(
    "case, recovery",
    [
        *((case, "least_squares") for case in FAMILY_CASES),
        *((case, name) for case in CORE_CASES for name in RECOVERIES if name != "least_squares"),
    ],
)
def test_saved_and_reloaded_logits_are_equal(case, recovery, tmp_path):
    model = pruned(case, recovery=recovery, head_unit="query")
    model.save_pretrained(tmp_path)
    for kwargs in ({"trust_remote_code": True}, {}):  # the file beside the weights, and plain ``import slimllm``
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
        assert torch.equal(logits(reloaded, make_ids()), logits(model, make_ids()))
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


def test_a_model_that_was_not_pruned_round_trips(tmp_path):
    model = make_model()
    before = logits(model, make_ids())
    runtimes.as_slim_model(model).save_pretrained(tmp_path)
    assert torch.equal(logits(checkpoint.load(tmp_path), make_ids()), before)


LOAD_ALONE = """
import sys, json
sys.modules["slimllm"] = None  # where it is installed too, importing it now raises ModuleNotFoundError
import torch
from transformers import AutoModelForCausalLM
folder, again, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype), device_map="auto")
assert model.dtype == getattr(torch, dtype)
ids = torch.arange(12)[None]
with torch.no_grad():
    print(json.dumps(model(ids).logits.float().flatten().tolist()))
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False))
model.save_pretrained(again)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_where_the_project_cannot_be_imported_and_saves_again(dtype, tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "first")
    for source, again in (("first", "second"), ("second", "third")):
        done = subprocess.run(
            [sys.executable, "-I", "-c", LOAD_ALONE, tmp_path / source, tmp_path / again, dtype],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
        expected = logits(copy.deepcopy(model).to(getattr(torch, dtype)), torch.arange(12)[None]).float().flatten()
        tolerance = 1e-4 if dtype == "float32" else 0.2
        assert (found - expected).abs().max() < tolerance * max(1, expected.abs().max())
    assert (tmp_path / "second" / "modeling.py").is_file()


LOAD_ALL = """
import sys
sys.modules["slimllm"] = None
import torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, logging
logging.disable_progress_bar()
for folder in Path(sys.argv[1]).iterdir():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__.startswith("Slim"), type(model)
    with torch.no_grad():
        torch.save(model(torch.arange(12)[None], use_cache=False).logits, folder / "logits.pt")
    if folder.name == "llama_gqa":
        for auto in set(model.config.auto_map) - {"AutoConfig"}:
            made = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
            assert type(made).__name__.startswith("Slim") and made.base_model.layers[1].mlp.down_proj.in_features < 48, made
"""


def test_every_family_loads_where_the_project_cannot_be_imported(tmp_path):
    models = {case: pruned(case) for case in FAMILY_CASES}
    for case, model in models.items():
        model.save_pretrained(tmp_path / case)
    done = subprocess.run([sys.executable, "-I", "-c", LOAD_ALL, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, model in models.items():
        torch.testing.assert_close(torch.load(tmp_path / case / "logits.pt"), logits(model, torch.arange(12)[None]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case, cache", [*((case, None) for case in FAMILY_CASES), *((case, "static") for case in DISTINCT_CASES)])
def test_generates_with_a_kv_cache(case, cache):
    model = pruned(case)
    ids = make_ids(2, 10)
    with torch.no_grad():
        plain = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=None)
        cached = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation=cache, pad_token_id=0, eos_token_id=None)
    assert torch.equal(plain, cached)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_batches_with_padding_give_what_single_rows_give(case):
    model = pruned(case)
    ids = make_ids(1, 10)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(14) >= 4).long()[None]
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 4:]
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_takes_peft(case):
    from peft import LoraConfig, get_peft_model

    model = pruned(case)
    before = logits(model, make_ids())
    targets = list(family_of(model.config).projections)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(wrapped, make_ids()), before)
    loss = wrapped(make_ids(), labels=make_ids()).loss
    loss.backward()
    updates = {
        name.rpartition(".lora_B")[0].rpartition(".")[2] for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert updates - {""} == set(targets)


def test_large_checkpoints_are_sharded(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(checkpoint.load(tmp_path), make_ids()), logits(model, make_ids()))


def spoil(folder):
    """Changes one tensor of a saved checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_that_is_another_model_fails_the_run(tmp_path, tiny_tokenizer):
    model = pruned()
    checkpoint.save(model, tiny_tokenizer, tmp_path, make_ids(2), "dense")
    reference.reload_and_compare(tmp_path, model.dtype)
    spoil(tmp_path)
    with pytest.raises(RuntimeError, match="does not load as the model that was saved"):
        reference.reload_and_compare(tmp_path, model.dtype)


def test_staged_moves_into_place_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "log" / "run"
    with outputs.atomic_dir(target, overwrite=False) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["run"] and (target / "a").read_text() == "1"
    with pytest.raises(UserError, match="--overwrite"):
        with outputs.atomic_dir(target, overwrite=False):
            pass
    with pytest.raises(KeyboardInterrupt):
        with outputs.atomic_dir(target, overwrite=True) as folder:
            (folder / "a").write_text("2")
            raise KeyboardInterrupt
    assert [p.name for p in target.parent.iterdir()] == ["run"] and (target / "a").read_text() == "1"
    with outputs.atomic_dir(target, overwrite=True) as folder:
        (folder / "a").write_text("3")
    assert [p.name for p in target.parent.iterdir()] == ["run"] and (target / "a").read_text() == "3"


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_head_that_the_family_has_is_in_the_auto_map_and_keeps_its_widths(case, tmp_path):
    model = pruned(case)
    adapter = LayerAdapter(model.config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    for auto, stock in modeling.AUTO_CLASSES.items():
        has_one = type(make_model(case).config) in stock
        assert (auto in written) is has_one
        if has_one and auto != "AutoModelForCausalLM":
            other = getattr(transformers, auto).from_pretrained(tmp_path)
            assert type(other).__name__ == written[auto].partition(".")[2]
            body = other if auto == "AutoModel" else other.base_model
            for mine, its in zip(adapter.parts(body.layers[1]), adapter.parts(adapter.layers(model)[1]), strict=True):
                assert torch.equal(mine.output.weight, its.output.weight)


def test_lists_that_do_not_fit_the_number_of_layers_are_named(tmp_path):
    pruned().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"\w+_per_layer has 2 entries, and num_hidden_layers is 1; what takes layers away"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
