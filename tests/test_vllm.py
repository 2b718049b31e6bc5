"""Pruned checkpoints in vLLM itself, wherever ``script/vllm.sh`` (or VLLM_PYTHON) provides it: 2 GB of packages of its own."""

import json
import os
import re

import pytest

import slimllm
from slimllm.__main__ import main as slim
from slimllm.deploy import vllm
from slimllm.errors import UserError
from slimllm.models.loading import load_config
from slimllm.models.shape import units_of
from slimllm.settings.common import VLLM_PYTHON
from tests.conftest import FAMILY_CASES, ROOT, count, make_ids, make_model, prune_to
from tests.test_export_gguf import VOCAB, bpe_tokenizer, save

PYTHON = os.environ.get("VLLM_PYTHON") or str(ROOT / VLLM_PYTHON)
PROVEN = (  # the families that were run in vLLM
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "ministral3"),
    *("granite", "phi3", "glm", "glm4", "olmo2", "olmo3", "exaone4"),
)
ONE_PER_FAMILY = [next(case for case, (name, _) in FAMILY_CASES.items() if name == family and "mha" not in case) for family in PROVEN]
wherever_it_is = pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason="no environment with vLLM: bash script/vllm.sh makes one")


def test_without_vllm_the_way_to_it_is_named(tmp_path, tiny_tokenizer, capsys):
    folder = prune_to(tmp_path / "pruned", tiny_tokenizer)
    assert slim(["verify", str(folder), "--seq_len", "16", "--vllm", str(tmp_path / "python")]) == 2
    error = capsys.readouterr().err
    assert "no such interpreter" in error and "script/vllm.sh" in error and error.count("\n") == 1
    assert slim(["vllm-speed", str(folder), "--vllm", str(tmp_path / "python")]) == 2
    assert slim(["vllm-speed", str(tmp_path / "nowhere")]) == 2


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FOREIGN = {  # a checkpoint that brings more than this program's modeling file
    "an altered file": lambda folder: (folder / "modeling.py").open("a").write("# and more"),
    "a file beside it": lambda folder: (folder / "tokenization_x.py").touch(),
    "another repository's": lambda folder: edited(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["me/x--modeling.X", None]}),
}


@pytest.mark.parametrize("spoil", FOREIGN.values(), ids=FOREIGN)
def test_vllm_runs_only_this_program_s_code_without_leave(spoil, tmp_path, tiny_tokenizer):
    python, request = tmp_path / "python", tmp_path / "request.json"
    python.write_text(f'#!/bin/sh\ncp "$2" {request}\necho "{{}}" > "$3"\n')
    python.chmod(0o755)
    folder = prune_to(tmp_path / "pruned", tiny_tokenizer)

    def trusted(**settings):
        vllm.ask(str(python), folder, 32, **settings)
        return json.loads(request.read_text())["trust_remote_code"]

    assert trusted()
    spoil(folder)
    assert not trusted() and trusted(trust_remote_code=True)


def test_the_way_to_run_code_of_others_is_named(tmp_path, tiny_tokenizer):
    python, folder = tmp_path / "python", prune_to(tmp_path / "pruned", tiny_tokenizer)
    python.write_text("#!/bin/sh\necho 'ValidationError: 1: Please pass the argument `trust_remote_code=True`'\nexit 1\n")
    python.chmod(0o755)
    (folder / "x.py").touch()
    with pytest.raises(UserError, match="brings code that is not this program's; .* --trust_remote_code$"):
        vllm.ask(str(python), folder, 32)


SIZES = dict(vocab_size=VOCAB, hidden_size=256, intermediate_size=96, num_hidden_layers=3, head_dim=64, max_position_embeddings=256)


NOT_IN_VLLM = {  # vLLM 0.32 on a CPU, and in docs/deployment.md
    ("gemma2", "any"),  # soft caps of the scores: not a number
    ("gemma2", "transformers"),
    ("ministral3", "transformers"),  # its own class leaves out the scale of queries beyond the original context
}


@wherever_it_is
@pytest.mark.parametrize(
    "case, runtime",
    [pair for runtime in ("any", "transformers") for case in ONE_PER_FAMILY if (pair := (case, runtime)) not in NOT_IN_VLLM]
    + [("llama_gqa", "vllm")],
)
def test_vllm_computes_the_same_model(case, runtime, tmp_path, capsys):
    """``any``: whole groups of heads and channels of each layer's own; ``vllm``: for its DeciLM; ``transformers``: a stock model."""
    settings = dict(head_unit="group" if runtime == "any" else "query", target_sparsity=0.2, pruned_layers=3, runtime=runtime)
    folder = save(case, tmp_path / "m", bpe_tokenizer(), sizes=SIZES, **settings)
    widths = units_of(load_config(str(folder), "DIR"))
    assert runtime != "any" or len({count(w, "channels") for w in widths}) > 1
    assert runtime != "any" or len({count(w, "kv_heads") for w in widths}) > 1 or case.startswith("olmo")
    assert slim(["verify", str(folder), "--seq_len", "24", "--blocks", "1", "--vllm", PYTHON]) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"vLLM: .* ok ", table)) == 3 and "FAILED" not in table


@wherever_it_is
@pytest.mark.parametrize("prune, lacking", [("heads", "self_attn"), ("channels", "mlp")])
def test_vllm_computes_layers_that_lack_a_part(prune, lacking, tmp_path, capsys):
    settings = dict(drop_parts=1, prune=prune, recovery="least_squares", runtime="vllm", calibration=make_ids(vocab=300))
    folder = tmp_path / "m"
    slimllm.save(slimllm.prune(make_model("llama_gqa", **SIZES), bpe_tokenizer(), **settings), folder)
    assert sum(lacking in names for names in load_config(str(folder), "DIR").missing_modules_per_layer) == 1
    assert slim(["verify", str(folder), "--seq_len", "24", "--blocks", "1", "--vllm", PYTHON]) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"vLLM: .* ok ", table)) == 3 and "FAILED" not in table


@wherever_it_is
def test_what_vllm_does_not_take_is_one_line(tmp_path):
    folder = save("llama_gqa", tmp_path / "m", bpe_tokenizer())  # heads of a size that its kernels do not have
    with pytest.raises(UserError, match="vLLM failed: .*Error"):
        vllm.ask(PYTHON, folder, 32, prompts=[[5, 6, 7]])
