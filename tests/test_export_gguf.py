"""GGUF export and its proof: every file here is loaded by an unmodified llama.cpp and compared with transformers."""

import json
import re
import shutil
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import slimllm
from slimllm import stages
from slimllm.__main__ import main as slim
from slimllm.data import texts
from slimllm.deploy import checkpoint, export_gguf, gguf_architecture, gguf_tokenizer, reference, runtimes, verify
from slimllm.deploy.llama_cpp import LlamaCpp
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.families import FAMILIES
from slimllm.models.shape import HEADS_FILL_HIDDEN
from slimllm.models.stored_names import Stacked
from slimllm.run import Run
from slimllm.settings.pruning import PruneConfig
from tests.conftest import (
    FAMILY_CASES,
    LLAMA3,
    MIXTURE_CASES,
    ROOT,
    TEXT,
    YARN,
    family_config,
    make_config,
    make_ids,
    make_model,
    make_shape,
    prune,
    runtimes_of,
    tiny_tokenizer_of,
)

VOCAB = 320
SIZES = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
SPLITS = {  # name in the file -> pre-tokenizer
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    **{
        name: pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in key),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for key, name in gguf_tokenizer.PRE_TOKENIZERS.items()
        if name not in ("gpt-2", "smollm")
    },
}
SAMPLES = (
    TEXT[:300],
    "In 2024, 12345 users' devices weren't UP-to-date:\n\n\tα β γ – “naïve” 漢字!!  ok\r\n   end",
)


def bpe_tokenizer(split="gpt-2", more=()):
    """A byte-level BPE tokenizer trained on the tests' text, and on ``more``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITS[split]
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "12345 2024 users devices", *more], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}")


@pytest.fixture(scope="module")
def spm_tokenizer(tmp_path_factory):
    """A SentencePiece BPE tokenizer with byte fallback, as Llama 2's, read by transformers from its tokenizer.model."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    return AutoTokenizer.from_pretrained(folder)


def save(case, folder, tokenizer, pruned=True, sizes=SIZES, **settings):
    """A random model, dense or pruned, as a checkpoint folder."""
    model = make_model(case, **sizes)
    ids = make_ids(vocab=300)
    if pruned:
        shape = make_shape(case, **sizes)
        config = make_config(shape=shape, **{"pruned_layers": 2, "recovery": "least_squares", **settings})
        prune(model, ids, config)
        runtimes.convert_for_runtime(model, config.runtime)
    checkpoint.save(model, tokenizer, folder, ids[:2], "dense")
    return folder


def checks(folder, path, length=20):
    """The rows of ``slimllm.verify`` for one file, as {last words of the check: Check}."""
    model, tokenizer = checkpoint.load(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    blocks = texts.in_blocks(texts.token_ids(TEXT, tokenizer), length, None)[:1]
    return verify.checks_of_file(str(path), model, tokenizer, TEXT, blocks)


def architecture(path):
    return gguf.GGUFReader(path).fields["general.architecture"].contents()


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "llama_gqa"])
def test_a_tensor_has_the_same_values_in_whatever_dtype_it_is_read(case, tmp_path):
    """Gemma's norms lie in a file with one added: in half precision that sum has fewer digits than what is left of it."""
    path = export_gguf.export(save(case, tmp_path / "dense", bpe_tokenizer(), pruned=False), tmp_path / "x.gguf", "f32")
    exact, rounded = (loading.open_source(str(path), dtype) for dtype in (torch.float32, torch.bfloat16))
    for name in exact.weights.names:
        assert torch.equal(rounded.tensor(name, torch.bfloat16), exact.tensor(name, torch.float32).bfloat16()), name


BIASED = ("qwen3_biases", "smollm3_biases", "ernie4_5_biases")  # in the output projections, for which their architectures have no place
NOT_HELD = {  # what llama.cpp has no place for -> why
    **{
        (case, "any"): "differ from the 4 heads.* takes one width for all layers, no biases.*--runtime gguf"
        for case in (
            *("qwen3", "gemma2", "gemma3", "gemma3_mha", "smollm3", "ministral3", "glm", "glm4", "olmo2", "olmo3", "exaone4"),
            *("ernie4_5", "seed_oss", "seed_oss_plain", "hunyuan_v1_dense", "gemma", "olmo", "stablelm", "arcee", "cohere", "cohere2"),
        )
    },
    **{
        (case, "any"): "differ from the .* takes one width for all layers" for case in ("apertus", "jais2", "starcoder2", "nemotron", "phi")
    },
    **{
        (case, form): f"{FAMILY_CASES[case][0]}: llama.cpp has no architecture that computes it"
        for case in FAMILY_CASES
        for form in ("dense", "any", "transformers")
        if FAMILIES[FAMILY_CASES[case][0]].gguf is None
    },
    ("qwen3_5", "any"): "differ from the .* qwen35 takes one width for all layers",
    ("minicpm3", "any"): "differ from the .* minicpm3 takes one width for all layers",
    ("qwen3_tied", "any"): "differ from .*openelm takes no biases of the output projections only",
    ("smollm3", "transformers"): "biases of the output projections",
    **{(case, "transformers"): "biases of the output projections" for case in ("ernie4_5", "seed_oss", "seed_oss_plain", "arcee")},
    **{(case, form): "biases of the output" for case in BIASED for form in ("dense", "transformers", "gguf")},
    **{(case, "any"): "differ from" for case in BIASED},
    **{
        (case, "transformers"): "2 heads of size .* takes .*heads that fill the hidden size only"
        for case in ("glm", "exaone4", "olmo", "starcoder2", "nemotron", "cohere", "cohere2", "phi")
    },
    **{("exaone4_window", form): "sliding_window: llama.cpp's exaone4" for form in ("dense", "any", "transformers", "gguf")},
    **{
        (case, form): "qk_.*norm: .* not written to GGUF"
        for case in ("stablelm_parallel", "cohere_normed")
        for form in ("dense", "any", "transformers", "gguf")
    },
}


