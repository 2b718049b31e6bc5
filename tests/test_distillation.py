"""Distillation on random two-layer models."""

import copy
import json

import pytest
import torch

import hf_prune
import slimllm
from slimllm.deploy.sink import CheckpointSink
from slimllm.deploy.weight_files import WeightFiles
from slimllm.models import loading
from slimllm.models.shape import shape_of
from slimllm.reporting.record import PROCESSES
from slimllm.training import distillation
from slimllm.training import teacher as teacher_module
from slimllm.training.distillation import trained_names
from slimllm.training.teacher import Teacher
from tests.conftest import DISTINCT_CASES, logits, make_config, make_ids, make_model, make_shape, prune, run_of


@pytest.fixture(autouse=True, params=[torch.float32, torch.bfloat16], ids=str)
def compute(request, monkeypatch):
    """What the teacher and the student compute in, whatever the processor is fast in."""
    monkeypatch.setattr(teacher_module, "distillation_dtype", lambda dtype, device: request.param)
    return request.param


def distil(model, teacher, mode, epochs=1, learning_rate=None, seed=42, saved=None):
    settings = dict(distill=mode, distill_epochs=epochs, distill_learning_rate=learning_rate, seed=seed)
    return distillation.distil(run_of(model, make_ids(), make_config(shape=shape_of(model.config), **settings)), model, teacher, saved)


def divergence(dense, model, ids):
    """KL(p || q), nats per token."""
    p, q = (logits(m, ids).log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def pruned(case="llama_gqa", **settings):
    model = make_model(case)
    prune(model, make_ids(), make_config(shape=make_shape(case), **settings))
    return model


@pytest.mark.parametrize("case", DISTINCT_CASES)
@pytest.mark.parametrize("mode", ["scales", "all"])
def test_the_divergence_falls_and_the_parameters_are_those_that_are_named(case, mode):
    dense, model, ids = make_model(case), pruned(case), make_ids(48)
    before = {name: p.clone() for name, p in model.named_parameters()}
    start = divergence(dense, model, ids[:36])
    found = distil(model, Teacher(dense, ids), mode, 4, 3e-3)
    assert found.kept and found.after < found.before
    assert divergence(dense, model, ids[:36]) < start
    assert found.before == pytest.approx(divergence(dense, pruned(case), ids[36:]), rel=0.02)
    assert found.after == pytest.approx(divergence(dense, model, ids[36:]), rel=0.02)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= set(trained_names(model, mode)) and len(changed) > 4
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == {n: (p.shape, p.dtype) for n, p in before.items()}


@pytest.mark.parametrize("mode", ["scales", "all"])
def test_a_bfloat16_model_is_trained_in_what_the_teacher_computes_in(mode):
    dense, model = make_model().bfloat16(), pruned().bfloat16()
    found = distil(model, Teacher(dense, make_ids(48)), mode, 4, 3e-3)
    assert found.kept and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_scales_are_one_factor_per_input_column_of_the_output_projections():
    dense, model = make_model(), pruned()
    before = copy.deepcopy(model)
    distil(model, Teacher(dense, make_ids(32)), "scales", 2, 1e-2)
    for layer, old in zip(model.model.layers, before.model.layers):
        for linear, was in ((layer.self_attn.o_proj, old.self_attn.o_proj), (layer.mlp.down_proj, old.mlp.down_proj)):
            factor = linear.weight / was.weight
            torch.testing.assert_close(factor, factor[:1].expand_as(factor), atol=1e-3, rtol=1e-3)
            assert (factor[0] - 1).abs().max() > 1e-3 and not linear._forward_pre_hooks
        assert torch.equal(layer.mlp.up_proj.weight, old.mlp.up_proj.weight)


def test_the_gradient_in_pieces_is_that_of_the_whole_loss(monkeypatch, compute):
    monkeypatch.setattr(distillation, "LOSS_ROWS", 7)
    dense, model, ids = make_model(), pruned(), make_ids(4)
    monkeypatch.setattr(distillation, "BATCH_TOKENS", 16)  # one sample at a time
    loss = distillation._Loss(model, Teacher(dense, ids))
    loss.backward(torch.arange(4))
    found = model.model.layers[0].mlp.down_proj.weight.grad.clone()
    model.zero_grad()
    p = logits(dense, ids).softmax(-1)
    (-(p * model(ids, use_cache=False).logits.log_softmax(-1)).sum(-1).mean()).backward()
    expected = model.model.layers[0].mlp.down_proj.weight.grad
    allowed = 1e-5 if compute == torch.float32 else 0.1 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=allowed)


