"""What the kept weights of an output projection become (paper section 3.4; docs/method.md, section 5).

Notation, for o_proj and down_proj alike: X_S [T, |S|] the input columns that stay, W_S [D, |S|] their weights, Y [T, D] the output before
pruning, Ŷ = X_S W_S^T + b0 the pruned one (b0 the projection's own bias or zero). A recovery is given W [D, n], b0 [D] or None, the indices
S ascending, the PairMoments of Ŷ and Y, the Covariance of X and the strength of the ridge. It sees these statistics only and gives new
weights and a bias; none of the recoveries can raise the mean squared error on the calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UserError
from ..streaming.statistics import Covariance, CrossCovariance, PairMoments


@dataclass
class Recovered:
    """New parameters of a pruned projection.

    weight [D, |S|], bias [D] or None. Where ``scale`` and ``shift`` [D] are given, the new output is scale * Ŷ + shift, so that it need not
    be computed again from the input.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def to(self, device) -> Recovered:
        """The same tensors on another device."""
        parts = (self.weight, self.bias, self.scale, self.shift)
        return Recovered(*(None if part is None else part.to(device) for part in parts))


def _affine(weight, bias, scale, shift) -> Recovered:
    base = torch.zeros_like(shift) if bias is None else bias
    return Recovered(weight * scale[:, None], base * scale + shift, scale, shift)


def none(weight, bias, keep, moments: PairMoments, covariance, ridge) -> Recovered:
    """The kept columns as they are: W_S and b0."""
    return Recovered(weight[:, keep], bias, torch.ones_like(moments.mean_x), torch.zeros_like(moments.mean_x))


def bias(weight, bias, keep, moments: PairMoments, covariance, ridge) -> Recovered:
    """Adds mean(Y - Ŷ) to the bias."""
    return _affine(weight[:, keep], bias, torch.ones_like(moments.mean_x), moments.mean_y - moments.mean_x)


def linear(weight, bias, keep, moments: PairMoments, covariance, ridge) -> Recovered:
    """The paper's regression of each output dimension: a = Cov(Ŷ, Y) / Var(Ŷ), b = mean(Y) - a mean(Ŷ) (Eq. e).

    A dimension in which Ŷ does not vary keeps a = 1.
    """
    varies = moments.var_x > 0
    scale = torch.where(varies, moments.cov_xy / torch.where(varies, moments.var_x, 1.0), 1.0)
    return _affine(weight[:, keep], bias, scale, moments.mean_y - scale * moments.mean_x)


def least_squares(
    weight, bias, keep, moments: PairMoments, covariance: Covariance, ridge: float, shift: CrossCovariance | None = None
) -> Recovered:
    """All kept weights anew, by ridge regression of Y on X_S that pulls towards W_S (not from the paper).

    With C the covariance of the input, R the removed columns, ρ the ``ridge`` and E the unit matrix,
    Δ^T = (C_SS + ρ * median(diag C_SS) * E)^-1 C_SR W_R^T, new weights W_S + Δ, b = mean(Y) - (W_S + Δ) mean(X_S) (Eq. f).
    The median, since one input with an outlying variance would raise a mean, and with it the pull, a thousandfold.

    Raises UserError where C_SS plus the ridge is not positive definite, for example because inputs overflowed.
    """
    return _ridge(weight, None, keep, moments, covariance, ridge, shift)


def rotation(
    weight, bias, keep, moments: PairMoments, covariance: Covariance, ridge: float, shift: CrossCovariance | None = None
) -> Recovered:
    """:func:`least_squares` that pulls towards R W_S, the kept weights turned so that their outputs come as near to Y as a rotation brings
    them (Eq. f'), in place of W_S (not from the paper).

    R = U V^T with U S V^T the singular value decomposition of Cov(Y, Ŷ), the orthogonal Procrustes problem's solution: outputs keep
    their lengths and angles. With a ridge without end R W_S is what remains, the rotation-constrained refit of RCPU (arXiv 2510.07782).
    """
    c, kept = covariance.matrix(), weight[:, keep]
    across = weight @ (c[:, keep] @ kept.T)
    if shift is not None:
        across += (kept @ shift.matrix()[keep]).T
    u, _, vt = torch.linalg.svd(across)
    return _ridge(weight, (u @ vt) @ kept, keep, moments, covariance, ridge, shift)


def _ridge(weight, towards, keep, moments: PairMoments, covariance: Covariance, ridge: float, shift: CrossCovariance | None) -> Recovered:
    """Ridge regression of Y on X_S that pulls towards the weights ``towards`` [D, |S|], or W_S where that is None. Raises as
    :func:`least_squares` does.
    """
    c, kept = covariance.matrix(), weight[:, keep]
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[keep] = False
    removed = removed.nonzero().flatten()
    cross = c[keep[:, None], removed] @ weight[:, removed].T
    mean = moments.mean_y
    if shift is not None:
        cross += shift.matrix()[keep]
        mean = mean + shift.mean
    kept_cov = c[keep[:, None], keep].T  # symmetric; in the order of memory in which it is decomposed in place
    if towards is not None:
        cross += kept_cov @ (kept - towards).T
    kept_cov.diagonal().add_(ridge * typical_variance(kept_cov.diagonal()))
    failed = torch.empty((), dtype=torch.int32, device=c.device)
    torch.linalg.cholesky_ex(kept_cov, out=(kept_cov, failed))
    if failed:  # a tiny ridge can be lost in float32
        kept_cov = c[keep[:, None], keep].double()
        kept_cov.diagonal().add_(ridge * typical_variance(kept_cov.diagonal()))
        kept_cov, failed = torch.linalg.cholesky_ex(kept_cov)
        if failed:
            raise UserError(f"least_squares: the input covariance is not positive definite at ridge {ridge}; use a larger --ridge")
    change = torch.linalg.solve_triangular(kept_cov, cross.to(kept_cov.dtype), upper=False)  # unlike cholesky_solve it copies no factor
    change = torch.linalg.solve_triangular(kept_cov.mT, change, upper=True)
    new = (kept if towards is None else towards) + change.T.to(weight.dtype)
    return Recovered(new, mean - new @ covariance.mean[keep])


def typical_variance(variances: torch.Tensor) -> torch.Tensor:
    """The median of the input variances [n], or of those that are not zero where most inputs are dead."""
    median = variances.median()
    if median <= 0 and (variances > 0).any():
        median = variances[variances > 0].median()
    return median.clamp_min(torch.finfo(variances.dtype).tiny)