@pytest.mark.parametrize("case", FAMILY_CASES)
@pytest.mark.parametrize("form", ["dense", "any", "transformers", "gguf"])
def test_llama_cpp_computes_the_same_model(case, form, tmp_path):
    family = FAMILIES[FAMILY_CASES[case][0]]
    filled = family.gguf in HEADS_FILL_HIDDEN and not family.gguf_free
    sizes = {**SIZES, "head_dim": 16} if filled else SIZES
    if form not in ("dense", *runtimes_of(case)):
        with pytest.raises(UserError, match="--runtime gguf: llama.cpp has no architecture that computes this model"):
            make_config(shape=make_shape(case, **sizes), runtime=form)
        return
    folder = save(case, tmp_path, bpe_tokenizer(), form != "dense", sizes, round_to=8, runtime="any" if form == "dense" else form)
    if (case, form) in NOT_HELD:
        with pytest.raises(UserError, match=NOT_HELD[case, form]):
            export_gguf.export(folder, tmp_path / "x.gguf", "f32")
        assert not list(tmp_path.glob("*.gguf*"))
        return
    path = export_gguf.export(folder, tmp_path / "x.gguf", "f32")
    free = family.gguf_free and form in ("any", "gguf") and case != "qwen3"
    # qwen2 and phi3 take no heads of 8 in their own architecture: 4 of them are not the hidden size
    assert architecture(path) == (family.gguf_free if free or case in ("qwen2", "qwen2_window", "phi3") else family.gguf)
    # llama.cpp's gelu is a table of half precision, and these weights are larger than a model's
    allowed = 5e-3 if family.activation != "silu" else 1e-3
    for check in checks(folder, path):
        assert check.measured < allowed, check


@pytest.mark.parametrize("case", ["gemma4", "gemma4_inputs", "gemma4_shared", "gemma4_unified"])
@pytest.mark.parametrize("form", ["dense", "gguf"])
def test_llama_cpp_computes_the_same_gemma_4(case, form, tmp_path, monkeypatch):
    """Once transformers' gelu is rounded as llama.cpp's table is: there are two of them in each layer, and norms behind both. Its scores
    are not divided by the head size, and are made smaller here, so that the last digits do not decide which tokens are looked at.
    """
    gelu, made = torch.nn.functional.gelu, make_model

    def softer(*args, **sizes):
        model = made(*args, **sizes)
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data *= 0.2
        return model

    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, **how: gelu(x.half().float(), **how).half().float())
    monkeypatch.setattr(sys.modules[__name__], "make_model", softer)
    sizes = dict(SIZES, head_dim=32, global_head_dim=64, num_hidden_layers=6)
    if case in ("gemma4_inputs", "gemma4_shared"):
        sizes["vocab_size_per_layer_input"] = SIZES["vocab_size"]
    folder = save(case, tmp_path, bpe_tokenizer(), form == "gguf", sizes, round_to=8, runtime=form)
    path = export_gguf.export(folder, tmp_path / "x.gguf", "f32")
    assert architecture(path) == "gemma4"
    for check in checks(folder, path):
        assert check.measured < 5e-3, check


@pytest.mark.parametrize(
    "case, settings, why",
    [
        ("gemma4_moe", {}, "enable_moe_block: experts beside the feed-forward part"),
        ("gemma4", {"attention_bias": True}, "attention_bias: llama.cpp's gemma4 has none"),
        ("gemma4_unified", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention: llama.cpp reads from left to right"),
        (
            "gemma4_shared",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]},
            "num_kv_shared_layers: llama.cpp's gemma4 reads keys and values of one layer with a window",
        ),
        ("minicpm3", {"scale_emb": 3}, "scale_emb 3: llama.cpp's minicpm3 computes 12 only"),
        ("minicpm3", {"q_lora_rank": None}, "q_lora_rank null: llama.cpp's minicpm3"),
    ],
)
def test_what_their_graphs_compute_otherwise_is_refused(case, settings, why):
    with pytest.raises(UserError, match=f"^{why}"):
        gguf_architecture.architecture_of(family_config(case, **settings), biased=False)


@pytest.mark.parametrize(
    "types, held", [("lllf", True), ("llfllf", True), ("lllfl", True), ("fl", False), ("lflffl", False), ("llflf", False)]
)
def test_full_attention_has_to_come_in_each_layer_of_a_fixed_number(types, held, tmp_path, monkeypatch):
    """A graph of llama.cpp's has no list of them; three value heads share a key head here."""
    kinds = {"l": "linear_attention", "f": "full_attention"}
    sizes = dict(num_key_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=6)
    monkeypatch.setitem(FAMILY_CASES, "qwen3_5", ("qwen3_5_text", {**sizes, "layer_types": [kinds[letter] for letter in types]}))
    folder = save("qwen3_5", tmp_path, bpe_tokenizer(), False, {**SIZES, "num_hidden_layers": len(types)})
    if not held:
        with pytest.raises(UserError, match="layer_types: llama.cpp wants full attention in each layer of a fixed number"):
            export_gguf.export(folder, tmp_path / "x.gguf", "f32")
        return
    assert all(check.passed for check in checks(folder, export_gguf.export(folder, tmp_path / "x.gguf", "f32")))
    assert checks(folder, export_gguf.export(folder, tmp_path / "y.gguf", "q8_0"))[0].passed  # it is loaded, and splits text alike


LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
HUNYUAN_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}  # as it is published
MIXTURES = {  # those that llama.cpp computes -> what their config has to say for that
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4, "head_dim": 16},
    "minimax_m2": {},
    "qwen2_moe": {"head_dim": 16},
    "qwen3_5_moe": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "qwen3_next": {"mlp_only_layers": []},
    "glm4_moe": {},
    "dots1": {"num_key_value_heads": 4, "n_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
    "ernie4_5_moe": {"use_bias": False},
    "exaone_moe": {},
    "hunyuan_v1_moe": {"moe_topk": [2, 2], "rope_parameters": HUNYUAN_ROPE},
    "solar_open": {},
    "gpt_oss": LINEAR_ROPE,
    "deepseek_v2": {},
    "deepseek_v3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": None}, "qk_rope_head_dim": 16, "head_dim": 16},
    "deepseek_v3_groups": {},
    "glm4_moe_lite": {},
}


def save_mixture(case, folder, prune, **sizes):
    """A mixture, pruned for llama.cpp, as a checkpoint folder; half of its experts, heads or channels go, or nothing."""
    sizes = {**SIZES, "num_hidden_layers": 2, "moe_intermediate_size": 32, **MIXTURES[case], **sizes}
    if prune is None:
        return save(case, folder, bpe_tokenizer(), False, sizes)
    return save(case, folder, bpe_tokenizer(), True, sizes, prune=prune, round_to=8, recovery="none", runtime="gguf")


@pytest.mark.parametrize(
    "case, prune",
    [
        *((case, "both" if len(FAMILIES[MIXTURE_CASES[case][0]].part("experts").sizes) > 1 else "experts") for case in MIXTURES),
        *((case, "heads") for case in ("granitemoe", "qwen3_5_moe", "gpt_oss")),
        ("mixtral", None),
    ],
)
def test_a_mixture_that_was_pruned_for_llama_cpp_is_the_same_there(case, prune, tmp_path):
    folder = save_mixture(case, tmp_path, prune)
    path = export_gguf.export(folder, tmp_path / "x.gguf", "f32")
    assert architecture(path) == FAMILIES[MIXTURE_CASES[case][0]].gguf
    for check in checks(folder, path):
        assert check.measured < 1e-3, check


@pytest.mark.parametrize("case, fits", [("qwen2_moe", False), ("olmoe", False), ("olmo", False), ("qwen2", True), ("qwen3_moe", True)])
def test_heads_that_llama_cpp_does_not_take_are_refused_before_anything_is_pruned(case, fits):
    def plan(**sizes):
        run = Run.of(PruneConfig(base_model="m", target_sparsity=0.0, runtime="gguf"), family_config(case, **sizes))
        return stages.plans_of(run)

    sizes = {**MIXTURES.get(case, {}), "hidden_size": 64, "num_attention_heads": 4}
    plan(**sizes | {"head_dim": 16})
    narrow = sizes | {"head_dim": 8}
    if fits:
        plan(**narrow)
    else:
        with pytest.raises(UserError, match="^--runtime gguf: 4 heads of size 8: .* takes heads that fill the hidden size 64 only"):
            plan(**narrow)


def test_texts_that_begin_alike_are_not_mixed_up_where_layers_have_windows(tmp_path):
    folder = save_mixture("gpt_oss", tmp_path, None)
    path, model = export_gguf.export(folder, tmp_path / "x.gguf", "f32"), checkpoint.load(folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = texts.in_blocks(texts.token_ids(TEXT, tokenizer), 31, None)[:2]
    blocks[1, 0] = blocks[0, 0]
    for check in verify.checks_of_file(str(path), model, tokenizer, TEXT, blocks):
        assert check.measured < 1e-3, check


def test_every_mixture_with_an_architecture_is_compared():
    written = {name for name, family in FAMILIES.items() if family.is_mixture and family.gguf}
    assert {MIXTURE_CASES[case][0] for case in MIXTURES} == written - {"gemma4_text"}  # which is written without experts


def test_a_base_that_hunyuan_calls_dynamic_is_that_of_the_file(tmp_path):
    folder = save("hunyuan_v1_dense", tmp_path, bpe_tokenizer(), False, {**SIZES, "rope_parameters": HUNYUAN_ROPE})
    for check in checks(folder, export_gguf.export(folder, tmp_path / "x.gguf", "f32"), length=40):
        assert check.measured < 1e-3, check


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])  # a tensor for each expert in the files, and all of a layer in one
def test_experts_are_exported_one_at_a_time_in_every_type(case, tmp_path, monkeypatch):
    folder, read = save_mixture(case, tmp_path, None, intermediate_size=48), Stacked.read
    monkeypatch.setattr(Stacked, "read", lambda self, name, *rest: pytest.fail(name) if ".experts." in name else read(self, name, *rest))
    for outtype in export_gguf.OUTTYPES:
        path = export_gguf.export(folder, tmp_path / f"{outtype}.gguf", outtype)
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert kinds["blk.1.ffn_up_exps.weight"] == kinds["blk.1.attn_q.weight"] == outtype.upper()
        assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"  # which expert a token goes to is no matter of rounding
        if case == "gpt_oss":  # 48 channels fill no blocks of 32
            assert kinds["blk.1.ffn_down_exps.weight"] == ("F16" if outtype == "q8_0" else outtype.upper())
            assert kinds["blk.1.ffn_down_exps.bias"] == "F32"
    monkeypatch.undo()
    for outtype in ("f16", "q8_0"):  # random weights are larger than a model's
        assert checks(folder, tmp_path / f"{outtype}.gguf")[1].measured < 10 * verify.GGUF_TOLERANCE[outtype.upper()]


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_weights_that_are_rounded_in_memory_are_those_of_the_file(case, tmp_path):
    folder = save_mixture(case, tmp_path, None)
    path, model = export_gguf.export(folder, tmp_path / "x.gguf", "q8_0"), checkpoint.load(folder, torch.float32)
    held = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    assert export_gguf.quantized_bytes(model, "q8_0") == held
    ups = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    ours = model.model.layers[1].mlp.experts.gate_up_proj
    ours = ours.transpose(1, 2)[:, 1::2] if case == "gpt_oss" else ours[:, 32:]
    assert torch.equal(torch.from_numpy(gguf.dequantize(ups.data, ups.tensor_type)), ours)


