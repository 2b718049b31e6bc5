"""Layer importance (paper Eq. 11)."""

from __future__ import annotations

import torch


def importance_weights(cosine: list[float], pruned_layers: int, alpha: float) -> list[float]:
    """One weight per layer [L]: pruned_layers * softmax(alpha * c) over the ``pruned_layers`` layers of highest cosine c, 0 elsewhere.

    Their mean over the pruned layers is 1; the ratio of layer l is pruning_ratio * weight_l (Eq. 11).
    """
    c = torch.tensor(cosine, dtype=torch.float64)
    chosen = _highest(c, pruned_layers)
    weights = torch.zeros_like(c)
    weights[chosen] = torch.softmax(alpha * c[chosen], 0) * len(chosen)
    return weights.tolist()


def uniform_weights(cosine: list[float], pruned_layers: int) -> list[float]:
    """One weight per layer [L]: 1 for the ``pruned_layers`` layers of highest cosine, 0 elsewhere."""
    c = torch.tensor(cosine, dtype=torch.float64)
    weights = torch.zeros_like(c)
    weights[_highest(c, pruned_layers)] = 1.0
    return weights.tolist()


def _highest(c: torch.Tensor, count: int) -> torch.Tensor:
    return torch.argsort(c, descending=True, stable=True)[:count]
