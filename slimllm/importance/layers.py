"""Layer importance (paper Eq. 11)."""

from __future__ import annotations

import torch


def cosine_sum(inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    """Sum over tokens of the cosine similarity of a layer's input and output, both [..., D].

    Divided by the number of tokens it is c_l: a layer that hardly turns its input (c near 1) matters less.
    """
    return float(torch.nn.functional.cosine_similarity(inputs.float(), outputs.float(), dim=-1).double().sum())


def layer_weights(cosine: list[float], pruned_layers: int, alpha: float, mode: str) -> list[float]:
    """How the budget is spread: one weight a layer, mean 1 over the ``pruned_layers`` layers of highest cosine, 0 elsewhere.

    ``importance`` is pruned_layers * softmax(alpha * c) over those layers (Eq. 11); ``uniform`` is 1 for each.
    The ratio of layer l is pruning_ratio * weight_l.
    """
    c = torch.tensor(cosine, dtype=torch.float64)
    chosen = torch.argsort(c, descending=True, stable=True)[:pruned_layers]
    weights = torch.zeros_like(c)
    weights[chosen] = torch.softmax(alpha * c[chosen], 0) * len(chosen) if mode == "importance" else 1.0
    return weights.tolist()