@pytest.mark.parametrize(
    "case, settings, says",
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False: llama.cpp's qwen3moe computes True"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob True: llama.cpp's olmoe computes False"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2: llama.cpp's olmoe wants as many as 4 heads"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0: llama.cpp's olmoe does not compute it"),
        ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings: llama.cpp's olmoe wants an output head of its own"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers 0 have no experts: llama.cpp's qwen3moe has some in every layer"),
        ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"]}, "layers 1 have no experts: .* has the layers without experts first"),
        ("exaone_moe", {"layer_types": ["full_attention"]}, "layer_types: llama.cpp's exaone-moe has layers with a sliding window"),
        ("qwen3_moe", {"rope_parameters": LLAMA3}, "rope_type llama3: llama.cpp's qwen3moe does not scale single frequencies"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "no layer has experts: llama.cpp's deepseek2 has some"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0: .* computes 7.0"),
        ("gpt_oss", {"rope_parameters": {**YARN, "truncate": False}}, "rope_type yarn with truncate false: llama.cpp rounds"),
        ("ernie4_5_moe", {"use_bias": True}, "biases of the output projections"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 0.5}}, "one number for mscale and mscale_all_dim"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias: llama.cpp's deepseek2 has none"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek_v2", {"q_lora_rank": None}, "q_lora_rank null: .* with 26 or 27 layers only"),
        ("deepseek_v2", {"num_hidden_layers": 27}, "q_lora_rank 8: .* has none in models of 27 layers"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2}, "n_group 2: llama.cpp chooses groups"),
        ("phimoe", {}, "model_type phimoe: llama.cpp has no architecture"),
    ],
)
def test_a_mixture_that_llama_cpp_computes_otherwise_is_refused(case, settings, says):
    config = family_config(case, **{**MIXTURES.get(case, {}), **settings})
    with pytest.raises(UserError, match=says):
        gguf_architecture.architecture_of(config, biased=False)


