"""Model cards, the warning about shared text, and uploads to a stand-in for the hub."""

import base64
import hashlib
import json
import re
import shlex
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects

import hf_prune
import post_training
import slimllm
from slimllm.__main__ import main as slim
from slimllm.data import calibration
from slimllm.models import hub as models_hub
from slimllm.reporting import card, paper_table, record
from slimllm.settings.methods import METHODS
from tests.conftest import FAMILY_CASES, TEXT, make_ids, make_model, run_cli
from tests.test_export_gguf import bpe_tokenizer, save

PRUNE = ("--target_sparsity", 0.2, "--num_examples", 4, "--seq_len", 16, "--max_seq_len", 16, "--pruned_layers", 1, "--device", "cpu")

HEAD = """---
license: >-
  llama3.2
license_name: the licence
license_link: https://example.org/LICENSE
language:
- en
- de
base_model: me/first
---
"""


@pytest.fixture
def base(tmp_path):
    folder = save("llama_gqa", tmp_path / "base", bpe_tokenizer(), pruned=False)
    (folder / "README.md").write_text(HEAD + "# The base\n")
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def flags_of(base, text, *flags):
    named = ("--base_model", base, "--calibration", text, "--eval_data", text, "--save_ckpt_log_name", "small")
    return [str(flag) for flag in (*named, *PRUNE, *flags)]


