"""Layers read from files one at a time: the same model, the same pruning, whatever the files are."""

import copy
import errno
import gc
import json
import weakref

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slimllm.deploy import checkpoint, export_gguf, runtimes
from slimllm.deploy.sink import CheckpointSink
from slimllm.errors import UserError
from slimllm.evaluation.perplexity import perplexities, perplexity
from slimllm.models import loading, tensor_file, weights
from slimllm.models.source import ModelSource, stored_tensors
from tests.conftest import DISTINCT_CASES, FAMILY_CASES, logits, make_config, make_ids, make_model, make_shape, prune


def saved(folder, case="llama_gqa", **sizes):
    model = make_model(case, **sizes)
    model.save_pretrained(folder)
    return model


def same_weights(model, other):
    a, b = model.state_dict(), other.state_dict()
    return sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_the_whole_model_is_what_transformers_reads(case, tmp_path):
    model = saved(tmp_path, case)
    read = loading.load_model(str(tmp_path), "auto")
    assert type(read) is type(model) and same_weights(read, model) and torch.equal(logits(read, make_ids()), logits(model, make_ids()))
    assert read.config._attn_implementation == AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation
    tied = model.config.tie_word_embeddings
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied


def test_shards_and_pickled_files_are_read_too(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.config.save_pretrained(tmp_path / "pickled")
    names = list(model.state_dict())
    files = {name: f"pytorch_model-0000{1 + (i >= 7)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: model.state_dict()[name] for name in names if files[name] == file}, tmp_path / "pickled" / file)
    (tmp_path / "pickled" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    for folder in ("shards", "pickled"):
        assert same_weights(loading.load_model(str(tmp_path / folder), "auto"), model)


@pytest.mark.parametrize("case", ["llama_mha", "llama_gqa", "llama_tied", "qwen2", "gemma2", "gemma3_mha"])
def test_a_gguf_file_is_what_transformers_makes_of_it(case, tmp_path, tiny_tokenizer):
    checkpoint.save(make_model(case), tiny_tokenizer, tmp_path / "model", make_ids(2), "dense")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(export_gguf.gguf_tokenizer, "add", lambda writer, folder, size: _add_tokens(writer, size))
    path = export_gguf.export(tmp_path / "model", tmp_path / "m.gguf", "f16")
    monkey.undo()
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert same_weights(loading.load_model(str(path), torch.float32), wanted)


def _add_tokens(writer, size):
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(size)])


def test_a_pickled_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    make_model().config.save_pretrained(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: not a readable file of weights"):
        loading.load_model(str(tmp_path), "auto")


def test_a_hub_model_is_downloaded_and_read_as_a_folder(tmp_path, monkeypatch):
    model, asked = saved(tmp_path), []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = loading.open_source("me/model", torch.float32, config=model.config)
    assert same_weights(source.whole(), model)
    assert asked == [("me/model", ["model.safetensors", "generation_config.json", "adapter_config.json"])]


def test_a_layer_leaves_memory_when_the_next_one_comes(tmp_path):
    saved(tmp_path, num_hidden_layers=4)
    source = loading.open_source(str(tmp_path), torch.float32)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    before, seen = make_model(num_hidden_layers=4), []
    for index, layer in source.visit(dtype=torch.bfloat16, start=1):
        wanted = before.model.layers[index].bfloat16().state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in layer.state_dict().items())
        seen.append(weakref.ref(layer.mlp.up_proj.weight))
        del layer
        gc.collect()
        assert [ref() is None for ref in seen[:-1]] == [True] * (len(seen) - 1)
    assert len(seen) == 3


@pytest.mark.parametrize("case", ["llama_gqa", "glm4_moe", "nemotron_h_moe"])
def test_a_layer_in_memory_is_visited_in_another_dtype_as_from_a_file(case, tmp_path):
    model = make_model(case)
    model.save_pretrained(tmp_path)
    read = loading.open_source(str(tmp_path), torch.float32).visit(dtype=torch.bfloat16)
    for (_, layer), (_, other) in zip(ModelSource(model).visit(dtype=torch.bfloat16), read, strict=True):
        ours, theirs = stored_tensors(layer), stored_tensors(other)
        assert {name: tensor.dtype for name, tensor in ours.items()} == {name: tensor.dtype for name, tensor in theirs.items()}
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_a_visit_that_is_broken_off_ends_its_reader(tmp_path):
    saved(tmp_path, num_hidden_layers=4)
    for _ in loading.open_source(str(tmp_path), torch.float32).visit():
        break


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_perplexity_from_files_is_that_of_the_model(case, tmp_path):
    model, texts = saved(tmp_path, case), [make_ids(5, 20), make_ids(3, 20, seed=2)]
    source = loading.open_source(str(tmp_path), torch.float32)
    assert perplexities(source, texts, ["a", "b"]) == pytest.approx([perplexity(model, ids) for ids in texts], rel=1e-6)


@pytest.mark.parametrize("runtime", ["any", "vllm", "transformers"])
@pytest.mark.parametrize("case", DISTINCT_CASES)
def test_a_streamed_pruning_is_that_of_the_model_in_memory(case, runtime, tmp_path, tiny_tokenizer):
    dense = saved(tmp_path / "dense", case)
    shape = make_shape(case)
    settings = dict(recovery="least_squares", runtime=runtime, target_sparsity=0.3)
    config, ids = make_config(shape=shape, **settings), make_ids(samples=12)
    streamed, source = tmp_path / "streamed", loading.open_source(str(tmp_path / "dense"), torch.float32)
    checkpoint.write_tokenizer(tiny_tokenizer, streamed, "dense", source.config)
    sink = CheckpointSink(streamed, source, config, ids[:2], "cpu")
    reports = prune(source, ids, config, sink=sink)
    sink.finish()
    model = copy.deepcopy(dense)
    assert [r.kept for r in prune(model, ids, config)] == [r.kept for r in reports]
    checkpoint.save(runtimes.convert_for_runtime(model, runtime), tiny_tokenizer, tmp_path / "whole", ids[:2], "dense")
    assert sink.model.num_parameters() == model.num_parameters()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in streamed.iterdir()} and "model.safetensors" in names
    for name in names - {"reference.safetensors"}:
        assert (streamed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert torch.equal(logits(checkpoint.load(streamed), ids), logits(model, ids))


def test_a_large_checkpoint_is_written_in_several_files(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("slimllm.deploy.weight_files.SHARD_BYTES", 30_000)
    model = make_model()
    checkpoint.save(runtimes.as_slim_model(model), tiny_tokenizer, tmp_path, make_ids(2), "dense")
    names = json.loads((tmp_path / weights.INDEX).read_text())["weight_map"]
    files = sorted(path.name for path in tmp_path.glob("model*.safetensors"))
    assert len(files) > 1 and files == sorted(set(names.values())) and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(logits(checkpoint.load(tmp_path), make_ids()), logits(model, make_ids()))
    assert torch.equal(logits(loading.load_model(str(tmp_path), "auto"), make_ids()), logits(model, make_ids()))


def test_a_file_of_tensors_is_an_ordinary_safetensors_file(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(5).bfloat16(), "c": torch.arange(4)}
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with tensor_file.TensorFile(tmp_path / "x.safetensors", layout) as file:
        for name in ("c", "b"):
            file.write(name, tensors[name])
        with pytest.raises(ValueError, match=r"a: torch.float32 \[5\], laid out as torch.bfloat16 \[5\]"):
            file.write("a", tensors["a"].float())
    with tensor_file.TensorFile(tmp_path / "x.safetensors", layout) as file:  # opened again it keeps what it has
        file.write("a", tensors["a"])
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_model_in_memory_is_its_own_source():
    model = make_model()
    source = ModelSource.of(model)
    assert ModelSource.of(source) is source and source.whole() is model
    assert [layer for _, layer in source.visit()] == list(model.model.layers)


@pytest.mark.parametrize("refusal", [AttributeError, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_that_cannot_take_room_beforehand_is_written_to_all_the_same(refusal, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(refusal, "not here")

    if refusal is AttributeError:  # macOS
        monkeypatch.delattr(tensor_file.os, "posix_fallocate")
    else:
        monkeypatch.setattr(tensor_file.os, "posix_fallocate", refuse)
    tensor = torch.arange(6.0).view(2, 3)
    with tensor_file.TensorFile(tmp_path / "a.safetensors", {"a": (torch.float32, tensor.shape)}) as file:
        file.write("a", tensor)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor)


def test_a_disk_that_is_too_small_is_found_when_the_file_is_laid_out(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        tensor_file.TensorFile(tmp_path / "a.safetensors", {"a": (torch.float32, torch.Size([2]))})
