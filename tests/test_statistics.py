import errno
import tempfile

import pytest
import torch

from slimllm.errors import UserError
from slimllm.streaming.activations import ActivationMemory, ActivationStore
from slimllm.streaming.statistics import Covariance, PairMoments, SquareSum


def rows(count=1000, size=7, offset=0.0):
    torch.manual_seed(0)
    return torch.randn(count, size) @ torch.randn(size, size) + offset


def test_covariance_of_batches_is_the_covariance_of_all():
    x = rows()
    covariance = Covariance(7)
    for batch in x.split(37):
        covariance.update(batch)
    torch.testing.assert_close(covariance.matrix(), torch.cov(x.T, correction=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance.mean, x.mean(0), rtol=1e-5, atol=1e-5)


def test_covariance_survives_a_mean_far_above_the_spread():
    """Raw second moments would lose all digits here in float32: the mean is 10^4 times the spread."""
    x = rows(offset=0.0) + torch.tensor([1e4, 0, 0, 0, 0, 0, -1e4])
    covariance = Covariance(7)
    for batch in x.split(64):
        covariance.update(batch)
    torch.testing.assert_close(covariance.matrix(), torch.cov(x.double().T, correction=0).float(), rtol=1e-3, atol=1e-2)


def test_covariance_wider_than_a_column_block_is_symmetric(monkeypatch):
    monkeypatch.setattr("slimllm.streaming.statistics._COLUMN_BLOCK", 3)
    x = rows()
    covariance = Covariance(7)
    covariance.update(x[:500])
    covariance.update(x[500:])
    matrix = covariance.matrix()
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix, torch.cov(x.T, correction=0), rtol=1e-5, atol=1e-5)


def test_square_sum_is_the_column_norm():
    x, norm = rows(), SquareSum(7)
    for batch in x.split(100):
        norm.update(batch)
    torch.testing.assert_close(norm.norm(), x.norm(dim=0))


def test_pair_moments_and_relative_error():
    x, y = rows(), rows(offset=2.0).roll(1, 1)
    moments = PairMoments(7)
    for a, b in zip(x.split(90), y.split(90)):
        moments.update(a, b)
    torch.testing.assert_close(moments.var_x, x.var(0, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.cov_xy, ((x - x.mean(0)) * (y - y.mean(0))).mean(0), rtol=1e-4, atol=1e-4)
    expected = ((y - x) ** 2).mean(0).sum() / y.var(0, correction=0).sum()
    assert abs(moments.relative_error() - expected) < 1e-4 * expected


def test_store_keeps_what_fits_in_memory_and_the_rest_in_a_file():
    memory = ActivationMemory(2 * 40)
    store = ActivationStore(memory)
    tensors = [torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5).bfloat16(), torch.randn(3, 5).half()]
    for tensor in tensors:
        store.append(tensor)
    assert memory.left == 0 and store._file is not None
    assert all(torch.equal(a, b) for a, b in zip(store, tensors))
    tensors[1], tensors[3] = tensors[1] + 1, tensors[3] + 1
    store[1], store[3] = tensors[1], tensors[3]
    assert all(torch.equal(a, b) for a, b in zip(store, tensors))
    store.close()
    assert memory.left == 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_lies_on_disk_comes_back_as_it_was(dtype, tmp_path):
    store, tensor = ActivationStore(ActivationMemory(0, str(tmp_path))), torch.randn(3, 5).to(dtype)
    store.append(tensor)
    assert torch.equal(store[0], tensor) and store[0].dtype == dtype


def test_a_full_temporary_folder_is_named_with_the_way_out(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=f"temporary folder {tempfile.gettempdir()}: cannot be written .*--tmp_dir"):
        ActivationStore(ActivationMemory(0)).append(torch.zeros(4))