@pytest.fixture
def prune(base, text, tmp_path, monkeypatch, capsys):
    """Prunes the tiny model in this process; what it wrote: the checkpoint folder."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        assert hf_prune.main(flags_of(base, text, *flags)) == 0, capsys.readouterr().err
        return tmp_path / "prune_log" / "small"

    return run


def test_the_card_says_where_the_model_comes_from_and_how_good_it_is(prune):
    folder = prune()
    found, run = ModelCard.load(folder / "README.md"), json.loads((folder / "pruning.json").read_text())
    assert found.data.license == "llama3.2" and found.data.library_name == "transformers" and "slimllm" in found.data.tags
    assert (found.data.license_name, found.data.license_link) == ("the licence", "https://example.org/LICENSE")
    assert (found.data.language, found.data.base_model) == (["en", "de"], "me/first")
    page, figure = found.text, run["evaluation"][0]
    (result,) = found.data.eval_results  # what the hub shows beside the card
    assert (result.dataset_name, result.dataset_split) == (figure["data"], figure["split"])
    assert result.metric_type == "perplexity" and result.metric_value == pytest.approx(figure["pruned"], abs=1e-3)
    assert "blocks of 16 tokens" in result.metric_name
    (picture,) = folder.glob("figures/*.png")
    assert f"](figures/{picture.name})" in page and 'target_modules="all-linear"' in page and "pip install slimllm" not in page
    for said in (
        card.portable(run["command"]),
        run["calibration"]["sha256"],
        f"{figure['dense']:.2f}",
        f"{figure['pruned']:.2f}",
        "trust_remote_code=True",
    ):
        assert said in page
    assert "**Warning:** calibration samples share" in page and figure["calibration_overlap"] == 4  # it was made of the same text
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("README.md", "log.txt", "slimllm.json"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in page, path
    assert slim(["export-gguf", str(folder)]) == 0
    assert hashlib.sha256((folder / "small-f16.gguf").read_bytes()).hexdigest() in (folder / "README.md").read_text()


def test_each_form_says_how_it_is_loaded(prune):
    for runtime, code, vllm in (("transformers", False, "vllm serve small\n"), ("vllm", True, "vllm serve small --trust-remote-code")):
        page = (prune("--runtime", runtime, "--overwrite") / "README.md").read_text()
        assert ("trust_remote_code" in page) is code and vllm in page
        assert page.count("trust_remote_code=True") == 2 * code and "have biases" in page
    assert "have biases" not in (prune("--no_new_bias", "--overwrite") / "README.md").read_text()


def test_the_card_names_what_made_the_model_and_no_folder_of_this_machine(prune, base, text, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf_prune.py", *flags_of(base, text)])
    page = (prune("--method", "wanda_sp", "--recovery", "least_squares", "--overwrite") / "README.md").read_text()
    assert "method: Wanda-sp ([An et al. 2024]" in page and "SlimLLM](" not in page and "recipe" not in page
    page = (prune("--recipe", "best", "--overwrite") / "README.md").read_text()
    assert "method: [SlimLLM](https://arxiv.org/abs/2505.22689) (Guo et al. 2025), recipe best" in page
    assert (
        [line for line in page.splitlines() if str(tmp_path) in line] == []
        and "--base_model base" in page
        and "--calibration text.txt" in page
    )


@pytest.mark.parametrize(
    "command, said",
    [
        (["/home/me/hf_prune.py", "--base_model", "/data/my models/llama/"], "python hf_prune.py --base_model llama"),
        (["hf_prune.py", "--eval_data=wikitext2=/x y/wiki.raw"], "python hf_prune.py --eval_data=wikitext2=wiki.raw"),
        (["hf_prune.py", "--calibration", "~/texts/a b.txt"], "python hf_prune.py --calibration 'a b.txt'"),
        (["hf_prune.py", "--base_model", "org/model", "--ridge", "0.5"], "python hf_prune.py --base_model org/model --ridge 0.5"),
        (["/venv/lib/slimllm/__main__.py", "verify", "a b"], "slimllm verify 'a b'"),
    ],
)
def test_commands_are_quoted_and_cards_hold_no_local_paths(command, said, monkeypatch):
    monkeypatch.setattr("sys.argv", command)
    assert shlex.split(record.command())[-1] == command[-1] and card.portable(record.command()) == said


def test_the_commit_is_the_program_s_own(tmp_path, monkeypatch):
    """And not that of a repository that its environment happens to lie in."""

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y.z", *arguments], cwd=tmp_path, check=True, capture_output=True)

    installed = tmp_path / "venv" / "site-packages" / "slimllm" / "reporting" / "record.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "another project's")
    monkeypatch.setattr(record, "__file__", str(installed))
    assert record.commit_of_this_program() is None
    monkeypatch.setattr(record, "__file__", str(tmp_path / "slimllm" / "reporting" / "record.py"))
    commit = record.commit_of_this_program()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert record.commit_of_this_program() == commit
    installed.write_text("changed")
    assert record.commit_of_this_program() == f"{commit} with changes"


@pytest.mark.parametrize("case, offered", [("llama_gqa", True), ("gemma3", False)])
def test_only_exports_that_the_checkpoint_allows_are_offered(case, offered, tmp_path):
    result = slimllm.prune(make_model(case, vocab_size=320), bpe_tokenizer(), calibration=make_ids(vocab=300), pruned_layers=1)
    slimllm.save(result, tmp_path / "small")
    assert ("export-gguf" in (tmp_path / "small" / "README.md").read_text()) is offered
    assert slim(["export-gguf", str(tmp_path / "small")]) == (0 if offered else 2)


NAMED = {  # what the card of a model says that each method made, and no other card
    "slimllm": "[SlimLLM](https://arxiv.org/abs/2505.22689) (Guo et al. 2025)",
    "llm_pruner": "[LLM-Pruner](https://arxiv.org/abs/2305.11627) (Ma et al. 2023)",
    "flap": "[FLAP](https://arxiv.org/abs/2312.11983) (An et al. 2024)",
    "wanda_sp": "Wanda-sp ([An et al. 2024]",
    "osscar": "[OSSCAR]",
    "shortgpt": "[ShortGPT]",
    "llm_drop": "[LLM-Drop]",
    "replaceme": "[ReplaceMe]",
    "magnitude": "magnitude, a baseline",
    "random": "random choice, a baseline",
}


@pytest.mark.parametrize(
    "method, case", [*((name, "llama_gqa") for name in METHODS if name != "slimllm"), *(("slimllm", name) for name in FAMILY_CASES)]
)
def test_every_method_and_family_has_a_card(method, case, tmp_path):
    model = make_model(case, vocab_size=320)
    model.config._name_or_path = f"me/{case}"
    result = slimllm.prune(model, bpe_tokenizer(), calibration=make_ids(vocab=300), method=method, target_sparsity=0.2)
    slimllm.save(result, tmp_path / "small")
    found = ModelCard.load(tmp_path / "small" / "README.md")
    (line,) = (line for line in found.text.splitlines() if line.startswith("- method: "))
    assert line.startswith(f"- method: {NAMED[method]}") and sum(words in found.text for words in NAMED.values()) == 1
    assert found.data.base_model == f"me/{case}" and f"- base model: [me/{case}](https://huggingface.co/me/{case})" in found.text
    assert f"{case} with {100 * result.parameters.decoder_removed:.2f}% of its decoder layers' parameters removed" in found.text


def test_overlap_is_runs_of_the_same_tokens():
    stream = torch.randperm(4000)
    samples = torch.stack([stream[100:132], torch.randperm(32) + 5000, torch.cat([stream[7:22], torch.arange(6000, 6017)])])
    assert calibration.overlap(samples, stream) == 1  # a run of 15 is none
    assert calibration.overlap(samples[:, :8], stream) == 0


def test_the_licence_of_a_gguf_model(gguf_file):
    assert card.origin_of(str(gguf_file)).items() >= {"license": "apache-2.0", "language": ["en"]}.items()


def test_the_card_of_a_hub_model_is_asked_for_before_the_work_and_may_fail(monkeypatch):
    """A checkpoint that took hours is not lost to a hub that stopped to answer."""

    def fails(name):
        raise HTTPError("503 Service Unavailable")

    monkeypatch.setattr(card.hub, "reachable", lambda: True)
    monkeypatch.setattr(card.ModelCard, "load", fails)
    assert card.origin_of("meta-llama/Llama-2-7b-hf") == {"hub_name": "meta-llama/Llama-2-7b-hf"}
    asked = []
    monkeypatch.setattr(card, "origin_of", lambda name: asked.append(name) or {})
    monkeypatch.setattr("slimllm.pruning.pipeline.prune", lambda *args: pytest.fail("no request came first") if not asked else [])
    result = slimllm.prune(make_model(), calibration=make_ids())
    monkeypatch.setattr(card, "origin_of", lambda name: pytest.fail("asked again"))
    assert result.record().model.license is None


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload needs; what is committed lands in ``server.files``."""

    def log_message(self, *args):
        pass

    def answer(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.answer({})

    def do_GET(self):
        if self.path.startswith("/api/whoami"):
            known = self.headers.get("Authorization") == "Bearer hf_known"
            return self.answer(
                {"name": "me", "type": "user"} if known else {"error": "Invalid username or password."}, 200 if known else 401
            )
        self.answer({"id": "me/small", "sha": "0" * 40, "siblings": [], "xetEnabled": False})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.address}/me/small", "name": "me/small"})
        if "/preupload/" in self.path:
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
            )
        if "/commit/" not in self.path:  # the card's metadata are checked first
            return self.answer({"errors": [], "warnings": []})
        self.server.committed.add(self.path)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"commitUrl": f"{self.server.address}/me/small/commit/1", "commitOid": "1" * 40, "success": True})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.created, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    server.committed = set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("name, flags", [("me/small", []), ("small", ["--public"])])
