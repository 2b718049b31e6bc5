"""--fit: a file and what llama.cpp keeps of a text take what was asked for, whatever a layer's attention is, and never more."""

import json
import re
import urllib.request

import pytest

import hf_prune
from slimllm.deploy import export_gguf
from slimllm.errors import UserError
from slimllm.models import skeleton
from slimllm.models.parts import Cache
from slimllm.models.shape import shape_of
from slimllm.pruning.allocation.budget import of_bytes
from tests.conftest import FAMILY_CASES, MIXTURE_CASES, ODD_CASES, TEXT, kept_bytes, make_config, make_model, make_shape
from tests.test_export_gguf import bpe_tokenizer

SIZES = dict(vocab_size=320, hidden_size=128, num_hidden_layers=6, intermediate_size=512, max_position_embeddings=2048)
LATENT = dict(q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=32, head_dim=32, qk_nope_head_dim=32, v_head_dim=32)
GEMMA4 = dict(head_dim=32, global_head_dim=64, sliding_window=40)
INPUTS = dict(vocab_size_per_layer_input=320, hidden_size_per_layer_input=32)
MODELS = {
    "gemma4_shared": GEMMA4 | INPUTS,
    "gemma4_unified": GEMMA4,
    "gemma3": dict(head_dim=32, sliding_window=40),
    "minicpm3": LATENT,
    "deepseek_v3": LATENT | dict(moe_intermediate_size=128, n_routed_experts=64),
    "qwen3_5": dict(head_dim=32, linear_key_head_dim=32, linear_value_head_dim=32),
}


def whole_bytes(shape, context, overhead=0):
    settings = dict(prune="experts") if shape.is_mixture else dict(layer_ratio="auto")
    config = make_config(len(shape.layers), shape, fit="1", context=context, gguf_type="q8_0", **settings)
    return 1 + of_bytes(shape, config, overhead).target


@pytest.mark.parametrize("case", [*FAMILY_CASES, *MIXTURE_CASES, *ODD_CASES])
def test_what_is_kept_of_a_text_is_counted_as_its_class_keeps_it(case):
    model = make_model(case)
    shape = shape_of(model.config)
    tokens, states = kept_bytes(model)
    if case == "minicpm3":  # whose graph in llama.cpp keeps keys and values of all heads
        attention, heads = model.model.layers[0].self_attn, model.config.num_attention_heads
        tokens = 2 * 2 * (attention.kv_b_proj.out_features + heads * attention.qk_rope_head_dim)
    assert 2 * shape.cache_numbers() == tokens
    assert 4 * sum(cache.state for layer in shape.layers for cache in layer.caches) == states
    assert whole_bytes(shape, 5) - whole_bytes(shape, 4) == tokens
    assert shape.uncounted is None


@pytest.mark.parametrize("case", ["gemma3", "gemma4_shared", "cohere2", "granite_swa"])
def test_a_layer_with_a_window_keeps_no_more_than_llama_cpp_does(case):
    """768 tokens for a window of 6, since llama.cpp reads 512 at once and keeps multiples of 256; layers without one keep all."""
    shape = make_shape(case)
    windowed = [part.cache_numbers() for layer in shape.layers for part in layer.parts if getattr(part, "window", None)]
    windowed += [cache.numbers for layer in shape.layers for cache in layer.caches if cache.window]
    assert windowed and whole_bytes(shape, 4096) - whole_bytes(shape, 768) == 2 * (4096 - 768) * (shape.cache_numbers() - sum(windowed))


def test_where_llama_cpp_knows_no_windows_all_tokens_are_kept():
    assert Cache(10, 6).bytes(2000) == 2 * 10 * 768 and Cache(10, None).bytes(2000) == 2 * 10 * 2000
    shape = make_shape("mistral_window")
    assert whole_bytes(shape, 4096) - whole_bytes(shape, 1024) == 2 * 3072 * shape.cache_numbers()


def cells_in_llama_cpp(path, context, capfd):
    """Bytes that llama.cpp says its caches take; also that it loads the file and computes a token."""
    xllamacpp = pytest.importorskip("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = str(path), context, 1, 0
    settings.warmup, settings.verbosity, settings.fit_params = False, 10, False
    capfd.readouterr()
    server = xllamacpp.Server(settings)
    body = json.dumps({"prompt": [5, 6], "n_predict": 1}).encode()
    request = urllib.request.Request(server.listening_address + "/completion", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()
    del server
    said = "".join(capfd.readouterr())
    return 2**20 * sum(map(float, re.findall(r"llama_(?:kv_cache|memory_recurrent): size = +([\d.]+) MiB", said)))


@pytest.mark.parametrize("context", [256, 1024])
@pytest.mark.parametrize("case", MODELS)
def test_the_file_and_what_llama_cpp_keeps_take_what_was_asked_for(case, context, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = make_model(case, **SIZES | MODELS[case]), bpe_tokenizer()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "text.txt").write_text(TEXT)
    shape = shape_of(model.config)
    asked = int(0.9 * whole_bytes(shape, context, export_gguf.metadata_bytes(tokenizer, "model", model.config)))
    flags = ["--base_model", "model", "--calibration", "text.txt", "--num_examples", "8", "--seq_len", "16", "--eval_data", "none"]
    flags += ["--recipe", "best", "--self_share", "0", "--runtime", "gguf", "--output_dir", "pruned"]
    assert hf_prune.main([*flags, "--fit", str(asked), "--context", str(context)]) == 0
    file = export_gguf.export("pruned", tmp_path / "out.gguf", "q8_0").stat().st_size
    kept = cells_in_llama_cpp(tmp_path / "out.gguf", context, capfd)
    rounded = 3 * 0.005 * 2**20  # three numbers of MiB with two digits
    assert 0.96 * asked <= file + kept + rounded and file + kept - rounded <= asked


@pytest.mark.parametrize("case", ["minicpm3", "deepseek_v3", "gemma4_moe", "qwen3_5"])
def test_where_it_is_not_known_what_is_kept_fit_is_refused(case, monkeypatch):
    monkeypatch.setattr(skeleton, "_cache_of", lambda *_: None)
    skeleton._counted.cache_clear()
    try:
        shape = make_shape(case)
    finally:
        skeleton._counted.cache_clear()
    assert shape.uncounted == (FAMILY_CASES | MIXTURE_CASES | ODD_CASES)[case][0]
    with pytest.raises(UserError, match=f"^--fit 1MB: what a {shape.uncounted} keeps of a text .* is unknown; ask by --target_params$"):
        make_config(2, shape, fit="1MB", **({} if shape.is_mixture else {"layer_ratio": "auto"}))
    make_config(2, shape, target_sparsity=0.1)


def test_the_table_of_what_layers_are_given_for_each_token_is_in_the_file():
    sizes = dict(num_hidden_layers=4, hidden_size=32, hidden_size_per_layer_input=8)
    shape = make_shape("gemma4_inputs", **sizes)
    model = make_model("gemma4_inputs", **sizes)
    tensors = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if "embed_scale" not in name}
    bytes_of = {
        name: tensor.numel() * (34 / 32 if tensor.shape[-1] % 32 == 0 else 2) if tensor.dim() == 2 else 4 * tensor.numel()
        for name, tensor in tensors.items()
        if "inv_freq" not in name and "layer_scalar" not in name
    }
    assert whole_bytes(shape, 1) - sum(kept_bytes(model)) == sum(bytes_of.values())
