import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from slimllm.experiments import plain
from slimllm.pruning.importance import reconstruction
from slimllm.pruning.importance.channels import ChannelStatistics, select_channels
from slimllm.pruning.importance.heads import HeadStatistics, greedy_search, leave_one_out, output_gram, similarity
from slimllm.pruning.importance.layers import importance_weights, uniform_weights
from slimllm.settings.methods import CHANNEL_SCORES
from slimllm.streaming.runner import cosine_sum


def heads_case(heads=5, width=3, dims=8, tokens=60, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(tokens, heads * width) @ torch.randn(heads * width, heads * width)
    weight = torch.randn(dims, heads * width)
    outputs = torch.stack([x[:, i * width : (i + 1) * width] @ weight[:, i * width : (i + 1) * width].T for i in range(heads)])
    gram = output_gram(torch.cov(x.T, correction=0), weight, heads)
    return outputs, gram


def test_gram_is_the_covariance_of_head_outputs():
    outputs, gram = heads_case()
    for i, j in itertools.product(range(5), repeat=2):
        a, b = outputs[i] - outputs[i].mean(0), outputs[j] - outputs[j].mean(0)
        torch.testing.assert_close(gram[i, j].float(), (a * b).mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [[0], [1, 3], [0, 1, 2, 4], [0, 1, 2, 3, 4]])
def test_similarity_is_the_sum_of_absolute_pearson_correlations(keep):
    outputs, gram = heads_case()
    full = outputs.sum(0).numpy()
    kept = outputs[keep].sum(0).numpy()
    expected = sum(abs(np.corrcoef(kept[:, d], full[:, d])[0, 1]) for d in range(full.shape[1]))
    assert similarity(gram, keep) == pytest.approx(expected, rel=1e-4)


def test_leave_one_out_is_the_similarity_of_the_rest():
    outputs, gram = heads_case()
    expected = [plain.similarity(outputs, [j for j in range(5) if j != i], outputs.sum(0)) for i in range(5)]
    assert leave_one_out(gram).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_constant_output_dimension_counts_as_zero():
    _, gram = heads_case()
    gram[:, :, 2] = 0
    assert np.isfinite(similarity(gram, [0, 1]))
    assert len(greedy_search(gram, 2)) == 3


@pytest.mark.parametrize("removed", range(5))
def test_search_follows_the_plain_algorithm(removed):
    for seed in range(8):
        outputs, gram = heads_case(seed=seed)
        full = outputs.sum(0)
        scores = [plain.similarity(outputs, [j for j in range(5) if j != i], full) for i in range(5)]
        pruned = sorted(range(5), key=lambda i: -scores[i])[:removed]
        keep = [i for i in range(5) if i not in pruned]
        assert greedy_search(gram, removed, swap=False) == keep
        best = plain.similarity(outputs, keep, full)
        for head in pruned:
            tried = [plain.similarity(outputs, [head if j == k else j for j in keep], full) for k in keep]
            if max(tried) > best:
                best = max(tried)
                keep[int(np.argmax(tried))] = head
        assert greedy_search(gram, removed) == sorted(keep)


def test_search_never_ends_below_its_start_and_mostly_finds_the_best_set():
    found = 0
    for seed in range(60):
        _, gram = heads_case(heads=6, seed=seed)
        removed = 1 + seed % 4
        start, end = greedy_search(gram, removed, swap=False), greedy_search(gram, removed)
        assert len(end) == 6 - removed
        assert similarity(gram, end) >= similarity(gram, start) - 1e-9
        best = max(itertools.combinations(range(6), 6 - removed), key=lambda s: similarity(gram, list(s)))
        found += tuple(end) == best
    assert found >= 56, f"equals exhaustive search in {found} of 60 cases"  # measured: 58


def test_search_in_groups_takes_the_same_number_from_each():
    for seed in range(10):
        _, gram = heads_case(heads=6, seed=seed)
        keep = greedy_search(gram, 1, groups=2)
        assert sum(i < 3 for i in keep) == 2 and sum(i >= 3 for i in keep) == 2
        assert similarity(gram, keep) >= similarity(gram, greedy_search(gram, 1, groups=2, swap=False)) - 1e-9


def channel_statistics(tokens=50, hidden=6, size=9, seed=0):
    torch.manual_seed(seed)
    x, a = torch.randn(tokens, hidden), torch.randn(tokens, size)
    gate, up, down = torch.randn(size, hidden), torch.randn(size, hidden), torch.randn(hidden, size)
    covariance = torch.cov((a @ down.T).T, correction=0)
    return ChannelStatistics(covariance, down, gate, up, a.norm(dim=0), x.norm(dim=0), seed=seed), x, a


def test_channel_scores_are_the_paper_s_formula():
    s, x, a = channel_statistics()
    scores = CHANNEL_SCORES["feature_space"](s)
    values, vectors = np.linalg.eigh(s.output_covariance.double().numpy())
    weight = 1 / (1 + np.exp(-values / values.mean()))
    for c in range(len(scores)):
        direction = np.linalg.norm((s.down[:, c].numpy() @ vectors) * weight) * np.linalg.norm(a[:, c])
        rest = sum(np.linalg.norm(w[c].numpy() * np.linalg.norm(x, axis=0)) for w in (s.gate, s.up))
        assert scores[c].item() == pytest.approx(direction + rest, rel=1e-4)


def test_without_a_gate_its_term_is_left_out():
    s, x, _ = channel_statistics()
    term = torch.tensor([np.linalg.norm(row * np.linalg.norm(x, axis=0)) for row in s.gate.numpy()])
    ungated = replace(s, gate=None)
    for score in ("feature_space", "unweighted"):
        torch.testing.assert_close(CHANNEL_SCORES[score](ungated), CHANNEL_SCORES[score](s) - term, rtol=1e-4, atol=1e-4)


def test_the_other_channel_scores():
    s, x, a = channel_statistics()
    c = 3
    norm = np.linalg.norm
    rest = sum(norm(w[c].numpy() * norm(x, axis=0)) for w in (s.gate, s.up))
    wanted = {
        "unweighted": norm(s.down[:, c]) * norm(a[:, c]) + rest,
        "wanda": s.down[:, c].abs().mean().item() * norm(a[:, c]),
        "magnitude": norm(s.down[:, c]),
    }
    for name, value in wanted.items():
        assert CHANNEL_SCORES[name](s)[c].item() == pytest.approx(value, rel=1e-4)
    assert torch.equal(CHANNEL_SCORES["random"](s), CHANNEL_SCORES["random"](s))
    assert not torch.equal(CHANNEL_SCORES["random"](s), CHANNEL_SCORES["random"](channel_statistics(seed=1)[0]))


@pytest.mark.parametrize("keep_lowest, kept", [(0.0, [3, 4, 5, 6, 7, 8, 9]), (0.1, [0, 4, 5, 6, 7, 8, 9])])
def test_select_channels_removes_the_lowest_above_the_spared(keep_lowest, kept):
    scores = torch.arange(10.0)
    order = torch.tensor(random.Random(0).sample(range(10), 10))
    assert select_channels(scores, 3, keep_lowest).tolist() == kept
    shuffled = torch.empty(10)
    shuffled[order] = scores
    assert sorted(shuffled[select_channels(shuffled, 3, keep_lowest)].tolist()) == kept


def test_select_channels_spares_no_more_than_may_stay():
    assert len(select_channels(torch.arange(10.0), 9, 0.5)) == 1


def test_layer_weights_are_a_softmax_over_the_most_similar_layers():
    cosine = [0.1, 0.9, 0.95, 0.5, 0.92]
    weights = importance_weights(cosine, 3, alpha=10)
    assert weights[0] == weights[3] == 0
    expected = 3 * np.exp(10 * np.array([0.9, 0.95, 0.92])) / np.exp(10 * np.array([0.9, 0.95, 0.92])).sum()
    assert [weights[i] for i in (1, 2, 4)] == pytest.approx(expected)
    assert uniform_weights(cosine, 3) == [0, 1, 1, 0, 1]


def test_cosine_sum():
    a, b = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[2.0, 0], [0, 3]])
    assert cosine_sum(a, b) == pytest.approx(1.0)


