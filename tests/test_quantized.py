"""Models whose files hold FP8 or MXFP4: read, pruned and written as if they had been dequantized before."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import hf_prune
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.quantized import Fp8, Mxfp4
from slimllm.models.weights import Tensors
from tests.conftest import logits, make_ids, make_model

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # what three of the four bits of a number say; the first is its sign
FORMS = {  # case of the model, what its config says besides
    "fp8": ("deepseek_v3", dict(kv_lora_rank=16)),  # a matrix has 20 rows, so that one block of 16 is not full
    "fp8 in full blocks": ("deepseek_v3", {}),
    "fp8 of a dense model": ("qwen3", {}),
    "mxfp4": ("gpt_oss", dict(intermediate_size=64)),
}


def in_fp8(tensors, block):
    """(the tensors with the matrices of projections in FP8, the same as numbers)"""
    stored, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if "proj" in name and name.endswith(".weight"):
            rows, columns = (-(-size // block) for size in tensor.shape)
            scales = torch.empty(rows, columns)
            numbers, codes = torch.empty_like(tensor), torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
            for i in range(rows):
                for j in range(columns):
                    place = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                    scales[i, j] = tensor[place].float().abs().max() / 448
                    codes[place] = (tensor[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
                    numbers[place] = (codes[place].float() * scales[i, j]).to(tensor.dtype)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = numbers
    return stored, plain


def in_mxfp4(tensors):
    """(the tensors with the experts in MXFP4, of random bits, the same as numbers)"""
    stored, plain, generator = dict(tensors), dict(tensors), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        bits = torch.stack([blocks % 16, blocks // 16], -1).flatten(-2).long()  # the lower half of a byte comes first
        numbers = torch.tensor(E2M1)[bits % 8] * (1 - 2.0 * (bits // 8)) * 2.0 ** (scales[..., None].float() - 127)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = numbers.flatten(-2).transpose(1, 2).to(tensors[name].dtype).contiguous()
    return stored, plain


@pytest.fixture(params=FORMS)
def folders(request, tmp_path, tiny_tokenizer):
    """(a quantized model, the same dequantized) as folders."""
    case, settings = FORMS[request.param]
    model = make_model(case, **settings).to(torch.bfloat16)
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    model.save_pretrained(plain)
    tiny_tokenizer.save_pretrained(plain)
    shutil.copytree(plain, quantized)
    tensors = load_file(plain / "model.safetensors")
    stored, numbers = in_mxfp4(tensors) if request.param == "mxfp4" else in_fp8(tensors, 16)
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    how = {"quant_method": "mxfp4"} if request.param == "mxfp4" else {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return quantized, plain


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_the_numbers_are_those_of_the_dequantized_model(dtype, folders):
    quantized, plain = (loading.open_source(str(folder), dtype) for folder in folders)
    assert quantized.dtype == plain.dtype
    expected = plain.whole().state_dict()
    for name, tensor in quantized.whole().state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for (_, layer), (_, other) in zip(quantized.visit(), plain.visit()):  # one at a time
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("folders", [form for form in FORMS if form != "fp8"], indirect=True)  # it wants blocks that are all full
def test_transformers_reads_the_same_numbers(folders):
    how = json.loads((folders[0] / "config.json").read_text())["quantization_config"]
    made = Mxfp4Config if how.pop("quant_method") == "mxfp4" else FineGrainedFP8Config
    theirs = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16, quantization_config=made(**how, dequantize=True))
    assert torch.equal(logits(loading.load_model(str(folders[0]), "auto"), make_ids()), logits(theirs, make_ids()))


@pytest.mark.parametrize("folders", ["fp8", "mxfp4"], indirect=True)
def test_what_is_pruned_of_it_is_what_is_pruned_of_the_dequantized_model(folders, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--calibration", str(text_file), "--eval_data", f"t={text_file}", "--max_seq_len", "16", "--eval_limit", "2"]
    flags += ["--num_examples", "4", "--seq_len", "16", "--target_sparsity", "0.2"]
    said = []
    for folder in folders:
        assert hf_prune.main(["--base_model", folder.name, *flags, "--dry_run"]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "memory" in line or "parameters" in line])
        assert hf_prune.main(["--base_model", folder.name, *flags, "--output_dir", f"{folder.name}-out"]) == 0
        assert "the same logits" in capsys.readouterr().out
    assert said[0] == said[1] and said[0]
    one, other = (load_file(f"{folder.name}-out/model.safetensors") for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.dtype in (torch.bfloat16, torch.float32) for tensor in one.values())
    assert "quantization_config" not in json.loads((tmp_path / "quantized-out" / "config.json").read_text())


def reader(kind, tmp_path, tensors, **settings):
    save_file(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    return kind(Tensors([tmp_path / "t.safetensors"]), torch.float32, settings)


def test_scales_may_be_one_number_exponents_or_of_stacked_matrices(tmp_path):
    codes = torch.randn(2, 4, 6).to(torch.float8_e4m3fn)
    scales = torch.tensor([[[1.0, 2.0, 4.0]] * 2, [[0.5, 0.25, 8.0]] * 2])
    exponents = torch.tensor([[126, 128, 127], [127, 125, 130]], dtype=torch.uint8)
    tensors = {"one": codes[0], "one_scale_inv": torch.tensor(0.5), "one_activation_scale": torch.tensor(3.0)}
    tensors |= {"exponents": codes[1].clone(), "exponents_scale_inv": exponents, "stacked": codes.clone(), "stacked_scale_inv": scales}
    read = reader(Fp8, tmp_path, tensors)
    assert sorted(read.names) == ["exponents", "one", "stacked"] and read.shape("stacked") == [2, 4, 6]
    assert torch.equal(read.read("one"), codes[0].float() / 2)
    factors = 2.0 ** (exponents.float() - 127)
    assert torch.equal(read.read("exponents"), codes[1].float() * factors.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(read.read("stacked"), codes.float() * scales.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert read.read("one", torch.bfloat16).dtype == torch.bfloat16


def bytes_of(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "kind, tensors, settings, said",
    [
        (Fp8, {"_scale_inv": torch.ones(4, 2)}, {"weight_block_size": [4, 3]}, "w: 4 scales do not divide its 6 rows or 6 columns"),
        (Fp8, {"_scale_inv": torch.ones(2)}, {}, r"w: its scales are \[2\], and it is \[6, 6\]"),
        (Fp8, {"_scale_inv": torch.ones(0, 2)}, {}, r"w: its scales are \[0, 2\]"),
        (Fp8, {"_scale_inv": torch.ones(3, 2, 2)}, {}, r"w: its scales are \[3, 2, 2\]"),
        (Fp8, {"_scale_inv": torch.ones(1, 2, 2)}, {}, None),
        (Fp8, {"_scale_inv": torch.ones(2, 2)}, {"weight_block_size": 3}, "weight_block_size is 3, not two whole numbers"),
        (Fp8, {"_scale_inv": torch.ones(2, 2)}, {"weight_block_size": [3, "3"]}, "weight_block_size is .*correct config.json"),
        (Mxfp4, {"_blocks": bytes_of(3, 5, 2, 16)}, {}, "w: the files hold its blocks, and no scales"),
        (Mxfp4, {"_blocks": bytes_of(3, 5, 2, 16), "_scales": bytes_of(3, 5, 1)}, {}, r"w: its scales are \[3, 5, 1\], and its blocks"),
        (Mxfp4, {"_blocks": bytes_of(3, 5, 2, 16), "_scales": bytes_of(2, 5, 2)}, {}, r"w: its scales are \[2, 5, 2\], and its blocks"),
        (Mxfp4, {"_blocks": bytes_of(3, 5, 32), "_scales": bytes_of(3, 5)}, {}, r"w: its scales are \[3, 5\], and its blocks"),
        (Mxfp4, {"_blocks": bytes_of(3, 5, 2, 16), "_scales": torch.ones(3, 5, 2)}, {}, "w: w_scales is F32, not bytes"),
    ],
)
def test_scales_that_are_missing_or_fit_not_are_named_before_any_is_read(kind, tensors, settings, said, tmp_path):
    stored = {f"w{name}": tensor for name, tensor in tensors.items()} | (
        {"w": torch.ones(6, 6).to(torch.float8_e4m3fn)} if kind is Fp8 else {}
    )
    read = reader(kind, tmp_path, stored, **settings)
    if said is None:
        read.check("--base_model M")
        assert torch.equal(read.read("w"), torch.ones(6, 6))
        return
    with pytest.raises(UserError, match=f"^--base_model M: {said}"):
        read.check("--base_model M")


def test_a_model_whose_scales_do_not_fit_is_refused_when_it_is_opened(tmp_path):
    model = make_model("gpt_oss", intermediate_size=64).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored, _ = in_mxfp4(load_file(tmp_path / "model.safetensors"))
    name = "model.layers.0.mlp.experts.down_proj"
    stored[f"{name}_scales"] = stored[f"{name}_scales"][..., :1].contiguous()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UserError, match=f"{name}: its scales are .*download the model again"):
        loading.open_source(str(tmp_path), "auto")


def test_a_tensor_of_4_bits_has_the_shape_of_the_model_s(tmp_path):
    blocks, scales = torch.zeros(3, 5, 2, 16, dtype=torch.uint8), torch.full((3, 5, 2), 127, dtype=torch.uint8)
    read = reader(Mxfp4, tmp_path, {"w_blocks": blocks, "w_scales": scales, "b": torch.ones(2)})
    assert sorted(read.names) == ["b", "w"] and read.shape("w") == [3, 64, 5] == list(read.read("w").shape)
    assert read.is_number("w") and torch.equal(read.read("b"), torch.ones(2))


@pytest.mark.parametrize("change, said", [("codes", "is I8, as in quantized weights"), ("scale", "is F8_E4M3, as in quantized weights")])
def test_what_is_stored_in_another_way_is_refused_by_name(change, said, tmp_path):
    model = make_model("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored, _ = in_fp8(load_file(tmp_path / "model.safetensors"), 16)
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "codes":
        stored[name] = stored[name].view(torch.int8)
    else:
        del stored[f"{name}_scale_inv"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match=f"{name} {said}"):
        loading.open_source(str(tmp_path), "auto")
