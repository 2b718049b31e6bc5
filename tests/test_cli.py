import ctypes
import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file

import hf_prune
from slimllm import cli as cli_module
from slimllm import footprint, stages
from slimllm.data import calibration
from slimllm.deploy import checkpoint, reference, sink
from slimllm.errors import UserError
from slimllm.models import loading
from slimllm.models.source import ModelSource
from slimllm.pruning import pipeline
from slimllm.settings.evaluate import EvalConfig
from slimllm.settings.latency import LatencyConfig
from slimllm.settings.pruning import PruneConfig
from slimllm.settings.training import TrainConfig
from slimllm.streaming.progress import bar_on_terminal
from tests.conftest import ROOT, logits, make_ids, make_model, run_cli
from tests.test_checkpoint import spoil


@pytest.fixture
def cli(tmp_path, tiny_folder, text_file, monkeypatch, capsys):
    """Runs hf_prune in this process on the tiny model. Returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    small = [
        "--calibration",
        text_file,
        "--eval_data",
        text_file,
        "--num_examples",
        "8",
        "--seq_len",
        "16",
        "--max_seq_len",
        "16",
        "--eval_limit",
        "8",
    ]

    def run(*args, model=tiny_folder, defaults=True):
        status = hf_prune.main([str(a) for a in ["--base_model", model, *(small if defaults else []), *args]])
        out = capsys.readouterr()
        return status, out.out, out.err

    run.folder = tmp_path
    return run


def test_a_run_leaves_a_whole_checkpoint(cli):
    status, out, err = cli("--target_sparsity", "0.3", "--save_ckpt_log_name", "run", "--slimllm", "--test_after_train")
    assert status == 0, err
    folder = cli.folder / "prune_log" / "run"
    names = {p.name for p in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "modeling.py",
        "pruning.json",
        "calibration.safetensors",
        "log.txt",
        "figures",
    } <= names
    assert (folder / "figures" / "layers.png").stat().st_size > 1000
    assert [p.name for p in folder.parent.iterdir()] == ["run"]
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in folder.iterdir())
    record = json.loads((folder / "pruning.json").read_text())
    model = checkpoint.load(folder)
    assert record["parameters"]["pruned"] == model.num_parameters()
    dense = make_model()
    decoder = sum(p.numel() for p in dense.model.layers.parameters())
    removed = decoder - sum(p.numel() for p in model.model.layers.parameters())
    assert record["parameters"]["decoder_removed"] == pytest.approx(removed / decoder)
    assert abs(removed - 0.3 * decoder) <= 3 * 32
    for layer, reported in zip(model.model.layers, record["layers"]):
        assert layer.mlp.down_proj.in_features == len(reported["kept"]["mlp"]["channels"])
        assert layer.self_attn.q_proj.out_features == 8 * len(reported["kept"]["attention"]["heads"])
    (figure,) = record["evaluation"]
    assert figure["limited"] and figure["blocks"] == 8 and figure["seq_len"] == 16 and len(figure["sha256"]) == 64
    assert len(load_file(folder / "calibration.safetensors")["calibration_ids"]) == 8
    assert record["calibration"]["sha256"] and record["environment"]["torch"] == importlib.metadata.version("torch")
    assert f"{removed / decoder:.2%}" in out and "limited" in out and "everything lies in prune_log/run/" in out
    assert "layer   1" in (folder / "log.txt").read_text() and "[pruned]" in out


def test_same_seed_same_bytes(cli):
    for name in ("a", "b"):
        assert cli("--save_ckpt_log_name", name, "--calibration", "self", "--layer_ratio", "auto")[0] == 0
    for file in ("model.safetensors", "calibration.safetensors", "config.json"):
        assert (cli.folder / "prune_log/a" / file).read_bytes() == (cli.folder / "prune_log/b" / file).read_bytes(), file
    assert cli("--save_ckpt_log_name", "c", "--calibration", "prune_log/a/calibration.safetensors", "--layer_ratio", "auto")[0] == 0
    assert (cli.folder / "prune_log/a/model.safetensors").read_bytes() == (cli.folder / "prune_log/c/model.safetensors").read_bytes()


def test_the_best_recipe_measures_each_layer_on_text_of_its_own(cli):
    assert cli("--recipe", "best", "--target_sparsity", "0.3", "--save_ckpt_log_name", "best", "--calibration", "self")[0] == 0
    record = json.loads((cli.folder / "prune_log" / "best" / "pruning.json").read_text())
    assert record["config"]["layer_ratio"] == "auto" and record["config"]["recovery"] == "least_squares"
    assert all(layer["sensitivity"] > 0 for layer in record["layers"]) and len({layer["ratio"] for layer in record["layers"]}) == 2
    assert cli("--target_sparsity", "0.3", "--save_ckpt_log_name", "paper")[0] == 0
    record = json.loads((cli.folder / "prune_log" / "paper" / "pruning.json").read_text())
    assert record["config"]["layer_ratio"] == "importance" and all(layer["sensitivity"] is None for layer in record["layers"])


def test_an_existing_checkpoint_is_replaced_only_on_request(cli):
    assert cli("--save_ckpt_log_name", "a")[0] == 0
    before = (cli.folder / "prune_log/a/model.safetensors").read_bytes()
    status, _, err = cli("--save_ckpt_log_name", "a", "--pruning_ratio", "0.5")
    assert status == 2 and "--overwrite" in err
    assert (cli.folder / "prune_log/a/model.safetensors").read_bytes() == before
    assert cli("--save_ckpt_log_name", "a", "--pruning_ratio", "0.5", "--overwrite")[0] == 0
    assert (cli.folder / "prune_log/a/model.safetensors").read_bytes() != before


def test_no_save_model_leaves_the_record_only(cli):
    assert cli("--no_save_model", "--eval_data", "none")[0] == 0
    names = {p.name for p in (cli.folder / "prune_log/llama_prune").iterdir()}
    assert names == {"pruning.json", "calibration.safetensors", "log.txt", "figures", "report.html", "slimllm.json"}


def test_the_dense_model_is_measured_once_for_the_runs_on_the_same_samples(cli, tiny_folder, text_file, monkeypatch):
    measured, perplexities = [], stages.perplexities
    monkeypatch.setattr(
        stages, "perplexities", lambda source, blocks, names, *rest: measured.append(names) or perplexities(source, blocks, names, *rest)
    )
    first, again = cli.folder / "prune_log/a", ("--calibration", cli.folder / "prune_log/a/calibration.safetensors")
    assert cli("--save_ckpt_log_name", "a")[0] == 0
    status, out, _ = cli(*again, "--pruning_ratio", "0.4", "--save_ckpt_log_name", "b")
    assert status == 0 and f"the dense model was measured by the run in {first}" in out
    assert [name[0].rpartition(" ")[2] for name in measured] == ["(dense)", "(pruned)", "(pruned)"]
    records = [json.loads((cli.folder / f"prune_log/{name}/pruning.json").read_text()) for name in "ab"]
    assert len({record["evaluation"][0]["dense"] for record in records}) == 1
    assert len({str([answer["dense"] for answer in record["answers"]]) for record in records}) == 1
    for flags in (("--eval_limit", "4"), ("--max_seq_len", "8")):  # other blocks are other figures
        cli(*again, *flags, "--save_ckpt_log_name", "c", "--overwrite")
        assert measured[-2][0].endswith("(dense)")
    whole = json.loads((first / "dense.json").read_text())
    for damage in ({"perplexities": ["a"]}, {"perplexities": [-5.0]}, {"perplexities": []}, {"answers": [{}] * 3}, {"answers": []}, None):
        (first / "dense.json").write_text("[" if damage is None else json.dumps(whole | damage))
        assert cli(*again, "--save_ckpt_log_name", "c", "--overwrite")[0] == 0 and measured[-2][0].endswith("(dense)"), damage
    (first / "dense.json").write_text(json.dumps(whole))
    for name in ("tokenizer_config.json", "config.json"):  # files beside the weights decide, too
        settings = json.loads((tiny_folder / name).read_text())
        (tiny_folder / name).write_text(json.dumps(settings | {"rope_theta": 3.0, "chat_template": "x"}))
        assert cli(*again, "--save_ckpt_log_name", "c", "--overwrite")[0] == 0 and measured[-2][0].endswith("(dense)"), name
    make_model(seed=1).save_pretrained(tiny_folder)  # and another model under the same name
    assert cli(*again, "--save_ckpt_log_name", "c", "--overwrite")[0] == 0 and measured[-2][0].endswith("(dense)")


def test_dry_run_reads_no_weights_and_writes_nothing(cli, tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    status, out, _ = cli("--dry_run", "--target_sparsity", "0.3")
    assert status == 0 and not (cli.folder / "prune_log").exists()
    for word in ("parameters", "KV cache per token", "peak memory", "all layers taken to matter the same"):
        assert word in out


def test_a_run_larger_than_the_machine_says_so_in_its_first_line(cli, monkeypatch):
    monkeypatch.setattr(footprint, "free_memory", lambda device: 10_000)
    status, out, _ = cli("--eval_data", "none")
    first = out.splitlines()[0]
    assert status == 0 and first.startswith("this run takes about ") and "0.0 GB are free" in first and "--dtype bfloat16" in first


def test_activations_that_do_not_fit_on_the_disk_are_said_before_the_first_pass(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 1_000))
    monkeypatch.setattr("slimllm.streaming.sizes.MIN_ACTIVATION_BYTES", 0)
    monkeypatch.setattr(footprint, "activation_room", lambda device, least: least)
    status, _, err = cli("--tmp_dir", tmp_path)
    assert status == 2 and f"the temporary folder {tmp_path} has 0.0 GB free" in err and "--tmp_dir" in err
    assert not (cli.folder / "prune_log").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--pruning_ratio", "1.5"], "--pruning_ratio 1.5: must be from 0 to below 1"),
        (["--pruning_ratio", "-0.1"], "--pruning_ratio -0.1: must be from 0"),
        (["--pruning_ratio", "much"], "--pruning_ratio: invalid float value: 'much'"),
        (["--target_sparsity", "1"], "--target_sparsity 1.0: must be from 0 to below 1"),
        (["--target_sparsity", "0.2", "--pruning_ratio", "0.2"], "give one of them"),
        (["--target_sparsity", "0.9", "--pruned_layers", "1"], "can give up at most"),
        (["--pruned_layers", "3"], "--pruned_layers 3: the model has 2 layers"),
        (["--pruned_layers", "0"], "--pruned_layers 0: must be at least 1"),
        (["--recovery", "liner"], "did you mean 'linear'?"),
        (["--head_unit", "groups"], "did you mean 'group'?"),
        (["--recipe", "bets"], "did you mean 'best'?"),
        (["--layer_ratio", "unifrom"], "did you mean 'uniform'?"),
        (["--dtype", "float23"], "did you mean 'float32'?"),
        (["--ridge", "0"], "--ridge 0.0: must be above 0"),
        (["--keep_lowest", "1"], "--keep_lowest 1.0"),
        (["--num_examples", "0"], "--num_examples 0: must be at least 1"),
        (["--round_to", "0"], "--round_to 0"),
        (["--seq_len", "1"], "--seq_len 1"),
        (["--top_p", "2"], "--top_p 2.0"),
        (["--device", "gpu"], "--device gpu: no such device here"),
        (["--eval_device", "cuda:77"], "--eval_device cuda:77: no such device here"),
        (["--save_ckpt_log_name", "../x"], "--save_ckpt_log_name ../x"),
        (["--prunning_ratio", "0.2"], "unknown argument --prunning_ratio; did you mean '--pruning_ratio'?"),
        (["--num_examples", "10000"], "too few for 10000 samples"),
        (["--calibration", "nowhere.txt"], "--calibration nowhere.txt: no such file"),
        (["--eval_data", "nowhere.txt"], "--eval_data nowhere.txt: no such file"),
        (["--max_seq_len", "100000"], "too short for one block"),
        (["--target_sparsity", "0.99"], "all 2 layers can give up at most"),
        (["--target_sparsity", "0.99"], "lower it: a part of each layer must stay"),
        (["--smaller", "0.7"], "can give up at most 0.504 of the model's parameters"),
        (["--smaller", "0.7"], "of the model's parameters; lower it"),
        (["--target_params", "7K"], " M parameters; raise it: a part of each layer must stay"),
        (["--target_params", "9" * 400], "too large a number"),
        (["--vocab", "9" * 400], "--vocab 9999"),
        (["--device", "mps"], "--device mps: Apple's GPU has no float64"),
        (["--save_ckpt_log_name", "x" * 300], "the name is too long"),
        (["--tmp_dir", "nowhere"], "--tmp_dir nowhere: no such folder"),
        (["--plan", "nowhere.json"], "--plan nowhere.json: no such file"),
        (["--plan", "x", "--pruning_ratio", "0.2"], "--plan and --pruning_ratio both say what to remove"),
        (["--no_greedy", "--head_choice", "greedy"], "contradict each other"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(cli, args, message):
    status, _, err = cli(*args)
    assert status == 2 and message in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("hf_prune.py: error: ")
    assert not any((cli.folder / "prune_log").glob("*")) and not any((cli.folder / "prune_log").glob(".*"))


def break_model(folder, how):
    if how == "family":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    elif how == "unknown":
        (folder / "config.json").write_text('{"model_type": "lama"}')
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "config":
        (folder / "config.json").unlink()
    elif how == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
    elif how == "weights":
        (folder / "model.safetensors").unlink()
    elif how == "missing":
        from safetensors.torch import save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif how == "mismatched":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    elif how in ("llama4_text", "falcon", "deepseek_v4", "whisper", "mamba2", "gemma3n_text"):
        (folder / "config.json").write_text(json.dumps({"model_type": how}))
    elif how in ("bitsandbytes", "awq", "gptq", "compressed-tensors"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": how, "bits": 4}}))
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "how, message",
    [
        ("family", "model_type gpt2: its projections are stored transposed"),
        ("unknown", "lama"),
        ("json", "cannot read the config"),
        ("config", "the folder has no config.json"),
        ("truncated", "model.safetensors: the file is broken"),
        ("garbage", "model.safetensors: the file is broken"),
        ("weights", "cannot read the weights"),
        ("missing", "1 weights are missing, the first model.layers.1.mlp.up_proj.weight"),
        ("mismatched", "is [32, 48] in the weights and [32, 40] by config.json"),
        ("deepseek_v4", "route tokens by their ids"),
        ("whisper", "the decoder of an encoder-decoder model"),
        ("mamba2", "a state space or recurrence only"),
        ("llama4_text", "model_type llama4_text: its router scales what its experts read"),
        ("falcon", "in one projection, head by head"),
        ("gemma3n_text", "hand on several states"),
        *((name, f"its weights are quantized ({name})") for name in ("bitsandbytes", "awq", "gptq", "compressed-tensors")),
    ],
)
def test_a_bad_model_is_one_line_and_status_2(cli, tiny_folder, how, message):
    break_model(tiny_folder, how)
    status, _, err = cli()
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert "did you mean" not in err and "ignore_mismatched" not in err
    assert not any((cli.folder / "prune_log").glob(".*"))


def test_a_gated_model_names_the_way_to_log_in(cli, monkeypatch):
    def gated(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://...")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", gated)
    status, _, err = cli(model="meta-llama/Llama-2-7b-hf")
    assert status == 2 and "gated" in err and "hf auth login" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("settings", [PruneConfig, TrainConfig, EvalConfig, LatencyConfig])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_flag_takes_infinity(settings, value):
    needed = {"base_model": "m", "prune_model": "m", "model": "m"}
    needed = {f.name: needed[f.name] for f in dataclasses.fields(settings) if f.name in needed}
    for f in dataclasses.fields(settings):
        if str(f.type) in ("float", "float | None"):
            with pytest.raises(UserError, match=f"--{f.name} {value}: must be"):
                settings(**needed, **{f.name: value})


def test_only_what_the_model_itself_has_to_say_needs_it_whole(cli, monkeypatch):
    def whole(*_):
        raise AssertionError("the whole model was read")

    monkeypatch.setattr(ModelSource, "whole", whole)
    assert cli("--prompt", "none")[0] == cli("--overwrite", "--eval_data", "none")[0] == 0
    monkeypatch.setattr(loading, "SMALL", 0)
    assert cli("--overwrite")[0] == 0  # a model so large answers nothing
    monkeypatch.undo()
    monkeypatch.chdir(cli.folder)
    monkeypatch.setattr(ModelSource, "whole", whole)
    for flags in (["--calibration", "self"], ["--recipe", "best"], ["--test_after_train"], ["--prompt", "a b"], []):
        with pytest.raises(AssertionError, match="whole model was read"):
            cli("--overwrite", *flags)


def test_samples_of_the_model_itself_are_made_where_and_as_it_is_evaluated(cli, monkeypatch):
    monkeypatch.setattr(loading, "evaluation_dtype", lambda dtype, device: torch.bfloat16)
    sample, said = calibration.sample_from_model, []

    def watched(voice, *args):
        said.append((voice.device, voice.model().dtype))
        return sample(voice, *args)

    monkeypatch.setattr(calibration, "sample_from_model", watched)
    assert cli("--eval_data", "none", "--calibration", "self", "--recipe", "best", "--eval_device", "cpu")[0] == 0
    assert said == [(torch.device("cpu"), torch.bfloat16)]


def test_where_the_whole_model_does_not_fit_it_writes_no_text_of_its_own(cli, monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    assert cli("--recipe", "best", "--target_sparsity", "0.3")[0] == 0
    record = json.loads((cli.folder / "prune_log/llama_prune/pruning.json").read_text())
    assert record["calibration"]["own"] == 0 and record["calibration"]["samples"] == 8
    status, _, err = cli("--calibration", "self", "--overwrite")
    assert status == 2 and "the whole model needs" in err and "name a text with --calibration" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere/", "no folder or file of that name is here"),
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
        ("", "--base_model is required"),
    ],
)
def test_a_model_that_is_not_there(cli, name, message):
    status, _, err = cli(model=name)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_read_only_folder(cli, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    status, _, err = cli()
    assert status == 2 and "prune_log/llama_prune: cannot be written (Read-only file system)" in err


def test_a_file_where_the_output_folder_should_be(cli):
    (cli.folder / "prune_log").write_text("")
    status, _, err = cli()
    assert status == 2 and "cannot be written" in err


def test_a_full_disk_leaves_the_old_checkpoint(cli, tiny_folder, text_file):
    """A limit on the size of files stands in for a full disk: the weights do not fit."""
    assert cli("--save_ckpt_log_name", "a")[0] == 0
    before = (cli.folder / "prune_log/a/model.safetensors").read_bytes()
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "hf_prune.py",
            "--base_model",
            tiny_folder,
            "--calibration",
            text_file,
            "--eval_data",
            "none",
            "--num_examples",
            "8",
            "--seq_len",
            "16",
            "--save_ckpt_log_name",
            "a",
            "--overwrite",
        ],
        cwd=cli.folder,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("hf_prune.py: error: prune_log/a: cannot be written")
    assert "Traceback" not in done.stderr
    assert "what is finished is kept in prune_log/.a." in done.stderr and "--resume" in done.stderr
    assert [p.name for p in (cli.folder / "prune_log").glob("[!.]*")] == ["a"]
    assert (cli.folder / "prune_log/a/model.safetensors").read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full")
def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path, capsys):
    with cli_module.logging_to_console():
        cli_module.log_to_file("/dev/full")
        cli_module.log.info("a line")
    assert capsys.readouterr() == ("a line\n", "")
    with pytest.raises(UserError, match="cannot be written"):
        cli_module.log_to_file(tmp_path)


def test_interrupted_in_the_middle_leaves_the_old_checkpoint(cli, monkeypatch):
    assert cli("--save_ckpt_log_name", "a")[0] == 0
    before = (cli.folder / "prune_log/a/model.safetensors").read_bytes()
    prune = pipeline.prune

    def interrupted(run, allocation):
        on_layer = run.on_layer

        def stop(report):
            on_layer(report)
            raise KeyboardInterrupt

        run.on_layer = stop
        return prune(run, allocation)

    monkeypatch.setattr(pipeline, "prune", interrupted)
    status, out, err = cli("--save_ckpt_log_name", "a", "--overwrite")
    assert status == 130 and "hf_prune.py: interrupted; what is finished is kept in prune_log/.a." in err and "layer   0" in out
    assert len(err.strip().splitlines()) == 1 and err.strip().endswith("go on with the same command and --resume")
    assert [p.name for p in (cli.folder / "prune_log").glob("[!.]*")] == ["a"]
    assert (cli.folder / "prune_log/a/model.safetensors").read_bytes() == before


def test_a_save_that_fails_to_load_fails_the_run(cli, monkeypatch):
    write_reference = reference.write_reference

    def wrong(folder, *rest):
        write_reference(folder, *rest)
        spoil(folder)

    monkeypatch.setattr(sink, "write_reference", wrong)
    with pytest.raises(RuntimeError, match="does not load as the model that was saved"):
        cli()
    assert not any((cli.folder / "prune_log").glob("[!.]*"))


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        hf_prune.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--base_model --pruning_ratio --pruned_layers --alpha --num_examples --save_ckpt_log_name --save_model --device "
        "--eval_device --seed --max_seq_len --test_after_train --temperature --top_p --slimllm --target_sparsity "
        "--recovery --ridge --keep_lowest --head_unit --no_greedy --layer_ratio --calibration --seq_len --eval_data "
        "--dtype --round_to --dry_run --recipe --eval_limit --overwrite"
    ).split():
        assert flag in text
    assert "[42]" in text and "[128]" in text and "[32; best" in text


def test_the_script_runs_from_any_folder(tiny_folder, text_file, tmp_path):
    done = run_cli(
        "--base_model", tiny_folder, "--calibration", text_file, "--eval_data", "none", "--num_examples", 8, "--seq_len", 16, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert logits(checkpoint.load(tmp_path / "prune_log/llama_prune"), make_ids()).isfinite().all()
    assert "\r" not in (tmp_path / "prune_log/llama_prune/log.txt").read_text() and os.path.getsize(
        tmp_path / "prune_log/llama_prune/log.txt"
    )


def in_a_destructor(interruption):
    class Interrupted:
        def __del__(self):
            return interruption()

    Interrupted()


def in_a_weak_references_callback(interruption):
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: interruption())
    del thing
    assert reference() is None


def below_c_code_that_clears_errors(interruption):
    class Interrupted:
        def __getattr__(self, name):
            return interruption()

    ctypes.pythonapi.PyObject_HasAttrString(ctypes.py_object(Interrupted()), b"anything")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_a_line_is_logged_ends_the_program_and_is_no_error_of_the_log(as_in_a_terminal, monkeypatch, capfd, sent):
    def write(text):
        os.kill(os.getpid(), sent)
        time.sleep(0.01)  # the handler runs in here

    def run():
        with bar_on_terminal(), cli_module.logging_to_console():
            monkeypatch.setattr(sys.stdout, "write", write)
            cli_module.log.info("layer 3")
            time.sleep(60)

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli_module.guarded("prog", run) == 128 + sent
    assert capfd.readouterr().err == "prog: interrupted; nothing was written\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", [in_a_destructor, in_a_weak_references_callback, below_c_code_that_clears_errors])
def test_an_interruption_that_python_drops_is_not_lost(as_in_a_terminal, capfd, sent, place):
    """The collector runs destructors and callbacks all through a run."""

    def interruption():
        os.kill(os.getpid(), sent)
        time.sleep(0.01)  # the handler runs in here

    def run():
        place(interruption)
        time.sleep(60)

    hook = sys.unraisablehook
    assert cli_module.guarded("prog", run) == 128 + sent
    assert signal.getsignal(sent) is signal.default_int_handler and sys.unraisablehook is hook
    assert capfd.readouterr().err == "prog: interrupted; nothing was written\n"