def test_an_eigendecomposition_that_fails_is_tried_again_on_the_cpu_in_float64(monkeypatch):
    eigh, tried = torch.linalg.eigh, []

    def fails_in_float32(matrix):
        tried.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return eigh(matrix)

    s, _, _ = channel_statistics()
    wanted = CHANNEL_SCORES["feature_space"](s)
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    torch.testing.assert_close(CHANNEL_SCORES["feature_space"](s), wanted, rtol=1e-4, atol=1e-4)
    assert tried == [torch.float32, torch.float64]


@pytest.mark.parametrize("width, groups", [(1, 1), (3, 1), (3, 2)])
def test_osscar_leaves_out_what_least_raises_the_error_of_a_fit_to_the_rest(width, groups):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64) @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    weight, units = torch.randn(5, 12, generator=generator, dtype=torch.float64), 12 // width
    h = x.T @ x / 60
    h += reconstruction.DAMPING * h.diagonal().mean() * torch.eye(12)

    def error(gone):
        kept = [c for c in range(12) if c // width not in gone]
        rest = [c for c in range(12) if c // width in gone]
        w = weight[:, rest]
        return float((w @ (h[rest][:, rest] - h[rest][:, kept] @ torch.linalg.solve(h[kept][:, kept], h[kept][:, rest])) @ w.T).trace())

    most, gone, size = units // groups - 1, [], units // groups
    while len(gone) < most * groups:
        allowed = [u for u in range(units) if u not in gone and sum(u // size == g // size for g in gone) < most]
        gone.append(min(allowed, key=lambda u: error([*gone, u])))
    covariance = x.T @ x / 60
    assert reconstruction.eliminate(covariance, weight, units, groups=groups, most=most).tolist() == gone
    kept = reconstruction.heads(HeadStatistics(covariance, weight, units, groups), most)
    assert kept == [u for u in range(units) if u not in gone]


def test_osscar_s_score_of_a_channel_is_when_it_goes():
    generator = torch.Generator().manual_seed(3)
    x, down = torch.randn(400, 300, generator=generator), torch.randn(8, 300, generator=generator)
    statistics = ChannelStatistics(None, down, None, down.T, x.norm(dim=0), down[:, 0], input_covariance=x.T @ x / 400)
    score = reconstruction.channels(statistics)
    assert sorted(score.tolist()) == list(range(300))
    alone = set(reconstruction.eliminate(statistics.input_covariance, down, 300)[:60].tolist())  # one at a time
    assert len(alone & set(score.argsort()[:60].tolist())) >= 36  # by chance 12
