"""Models of text and images: the text model inside is read, pruned, and put back."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import hf_prune
from slimllm.commands import COMMANDS
from slimllm.deploy import checkpoint, reference, runtimes, whole_model
from slimllm.models import loading
from slimllm.models.shape import shape_of
from tests.conftest import FAMILY_CASES, MIXTURE_CASES, ODD_CASES, family_config, logits, make_config, make_ids, prune

_VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
_QWEN_VISION = dict(depth=1, hidden_size=16, out_hidden_size=32, num_heads=2, intermediate_size=16)
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_GLM_MROPE = {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
_GLM_VISION = dict(depth=1, hidden_size=16, out_hidden_size=32, num_heads=2, intermediate_size=16, image_size=28, patch_size=14)
WRAPPERS = {  # what stands around the text model: (case of the text model, what its config says, the config of the other tower)
    "gemma3": ("gemma3", {}, {"model_type": "siglip_vision_model", **_VISION}),
    "llava": ("llama_gqa", {}, {"model_type": "clip_vision_model", **_VISION}),
    "smolvlm": ("llama_gqa", {}, _VISION),
    "internvl": ("qwen2", {}, {"model_type": "internvl_vision", **_VISION}),
    "mistral3": ("mistral", {}, {"model_type": "pixtral", **_VISION}),
    "qwen2_vl": (
        "qwen2",
        {"model_type": "qwen2_vl_text", "rope_parameters": _MROPE},
        dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2),
    ),
    "qwen2_5_vl": (
        "qwen2",
        {"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE},
        {**_QWEN_VISION, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        "qwen3",
        {"model_type": "qwen3_vl_text", "rope_parameters": _MROPE},
        {**_QWEN_VISION, "deepstack_visual_indexes": []},
    ),
    "qwen3_5": ("qwen3_5", {}, _QWEN_VISION),
    "qwen3_vl_moe": (
        "qwen3_moe",
        {"model_type": "qwen3_vl_moe_text", "norm_topk_prob": None, "rope_parameters": _MROPE},
        {**_QWEN_VISION, "deepstack_visual_indexes": []},
    ),
    "glm4v": ("glm4", {"model_type": "glm4v_text", "rope_parameters": _GLM_MROPE}, _GLM_VISION),
    "glm4v_moe": ("glm4_moe", {"model_type": "glm4v_moe_text", "rope_parameters": _GLM_MROPE}, _GLM_VISION),
    "paddleocr_vl": (
        "mistral",
        {"model_type": "paddleocr_vl_text", "rope_parameters": _MROPE},
        {**_VISION, "spatial_merge_size": 1},
    ),
    "hunyuan_vl": (
        "hunyuan_v1_dense",
        {"model_type": "hunyuan_vl_text", "rope_parameters": _MROPE},
        {**_VISION, "out_hidden_size": 32, "text_hidden_size": 32},
    ),
    "granite_docling": (
        "granite",
        {"model_type": "granite_docling_text"},
        {**_VISION, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": []},
    ),
    "cohere_compass": ("cohere_compass", {}, {**_QWEN_VISION, "deepstack_visual_indexes": []}),
    "lfm3_vl": ("lfm3", {}, {**_VISION, "num_key_value_heads": 1}),
    "qianfan_ocr": ("qwen3", {}, {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]}),
    "minimax_m3_vl": ("minimax_m3", {}, _VISION),
    "kimi_k25": ("deepseek_v3", {}, {**_VISION, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}),
    "hyperclovax_vision_v2": ("hyperclovax", {}, {"model_type": "qwen2_5_vl_vision", **_QWEN_VISION, "fullatt_block_indexes": [0]}),
    "cosmos3_omni": (
        "qwen3",
        {"model_type": "qwen3_vl_text", "rope_parameters": _MROPE},
        {**_QWEN_VISION, "deepstack_visual_indexes": []},
    ),
    "nemotron_h_omni": ("nemotron_h_moe", {}, {"model_type": "radio", **_VISION, "max_img_size": 28, "video_temporal_patch_size": 2}),
    "gemma4": ("gemma4_shared", {}, {**_VISION, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64}),
}


def _inside(name):
    return f"language_model.{name}" if name.startswith("lm_head") else name.replace("model.language_model.", "language_model.model.")


def _deeper(name):
    return name.replace("lm_head", "model.language_model.lm_head").replace("language_model.", "language_model.model.", name[0] == "m")


def _in_layers(name):
    return name.replace("language_model.model.blocks.", "language_model.model.layers.")


# what published files call a tensor, where save_pretrained calls it something else; the last has the form of the rules that it saves by
AS_PUBLISHED = {"qianfan_ocr": _inside, "hyperclovax_vision_v2": _deeper, "kimi_k25": _in_layers}


def saved_whole(wrapper, folder, tokenizer, dtype=torch.float32, **changes):
    """A random model of text and images, as stock transformers writes it."""
    case, settings, vision = WRAPPERS[wrapper]
    text_config = family_config(case, **changes).to_dict() | settings
    sizes = {"vision_hidden_size": 16} if wrapper == "nemotron_h_omni" else {}
    config = AutoConfig.for_model(wrapper, text_config=text_config, vision_config=vision, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    whole.save_pretrained(folder, save_original_format=wrapper not in AS_PUBLISHED or wrapper == "kimi_k25")
    if wrapper in AS_PUBLISHED:
        path = folder / "model.safetensors"
        named = {AS_PUBLISHED[wrapper](name): tensor for name, tensor in load_file(path).items()}
        save_file(named, path, {"format": "pt"})
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return whole


def pruned_text(whole, folder, tokenizer, dtype="auto", **settings):
    """The text model inside the folder ``whole``, pruned to one width in all layers, as a checkpoint."""
    text = loading.load_model(str(whole), dtype)
    settings = {"runtime": "transformers", "layer_ratio": "uniform", "recovery": "least_squares", "target_sparsity": 0.2} | settings
    prune(text, make_ids(), make_config(len(text.model.layers), shape_of(text.config), **settings))
    regular = settings["runtime"] == "transformers"
    checkpoint.save((runtimes.as_stock_model if regular else runtimes.as_slim_model)(text), tokenizer, folder, make_ids(2), str(whole))
    return text


def put_back(*args):
    return COMMANDS["export-transformers"].run("export-transformers", [str(arg) for arg in args])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_text_model_is_read_pruned_and_put_back(wrapper, tmp_path, tiny_tokenizer, capsys):
    whole = saved_whole(wrapper, tmp_path / "whole", tiny_tokenizer)
    case = WRAPPERS[wrapper][0]
    assert loading.load_config(str(tmp_path / "whole")).dtype == torch.float32
    text = loading.load_model(str(tmp_path / "whole"), "auto")
    assert text.config.model_type == (FAMILY_CASES | MIXTURE_CASES | ODD_CASES)[case][0] and type(text).__name__.endswith("ForCausalLM")
    assert torch.equal(logits(text, make_ids()), logits(whole, make_ids()))
    units = "experts" if case in MIXTURE_CASES else "channels"
    recovery = "none" if case == "nemotron_h_moe" else "least_squares"
    smaller = pruned_text(tmp_path / "whole", tmp_path / "text", tiny_tokenizer, prune=units, recovery=recovery)
    if wrapper in ("qwen3_vl_moe", "minimax_m3_vl"):  # their experts are stored together, or each by itself where the text model's are not
        assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / "whole") == 2
        assert "take the text model alone" in capsys.readouterr().err
        return
    assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / "whole") == 0
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(whole) and again.num_parameters() < whole.num_parameters()
    assert torch.allclose(logits(again, make_ids()), logits(smaller, make_ids()), atol=1e-5)
    assert torch.equal(logits(loading.load_model(str(tmp_path / "out"), "auto"), make_ids()), logits(smaller, make_ids()))
    others = {name: tensor for name, tensor in whole.state_dict().items() if not re.search("language_model|text_model|lm_head", name)}
    now = again.state_dict()
    assert others and all(torch.equal(now[name], tensor) for name, tensor in others.items())
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'


@pytest.mark.parametrize("inside", ["whole", "text"])
def test_nothing_is_written_inside_what_is_read(inside, tmp_path, capsys):
    for name in ("whole", "text"):
        (tmp_path / name).mkdir()
    assert put_back(tmp_path / "text", tmp_path / inside / "a/out", "--into", tmp_path / "whole") == 2
    assert f"lies inside {'DIR' if inside == 'text' else '--into'}" in capsys.readouterr().err and not any((tmp_path / inside).iterdir())


def test_what_files_hold_of_layers_that_share_keys_and_values_is_left_as_it_is(tmp_path, tiny_tokenizer):
    saved_whole("gemma4", tmp_path / "whole", tiny_tokenizer)
    name, path = "model.language_model.layers.2.self_attn.k_proj.weight", tmp_path / "whole" / "model.safetensors"
    stored = load_file(path)
    assert name not in stored
    save_file(stored | {name: torch.ones(16, 32)}, path, {"format": "pt"})
    pruned_text(tmp_path / "whole", tmp_path / "text", tiny_tokenizer)
    assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / "whole") == 0
    assert name not in load_file(tmp_path / "text" / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], torch.ones(16, 32))


def test_heads_go_and_the_biases_of_a_recovery_find_their_place(tmp_path, tiny_tokenizer, text_file):
    saved_whole("llava", tmp_path / "whole", tiny_tokenizer)
    smaller = pruned_text(tmp_path / "whole", tmp_path / "text", tiny_tokenizer, prune="heads", target_sparsity=0.1)
    assert smaller.config.attention_bias and smaller.config.num_attention_heads == 2
    assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / "whole") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("language_model") and name.endswith("o_proj.bias") for name in stored)
    assert COMMANDS["verify"].run("verify", [str(tmp_path / "out"), "--text", str(text_file), "--seq_len", "16"]) == 0


def test_shards_and_types_stay_as_they_are(tmp_path, tiny_tokenizer, capsys):
    saved_whole("llava", tmp_path / "whole", tiny_tokenizer, torch.bfloat16)
    pruned_text(tmp_path / "whole", tmp_path / "text", tiny_tokenizer)
    assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / "whole") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    pruned_text(tmp_path / "whole", tmp_path / "wide", tiny_tokenizer, dtype=torch.float32)
    assert put_back(tmp_path / "wide", tmp_path / "wider", "--into", tmp_path / "whole") == 2
    assert "prune with --save_dtype bfloat16" in capsys.readouterr().err and not (tmp_path / "wider").exists()


REFUSED = {  # what is pruned, how, and what it is put into -> what is said
    "layers that differ": ("llava", dict(runtime="any", layer_ratio="importance", pruned_layers=1), "whole", "--runtime transformers"),
    "a text model": ("llava", {}, "text", "with nothing around it"),
    "another model": ("llava", {}, "other", "its text model has num_hidden_layers 1, the checkpoint 2: not the same model"),
    "fewer layers": ("llava", {}, "deeper", "whole layers went, 1 of 3, and a text model with fewer stands by itself"),
    "another rope": ("llava", {}, "turned", "its text model has rope_parameters {"),
    "a class that derives the size of a head": (
        "qwen2_vl",
        dict(prune="heads", target_sparsity=0.1),
        "whole",
        "prune with --prune channels",
    ),
    "quantized weights": ("llava", {}, "quantized", "its weights are quantized, and the checkpoint's are not"),
    "no folder": ("llava", {}, "nowhere/at/all", "no such folder"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_put_back_is_refused_in_one_line(what, tmp_path, tiny_tokenizer, capsys):
    wrapper, settings, into, says = REFUSED[what]
    saved_whole(wrapper, tmp_path / "whole", tiny_tokenizer)
    saved_whole(wrapper, tmp_path / "other", tiny_tokenizer, num_hidden_layers=1)
    saved_whole(wrapper, tmp_path / "deeper", tiny_tokenizer, num_hidden_layers=3)
    if into == "quantized":
        shutil.copytree(tmp_path / "whole", tmp_path / into)
        config = json.loads((tmp_path / into / "config.json").read_text())
        (tmp_path / into / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    if into == "turned":
        saved_whole(wrapper, tmp_path / "turned", tiny_tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    pruned_text(tmp_path / "whole", tmp_path / "text", tiny_tokenizer, **settings)
    assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / into) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error and not (tmp_path / "out").exists()


def test_a_whole_that_computes_something_else_is_not_written(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    saved_whole("llava", tmp_path / "whole", tiny_tokenizer)
    pruned_text(tmp_path / "whole", tmp_path / "text", tiny_tokenizer)
    written = whole_model.put_back

    def wrong(text, whole, folder):
        written(text, whole, folder)
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
        save_file(tensors | {name: -tensors[name]}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(whole_model, "put_back", wrong)
    assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / "whole") == 2
    assert "does not give the logits of the text model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_looks_at_the_whole(tmp_path, tiny_tokenizer, text_file, capsys):
    saved_whole("gemma3", tmp_path / "whole", tiny_tokenizer)
    pruned_text(tmp_path / "whole", tmp_path / "text", tiny_tokenizer)
    assert put_back(tmp_path / "text", tmp_path / "out", "--into", tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert COMMANDS["verify"].run("verify", [str(tmp_path / "copy"), "--text", str(text_file), "--seq_len", "16"]) == 0
    assert "the whole in its own class" in capsys.readouterr().out
    assert reference.agrees(*whole_model.compare(tmp_path / "copy")) and whole_model.is_whole(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["model_type"] == "gemma3"
    assert not whole_model.is_whole(tmp_path / "text") and not whole_model.is_whole("no/such")


def test_a_run_says_what_it_takes_out_and_how_that_goes_back(tmp_path, tiny_tokenizer, text_file, capsys):
    saved_whole("llava", tmp_path / "whole", tiny_tokenizer)
    flags = "--num_examples 8 --seq_len 16 --eval_data none --prompt none --runtime transformers --target_sparsity 0.2 --output_dir"
    assert hf_prune.main([str(tmp_path / "whole"), "--calibration", str(text_file), *flags.split(), str(tmp_path / "text")]) == 0
    said = capsys.readouterr().out
    assert f"the text model inside {tmp_path / 'whole'}" in said and f"--into {tmp_path / 'whole'}" in said
    record = json.loads((tmp_path / "text" / "pruning.json").read_text())
    assert record["bytes"]["dense"] == 4 * record["parameters"]["dense"]  # the text model's, not those of all that lies around it
