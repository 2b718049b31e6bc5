"""A checkpoint is saved in the dtype of what it was made of, and is what was compared."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import hf_prune
import slimllm
from slimllm.__main__ import main as slim
from slimllm.deploy import checkpoint, reference
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.weights import Tensors, round_to, weight_files
from slimllm.utils.device import saving_dtype
from tests.conftest import logits, make_ids, make_model
from tests.test_export_gguf import bpe_tokenizer, save

FLAGS = ("--eval_data", "none", "--num_examples", "4", "--seq_len", "16", "--target_sparsity", "0.3", "--device", "cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def prune(tmp_path, text_file, tiny_tokenizer, monkeypatch, capsys):
    """Prunes a random model that is stored in bfloat16; takes more flags, gives (folder, what was printed)."""
    monkeypatch.chdir(tmp_path)
    make_model().to(BF16).save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")

    def run(name, *flags, status=0):
        command = ["--base_model", "base", "--calibration", str(text_file), "--save_ckpt_log_name", name, *FLAGS, *flags]
        assert hf_prune.main(command) == status
        out = capsys.readouterr()
        return tmp_path / "prune_log" / name, out.out + out.err

    return run


def dtypes(folder):
    tensors = Tensors(weight_files(folder))
    return {tensors.read(name).dtype for name in tensors.names}


@pytest.mark.parametrize("distill", ["none", "all", "scales"])
def test_a_run_on_a_cpu_saves_what_it_was_given(prune, distill):
    """Rounded once, at the end: every decision is that of a run which saves float32."""
    flags = ("--distill", distill, "--distill_examples", "8")
    short, said = prune("short", *flags)
    long, _ = prune("long", *flags, "--save_dtype", "float32")
    assert (dtypes(short), dtypes(long)) == ({BF16}, {F32})
    assert [json.loads((folder / "config.json").read_text())["dtype"] for folder in (short, long)] == ["bfloat16", "float32"]
    records = [json.loads((folder / "pruning.json").read_text()) for folder in (short, long)]
    one, other = ([{**layer, "seconds": 0} for layer in record["layers"]] for record in records)
    assert one == other
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (short, long)]
    assert [record["bytes"]["pruned"] for record in records] == sizes and sizes[0] < records[0]["bytes"]["dense"] < sizes[1]
    assert f"{sizes[0] / 1e6:.4g} MB" in said
    if distill == "none":
        rounded, whole = Tensors(weight_files(short)), Tensors(weight_files(long))
        assert all(torch.equal(rounded.read(name), whole.read(name).to(BF16)) for name in whole.names)


def test_the_comparison_is_of_what_was_saved_and_as_strict_as_in_float32(prune):
    folder, _ = prune("short")
    source = loading.open_source(str(folder), reference.reference_dtype(folder), "DIR")
    difference, allowed = reference.compare_with_reference(source, folder)
    largest = float(load_file(folder / reference.REFERENCE)["last_logits"].abs().max())
    assert source.dtype == F32 and difference <= allowed == pytest.approx(1e-5 * largest)


@pytest.mark.parametrize("flags", [(), ("--distill", "scales", "--distill_examples", "8")])
def test_what_float16_cannot_hold_is_named(prune, flags, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = 1e5
    model.save_pretrained(tmp_path / "base")
    folder, said = prune("huge", "--save_dtype", "float16", *flags, status=2)
    assert re.search(r"error: model.layers.1.mlp.down_proj.weight: .* 65504; .*--save_dtype bfloat16", said.splitlines()[-1])
    assert not folder.exists()


@pytest.mark.parametrize("outtype, wanted", [("f32", F32), ("f16", F16), ("bf16", BF16), ("q8_0", BF16)])
def test_a_gguf_file_of_fewer_than_16_bits_becomes_bfloat16(outtype, wanted, tmp_path):
    save("llama_gqa", tmp_path / "base", bpe_tokenizer(), pruned=False)
    assert slim(["export-gguf", str(tmp_path / "base"), "--outtype", outtype]) == 0
    path = str(tmp_path / "base" / f"base-{outtype}.gguf")
    stored = loading.stored_dtype(path, loading.load_config(path))
    assert stored == wanted and saving_dtype("auto", stored, F32) == wanted


@pytest.mark.parametrize(
    "name, stored, computed, wanted",
    [
        ("auto", F32, F32, F32),
        ("auto", F32, BF16, BF16),
        ("auto", F16, BF16, BF16),
        ("auto", None, F32, F32),
        ("auto", torch.float64, F32, F32),
        ("float32", BF16, BF16, F32),
    ],
)
def test_no_bits_are_saved_that_were_not_there(name, stored, computed, wanted):
    assert saving_dtype(name, stored, computed) == wanted


def test_rounding_gives_a_tensor_in_place_what_the_dtype_holds():
    tensor = torch.randn(5, 7).T
    wanted = tensor.to(BF16).float()
    round_to(BF16, tensor, "x")
    assert torch.equal(tensor, wanted)
    round_to(F16, torch.tensor(3.0), "a scalar")
    with pytest.raises(UserError, match="^x: a value is beyond float16"):
        round_to(F16, torch.tensor([7e4]), "x")


def test_saving_from_python_leaves_the_dtype_or_takes_the_one_that_is_named(tmp_path, tiny_tokenizer):
    for name, settings, wanted in (("as it is", {}, F32), ("short", {"save_dtype": "bfloat16"}, BF16)):
        model = make_model()
        result = slimllm.prune(model, tiny_tokenizer, calibration=make_ids(vocab=80), target_sparsity=0.3, **settings)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for folder in (name, f"{name}, again"):
            slimllm.save(result, tmp_path / folder)
            assert dtypes(tmp_path / folder) == {wanted}
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())  # in memory nothing is rounded
        for parameter in result.model.parameters():
            parameter.data = parameter.data.to(wanted).float()
        assert torch.equal(logits(checkpoint.load(tmp_path / name, F32), make_ids()), logits(result.model, make_ids()))
