import copy

import numpy as np
import pytest
import torch

from slimllm.deploy import runtimes
from slimllm.plan import LayerPlan, removed_parameters
from slimllm.settings.methods import RECOVERIES
from slimllm.streaming.statistics import Covariance, PairMoments
from tests.conftest import make_config, make_ids, make_model, make_shape, prune


def case(bias, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(400, 10) @ torch.randn(10, 10) + 3
    weight = torch.randn(6, 10)
    b0 = torch.randn(6) if bias else None
    keep = torch.tensor([0, 2, 3, 7, 9])
    y = torch.nn.functional.linear(x, weight, b0)
    pruned = torch.nn.functional.linear(x[:, keep], weight[:, keep], b0)
    covariance, moments = Covariance(10), PairMoments(6)
    covariance.update(x)
    moments.update(pruned, y)
    return x, y, pruned, weight, b0, keep, covariance, moments


def recovered_output(name, ridge, x, weight, b0, keep, covariance, moments):
    r = RECOVERIES[name](weight, b0, keep, moments, covariance, ridge)
    return r, torch.nn.functional.linear(x[:, keep], r.weight, r.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", RECOVERIES)
def test_recovery_never_raises_the_calibration_error(name, bias):
    for ridge in (0.01, 1.0, 100.0):
        x, y, pruned, weight, b0, keep, covariance, moments = case(bias)
        _, output = recovered_output(name, ridge, x, weight, b0, keep, covariance, moments)
        assert (y - output).square().mean() <= (y - pruned).square().mean() * (1 + 1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["none", "bias", "linear"])
def test_scale_and_shift_say_the_same_as_weight_and_bias(name, bias):
    x, y, pruned, weight, b0, keep, covariance, moments = case(bias)
    r, output = recovered_output(name, 1.0, x, weight, b0, keep, covariance, moments)
    torch.testing.assert_close(pruned * r.scale + r.shift, output, rtol=1e-4, atol=1e-4)


def test_none_keeps_the_columns_and_adds_nothing():
    x, y, pruned, weight, b0, keep, covariance, moments = case(False)
    r, _ = recovered_output("none", 1.0, x, weight, b0, keep, covariance, moments)
    assert torch.equal(r.weight, weight[:, keep]) and r.bias is None


def test_linear_is_polyfit_of_each_output_dimension():
    x, y, pruned, weight, b0, keep, covariance, moments = case(False)
    r, _ = recovered_output("linear", 1.0, x, weight, b0, keep, covariance, moments)
    fits = np.array([np.polyfit(pruned[:, d].double(), y[:, d].double(), 1) for d in range(6)])
    np.testing.assert_allclose(r.scale, fits[:, 0], rtol=1e-4)
    np.testing.assert_allclose(r.bias, fits[:, 1], rtol=1e-3, atol=1e-3)


def test_linear_with_a_constant_dimension_stays_finite():
    x, y, pruned, weight, b0, keep, covariance, _ = case(False)
    weight[2] = 0
    moments = PairMoments(6)
    moments.update(x[:, keep] @ weight[:, keep].T, x @ weight.T)
    r, _ = recovered_output("linear", 1.0, x, weight, b0, keep, covariance, moments)
    assert r.weight.isfinite().all() and r.bias.isfinite().all()


def test_least_squares_is_ridge_regression_towards_the_kept_weights():
    x, y, pruned, weight, b0, keep, covariance, moments = case(False)
    r, _ = recovered_output("least_squares", 0.5, x, weight, b0, keep, covariance, moments)
    xs = (x[:, keep] - x[:, keep].mean(0)).double()
    residual = (y - pruned).double()
    residual = residual - residual.mean(0)
    ridge = 0.5 * xs.square().mean(0).median() * len(xs)
    delta = torch.linalg.solve(xs.T @ xs + ridge * torch.eye(5), xs.T @ residual)
    torch.testing.assert_close(r.weight.double(), weight[:, keep].double() + delta.T, rtol=1e-3, atol=1e-3)


def test_rotation_is_the_orthogonal_procrustes_solution_where_the_ridge_has_no_end():
    x, y, pruned, weight, b0, keep, covariance, moments = case(False)
    r, output = recovered_output("rotation", 1e9, x, weight, b0, keep, covariance, moments)
    centred_y, centred = y - y.mean(0), pruned - pruned.mean(0)
    u, _, vt = np.linalg.svd((centred_y.T @ centred).double().numpy())
    turned = torch.from_numpy(u @ vt).float()
    torch.testing.assert_close(turned @ turned.T, torch.eye(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(r.weight, turned @ weight[:, keep], rtol=1e-3, atol=1e-3)
    assert (y - output).square().mean() < (centred_y - centred).square().mean()


def test_rotation_and_least_squares_agree_where_there_is_no_ridge():
    args = case(False)
    found = [recovered_output(name, 1e-6, args[0], *args[3:])[0] for name in ("rotation", "least_squares")]
    torch.testing.assert_close(found[0].weight, found[1].weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("outlier", [1.0, 1e3])
def test_one_input_with_an_outlying_variance_does_not_switch_least_squares_off(outlier):
    """The other inputs are recovered as well as without it (LLaMA-2 has an input of 1,400 times the ordinary size)."""
    x, y, pruned, weight, b0, keep, covariance, moments = case(False)
    x = torch.cat([x, outlier * x.std() * torch.randn(len(x), 1)], 1)
    weight = torch.cat([weight, torch.full((6, 1), 0.1 / outlier)], 1)
    keep = torch.cat([keep, torch.tensor([10])])
    covariance, moments = Covariance(11), PairMoments(6)
    covariance.update(x)
    y, pruned = x @ weight.T, x[:, keep] @ weight[:, keep].T
    moments.update(pruned, y)
    _, output = recovered_output("least_squares", 1.0, x, weight, b0, keep, covariance, moments)
    assert (y - output).var(0).sum() <= 0.75 * (y - pruned).var(0).sum()


def test_least_squares_with_a_dead_input_and_a_tiny_ridge():
    x, y, pruned, weight, b0, keep, covariance, moments = case(False)
    x[:, 2] = 0
    covariance = Covariance(10)
    covariance.update(x)
    r, output = recovered_output("least_squares", 1e-9, x, weight, b0, keep, covariance, moments)
    assert output.isfinite().all()


@pytest.mark.parametrize("runtime", ["any", "transformers"])
@pytest.mark.parametrize("case", ["llama_gqa", "llama_biases", "qwen3"])
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_no_new_bias_adds_none_and_fits_through_zero(recovery, case, runtime):
    dense, shape = make_model(case), make_shape(case)
    config = make_config(shape=shape, recovery=recovery, runtime=runtime, target_sparsity=0.3, new_bias=False)
    model = copy.deepcopy(dense)
    reports = prune(model, make_ids(), config)
    biased = {name for name, _ in dense.named_parameters() if name.endswith("bias")}
    assert {name for name, _ in model.named_parameters() if name.endswith("bias")} == biased
    for report in reports:
        for before, after in report.errors.values():
            assert after <= before * (1 + 1e-5)
    plans = [LayerPlan(0.0, r.units) for r in reports]
    runtimes.convert_for_runtime(model, runtime)
    assert removed_parameters(shape, plans, config) == dense.num_parameters() - model.num_parameters()