def test_a_model_that_llama_cpp_computes_otherwise_is_refused_before_it_is_pruned_for_it(capsys, tmp_path, text_file):
    make_model("gpt_oss").save_pretrained(tmp_path / "m")
    tiny_tokenizer_of().save_pretrained(tmp_path / "m")
    assert slim(["prune", str(tmp_path / "m"), "--runtime", "gguf", "--calibration", str(text_file), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search("--runtime gguf: rope_type yarn with truncate false.*name another runtime", error)


def test_what_is_left_of_the_layers_is_refused_before_it_is_pruned_where_llama_cpp_computes_it_otherwise(capsys, tmp_path, text_file):
    model = make_model("gpt_oss", num_hidden_layers=4, **LINEAR_ROPE)
    with torch.no_grad():  # the first layer adds nothing, so it is the one to go
        first = model.model.layers[0]
        for parameter in (*first.self_attn.o_proj.parameters(), first.mlp.experts.down_proj, first.mlp.experts.down_proj_bias):
            parameter.zero_()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer_of().save_pretrained(tmp_path / "m")
    amount = (
        "--drop_layers",
        "1",
        "--target_sparsity",
        "0.3",
        "--num_examples",
        "4",
        "--seq_len",
        "16",
        "--output_dir",
        str(tmp_path / "o"),
    )
    for runtime, status in (("gguf", 2), ("any", 0)):
        flags = ("--runtime", runtime, "--calibration", str(text_file), "--eval_data", "none", "--overwrite")
        assert slim(["prune", str(tmp_path / "m"), *amount, *flags]) == status
        error = capsys.readouterr().err
        assert (error.count("\n") == 1 and "--runtime gguf: without these layers: layer_types: " in error) == (status == 2)


def test_a_mixture_goes_from_its_files_to_llama_cpp(tmp_path, capsys, text_file):
    """With the commands that a user types, least squares and two kinds of units."""
    make_model("qwen3_moe", **{**SIZES, **MIXTURES["qwen3_moe"], "moe_intermediate_size": 128}).save_pretrained(tmp_path / "m")
    bpe_tokenizer().save_pretrained(tmp_path / "m")
    flags = ["--calibration", text_file, "--num_examples", 4, "--seq_len", 32, "--target_sparsity", 0.5, "--prune", "both"]
    flags += ["--runtime", "gguf", "--eval_data", "none", "--prompt", "none", "--output_dir", tmp_path / "out"]
    assert slim(["prune", *map(str, [tmp_path / "m", *flags])]) == 0 and "export-gguf" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] < 8 and config["moe_intermediate_size"] in (32, 64, 96)  # of 128: blocks of 32
    assert slim(["export-gguf", str(tmp_path / "out"), "--outtype", "f32,q8_0"]) == 0 and "stayed f16" not in capsys.readouterr().out
    path = tmp_path / "out" / "out-f32.gguf"
    assert run_verify(tmp_path / "out", path, "--text", text_file, "--seq_len", 16, "--blocks", 1) == 0, capsys.readouterr().out


@pytest.mark.parametrize("case, flags", [("starcoder2", {"use_bias": False}), ("jais2", {"mlp_bias": False})])
def test_an_architecture_that_asks_for_biases_gets_no_model_without_them(case, flags, tmp_path):
    folder = save(case, tmp_path, bpe_tokenizer(), False, {**SIZES, "head_dim": 16, **flags})
    with pytest.raises(UserError, match=f"llama.cpp's {case} takes no projection without a bias"):
        export_gguf.export(folder, tmp_path / "x.gguf", "f32")


def test_biases_of_zeros_that_an_architecture_asks_for_are_written(tmp_path):
    """Those of projections and of norms, as a fresh model has them."""
    model = make_model("starcoder2", **SIZES, head_dim=16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    checkpoint.save(model, bpe_tokenizer(), tmp_path, make_ids(2, vocab=300), "dense")
    for check in checks(tmp_path, export_gguf.export(tmp_path, tmp_path / "x.gguf", "f32")):
        assert check.measured < 5e-3, check


@pytest.mark.parametrize("case, layers", [("gemma2", 46), ("gemma3", 62), ("exaone4_window", 64)])
def test_what_llama_cpp_reads_from_the_depth(case, layers, tmp_path, monkeypatch):
    """It takes Gemma's 27B models, whose scores it scales by hidden size / heads, and EXAONE's 32B, which has windows, by their layers."""
    model_type, extra = FAMILY_CASES[case]
    period = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    monkeypatch.setitem(FAMILY_CASES, case, (model_type, {**extra, **period}))
    folder = save(case, tmp_path, bpe_tokenizer(), sizes={**SIZES, "head_dim": 16, "num_hidden_layers": layers}, runtime="gguf", round_to=8)
    log_probabilities = checks(folder, export_gguf.export(folder, tmp_path / "x.gguf", "f32"))[1]
    assert log_probabilities.measured < 2e-2  # gelu's table, over so many layers; the other scale would be off by whole nats


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5},
    ],
    ids=("linear", "yarn", "dynamic", "yarn with a setting of its own"),
)
def test_rope_scaling(rope, tmp_path):
    sizes = {**SIZES, "rope_parameters": {"rope_theta": 10000.0, **rope}, "head_dim": 32, "max_position_embeddings": 64}
    folder = save("llama_gqa", tmp_path, bpe_tokenizer(), sizes=sizes)
    if rope["rope_type"] == "dynamic" or "attention_factor" in rope:
        with pytest.raises(UserError, match="rope_type (dynamic|yarn with attention_factor): cannot be written to GGUF"):
            export_gguf.export(folder, tmp_path / "x.gguf", "f32")
        return
    for check in checks(folder, export_gguf.export(folder, tmp_path / "x.gguf", "f32"), length=40):
        assert check.passed and check.measured < 1e-3, check


@pytest.mark.parametrize(
    "case, rope",
    [
        ("gemma3", {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}),
        (
            "olmo3",
            {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2079441541679836,
            },
        ),
    ],
)
def test_layers_with_windows_have_a_rope_of_their_own(case, rope, tmp_path):
    """As the larger Gemma 3 and OLMo 3 have it: only the layers that see everything are scaled."""
    ropes = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4 if case == "gemma3" else 5e5}}
    folder = save(case, tmp_path, bpe_tokenizer(), sizes={**SIZES, "head_dim": 16, "rope_parameters": ropes}, runtime="gguf", round_to=8)
    for check in checks(folder, export_gguf.export(folder, tmp_path / "x.gguf", "f32"), length=40):
        assert check.measured < (5e-3 if case == "gemma3" else 1e-3), check


@pytest.mark.parametrize("outtype", export_gguf.OUTTYPES)
def test_every_type_is_within_its_tolerance(outtype, tmp_path):
    folder = save("llama_gqa", tmp_path, bpe_tokenizer(), sizes={**SIZES, "intermediate_size": 150})
    path = export_gguf.export(folder, tmp_path / "x.gguf", outtype)
    tensors = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.attn_q.weight"] == outtype.upper() and tensors["blk.0.attn_norm.weight"] == "F32"
    if outtype == "q8_0":  # rows of 75 or 150 channels fill no blocks of 32
        assert tensors["blk.1.ffn_down.weight"] == "F16"
    assert checks(folder, path)[1].measured < 10 * verify.GGUF_TOLERANCE[outtype.upper()]  # random weights are larger than a model's


@pytest.mark.parametrize("split", ["llama-bpe", "qwen2", "qwen35", "deepseek-v3"])
def test_marks_and_other_letters_are_split_as_the_tokenizer_does(split, tmp_path):
    text = "e\u0301te\u0301 हिन्दी 漢字abc "
    tokenizer = bpe_tokenizer(split, [text * 50])
    path = export_gguf.export(save("llama_gqa", tmp_path, tokenizer, pruned=False), tmp_path / "x.gguf", "f16")
    with LlamaCpp(path) as llama:
        assert llama.tokenize(text) == tokenizer(text).input_ids


