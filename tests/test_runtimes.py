"""``--runtime``: plans that a runtime can hold, and the form in which they are saved."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from slimllm import modeling
from slimllm.__main__ import main as slim
from slimllm.deploy import checkpoint, runtimes
from slimllm.errors import UserError
from slimllm.models import families
from slimllm.models import shape as shapes
from slimllm.models.weights import Tensors, weight_files
from slimllm.plan import LayerPlan, removed_parameters
from tests.conftest import FAMILY_CASES, count, logits, make_config, make_ids, make_model, make_shape, plan, prune, prune_to, runtimes_of

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4)


def pruned(case, runtime, tmp_path, tokenizer, **settings):
    """A random model pruned for a runtime and saved. Returns (model, folder, share removed, what one step removes as a share)."""
    model = make_model(case, **SIZES)
    shape = make_shape(case, **SIZES)
    settings = {"target_sparsity": 0.3, "pruned_layers": 3, "recovery": "least_squares", "round_to": 1, **settings}
    config = make_config(shape=shape, runtime=runtime, **settings)
    dense = model.num_parameters()
    prune(model, make_ids(), config)
    runtimes.convert_for_runtime(model, runtime)
    checkpoint.save(model, tokenizer, tmp_path, make_ids(2, 6), "dense")
    together = len(shape.layers) if shapes.limits_of(runtime, shape).same_channels else 1
    step = together * (3 * shape.hidden + 2) / shape.decoder_parameters
    return model, tmp_path, (dense - model.num_parameters()) / shape.decoder_parameters, step


@pytest.mark.parametrize("case, runtime", [(case, name) for case in FAMILY_CASES for name in runtimes_of(case) if name != "any"])
def test_what_a_runtime_gets_is_what_it_holds(case, runtime, tmp_path, tiny_tokenizer):
    if runtime == "gguf" and make_shape(case).gguf is None:
        with pytest.raises(UserError, match="--runtime gguf: llama.cpp has no architecture that computes this model"):
            pruned(case, runtime, tmp_path, tiny_tokenizer)
        return
    model, folder, removed, step = pruned(case, runtime, tmp_path, tiny_tokenizer)
    shape, config = make_shape(case, **SIZES), AutoConfig.from_pretrained(folder, trust_remote_code=True)
    widths = shapes.units_of(config)
    limits = shapes.limits_of(runtime, shape)
    assert abs(removed - 0.3) <= step
    plans = [LayerPlan(0.0, width) for width in widths]  # what a dry run counts is what the model has
    counted = removed_parameters(shape, plans, make_config(shape=shape, runtime=runtime, recovery="least_squares"))
    assert counted == shape.decoder_parameters + shape.other_parameters - model.num_parameters()
    attention = [width["attention"] for width in widths if "attention" in width]  # which not all layers of a hybrid have
    assert not limits.same_heads or all(own == attention[0] for own in attention)
    assert not limits.same_channels or not shapes.irregular(widths)
    assert all(own["heads"] % own["kv_heads"] == 0 for own in attention)
    stock = json.loads((folder / "config.json").read_text())["model_type"] in families.FAMILIES
    assert stock == limits.same_channels and stock != (folder / "modeling.py").is_file()
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not stock)
    assert torch.equal(logits(reloaded, make_ids(2, 6)), logits(model, make_ids(2, 6)))
    if stock:
        assert type(reloaded) is type(make_model(case))


def test_transformers_form_holds_the_recovery_s_biases(tmp_path, tiny_tokenizer):
    model, folder, _, _ = pruned("llama_gqa", "transformers", tmp_path, tiny_tokenizer, target_sparsity=0.6)
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] and config["mlp_bias"] and config["head_dim"] == 8 and "auto_map" not in config
    layer = model.model.layers[1]
    assert layer.self_attn.o_proj.bias.abs().sum() > 0 and layer.mlp.down_proj.bias.abs().sum() > 0
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
        assert linear.bias.abs().sum() == 0


def test_vllm_form_is_what_decilm_reads(tmp_path, tiny_tokenizer):
    _, folder, _, _ = pruned("llama_mha", "vllm", tmp_path, tiny_tokenizer)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["DeciLMForCausalLM"] and raw["num_attention_heads"] == 3 == raw["num_key_value_heads"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for block, own in zip(config.block_configs, shapes.units_of(config), strict=True):
        group = count(own, "heads") // count(own, "kv_heads")
        assert (block.attention.n_heads_in_group, block.ffn.intermediate_size) == (group, count(own, "channels"))
        assert not (block.attention.no_op or block.ffn.no_op or hasattr(block.ffn, "ffn_mult"))
    assert len({block.ffn.intermediate_size for block in config.block_configs}) > 1
    # every bias that the config's flags make vLLM look for is there
    tensors = Tensors(weight_files(folder))
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ):
        assert f"model.layers.0.{name}.bias" in tensors.names
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors.names) and set(index.values()) == {"model.safetensors"}


def test_any_form_is_what_vllm_s_transformers_backend_reads(tmp_path, tiny_tokenizer):
    """Each layer's widths in ``per_layer_config``, and a class without a head to make the model of."""
    model, folder, _, _ = pruned("llama_gqa", "any", tmp_path, tiny_tokenizer)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    found = [(c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) for c in config.per_layer_config]
    widths = [tuple(count(own, sort) for sort in ("heads", "kv_heads", "channels")) for own in shapes.units_of(config)]
    assert config.is_heterogeneous and found == widths and len(set(found)) > 1
    ids = make_ids(2, 6)
    headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
    states = headless(ids, use_cache=False).last_hidden_state
    assert torch.equal(model.lm_head(states), model(ids, use_cache=False).logits)


