"""What least raises the error of a layer's output where all kept weights are fitted anew: OSSCAR's choice (Meng et al. 2024).

With H = C + λ mean(diag C) E, C [n, n] the covariance of the output projection's input X and W [D, n] its weights, leaving out the columns
P and fitting the others by least squares raises the error by tr(W_P (H^-1_PP)^-1 W_P^T). The columns that raise it least go, W and H^-1
become those of the fit without them, and so on. OSSCAR goes by X^T X; here the mean is left to the bias that the fit gives.
"""

from __future__ import annotations

import torch

from ...errors import UserError
from .channels import ChannelStatistics
from .heads import HeadStatistics

DAMPING = 0.01  # λ, as OSSCAR has it
STEPS = 128  # in which the channels of a layer go


def channels(s: ChannelStatistics) -> torch.Tensor:
    """When each channel goes: the later, the more it matters. ``STEPS`` times the least of those that are left go together."""
    size = s.down.shape[1]
    order = eliminate(s.input_covariance, s.down, size, together=-(-size // STEPS))
    return torch.empty(size, device=s.down.device).index_copy_(0, order, torch.arange(size, device=s.down.device, dtype=torch.float32))


def heads(s: HeadStatistics, removed: int) -> list[int]:
    """The units that are left where one after the other has gone, ``removed`` from each group."""
    gone = eliminate(s.covariance, s.weight, s.units, groups=s.groups, most=removed)
    return [unit for unit in range(s.units) if unit not in set(gone.tolist())]


def eliminate(
    covariance: torch.Tensor, weight: torch.Tensor, units: int, together: int = 1, groups: int = 1, most: int | None = None
) -> torch.Tensor:
    """The units in the order in which they go, int64.

    ``covariance`` [n, n], ``weight`` [D, n]; ``units``: how many equal blocks of columns; ``together``: how many go in one step.
    ``groups``: equal runs of units, each of which loses ``most`` (all, where it is None). Raises UserError where H has no inverse.
    """
    width, most = weight.shape[1] // units, units // groups if most is None else most
    inverse, failed = torch.linalg.inv_ex(covariance + DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance))
    if failed or not inverse.isfinite().all():
        raise UserError("osscar: the input covariance of a layer cannot be inverted; give more calibration samples, or --dtype float32")
    weight, alive = weight.to(inverse), torch.arange(units, device=weight.device)
    lost, order = torch.zeros(groups, dtype=torch.long, device=weight.device), []
    while (lost < most).any():
        blocks = inverse.view(len(alive), width, len(alive), width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [alive, width, width]
        by_unit = weight.view(len(weight), len(alive), width).permute(1, 2, 0)  # [alive, width, D]
        error = (by_unit * torch.linalg.solve(blocks, by_unit)).sum((1, 2))
        error[lost[alive * groups // units] >= most] = torch.inf
        count = min(together, int((error < torch.inf).sum()))
        go = error.argsort(stable=True)[:count]
        order.append(alive[go])
        lost += torch.bincount(alive[go] * groups // units, minlength=groups)
        stay = torch.ones(len(alive), dtype=torch.bool, device=weight.device)
        stay[go] = False
        of_columns = stay.repeat_interleave(width)
        out = (go[:, None] * width + torch.arange(width, device=go.device)).flatten()
        factor = torch.linalg.solve(inverse[out][:, out], inverse[out][:, of_columns])  # [P, kept]
        weight = weight[:, of_columns] - weight[:, out] @ factor
        inverse = inverse[of_columns][:, of_columns] - inverse[:, out][of_columns] @ factor
        alive = alive[stay]
    return torch.cat(order) if order else alive[:0]