@pytest.mark.parametrize("case", ["llama_gqa", "gemma3"])
def test_the_default_learning_rate_is_a_share_of_the_weights_size(case):
    """Models of small weights, such as Gemma's, were trained apart by a rate that suits large ones."""
    model = pruned(case)
    weights = torch.cat([w.detach().flatten() for w in model.model.layers.parameters() if w.ndim == 2])
    found = distil(model, Teacher(make_model(case), make_ids(32)), "all")
    assert found.learning_rate == pytest.approx(0.0026 * float(weights.square().mean().sqrt()) * found.before**0.5)


def test_a_loss_that_does_not_fall_leaves_the_model_as_it_was(caplog):
    dense, model = make_model(), pruned()
    before = copy.deepcopy(model)
    found = distil(model, Teacher(dense, make_ids(32)), "all", 1, 10.0)
    assert not found.kept and "did not fall" in caplog.text
    for parameter, was in zip(model.parameters(), before.parameters()):
        assert torch.equal(parameter, was) and parameter.grad is None


def test_the_same_seed_gives_the_same_model():
    weights = []
    for seed in (1, 1, 2):
        model = pruned()
        distil(model, Teacher(make_model(), make_ids(32)), "all", 1, 1e-3, seed)
        weights.append(model.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_from_python_and_from_the_command_line_alike(tiny_folder, text_file, tmp_path, monkeypatch):
    """The distilled checkpoint holds what was trained, loads again, and its record says how it went."""
    monkeypatch.chdir(tmp_path)
    settings = dict(target_sparsity=0.3, distill="all", distill_examples=80, num_examples=8, seq_len=16)
    settings |= dict(recovery="least_squares", distill_learning_rate=1e-3, distill_epochs=2)
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    flags += ["--base_model", str(tiny_folder), "--calibration", str(text_file), "--eval_data", f"text={text_file}"]
    assert hf_prune.main(flags) == 0
    record = json.loads((tmp_path / "prune_log/llama_prune/pruning.json").read_text())
    assert record["distillation"]["kept"] and record["calibration"]["distill_samples"] == 80
    saved = loading.load_model(str(tmp_path / "prune_log/llama_prune"), "auto")

    model, tokenizer = loading.load_model(str(tiny_folder), "auto"), loading.load_tokenizer(str(tiny_folder))
    result = slimllm.prune(model, tokenizer, calibration=str(text_file), **settings)
    assert result.distillation.kept
    torch.testing.assert_close(logits(saved, make_ids(2)), logits(result.model, make_ids(2)), rtol=1e-3, atol=1e-3)
    slimllm.save(result, tmp_path / "saved")


def test_a_run_stopped_after_the_training_does_not_train_again(tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", str(tiny_folder), "--calibration", str(text_file), "--eval_data", "none", "--distill", "scales"]
    flags += ["--distill_examples", "24", "--num_examples", "8", "--seq_len", "16", "--target_sparsity", "0.3"]

    def stop(self, model, names):  # in the middle of writing
        files = WeightFiles.of(self.folder, model, self.dtype)
        files.write(names[0], model.get_parameter(names[0]))
        files.close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSink, "replace", stop)
        assert hf_prune.main(flags) == 130
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "distil", None)
        assert hf_prune.main([*flags, "--resume"]) == 0
    assert hf_prune.main([*flags, "--save_ckpt_log_name", "whole"]) == 0
    one, other = (tmp_path / "prune_log" / name / "model.safetensors" for name in ("llama_prune", "whole"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("mode", ["all", "scales"])
def test_the_divergence_after_is_that_of_the_weights_as_saved(mode):
    dense, student = make_model(), pruned()
    teacher = Teacher(dense, make_ids(24))
    found = distil(student, teacher, mode, saved=torch.bfloat16)
    names = distillation.trained_names(student, mode)
    rounded = {name: student.get_parameter(name).bfloat16().float() for name in names}
    if found.kept:
        assert all(torch.equal(student.get_parameter(name), value) for name, value in rounded.items())
    with distillation._trainable(student, mode, teacher.dtype):
        measured = distillation._Loss(student, teacher).mean(torch.arange(24)[-found.held_out :])
    assert measured == (found.after if found.kept else found.before)


def test_a_float16_model_is_distilled_in_another_dtype_and_keeps_what_is_not_trained(monkeypatch):
    monkeypatch.setattr(teacher_module, "distillation_dtype", lambda own, device: torch.bfloat16)
    dense, student = make_model().half(), pruned().half()
    before = {name: p.clone() for name, p in student.named_parameters()}
    distil(student, Teacher(dense, make_ids(24)), "all")
    assert all(p.dtype == torch.float16 for p in student.parameters())
    names = set(distillation.trained_names(student, "all"))
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters() if name not in names)


def stopping_at_step(number, steps):
    """A _Loss.backward that is interrupted before it takes this step; ``steps`` gets the sizes of the batches."""
    backward = distillation._Loss.backward

    def stops(self, samples):
        steps.append(len(samples))
        if len(steps) == number:
            raise KeyboardInterrupt
        return backward(self, samples)

    return stops


@pytest.mark.parametrize("mode", ["all", "scales"])
def test_a_run_stopped_while_it_distils_goes_on_from_its_last_saved_step(mode, tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    """The model is the same, byte for byte, as where nothing was stopped; all layers are pruned, so it may have been of other processes."""
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", str(tiny_folder), "--calibration", str(text_file), "--eval_data", "none", "--distill", mode]
    flags += ["--distill_examples", "72", "--num_examples", "8", "--seq_len", "16", "--target_sparsity", "0.3", "--distill_epochs", "3"]
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(distillation._Loss, "backward", stopping_at_step(8, steps))
        assert hf_prune.main(flags) == 130
        [step] = (tmp_path / "prune_log").rglob("distilling.safetensors")
        content = step.read_bytes()
        step.write_bytes(content[:-8])
        capsys.readouterr()
        assert hf_prune.main([*flags, "--resume"]) == 2
        assert "distilling.safetensors, which the stopped run had written, is broken" in capsys.readouterr().err
        step.write_bytes(content)
        [identity] = (tmp_path / "prune_log").rglob("identity.json")
        identity.write_text(json.dumps(json.loads(identity.read_text()) | {PROCESSES: 2}))
        assert hf_prune.main([*flags, "--resume"]) == 0
    assert "distillation: resumed at step 6 of 21" in capsys.readouterr().out and len(steps) == 8 + 21 - 6
    assert hf_prune.main([*flags, "--save_ckpt_log_name", "whole"]) == 0
    one, other = (tmp_path / "prune_log" / name for name in ("llama_prune", "whole"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    records = [json.loads((folder / "pruning.json").read_text())["distillation"] for folder in (one, other)]
    assert records[0] == records[1]


@pytest.mark.parametrize("seconds_to_keep, times", [(0.5, 8), (5.0, 1)])
def test_a_step_that_takes_long_to_keep_is_kept_seldom(seconds_to_keep, times, monkeypatch):
    kept, now, weight = [], [0.0], torch.nn.Parameter(torch.ones(2))

    def keep(training):
        kept.append(training.step)
        now[0] += seconds_to_keep

    class Loss:
        def backward(self, batch):
            now[0] += 1.0
            weight.grad = torch.ones(2)
            return 1.0

    monkeypatch.setattr(distillation._Training, "_keep", keep)
    monkeypatch.setattr(distillation.time, "perf_counter", lambda: now[0])
    training = object.__new__(distillation._Training)
    training.parameters, training.steps, training.step, training.rate = [weight], 16, 0, 0.1
    training._optimizer = torch.optim.SGD([weight], 0.1)
    training.run(Loss(), [torch.zeros(1)] * 16, lambda *_: None)
    assert len(kept) == times