def test_push_to_hub_uploads_the_checkpoint(hub, base, text, tmp_path, name, flags):
    """To the id that the hub answers; what is new there is private unless it is asked for."""
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_known",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = run_cli(*flags_of(base, text, "--push_to_hub", name, *flags), cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "prune_log" / "small"
    local = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}
    (created,) = hub.created
    assert created["name"] == "small" and bool(created.get("private") or created.get("visibility") == "private") is not bool(flags)
    page = local["README.md"].decode()
    assert 'AutoTokenizer.from_pretrained("me/small", trust_remote_code=True)' in page and "vllm serve me/small " in page
    assert hub.files == local and "uploaded to" in done.stdout and hub.committed == {"/api/models/me/small/commit/main"}


@pytest.mark.parametrize(
    "name, env, says",
    [
        ("me/small", {"HF_HUB_OFFLINE": "1"}, "--push_to_hub me/small: .*offline mode"),
        ("me/small", {"HF_TOKEN": "hf_wrong"}, "--push_to_hub me/small: .*nothing was done yet"),
        ("a/b/c", {}, "--push_to_hub a/b/c: Repo id must be"),
    ],
)
def test_push_that_cannot_be_is_said_before_the_run(hub, base, text, tmp_path, name, env, says):
    env = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), **env}
    done = run_cli(*flags_of(base, text, "--push_to_hub", name), cwd=tmp_path, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(says, done.stderr), done.stderr
    assert not (tmp_path / "prune_log").exists() and not hub.files


def test_a_post_trained_model_has_a_card_of_both_steps(prune, text, tmp_path):
    prune("--max_seq_len", 128)
    (tmp_path / "rows.jsonl").write_text('{"text": "it was the best of times"}\n' * 16)
    data = ("--data_path", "rows.jsonl", "--val_set_size", 0, "--extra_val_dataset", text, "--cutoff_len", 32)
    steps = ("--num_epochs", 1, "--batch_size", 8, "--micro_batch_size", 8, "--output_dir", "tuned", "--merge")
    assert post_training.main([str(flag) for flag in ("--prune_model", "prune_log/small", *data, *steps)]) == 0
    page = (tmp_path / "tuned" / "merged" / "README.md").read_text()
    run = json.loads((tmp_path / "tuned" / "merged" / "pruning.json").read_text())
    (figure,) = run["evaluation"]
    assert "LoRA, merged" in page and f"{figure['pruned']:.2f} -> {figure['tuned']:.2f}" in page and "llama3.2" in page
    merged = tmp_path / "tuned" / "merged"
    flags = [str(merged), "--tasks", "none", "--eval_data", str(text), "--max_seq_len", "16", "--output", str(tmp_path / "r.json")]
    assert slim(["evaluate", *flags]) == 0
    (row,) = paper_table.paper_cells([json.loads((tmp_path / "r.json").read_text())])[1:]
    assert row[0] == f"{run['parameters']['decoder_removed']:.0%}".replace("%", " %") + " w/ tune"


def test_the_tokenizer_of_a_gguf_model_is_not_uploaded():
    """The hub takes a repository with a .gguf file for a model for llama.cpp."""
    files = ["tokenizer.gguf", "small-f16.gguf", "README.md", "figures/small.png", "log.txt"]
    assert list(filter_repo_objects(files, ignore_patterns=models_hub.NOT_UPLOADED)) == ["small-f16.gguf", "README.md", "figures/small.png"]
