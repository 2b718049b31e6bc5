"""What people hand to ``slimllm.prune``: taken where it can be, named where not, and left as it was."""

import copy
import os
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft import inject_adapter_in_model as inject
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel

import hf_prune
import slimllm
from slimllm.commands import COMMANDS
from slimllm.models.given import check_model
from slimllm.settings.pruning import PruneConfig
from slimllm.settings.training import TrainConfig
from tests.conftest import FAMILY_CASES, TEXT, family_config, logits, make_ids, make_model

LORA = dict(r=2, target_modules=["q_proj"])


def changed(change, **sizes):
    """A model in which ``change`` altered something in place."""
    model = make_model(**sizes)
    with torch.no_grad():
        change(model)
    return model


class Linear8bitLt(nn.Linear):
    """As bitsandbytes keeps a weight."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=False)
        self.weight = nn.Parameter(dense.weight.data.to(torch.int8), requires_grad=False)


def int8_layer(model):
    model.model.layers[1].mlp.up_proj = Linear8bitLt(model.model.layers[1].mlp.up_proj)


def int8_parameter(model):
    projection = model.model.layers[1].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)


def with_quantization(model):
    model.config.quantization_config = {"quant_method": "awq"}


def without_last_layer(model):
    model.model.layers = model.model.layers[:-1]


def spoiled(name, value=float("nan"), dtype=torch.float32):
    return lambda model: model.to(dtype).get_parameter(name).view(-1)[3:4].fill_(value)


REFUSED = {
    "its name": (lambda: "some/model", "'some/model' is a name; give the model, as from_pretrained does"),
    "its folder": (lambda: pathlib.Path("model"), "'model' is a name; give the model"),
    "nothing": (lambda: None, "a NoneType, not a causal LM of transformers"),
    "an own module": (lambda: nn.Linear(4, 4), "a Linear, not a causal LM"),
    "a PeftModel": (lambda: get_peft_model(make_model(), LoraConfig(**LORA)), r"an adapter of peft is on it; merge.*merge_and_unload"),
    "injected adapters": (lambda: changed(lambda model: inject(LoraConfig(**LORA), model)), "an adapter of peft is on it"),
    "added adapters": (lambda: changed(lambda model: model.add_adapter(LoraConfig(**LORA))), "an adapter of peft is on it"),
    "headless": (lambda: LlamaModel(family_config("llama_gqa")), "a LlamaModel has no output head"),
    "a classifier": (lambda: LlamaForSequenceClassification(family_config("llama_gqa")), "has no output head"),
    "int8 layers": (lambda: changed(int8_layer), r"layers.1.mlp.up_proj is a .*Linear8bitLt, not a plain Linear"),
    "int8 parameters": (lambda: changed(int8_parameter), "up_proj.weight is int8, as in quantized models"),
    "float8 parameters": (lambda: make_model().to(torch.float8_e4m3fn), "is float8_e4m3fn, as in quantized models"),
    "by its config": (lambda: changed(with_quantization), "its weights are quantized"),
    "by its flag": (lambda: changed(lambda model: setattr(model, "is_quantized", True)), "its weights are quantized"),
    "meta": (lambda: make_model().to("meta"), "on the meta device, where nothing is kept; load it again"),
    "half meta": (lambda: changed(lambda model: model.model.layers[1].to("meta")), "on the meta device"),
    "offloaded": (lambda: changed(cpu_offload), "accelerate moves its weights .*without device_map"),
    "mixed dtypes": (lambda: changed(lambda model: model.model.norm.bfloat16()), "bfloat16 and float32; .*in one dtype"),
    "fewer layers": (lambda: changed(without_last_layer), "layers.1.* is none in the model and"),
    "NaN in the embeddings": (lambda: changed(spoiled("model.embed_tokens.weight")), "numbers of model.embed_tokens.weight are not finite"),
    "NaN in the norm": (lambda: changed(spoiled("model.norm.weight")), "numbers of model.norm.weight are not finite; load or train"),
    "inf in the head": (lambda: changed(spoiled("lm_head.weight", float("inf"))), "numbers of lm_head.weight are not finite"),
    "NaN in a layer": (lambda: changed(spoiled("model.layers.1.mlp.down_proj.weight")), "layers.1.mlp.down_proj.weight are not finite"),
    "inf in float16": (
        lambda: changed(spoiled("lm_head.weight", float("inf"), torch.float16)),
        "lm_head.weight are not finite; they are too large for float16: load it in bfloat16",
    ),
    "widths": (lambda: changed(lambda model: setattr(model.config, "intermediate_size", 40)), "48. in the model and .*40. by its config"),
    "kv heads": (lambda: changed(lambda model: setattr(model.config, "num_key_value_heads", 3)), "num_attention_heads 4 is no multiple"),
}


def look_of(model):
    """What tells whether a model was touched."""
    if not isinstance(model, nn.Module):
        return None
    tensors = {name: (id(p), p._version, p.dtype, p.device) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return tensors, modes, copy.deepcopy(getattr(model, "config", None) and model.config.to_dict())


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_cannot_be_pruned_is_named_and_left_as_it_was(what):
    make, said = REFUSED[what]
    model = make()
    before = look_of(model)
    with pytest.raises(slimllm.UserError, match=said) as raised:
        slimllm.prune(model, calibration=make_ids(), pruning_ratio=0.5)
    assert "\n" not in str(raised.value) and look_of(model) == before


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_dense_model_of_every_family_is_taken(case):
    model = make_model(case)
    assert check_model(model) is model and check_model(model.bfloat16()) is model


def train_mode(model):
    model.train()
    model.model.layers[0].eval()  # each module's own is given back
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


def checkpointing(model):
    model.train().gradient_checkpointing_enable()
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        compiled_in_place,
        train_mode,
        checkpointing,
        lambda model: model.requires_grad_(False),
    ],
    ids=["compiled", "parallel", "both", "compiled in place", "train mode", "checkpointing", "frozen"],
)
def test_what_is_around_a_model_changes_nothing(wrap, tmp_path, tiny_tokenizer):
    settings = dict(calibration=make_ids(), pruning_ratio=0.5)
    expected = slimllm.prune(make_model(), **settings).model
    dense = make_model()
    given = wrap(dense)
    modes = [module.training for module in given.modules()]
    result = slimllm.prune(given, tiny_tokenizer, **settings)
    assert result.model is dense and [module.training for module in given.modules()] == modes
    slimllm.save(result, tmp_path / "saved")
    assert [module.training for module in given.modules()] == modes
    assert torch.equal(logits(dense.eval(), make_ids()), logits(expected, make_ids()))


def test_the_mode_is_given_back_where_something_is_wrong():
    model = train_mode(make_model())
    modes = [module.training for module in model.modules()]
    with pytest.raises(slimllm.UserError, match="token ids are"):
        slimllm.prune(model, calibration=make_ids()[0])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "form",
    [lambda ids: ids.numpy(), lambda ids: ids.numpy().astype(np.uint16), lambda ids: ids.tolist(), tuple, lambda ids: ids.int()],
    ids=["array", "uint16", "lists", "rows", "int32"],
)
def test_token_ids_may_be_tensors_arrays_or_lists(form):
    result = slimllm.prune(make_model(), calibration=form(make_ids()), pruning_ratio=0.5)
    assert torch.equal(result.calibration.ids, make_ids())


def test_a_calibration_file_may_be_a_path(text_file, tiny_tokenizer):
    result = slimllm.prune(make_model(), tiny_tokenizer, calibration=text_file, num_examples=4, seq_len=16)
    assert result.calibration.source == str(text_file)


@pytest.mark.parametrize(
    "given, said",
    [
        (make_ids().float(), "token ids are integers, not float32"),
        (np.full((2, 8), np.nan), "token ids are integers, not float64"),
        ([[1.0, 2.0]], "token ids are integers, not float"),
        (make_ids() > 3, "token ids are integers, not bool"),
        (make_ids() - 97, "token id -[0-9]+ is outside the model's vocabulary of 97"),
        (make_ids() + 97, "is outside the model's vocabulary of 97"),
        ([], "calibration: is empty"),
        ([[]], r"\[samples, length\], not \[1, 0\]"),
        (torch.zeros(0, 8, dtype=torch.long), r"\[samples, length\], not \[0, 8\]"),
        ([1, 2, 3], r"\[samples, length\], not \[3\]"),
        ([[1, 2], [3]], "lists of integers all of one length"),
        (["text", 3], "neither texts nor token ids"),
        ([None], "neither texts nor token ids"),
        ({"input_ids": [[1]]}, "is a dict; give texts"),
        (7, "is a int; give texts"),
        (["\n \n\n"], "nothing but blanks"),
        (["good\ud800"], "half of a surrogate pair"),
    ],
    ids=[
        *("float32", "NaN", "floats", "bool", "negative", "too large", "no list", "empty list", "empty tensor", "flat", "ragged"),
        *("text and number", "None", "dict", "number", "blanks", "surrogate"),
    ],
)
def test_a_calibration_that_is_none_is_named(given, said, tiny_tokenizer):
    with pytest.raises(slimllm.UserError, match=said):
        slimllm.prune(make_model(), tiny_tokenizer, calibration=given)


@pytest.mark.parametrize("kind", [PruneConfig, TrainConfig])
@pytest.mark.parametrize(
    "name, value, said",
    [
        ("target_sparsity", "0.2", "--target_sparsity '0.2': must be a number"),
        ("seed", 1.5, "--seed 1.5: must be a whole number"),
        ("num_examples", True, "--num_examples True: must be a whole number"),
        ("new_bias", 1, "--new_bias 1: must be True or False"),
        ("recipe", 3, "--recipe 3: must be a string"),
        ("seq_len", None, "--seq_len None: must be a whole number"),
        ("device", torch.device("cpu"), r"--device device\(type='cpu'\): must be a string"),
        ("eval_data", (3,), "--eval_data 3: must be a string"),
        ("base_model", 3, "--base_model 3: must be a string"),
        ("learning_rate", "1e-4", "--learning_rate '1e-4': must be a number"),
        ("prune_model", b"x", "--prune_model b'x': must be a string"),
        ("batch_size", 8.0, "--batch_size 8.0: must be a whole number"),
        ("merge", "yes", "--merge 'yes': must be True or False"),
    ],
)
def test_a_setting_of_another_type_is_named(kind, name, value, said):
    required = {"base_model" if kind is PruneConfig else "prune_model": "m"}
    if name not in kind.__dataclass_fields__:
        return
    with pytest.raises(slimllm.UserError, match=said):
        kind(**{**required, name: value})


def test_settings_become_plain():
    config = PruneConfig(base_model=pathlib.Path("m"), seed=np.int64(3), alpha=np.float32(2), eval_data="none")
    assert (config.base_model, config.seed, config.alpha, config.eval_data) == ("m", 3, 2.0, ("none",))
    assert type(config.seed) is int and type(config.alpha) is float


def test_settings_and_tokenizer_of_another_kind_are_named(tiny_tokenizer):
    for arguments, said in (
        (dict(target_sparsity="0.2"), "--target_sparsity '0.2': must be a number"),
        (dict(config={"seed": 1}), "config: a dict, not a PruneConfig"),
        (dict(tokenizer="gpt2"), "tokenizer: a str, not a tokenizer of transformers"),
        (dict(tokenizer=tiny_tokenizer.backend_tokenizer), "tokenizer: a Tokenizer, not a tokenizer of transformers"),
        (dict(tokenizer=SimpleNamespace()), "tokenizer: a SimpleNamespace"),
    ):
        with pytest.raises(slimllm.UserError, match=said):
            slimllm.prune(make_model(), calibration=make_ids(), **arguments)


def test_a_text_with_a_token_that_the_model_lacks_is_named(tiny_tokenizer):
    tiny_tokenizer.add_tokens(["zebra"] + [f"<{i}>" for i in range(20)])
    with pytest.raises(slimllm.UserError, match="--calibration texts: token id 8[0-9] .*outside the model's vocabulary of 80"):
        slimllm.prune(make_model(vocab_size=80), tiny_tokenizer, calibration=[TEXT, "zebra" * 20000], num_examples=4, seq_len=16)


def test_a_plan_that_is_a_pipe_or_too_deep_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, said in (
        ("pipe.json", "a pipe or device, not a plain file"),
        ("deep.json", "not a JSON object"),
        ("no.json", "no such file"),
    ):
        with pytest.raises(slimllm.UserError, match=f"--plan .*{name}: {said}"):
            slimllm.prune(make_model(), calibration=make_ids(), plan=str(tmp_path / name))


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("base_model", "a\0b", "--base_model 'a.x00b': not UTF-8 text"),
        ("save_ckpt_log_name", "\udcff", "not UTF-8 text"),
        ("eval_data", ("t.txt", "\ud800"), "--eval_data '.ud800': not UTF-8 text"),
        ("seed", 10**30, "--seed: too large a number; at most"),
        ("seq_len", 10**400, "--seq_len: too large a number"),
    ],
)
def test_a_value_that_nothing_can_be_is_named(name, value, said):
    with pytest.raises(slimllm.UserError, match=said):
        PruneConfig(**{"base_model": "m", name: value})
    items = [str(item) for item in (value if isinstance(value, tuple) else [value])]
    with pytest.raises(slimllm.UserError, match=said):
        COMMANDS["prune"].parsed("prune", ["--base_model", "m", f"--{name}", *items])


def test_a_mistake_is_one_line_whatever_is_in_it(capsys):
    assert hf_prune.main(["--base_model", "m", "--device", "a\nb"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
