"""Channel importance in the feature space of the layer's output (paper section 3.3)."""

from __future__ import annotations

import torch


def channel_scores(output_covariance, down_weight, gate_weight, up_weight, activation_norm, input_norm) -> torch.Tensor:
    """Importance [I] of each feed-forward channel: the higher, the more it matters.

    With Cov(Y) = V diag(lambda) V^T and w = sigmoid(lambda / mean(lambda)):
    ||(W_down[:, c]^T V) * w|| * ||A[:, c]|| + ||W_gate[c] * xnorm|| + ||W_up[c] * xnorm||.

    Args:
        output_covariance: [D, D] of the feed-forward output Y. down_weight: [D, I]. gate_weight, up_weight: [I, D].
        activation_norm: [I], ||A[:, c]|| over tokens of down_proj's input. input_norm: [D], the norm over tokens of
        each dimension of the feed-forward input. None of the norms is centred.
    """
    eigenvalues, vectors = torch.linalg.eigh(output_covariance)
    weighted = vectors * torch.sigmoid(eigenvalues / eigenvalues.mean())
    direction = (down_weight.T @ weighted).norm(dim=1)
    squared = input_norm.square()
    gate, up = ((weight.square() @ squared).sqrt() for weight in (gate_weight, up_weight))
    return direction * activation_norm + gate + up


def select_channels(scores: torch.Tensor, removed: int, keep_lowest: float) -> torch.Tensor:
    """The channels to keep, ascending [I - removed].

    The lowest ``round(keep_lowest * I)`` scores stay and the ``removed`` above them go: 0.01 is what the published
    code does, 0 is the paper's text.
    """
    order = torch.argsort(scores, stable=True)
    spared = min(round(keep_lowest * len(scores)), len(scores) - removed)
    return torch.cat([order[:spared], order[spared + removed :]]).sort().values