def test_loading_warns_of_nothing(tmp_path, tiny_tokenizer):
    _, folder, _, _ = pruned("llama_gqa", "any", tmp_path, tiny_tokenizer)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, logging; logging.disable_progress_bar()\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model.generate(torch.arange(8)[None], max_new_tokens=4, pad_token_id=0, eos_token_id=None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "per-layer" not in done.stderr + done.stdout and "Warning" not in done.stderr, done.stderr


def test_qwen2_goes_to_vllm_with_its_own_biases_only(tmp_path, tiny_tokenizer):
    _, folder, _, _ = pruned("qwen2", "vllm", tmp_path, tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["qkv_bias"] and not config.get("attention_bias")
    assert {name.split(".")[-2] for name in Tensors(weight_files(folder)).names if name.endswith("bias")} == {"q_proj", "k_proj", "v_proj"}


def test_the_number_of_heads_is_one_that_the_stock_class_takes():
    shape = make_shape("llama_mha", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=4)
    for target in (0.1, 0.25, 0.4, 0.6):
        plans = plan(shape, [0.0] * 4, make_config(shape=shape, target_sparsity=target, pruned_layers=4, runtime="transformers"))
        assert {count(p, "heads") for p in plans} <= {1, 2, 4, 8}


@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_heads_that_every_layer_loses_are_half_the_share_of_channels(runtime):
    shape = make_shape(
        "mistral", hidden_size=64, num_attention_heads=16, num_key_value_heads=16, intermediate_size=200, sliding_window=None
    )
    for target in (0.1, 0.3, 0.5):
        plans = plan(shape, [0.9] * len(shape.layers), make_config(shape=shape, target_sparsity=target, runtime=runtime))
        channels = 1 - sum(count(p, "channels") for p in plans) / (200 * len(shape.layers))
        assert abs(1 - count(plans[0], "heads") / 16 - channels / 2) <= 1 / 16


def test_auto_gives_all_layers_the_same_widths_where_they_must_be_alike():
    shape = make_shape(num_hidden_layers=4)
    plans = plan(shape, [0.9] * 4, make_config(4, shape, layer_ratio="auto", runtime="transformers", target_sparsity=0.3))
    assert plans[0].units != shape.units[0] and all(p.units == plans[0].units for p in plans)


def test_nothing_removed_is_the_dense_model():
    shape = make_shape(**SIZES)
    plans = plan(shape, [0.9] * 4, make_config(4, shape, target_sparsity=0.0, runtime="transformers", recovery="none"))
    assert [p.units for p in plans] == shape.units


def test_gguf_keeps_whole_blocks_of_quantized_rows():
    shape = make_shape(
        hidden_size=64, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=16, num_hidden_layers=4
    )
    config = make_config(shape=shape, target_sparsity=0.3, pruned_layers=3, runtime="gguf")
    plans = plan(shape, [0.1, 0.9, 0.8, 0.7], config)
    assert config.round_to == 32 and all(count(p, "channels") % 32 == 0 for p in plans)
    assert abs(removed_parameters(shape, plans, config) / shape.decoder_parameters - 0.3) <= 32 * 3 * 64 / shape.decoder_parameters


@pytest.mark.parametrize("recovery", ["bias", "linear", "least_squares"])
def test_without_a_place_for_a_bias_the_fit_goes_through_zero(recovery):
    """The error after recovery is no larger than without, and no bias appears."""
    model = make_model("mistral", **SIZES)
    reports = prune(model, make_ids(), make_config(4, make_shape("mistral", **SIZES), runtime="transformers", recovery=recovery))
    assert all(layer.self_attn.o_proj.bias is None and layer.mlp.down_proj.bias is None for layer in model.model.layers)
    for report in reports:
        for before, after in report.errors.values():
            assert after <= before * 1.001 and (recovery == "bias" or after < before)


def test_irregular_layers_are_named_with_the_way_out():
    model = make_model(**SIZES)
    prune(model, make_ids(), make_config(shape=make_shape(**SIZES), pruned_layers=1))
    with pytest.raises(UserError, match=r"layers \d differ from the 4 heads, 2 KV heads and 96 channels .*--runtime transformers"):
        runtimes.as_stock_model(model)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.num_attention_heads == 4  # untouched


def test_a_checkpoint_that_is_regular_can_be_exported_as_a_stock_one(tmp_path, tiny_tokenizer, capsys):
    model = make_model(**SIZES)
    shape = make_shape(**SIZES)
    prune(model, make_ids(), make_config(4, shape, layer_ratio="uniform", recovery="least_squares"))
    checkpoint.save(runtimes.as_slim_model(model), tiny_tokenizer, tmp_path / "slim", make_ids(2), "dense")
    before = logits(model, make_ids())
    assert slim(["export-transformers", str(tmp_path / "slim"), str(tmp_path / "stock")]) == 0
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    left = {"auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"}
    assert config["model_type"] == "llama" and not set(config) & left and not any(name.endswith(modeling.PER_LAYER) for name in config)
    assert not (tmp_path / "stock" / "modeling.py").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), make_ids()), before)
    assert slim(["export-transformers", str(tmp_path / "slim"), str(tmp_path / "stock")]) == 2
    assert "stock exists" in capsys.readouterr().err


def test_an_irregular_checkpoint_is_not_exported_as_a_stock_one(tmp_path, tiny_tokenizer, capsys):
    folder = prune_to(tmp_path / "slim", tiny_tokenizer)
    assert slim(["export-transformers", str(folder), str(tmp_path / "stock")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and " differ from the 4 heads" in error and "--runtime transformers" in error
    assert not (tmp_path / "stock").exists() and slim(["export-transformers", str(folder)]) == 2
