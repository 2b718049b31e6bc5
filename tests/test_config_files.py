"""What other programs read in a checkpoint's config.json and tokenizer_config.json."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slimllm import modeling
from slimllm.deploy import checkpoint, config_files, runtimes
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.shape import rope_of
from tests.conftest import FAMILY_CASES, LLAMA3, family_config, logits, make_ids, make_model

YARN4 = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {  # transformers 4's form of it, at the top of config.json
    "llama_gqa": dict(rope_theta=10000.0),
    "llama3_rope": dict(rope_theta=5e5, rope_scaling={name: value for name, value in LLAMA3.items() if name != "rope_theta"}),
    "gemma3": dict(rope_theta=1e6, rope_local_base_freq=10000.0),
    "glm": dict(rope_theta=10000.0, partial_rotary_factor=0.5),
    "phi3_long": dict(
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
        original_max_position_embeddings=512,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 4.4, 4.8, 5.2]},
    ),
    "olmo3": dict(rope_theta=5e5),
}


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("class_name", ["XTokenizer", None])
def test_a_model_s_code_is_never_run_nor_asked_about(class_name, tmp_path, tiny_tokenizer, monkeypatch):
    """With a class of transformers beside it (``class_name`` None: the tokenizer's own) that is taken; else it is one line."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    model = make_model()
    model.config.auto_map = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X"}
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')\n")
    path = tmp_path / "tokenizer_config.json"
    named = {"tokenizer_class": class_name} if class_name else {}
    path.write_text(json.dumps(read_json(path) | {"auto_map": {"AutoTokenizer": [None, "evil.X"]}} | named))
    assert torch.equal(logits(loading.load_model(str(tmp_path), "auto"), make_ids()), logits(model, make_ids()))
    if class_name is None:
        assert loading.load_tokenizer(str(tmp_path))("abc") == tiny_tokenizer("abc")
        return
    with pytest.raises(UserError, match="its tokenizer needs code that comes with the model, and no model's code is run here"):
        loading.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("case", ROPES)
def test_the_rotary_settings_stand_there_as_transformers_4_had_them(case):
    assert config_files.older_rope(family_config(case)) == ROPES[case]


BY_KIND = ("cohere_compass", "lfm3")  # settings for each kind of layer, which transformers 4 had no form for


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_transformers_5_reads_the_same_with_both_forms(case, tmp_path):
    model = make_model(case)
    for slim in (False, True):
        if slim:
            runtimes.as_slim_model(model)
        model.config.save_pretrained(tmp_path)
        config_files.complete_config(tmp_path, model.config, model.dtype)
        theta = None if case in BY_KIND else rope_of(model.config)["rope_theta"]
        assert read_json(tmp_path / "config.json").get("rope_theta") == theta
        read = AutoConfig.from_pretrained(tmp_path)
        same = AutoModelForCausalLM.from_config(read).eval()
        same.load_state_dict(model.state_dict())
        assert torch.equal(logits(same, make_ids(2)), logits(model, make_ids(2)))
        read.rope_parameters.pop("type", None)  # the older name of rope_type, beside it
        assert read.rope_parameters == model.config.rope_parameters


def test_scaling_of_the_layers_without_a_window_is_kept(tmp_path, tiny_tokenizer):
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 7000.0}, "full_attention": YARN4}
    for case in ("gemma3", "olmo3"):
        model = make_model(case, rope_parameters=ropes)
        checkpoint.save(model, tiny_tokenizer, tmp_path, make_ids(2), "dense")
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters
        assert read_json(tmp_path / "config.json")["rope_scaling"]["factor"] == 4.0


def test_an_auto_map_names_only_files_that_are_there(tmp_path, tiny_tokenizer):
    model = make_model("phi3")
    model.config.auto_map = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    tiny_tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    checkpoint.save(model, tiny_tokenizer, tmp_path / "stock", make_ids(2), "dense")
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in read_json(tmp_path / "stock" / name)
    checkpoint.save(runtimes.as_slim_model(model), tiny_tokenizer, tmp_path / "slim", make_ids(2), "dense")
    assert "auto_map" not in read_json(tmp_path / "slim" / "tokenizer_config.json")
    entries = read_json(tmp_path / "slim" / "config.json")["auto_map"]
    assert entries["AutoModelForCausalLM"] == "modeling.SlimPhi3ForCausalLM"
    assert {entry.partition(".")[0] for entry in entries.values()} == {"modeling"}


def test_another_repository_s_code_is_not_in_the_auto_map(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"auto_map": {"AutoConfig": "me/code--modeling.X", "AutoModel": "modeling.X"}}')
    (tmp_path / "modeling.py").touch()
    config_files.rewrite(path, dict)
    assert read_json(path) == {"auto_map": {"AutoModel": "modeling.X"}}


def test_the_tokenizer_knows_the_model_s_context_and_a_class_of_both_versions(tmp_path, tiny_tokenizer):
    checkpoint.save(make_model(), tiny_tokenizer, tmp_path, make_ids(2), "dense")
    written = read_json(tmp_path / "tokenizer_config.json")
    assert (written["model_max_length"], written["tokenizer_class"]) == (64, "PreTrainedTokenizerFast")
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is type(tiny_tokenizer) and found("abc") == tiny_tokenizer("abc") and found.model_max_length == 64
    tiny_tokenizer.model_max_length = 32
    checkpoint.write_tokenizer(tiny_tokenizer, tmp_path, "dense", make_model().config)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 32


def test_the_tokenizer_is_loaded_as_the_card_says_without_a_question_or_a_warning(tmp_path, tiny_tokenizer):
    checkpoint.save(runtimes.as_slim_model(make_model()), tiny_tokenizer, tmp_path, make_ids(2), "dense")
    code = "import sys; from transformers import AutoTokenizer; AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)('abc')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, tmp_path], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_transformers_4_is_told_in_one_sentence_that_it_is_too_old(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"^a model whose layers differ in width needs transformers 5 or newer, and this is 4\.57\.6$"):
        runpy.run_path(modeling.__file__)