@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_tokenizers(split, tmp_path):
    tokenizer = bpe_tokenizer(split)
    path = export_gguf.export(save("llama_gqa", tmp_path, tokenizer, pruned=False), tmp_path / "x.gguf", "f16")
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == split and fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == VOCAB
    with LlamaCpp(path) as llama:
        for text in SAMPLES:
            assert llama.tokenize(text) == tokenizer(text).input_ids


def test_sentencepiece_tokenizer(spm_tokenizer, tmp_path):
    path = export_gguf.export(save("llama_mha", tmp_path, spm_tokenizer), tmp_path / "x.gguf", "f16")
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama" and fields["tokenizer.ggml.add_space_prefix"].contents()
    with LlamaCpp(path) as llama:
        for text in SAMPLES:
            assert llama.tokenize(text) == spm_tokenizer(text).input_ids


def test_every_chat_template_of_a_tokenizer_is_written(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    fields = gguf.GGUFReader(export_gguf.export(save("llama_gqa", tmp_path, tokenizer, pruned=False), tmp_path / "x.gguf")).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]


def test_a_gguf_model_s_own_tokenizer_is_kept(gguf_file, tmp_path):
    gguf_tokenizer.carry(str(gguf_file), tmp_path)
    (tmp_path / "again").mkdir()
    gguf_tokenizer.carry(str(tmp_path), tmp_path / "again")  # from checkpoint to checkpoint
    source = gguf.GGUFReader(gguf_file).fields
    found = gguf.GGUFReader(tmp_path / "again" / gguf_tokenizer.FILE).fields
    names = [name for name in source if name.startswith("tokenizer.")]
    assert "tokenizer.ggml.pre" in names and all(found[name].contents() == source[name].contents() for name in names)


