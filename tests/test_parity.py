"""The package against what the paper's published code decided on the real model, recorded in a folder beside the repository.

Where that is absent, the plain transcription of the equations (slimllm/experiments/plain.py) decides instead, on the same
model and on tokens of the Python manual.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from slimllm.data import texts
from slimllm.evaluation.perplexity import perplexity
from slimllm.experiments import plain
from slimllm.models import loading
from slimllm.models.adapter import with_multi_head_attention
from slimllm.pruning import pipeline
from tests.conftest import ROOT, make_config

PARITY = ROOT.parent / "shared" / "parity"
CASES = {"025": dict(pruning_ratio=0.25, pruned_layers=24, alpha=10.0), "055": dict(pruning_ratio=0.55, pruned_layers=28, alpha=7.0)}


def dense(folder):
    return with_multi_head_attention(loading.load_model(str(folder), torch.float32))


def manual_ids(folder, samples, length=128):
    (text,) = texts.load_texts(("python_manual",))
    return texts.blocks_of(text, loading.load_tokenizer(str(folder)), length, limit=samples)


@pytest.fixture(scope="module", params=CASES)
def published(request, smollm2):
    """(settings, calibration ids, eval ids, cosines, {layer: (heads, channels)}, perplexity) as decided by others."""
    settings = CASES[request.param]
    record = PARITY / f"smollm2_mha_ratio{request.param}.json"
    if record.is_file():
        found, tensors = json.loads(record.read_text()), load_file(record.with_suffix(".safetensors"))
        kept = {int(i): (layer["heads"], layer["channels"]) for i, layer in found["layers"].items()}
        return settings, tensors["calibration_ids"], tensors["eval_ids"], found["layer_cosine"], kept, found["eval_ppl"]
    ids = manual_ids(smollm2, 96)
    model = dense(smollm2)
    cosine, kept = plain.prune(model, ids[:32], **settings)
    return settings, ids[:32], ids[32:], cosine, kept, perplexity(model, ids[32:])


def test_the_published_decisions(published, smollm2):
    settings, ids, eval_ids, cosine, kept, expected = published
    model = dense(smollm2)
    reports = pipeline.prune(model, ids, make_config(layers=30, keep_lowest=0.01, recovery="linear", **settings))
    assert [r.cosine for r in reports] == pytest.approx(cosine, abs=1e-5)
    assert {i: reports[i].heads for i in kept} == {i: heads for i, (heads, _) in kept.items()}
    wanted = sum(len(channels) for _, channels in kept.values())
    same = sum(len(set(channels) & set(reports[i].channels)) for i, (_, channels) in kept.items())
    assert all(len(reports[i].channels) == len(channels) for i, (_, channels) in kept.items())
    assert same / wanted >= 0.999
    assert perplexity(model, eval_ids) == pytest.approx(expected, rel=1e-3)


def test_least_squares_beats_the_published_recovery(published, smollm2):
    """At the same kept parameters and the same calibration tokens."""
    settings, ids, eval_ids, _, kept, published_perplexity = published
    model = dense(smollm2)
    reports = pipeline.prune(model, ids, make_config(layers=30, recovery="least_squares", **settings))
    assert all(len(reports[i].channels) == len(channels) and len(reports[i].heads) == len(heads) for i, (heads, channels) in kept.items())
    bound = {0.25: 0.87, 0.55: 0.80}[settings["pruning_ratio"]]
    assert perplexity(model, eval_ids) <= bound * published_perplexity


def test_the_plain_transcription_decides_the_same_on_the_real_model(smollm2):
    """A small case that runs whether or not the recorded decisions are at hand."""
    ids = manual_ids(smollm2, 6)
    twin, model = dense(smollm2), dense(smollm2)
    cosine, kept = plain.prune(twin, ids, 0.4, 4, 10.0)
    reports = pipeline.prune(model, ids, make_config(layers=30, pruned_layers=4, pruning_ratio=0.4, alpha=10.0))
    assert [r.cosine for r in reports] == pytest.approx(cosine, abs=1e-5)
    assert sorted(kept) == [r.index for r in reports if r.ratio] and len(kept) == 4
    for index, (heads, channels) in kept.items():
        assert reports[index].heads == heads
        assert len(set(channels) & set(reports[index].channels)) >= 0.999 * len(channels)
    blocks = manual_ids(smollm2, 12)[6:]
    assert perplexity(model, blocks) == pytest.approx(perplexity(twin, blocks), rel=1e-3)
