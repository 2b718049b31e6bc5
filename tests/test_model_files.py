"""The files and tensors that make up a model: those that transformers takes, with the same logits, or a refusal that names them."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.llama import modeling_llama

from slimllm.deploy import checkpoint, export_gguf, gguf_architecture
from slimllm.deploy.sink import CheckpointSink
from slimllm.errors import UserError
from slimllm.models import gguf_settings, loading
from tests.conftest import LLAMA3, YARN, family_config, logits, make_config, make_ids, make_model, prune

WEIGHTS = "model.safetensors"


def saved(folder, case="llama_gqa", seed=0, **sizes):
    make_model(case, seed, **sizes).save_pretrained(folder)
    return folder


def altered(folder, change, file=WEIGHTS):
    """The folder, with ``change`` made to the tensors of one of its files."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


def config_set(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def head_of_its_own(tensors):
    tensors["lm_head.weight"] = torch.randn(97, 32, generator=torch.Generator().manual_seed(5))


def the_same_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def only_the_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def write_index(folder, files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def old_frequencies(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def stale_index(folder):
    saved(folder / "old", seed=3)
    shutil.copy(folder / "old" / WEIGHTS, folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )


def renamed_shards(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"ft-model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    write_index(folder, files)


def strays(folder):
    saved(folder / "old", seed=3)
    for name in ("model_old.safetensors", "model2.safetensors", "modelz.safetensors"):
        shutil.copy(folder / "old" / WEIGHTS, folder / name)
    torch.save(load_file(folder / "old" / WEIGHTS), folder / "pytorch_model_old.bin")


def pickled_and_stray(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    strays(folder)


def named_by_the_config(folder):
    shutil.copy(folder / WEIGHTS, folder / "mine.safetensors")
    saved(folder / "old", seed=3)
    shutil.copy(folder / "old" / WEIGHTS, folder / WEIGHTS)
    config_set(folder, transformers_weights="mine.safetensors")


CASES = {
    "a tied config and a head of its own": ("llama_tied", lambda folder: altered(folder, head_of_its_own)),
    "a tied config and the same head": ("llama_tied", lambda folder: altered(folder, the_same_head)),
    "a tied config and a head alone": ("llama_tied", lambda folder: altered(folder, only_the_head)),
    "an index left beside a single file": ("llama_gqa", stale_index),
    "shards of other names": ("llama_gqa", renamed_shards),
    "stray files of weights": ("llama_gqa", strays),
    "a pickled file and strays": ("llama_gqa", pickled_and_stray),
    "a file that the config names": ("llama_gqa", named_by_the_config),
    "old rotary frequencies": ("llama_gqa", lambda folder: altered(folder, old_frequencies)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_one_that_transformers_reads(name, tmp_path):
    case, change = CASES[name]
    change(saved(tmp_path, case))
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), make_ids())
    assert torch.equal(logits(loading.load_model(str(tmp_path), torch.float32), make_ids()), wanted)


def test_a_head_of_its_own_is_pruned_saved_and_exported(tmp_path, tiny_tokenizer):
    altered(saved(tmp_path / "model", "llama_tied"), head_of_its_own)
    model = loading.load_model(str(tmp_path / "model"), torch.float32)
    checkpoint.save(model, tiny_tokenizer, tmp_path / "copy", make_ids(2), "dense")
    assert not json.loads((tmp_path / "copy" / "config.json").read_text())["tie_word_embeddings"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(logits(again.eval(), make_ids()), logits(model, make_ids()))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(export_gguf.gguf_tokenizer, "add", lambda writer, folder, size: _add_tokens(writer, size))
    for folder in ("model", "copy"):
        export_gguf.export(tmp_path / folder, tmp_path / f"{folder}.gguf", "f32")
        found = loading.load_model(str(tmp_path / f"{folder}.gguf"), torch.float32)
        assert torch.equal(found.lm_head.weight, model.lm_head.weight) and not torch.equal(
            found.lm_head.weight, found.model.embed_tokens.weight
        )
    monkey.undo()


def _add_tokens(writer, size):
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(size)])


VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
WRAPPERS = {  # outer model_type -> (the text model's case, what else its config says)
    "gemma3": ("gemma3", dict(mm_tokens_per_image=4, image_token_index=96, boi_token_index=95, eoi_token_index=94)),
    "llava": ("llama_gqa", dict(image_token_index=96)),
    "llava_onevision": ("qwen2", dict(image_token_index=96)),
    "mistral3": ("mistral", dict(image_token_index=96)),
}


@pytest.mark.parametrize("says", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("outer", WRAPPERS)
def test_the_outer_config_says_whether_the_head_is_the_embeddings(outer, says, tmp_path):
    case, extra = WRAPPERS[outer]
    text = family_config(case).to_dict() | {"tie_word_embeddings": says[1]}
    vision = VISION | ({"model_type": "pixtral"} if outer == "mistral3" else {"model_type": "siglip_vision_model"})
    config = AutoConfig.for_model(outer, text_config=text, vision_config=vision, tie_word_embeddings=says[0], **extra)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"] = says
    path.write_text(json.dumps(written))
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(loading.load_model(str(tmp_path), torch.float32), make_ids()), logits(stock, make_ids()), atol=1e-4)


STRANGE = {  # what is in the file besides the model -> the tensor that the refusal names
    "biases": ("model.layers.0.self_attn.q_proj.bias", (32,)),
    "a classifier's head": ("score.weight", (2, 32)),
    "one layer more": ("model.layers.2.input_layernorm.weight", (32,)),
    "norms of queries": ("model.layers.1.self_attn.q_norm.weight", (8,)),
}


@pytest.mark.parametrize("name", STRANGE)
def test_tensors_that_the_config_does_not_know_are_refused_by_name(name, tmp_path):
    tensor, shape = STRANGE[name]
    altered(saved(tmp_path), lambda tensors: tensors.update({tensor: torch.ones(shape)}))
    with pytest.raises(UserError, match=f"the files hold {tensor}, .* correct config.json"):
        loading.open_source(str(tmp_path), torch.float32)


def test_the_tensors_of_another_model_are_not_taken_for_the_text_model_s(tmp_path):
    altered(saved(tmp_path), lambda tensors: tensors.update({f"language_model.{name}": -value for name, value in tensors.items()}))
    with pytest.raises(UserError, match="the files hold language_model.lm_head.weight, and 20 more, of which"):
        loading.open_source(str(tmp_path), torch.float32)


def renamed(change):
    return lambda tensors: [tensors.update({change(name): tensors.pop(name)}) for name in list(tensors)]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_tensors_of_other_names_are_shown_where_some_are_missing(prefix, tmp_path):
    altered(saved(tmp_path), renamed(lambda name: prefix + name))
    said = f"21 weights are missing, the first lm_head.weight; the files name others, such as {prefix}lm_head"
    with pytest.raises(UserError, match=said):
        loading.open_source(str(tmp_path), torch.float32)


@pytest.mark.parametrize("shape", [(), (0, 32)])
def test_a_tied_head_without_rows_is_one_line(shape, tmp_path):
    names = ("lm_head.weight", "model.embed_tokens.weight")
    altered(saved(tmp_path, "llama_tied"), lambda tensors: tensors.update({name: torch.zeros(shape) for name in names}))
    with pytest.raises(UserError, match="do not belong together"):
        loading.open_source(str(tmp_path), torch.float32)


def test_a_model_folder_may_end_in_gguf(tmp_path):
    folder = saved(tmp_path / "model.gguf")
    assert torch.equal(logits(loading.load_model(str(folder), torch.float32), make_ids()), logits(make_model(), make_ids()))


def test_a_gguf_file_that_was_replaced_is_read_anew(tiny_gguf, tmp_path):
    loading.load_config(str(tiny_gguf))
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole .gguf file"):
        loading.load_config(str(tiny_gguf))


def test_an_adapter_beside_a_model_or_alone_is_refused_with_the_way_out(tmp_path):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers applies .* merge it"):
        loading.load_config(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="an adapter, not a model; post_training.py --merge"):
        loading.load_config(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool], ids=str)
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(dtype, pickled, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    altered(saved(tmp_path), lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    if pickled:
        torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "pytorch_model.bin")
        (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{name} is .*quantized weights"):
        loading.open_source(str(tmp_path), torch.float32)


class LayerWithScalar(modeling_llama.LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) * self.layer_scalar


def test_persistent_buffers_are_read_written_and_missed(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", LayerWithScalar)
    model = make_model()
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.5), layer.steps.fill_(7)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    source = loading.open_source(str(tmp_path / "model"), torch.float32)
    for _, layer in source.visit():
        assert float(layer.layer_scalar) == 0.5 and layer.steps.tolist() == [7] and layer.steps.dtype == torch.long
    assert torch.equal(logits(source.whole(), make_ids()), logits(model, make_ids()))
    checkpoint.save(model, tiny_tokenizer, tmp_path / "copy", make_ids(2), "dense")
    assert torch.equal(logits(checkpoint.load(tmp_path / "copy"), make_ids()), logits(model, make_ids()))
    sink = CheckpointSink(tmp_path / "pruned", source, config := make_config(), make_ids(2), "cpu")
    prune(source, make_ids(), config, sink=sink)
    sink.finish()
    assert load_file(tmp_path / "pruned" / WEIGHTS)["model.layers.1.layer_scalar"].tolist() == [0.5]
    altered(tmp_path / "model", lambda tensors: tensors.pop("model.layers.1.layer_scalar"))
    with pytest.raises(UserError, match="1 weights are missing, the first model.layers.1.layer_scalar"):
        loading.open_source(str(tmp_path / "model"), torch.float32)


BROKEN_INDEXES = {
    "no map": "{}",
    "null": '{"weight_map": null}',
    "a list": '{"weight_map": ["a"]}',
    "an empty map": '{"weight_map": {}}',
    "files elsewhere": '{"weight_map": {"a": "../secret.safetensors"}}',
    "numbers": '{"weight_map": {"a": 3}}',
    "no JSON": "{",
    "nesting without end": "[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN_INDEXES)
def test_a_broken_index_is_one_line(name, tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "model.safetensors.index.json").write_text(BROKEN_INDEXES[name])
    with pytest.raises(UserError, match="index.json: not an index of weights") as caught:
        loading.open_source(str(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)


def test_files_that_no_rule_of_transformers_finds_are_no_model(tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(UserError, match="none of model.safetensors, "):
        loading.open_source(str(tmp_path), torch.float32)


def test_the_hub_is_asked_for_what_the_index_lists(tmp_path, monkeypatch):
    renamed_shards(saved(tmp_path))
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = loading.open_source("me/model", torch.float32, config=AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(logits(source.whole(), make_ids()), logits(make_model(), make_ids()))
    assert {"ft-model-00001-of-00002.safetensors", "ft-model-00002-of-00002.safetensors"} < set(asked)


@pytest.fixture
def tiny_gguf(tmp_path, tiny_tokenizer):
    checkpoint.save(make_model(), tiny_tokenizer, tmp_path / "model", make_ids(2), "dense")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(export_gguf.gguf_tokenizer, "add", lambda writer, folder, size: _add_tokens(writer, size))
    path = export_gguf.export(tmp_path / "model", tmp_path / "m.gguf", "f16")
    monkey.undo()
    return path


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA_YARN = {name: value for name, value in YARN.items() if "scal" not in name}
LLAMA_3_1 = {**LLAMA3, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
GGUF_CASES = {
    "llama": ("llama_gqa", {}),
    "llama3 scaling": ("llama3_rope", {}),
    "llama3 scaling of Llama 3.1": ("llama3_rope", dict(rope_parameters=LLAMA_3_1, head_dim=128)),
    "linear scaling": ("llama_gqa", dict(rope_parameters=LINEAR)),
    "yarn": ("llama_gqa", dict(rope_parameters=LLAMA_YARN)),
    "soft caps, scores and windows": ("gemma2", {}),
    "windows and two bases": ("gemma3", dict(num_hidden_layers=4)),
    "scores by the hidden size": ("gemma3", dict(num_hidden_layers=62, query_pre_attn_scalar=8)),
}


def gguf_of(model, folder, monkeypatch):
    model.save_pretrained(folder / "model")
    monkeypatch.setattr(export_gguf.gguf_tokenizer, "add", lambda writer, folder, size: _add_tokens(writer, size))
    return str(export_gguf.export(folder / "model", folder / "model.gguf", "f32"))


@pytest.mark.parametrize("name", GGUF_CASES)
def test_a_gguf_file_is_the_model_that_its_metadata_describes(name, tmp_path, monkeypatch):
    case, sizes = GGUF_CASES[name]
    model = make_model(case, **sizes)
    found = loading.load_model(gguf_of(model, tmp_path, monkeypatch), torch.float32)
    assert torch.allclose(logits(found, make_ids()), logits(model, make_ids()), rtol=1e-3, atol=1e-3)


def test_a_scaling_that_no_setting_describes_is_refused(tmp_path, monkeypatch):
    path = gguf_of(make_model("phi3_long"), tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"a scaling of the rotary embeddings \(longrope\) .* name the model in the form of transformers"):
        loading.load_config(path)
    monkeypatch.setattr(gguf_settings, "_llama3", lambda *_: None)
    path = gguf_of(make_model("llama3_rope"), tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"a scaling of the rotary embeddings \(rope_freqs.weight\)"):
        loading.load_config(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_a_gguf_file_that_is_cut_short_is_one_line(share, tiny_gguf):
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[: round(share * len(content))])
    with pytest.raises(UserError, match="m.gguf: not a whole .gguf file .*download it again") as caught:
        loading.open_source(str(tiny_gguf), torch.float32)
    assert "\n" not in str(caught.value)


def test_one_of_several_gguf_files_is_refused_as_that(tmp_path, monkeypatch, tiny_gguf):
    export = gguf_architecture.add_settings
    monkeypatch.setattr(export_gguf, "add_settings", lambda writer, config: (export(writer, config), writer.add_uint16("split.count", 2)))
    monkeypatch.setattr(export_gguf.gguf_tokenizer, "add", lambda writer, folder, size: _add_tokens(writer, size))
    part = export_gguf.export(tmp_path / "model", tmp_path / "m-00001-of-00002.gguf", "f16")
    with pytest.raises(UserError, match="one of 2 files that hold the model together; join them"):
        loading.load_config(str(part))


BAD_CONFIGS = {
    "heads as text": dict(num_attention_heads="4"),
    "no heads": dict(num_attention_heads=0),
    "heads null": dict(num_attention_heads=None),
    "heads a fraction": dict(num_attention_heads=4.5),
    "more KV heads than heads": dict(num_key_value_heads=8),
    "KV heads that do not divide": dict(num_key_value_heads=3),
    "a list of hidden sizes": dict(hidden_size=[32]),
    "hidden size negative": dict(hidden_size=-32),
    "head_dim zero": dict(head_dim=0),
    "no head_dim and no multiple": dict(head_dim=None, hidden_size=33),
    "vocabulary zero": dict(vocab_size=0),
    "channels true": dict(intermediate_size=True),
    "padding outside": dict(pad_token_id=97),
    "padding far outside": dict(pad_token_id=99999),
    "padding as text": dict(pad_token_id="0"),
    "unknown activation": dict(hidden_act="swoosh"),
    "activation null": dict(hidden_act=None),
    "unknown rope": dict(rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0}),
    "rope a list": dict(rope_parameters=[1]),
    **{
        f"{name} {value}": dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, name: value})
        for name, value in (
            ("mrope_section", [24, 20]),
            ("mrope_section", "24"),
            ("mrope_section", [1.5, 1, 1]),
            ("factor", "two"),
            ("partial_rotary_factor", -0.5),
            ("rope_theta", float("nan")),
            ("long_factor", 1.0),
            ("truncate", "no"),
        )
    },
    "ten million layers": dict(num_hidden_layers=10**7),
    "no layers": dict(num_hidden_layers=0),
    "layer_types too short": dict(layer_types=["full_attention"]),
    "layer_types unknown": dict(layer_types=["full_attention", "no_attention"]),
    "text_config a list": dict(text_config=[1]),
    "text_config text": dict(text_config="llama"),
    "bias as text": dict(attention_bias="yes"),
    "epsilon as text": dict(rms_norm_eps="small"),
    "epsilon nan": dict(rms_norm_eps=float("nan")),
    "dtype unknown": dict(dtype="float31"),
    "dtype a number": dict(dtype=7),
    "context null": dict(max_position_embeddings=None),
    "weights elsewhere": dict(transformers_weights="../x.safetensors"),
    "weights that are none": dict(transformers_weights="config.json"),
    "weights a number": dict(transformers_weights=3),
    "tied as text": dict(tie_word_embeddings="yes"),
    "model_type a list": dict(model_type=["llama"]),
    "model_type null": dict(model_type=None),
    "unknown model_type": dict(model_type="camel"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_makes_no_sense_is_one_line_that_names_it(name, tmp_path):
    config_set(saved(tmp_path), **BAD_CONFIGS[name])
    with pytest.raises(UserError) as caught:
        config = loading.load_config(str(tmp_path))
        loading.open_source(str(tmp_path), torch.float32, config=config)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value), caught.value


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{", "[" * 100_000, '{"a": ' * 100_000])
def test_a_config_that_is_no_json_object_is_one_line(text, tmp_path):
    (saved(tmp_path) / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        loading.load_config(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["flash_attention_2", "paged|eager", "nonsense", {"": "eager"}, 3], ids=str)
def test_how_attention_is_computed_is_not_the_file_s_to_choose(key, value, tmp_path):
    wanted = loading.load_model(str(saved(tmp_path)), torch.float32)
    config_set(tmp_path, **{key: value})
    found = loading.load_model(str(tmp_path), torch.float32)
    assert found.config._attn_implementation == wanted.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("text", ["[]", '{"eos_token_id": [[1]]}', "{", "7"])
def test_a_broken_generation_config_is_one_line(text, tmp_path):
    (saved(tmp_path) / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match="generation_config.json") as caught:
        loading.open_source(str(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)


NOT_FINITE = ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_numbers_that_are_not_finite_are_named_when_they_are_read(name, value, tmp_path):
    def change(tensors):
        tensors[name].view(-1)[5] = value

    altered(saved(tmp_path), change)
    source = loading.open_source(str(tmp_path), torch.float32)
    with pytest.raises(UserError, match=f"{name}: some of its numbers are not finite in the file"):
        source.whole()


@pytest.mark.parametrize("name", NOT_FINITE)
def test_numbers_too_large_for_float16_get_that_advice(name, tmp_path):
    def change(tensors):
        tensors[name].view(-1)[5] = 1e6

    altered(saved(tmp_path), change)
    source = loading.open_source(str(tmp_path), torch.float16)
    with pytest.raises(UserError, match="too large for float16; use --dtype bfloat16 or float32"):
        for _ in source.visit():
            pass
        source.whole()