def broken(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


@pytest.mark.parametrize(
    "make, arguments, says",
    [
        (lambda f, t: f / "missing", [], "no such folder"),
        (lambda f, t: f, [], "the folder has no config.json"),
        (lambda f, t: save("llama_gqa", f, t), [], "no known type for how this tokenizer splits text|WordLevel tokenizer"),
        (lambda f, t: broken(save("llama_gqa", f, bpe_tokenizer()), "model.safetensors"), [], "model.safetensors: the file is broken"),
        (
            lambda f, t: save("llama_gqa", f, bpe_tokenizer(), pruned_layers=1),
            ["--arch", "llama"],
            r"layers \d differ .*--runtime",
        ),
        (lambda f, t: save("qwen2", f, bpe_tokenizer(), pruned=False), ["--arch", "llama"], "--arch llama: the model is a qwen2"),
        (lambda f, t: save("llama_gqa", f, bpe_tokenizer()), ["--outtype", "q4_k"], "--outtype q4_k: not one of f32, f16, bf16, q8_0"),
        (lambda f, t: save("llama_gqa", f, bpe_tokenizer()), ["--outtype", "f16,f32", "--output", "x"], "--output names one file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(make, arguments, says, tmp_path, tiny_tokenizer, capsys):
    folder = make(tmp_path, tiny_tokenizer)
    assert slim(["export-gguf", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*gguf*")]


@pytest.mark.parametrize("case", ["llama_gqa", "qwen3_moe"])
def test_pytorch_s_own_files_are_exported_as_well(case, tmp_path):
    folder = save(case, tmp_path, bpe_tokenizer(), False, {**SIZES, **MIXTURES.get(case, {})})
    first = export_gguf.export(folder, tmp_path / "first.gguf", "f32")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    for path in folder.glob("model.safetensors*"):
        path.unlink()
    assert export_gguf.export(folder, tmp_path / "second.gguf", "f32").read_bytes() == first.read_bytes()


def test_an_existing_file_stays(tmp_path, capsys):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer())
    assert slim(["export-gguf", str(folder)]) == 0
    path = folder / "m-f16.gguf"
    before = path.read_bytes()
    assert slim(["export-gguf", str(folder)]) == 2 and "exists" in capsys.readouterr().err
    assert path.read_bytes() == before and slim(["export-gguf", str(folder), "--overwrite"]) == 0


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from slimllm.__main__ import main as slim
sys.exit(slim(["export-gguf", *sys.argv[1:]]))
"""


def test_a_full_disk_leaves_no_half_file(tmp_path):
    folder = save("llama_gqa", tmp_path, bpe_tokenizer(), sizes={**SIZES, "hidden_size": 128})
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, folder, "--outtype", "f32"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("scale", [4, 10])
def test_a_sharp_model_is_allowed_what_rounding_does_to_it(scale, tmp_path):
    """Its log-probabilities are so many times larger, and so is what eight bits change in them."""
    model, tokenizer = make_model(vocab_size=320, hidden_size=64, intermediate_size=96), bpe_tokenizer()
    model.lm_head.weight.data *= scale
    for name in ("sharp", "other"):
        checkpoint.save(model, tokenizer, tmp_path / name, make_ids(2), "dense")
        model.model.layers[1].mlp.down_proj.weight.data *= -1
    path = export_gguf.export(tmp_path / "sharp", tmp_path / "x.gguf", "q8_0")
    tokens, difference, continuation = checks(tmp_path / "sharp", path, length=48)
    assert tokens.passed and difference.passed and continuation.passed and difference.allowed > verify.GGUF_TOLERANCE["Q8_0"]
    assert not checks(tmp_path / "other", path, length=48)[1].passed


def run_verify(*arguments):
    return slim(["verify", *map(str, arguments)])


def test_verify_passes_what_is_the_same_and_fails_what_is_not(tmp_path, capsys, text_file):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer())
    path = export_gguf.export(folder, folder / "m-f32.gguf", "f32")
    options = ["--text", text_file, "--seq_len", 16, "--blocks", 1]
    assert run_verify(folder, path, *options) == 0
    table = capsys.readouterr().out
    assert table.count(" ok ") == 6 and "FAILED" not in table
    other = save("llama_gqa", tmp_path / "other", bpe_tokenizer(), recovery="none")  # another model's file
    assert run_verify(other, path, *options) == 1
    table = capsys.readouterr().out
    assert table.count("FAILED") == 2 and "log-probabilities" in next(line for line in table.splitlines() if "FAILED" in line)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] *= -1  # changed after it was saved
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert run_verify(folder, *options) == 1
    assert re.search(r"in memory: logits +\| .*FAILED", capsys.readouterr().out)


def altered(path, name, change):
    """Changes one tensor of a file of tensors, in place."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    change(tensors[name])
    save_file(tensors, path, metadata)


def spare_rows(folder):
    """Rows of the embeddings that the reference's text does not have."""
    used = load_file(folder / reference.REFERENCE)["ids"].unique()
    return torch.tensor([row for row in range(97) if row not in used])


def flip_bit(tensor):
    tensor.view(torch.int16).view(-1)[5] ^= 1


def alter_heads(path):
    record = json.loads(path.read_text())
    heads = record["layers"][0]["kept"]["attention"]["heads"]
    heads.pop()
    path.write_text(json.dumps(record))


WEIGHTS, DOWN = "model.safetensors", "model.layers.0.mlp.down_proj.weight"
ALTERATIONS = {  # what was altered -> (file, how)
    "rows": (WEIGHTS, lambda f: altered(f / WEIGHTS, "model.embed_tokens.weight", lambda w: w.index_fill_(0, spare_rows(f), 0))),
    "bit": (WEIGHTS, lambda f: altered(f / WEIGHTS, DOWN, flip_bit)),
    "sign": (WEIGHTS, lambda f: altered(f / WEIGHTS, DOWN, lambda w: w.view(-1)[:1].neg_())),
    "scale": (WEIGHTS, lambda f: altered(f / WEIGHTS, DOWN, lambda w: w.mul_(1.02))),
    "reference": (reference.REFERENCE, lambda f: altered(f / reference.REFERENCE, "last_logits", lambda w: w[0, :1].fill_(torch.inf))),
    "plan": ("pruning.json", lambda f: alter_heads(f / "pruning.json")),
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A saved checkpoint in bfloat16."""
    model = make_model()
    for parameter in model.parameters():  # the position frequencies stay float32, as from_pretrained leaves them
        parameter.data = parameter.data.bfloat16()
    result = slimllm.prune(model, tiny_tokenizer_of(), calibration=make_ids(), pruning_ratio=0.5, pruned_layers=2)
    slimllm.save(result, tmp_path_factory.mktemp("sealed") / "m")
    return tmp_path_factory.getbasetemp() / "sealed0" / "m"


@pytest.mark.parametrize("what", ALTERATIONS)
def test_verify_finds_every_alteration_and_says_where(what, sealed, tmp_path, capsys, text_file):
    folder = shutil.copytree(sealed, tmp_path / "m")
    name, alter = ALTERATIONS[what]
    before = (folder / name).read_bytes()
    alter(folder)
    assert (folder / name).read_bytes() != before
    assert run_verify(folder, "--text", text_file, "--seq_len", 16, "--blocks", 1) == 1
    table = capsys.readouterr().out
    assert (
        re.search(rf"files with the SHA-256 that slimllm.json holds: not {name} +\| 1 differ .*FAILED", table)
        and table.count("FAILED") == 1
    )
    (folder / "slimllm.json").unlink()  # a checkpoint of before there were seals
    status = run_verify(folder, "--text", text_file, "--seq_len", 16, "--blocks", 1)
    table = capsys.readouterr().out
    assert "it has no slimllm.json, so its files cannot be compared" in table
    if what in ("reference", "plan"):
        assert (
            status == 1
            and table.count("FAILED") == 1
            and ("widths of the layers that pruning.json holds: not layer 0" in table) is (what == "plan")
        )


def test_verify_passes_what_was_saved_and_says_what_its_text_does_not_reach(sealed, capsys, text_file):
    assert run_verify(sealed, "--text", text_file, "--seq_len", 16, "--blocks", 1) == 0
    table, covered = capsys.readouterr().out, 97 - len(spare_rows(sealed))
    assert table.count(" ok ") == 5 and f"the saved outputs follow from {covered} of 97 rows of the embeddings" in table


def test_verify_names_what_came_beside_the_files_that_were_written(sealed, tmp_path, capsys, text_file):
    folder = shutil.copytree(sealed, tmp_path / "m")
    (folder / "chat_template.jinja").write_text("mine")
    assert run_verify(folder, "--text", text_file, "--seq_len", 16, "--blocks", 1) == 0
    assert "not from the run that wrote the rest, so not compared: chat_template.jinja" in capsys.readouterr().out


REFERENCES = {  # what stands in the file of saved outputs
    "another thing": dict(x=torch.ones(1)),
    "no samples": dict(ids=torch.zeros(0, 4).long(), log_probabilities=torch.zeros(0, 3), last_logits=torch.zeros(0, 97)),
    "ids of no token": dict(ids=torch.full((2, 4), 97), log_probabilities=torch.zeros(2, 3), last_logits=torch.zeros(2, 97)),
    "one value for all": dict(ids=torch.zeros(2, 4).long(), log_probabilities=torch.zeros(1, 1), last_logits=torch.zeros(2, 97)),
    "another vocabulary": dict(ids=torch.zeros(2, 4).long(), log_probabilities=torch.zeros(2, 3), last_logits=torch.zeros(2, 98)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_saved_outputs_that_make_no_sense_are_one_line(name, tmp_path):
    save_file(REFERENCES[name], tmp_path / reference.REFERENCE)
    with pytest.raises(UserError, match=r"no readable reference.safetensors|of a model with another vocabulary") as caught:
        reference.compare_with_reference(make_model(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("measured, allowed", [(float("inf"), float("inf")), (1.0, float("inf")), (float("nan"), 1.0), (0.0, float("nan"))])
def test_what_is_not_finite_proves_nothing(measured, allowed):
    assert not verify.Check("x", measured, allowed).passed and verify.Check("x", 1.0, 1.0).passed


@pytest.mark.parametrize("case", ["truncated", "empty", "missing", "no reference", "no folder"])
def test_verify_says_what_cannot_be_read(case, tmp_path, capsys, text_file):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer())
    path = export_gguf.export(folder, folder / "m-f16.gguf", "f16")
    if case == "truncated":
        broken(folder, path.name)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "missing":
        path.unlink()
    elif case == "no reference":
        (folder / reference.REFERENCE).unlink()
    else:
        folder = tmp_path / "nowhere"
    assert run_verify(folder, path, "--text", text_file, "--seq_len", 16) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder if case.startswith("no") else path) in error


def test_the_speed_of_files_is_one_table(tmp_path, capsys):
    """The dense file and the pruned one, in turns; which is faster is no matter of a test, script/runtimes.sh measures it."""
    files = [
        export_gguf.export(save("llama_gqa", tmp_path / name, bpe_tokenizer(), pruned), tmp_path / f"{name}.gguf", "f16")
        for name, pruned in (("dense", False), ("pruned", True))
    ]
    flags = ("--prompt_tokens", "16", "--new_tokens", "4", "--repeats", "2", "--threads", "1")
    assert slim(["llama-cpp-speed", *map(str, files), *flags]) == 0
    header, _, dense, pruned = capsys.readouterr().out.strip().splitlines()
    assert "tokens/s" in header and dense.count("(1.00 x)") == 2 and len(re.findall(r"\([\d.]+ x\)", pruned)) == 2


def origin(path):
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("general.")}


CARD = """---
license: other
license_name: mine
license_link: https://example.org
language: en
tags: [a, b]
base_model: me/first
---
"""


def test_a_file_says_where_its_model_comes_from(tmp_path):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer())
    (folder / "README.md").write_text(CARD)
    found = origin(export_gguf.export(folder, tmp_path / "x.gguf"))
    assert (
        found.items()
        >= {
            "general.license": "other",
            "general.license.name": "mine",
            "general.license.link": "https://example.org",
            "general.languages": ["en"],
            "general.tags": ["a", "b"],
            "general.base_model.count": 1,
            "general.base_model.0.name": "first",
            "general.base_model.0.organization": "me",
            "general.base_model.0.repo_url": "https://huggingface.co/me/first",
        }.items()
    )
    assert found["general.size_label"].endswith("K")

    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")  # what a .gguf source says goes first, and through the checkpoint
    writer.add_name("The Source")
    writer.add_organization("Them")
    writer.add_license("apache-2.0")
    writer.add_token_list(["a"])
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        finish()
    gguf_tokenizer.carry(str(tmp_path / "source.gguf"), folder)
    found = origin(export_gguf.export(folder, tmp_path / "y.gguf"))
    assert (found["general.license"], found["general.organization"], found["general.languages"]) == ("apache-2.0", "Them", ["en"])
    assert (found["general.base_model.0.name"], found["general.base_model.0.organization"]) == ("The Source", "Them")


def test_a_card_may_name_several_licenses_and_bases(tmp_path):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer())
    (folder / "README.md").write_text("---\nlicense: [mit, cc0-1.0]\nbase_model: [me/Llama-3.2-1B, gpt2]\n---\n")
    found = origin(export_gguf.export(folder, tmp_path / "x.gguf"))
    assert found["general.license"] == "mit,cc0-1.0" and found["general.base_model.count"] == 2
    assert (found["general.base_model.0.name"], found["general.base_model.1.name"]) == ("Llama-3.2-1B", "gpt2")
    assert found["general.base_model.0.organization"] == "me" and "general.base_model.1.organization" not in found


def test_the_matrices_that_stay_f16_are_named(tmp_path, capsys):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer(), target_sparsity=0.3, pruned_layers=3, round_to=1)
    assert slim(["export-gguf", str(folder), "--outtype", "q8_0"]) == 0
    said = capsys.readouterr().out
    named = re.search(r"stayed f16, since their rows are no multiple of 32: (.*); with --runtime gguf they would be q8_0 too, about", said)
    assert all(re.search(r"(down_proj|o_proj)\.weight$", name) for name in re.sub(" and .*", "", named[1]).split(", "))
    folder = save("llama_gqa", tmp_path / "n", bpe_tokenizer(), target_sparsity=0.3, pruned_layers=3, runtime="gguf")
    assert slim(["export-gguf", str(folder), "--outtype", "q8_0"]) == 0
    assert "stayed f16" not in capsys.readouterr().out
    folder = save("llama_gqa", tmp_path / "o", bpe_tokenizer(), False, {**SIZES, "hidden_size": 48})  # which no pruning changes
    assert slim(["export-gguf", str(folder), "--outtype", "q8_0"]) == 0
    said = capsys.readouterr().out
    assert "stayed f16" in said and "--runtime gguf" not in said
