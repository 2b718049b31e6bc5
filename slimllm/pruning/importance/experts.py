"""Importance of whole experts: how much of what a layer's experts give comes from each (docs/method.md, section 9).

A score takes an ExpertStatistics and gives the importance [E] of each expert: the higher, the more it matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class ExpertStatistics:
    """The experts of one layer on the calibration tokens. tokens: [E], how many were routed to each. norms: [E], the sum over these of
    ||g f(x)||, the norm of the expert's output with the router's weight; None for a score that does not need it (ExpertScore). seed: for
    what is random.
    """

    tokens: torch.Tensor
    norms: torch.Tensor | None
    seed: int = 0


def routed(s: ExpertStatistics) -> torch.Tensor:
    """The sum over tokens of ||g f(x)||: an expert matters by how much it adds in all."""
    return s.norms


def reap(s: ExpertStatistics) -> torch.Tensor:
    """REAP's (Lasby et al. 2025): the mean of ||g f(x)|| over the tokens that are routed to the expert, 0 where none is."""
    return s.norms / s.tokens.clamp_min(1)


def frequency(s: ExpertStatistics) -> torch.Tensor:
    """How many tokens are routed to the expert."""
    return s.tokens


def random(s: ExpertStatistics) -> torch.Tensor:
    """Chance, the floor that any score must beat."""
    return torch.rand(len(s.tokens), generator=torch.Generator().manual_seed(s.seed)).to(s.tokens.device)
