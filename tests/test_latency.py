import json
import weakref

import pytest
import torch

from slimllm.__main__ import main as slim
from slimllm.commands.latency import models_of
from slimllm.errors import UserError
from slimllm.evaluation import latency
from slimllm.models.shape import shape_of
from slimllm.settings.latency import LatencyConfig
from tests.conftest import FAMILY_CASES, make_ids, make_model, prune_to, tiny_tokenizer_of


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_macs_are_what_the_modules_multiply(case):
    model, ids = make_model(case), make_ids(1, 12)
    counted = []

    def count(module, args, output):
        counted.append(args[0].numel() // module.in_features * module.weight.numel())

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(ids)
    heads, width = model.config.num_attention_heads, model.config.head_dim
    pairs = 12 * 13 // 2  # causal: each token with itself and those before it
    layers = sum("attention" in units for units in shape_of(model.config).units)
    attention = layers * 2 * heads * width * pairs  # scores, then the weighted sum
    assert latency.macs(latency.size_of(model), 12) == sum(counted) + attention


def test_sizes(tmp_path):
    model = make_model("llama_gqa")
    size = latency.size_of(model)
    assert size["parameters"] == model.num_parameters() and size["weight_bytes"] == 4 * model.num_parameters()
    cache = model(make_ids(1, 5), use_cache=True).past_key_values
    assert size["kv_bytes_per_token"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 5


def test_decode_continues_the_prompt():
    model, ids = make_model(), make_ids(2, 6)
    seen = []
    _, cache, token = latency.prefill(model, ids)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert latency.decode(model, cache, token, 4) > 0
    model._forward_pre_hooks.clear()
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat(seen, 1), wanted[:, 6:])


def test_the_command(tmp_path, tiny_folder, capsys):
    pruned = prune_to(tmp_path / "pruned", tiny_tokenizer_of())
    flags = ["--batch_size", "1", "2", "--length", "8", "16", "--new_tokens", "3", "--repeats", "2", "--json", str(tmp_path / "l.json")]
    assert slim(["latency", str(pruned), "--baseline", str(tiny_folder), *flags]) == 0
    out = capsys.readouterr().out
    assert out.count(" x |") == 2 * 8 and "KV cache per token" in out
    record = json.loads((tmp_path / "l.json").read_text())
    assert len(record["measurements"]) == 8 and all(len(e["prefill"]) == 2 for e in record["measurements"])
    assert record["sizes"]["pruned"]["parameters"] < record["sizes"]["dense"]["parameters"]


def test_a_model_called_dense_does_not_take_the_place_of_its_baseline():
    for model, name in (("prune_log/dense", "MODEL"), ("prune_log/small", "small")):
        found = models_of(LatencyConfig(model=model, baseline="path/to/dense"))
        assert found == {"dense": ("--baseline", "path/to/dense"), name: ("MODEL", model)}


def test_mistakes(tiny_folder, capsys):
    for wrong, said in (
        ([], "name a model"),
        (["nowhere/x/y"], "nowhere/x/y"),
        ([str(tiny_folder), "--length", "64"], "context is 64"),
        ([str(tiny_folder), "--batch_size", "0"], "at least 1"),
    ):
        assert slim(["latency", *wrong]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="float31"):
        LatencyConfig("x", dtype="float31")


def test_a_model_s_cache_is_gone_before_the_next_one_is_measured(monkeypatch):
    """Else the next model's peak would hold it too."""
    caches, alive = [], []
    prefill = latency.prefill

    def watched(model, ids):
        alive.append(sum(cache() is not None for cache in caches))
        seconds, cache, token = prefill(model, ids)
        caches.append(weakref.ref(cache))
        return seconds, cache, token

    monkeypatch.setattr(latency, "prefill", watched)
    latency.measure({"dense": make_model(), "pruned": make_model()}, (1,), (8,), 2, 1, torch.device("cpu"))
    assert len(caches) >= 4 and not any(alive)
