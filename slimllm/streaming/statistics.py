"""Streaming statistics of activations, merged batch by batch.

Means and co-moments are merged pairwise (Chan, Golub and LeVeque 1983), never taken from raw second moments: the
few very large activations of Llama models would ruin those in float32. All statistics are float32 on the device
of the activations; their size does not depend on the number of tokens.
"""

from __future__ import annotations

import torch

from ..utils import processes

_COLUMN_BLOCK = 1024  # the co-moment is symmetric: only blocks on and above the diagonal are multiplied


class Covariance:
    """Mean [n] and covariance [n, n] of the rows given to :meth:`update` so far."""

    def __init__(self, size: int, device=None):
        self.count = 0
        self.mean = torch.zeros(size, device=device)
        self._comoment = torch.zeros(size, size, device=device)
        self._complete = False

    def update(self, rows: torch.Tensor) -> None:
        """Takes in rows [tokens, n], float32."""
        count, mean = rows.shape[0], rows.mean(0)
        centred, delta = rows - mean, mean - self.mean
        total = self.count + count
        for start in range(0, len(mean), _COLUMN_BLOCK):
            block = self._comoment[start : start + _COLUMN_BLOCK, start:]
            block.addmm_(centred[:, start : start + _COLUMN_BLOCK].T, centred[:, start:])
            block.addr_(delta[start : start + _COLUMN_BLOCK], delta[start:], alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def merge(self) -> None:
        """Takes in the rows that the other processes of the run have been given."""
        if processes.count() == 1:
            return
        mean, weighted = self.mean.clone(), self.mean * self.count
        [total] = processes.total(self.count)
        processes.add(weighted)
        self.mean = weighted / total
        delta = mean - self.mean
        for start in range(0, len(mean), _COLUMN_BLOCK):
            block = self._comoment[start : start + _COLUMN_BLOCK, start:]
            block.addr_(delta[start : start + _COLUMN_BLOCK], delta[start:], alpha=self.count)
        processes.add(self._comoment)
        self.count = int(total)

    def matrix(self) -> torch.Tensor:
        """The covariance [n, n] (divided by the count), symmetric up to rounding. No row can be added afterwards."""
        if not self._complete:  # in place: it is the largest thing that a layer needs
            for start in range(0, len(self.mean), _COLUMN_BLOCK):
                stop = start + _COLUMN_BLOCK
                self._comoment[stop:, start:stop] = self._comoment[start:stop, stop:].T
            self._comoment /= self.count
            self._complete = True
        return self._comoment

    def about_zero(self) -> Covariance:
        """The same with raw second moments in place of covariances, and a mean of zero."""
        raw = Covariance(0, self.mean.device)
        raw.count, raw.mean, raw._complete = self.count, torch.zeros_like(self.mean), True
        raw._comoment = torch.addr(self.matrix(), self.mean, self.mean)
        return raw


class CrossCovariance:
    """Covariance [m, n] of two streams of rows, [tokens, m] and [tokens, n], and the mean [n] of the second."""

    def __init__(self, rows: int, columns: int, device=None):
        self.count = 0
        self._mean_x, self.mean = torch.zeros(rows, device=device), torch.zeros(columns, device=device)
        self._comoment = torch.zeros(rows, columns, device=device)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Takes in rows of both streams, float32."""
        count, mean_x, mean_y = len(x), x.mean(0), y.mean(0)
        total, dx, dy = self.count + count, mean_x - self._mean_x, mean_y - self.mean
        self._comoment.addmm_((x - mean_x).T, y - mean_y).addr_(dx, dy, alpha=self.count * count / total)
        self._mean_x += dx * (count / total)
        self.mean += dy * (count / total)
        self.count = total

    def merge(self) -> None:
        """Takes in the rows that the other processes of the run have been given."""
        if processes.count() == 1:
            return
        mine = self._mean_x.clone(), self.mean.clone()
        means = [mean * self.count for mean in mine]
        [total] = processes.total(self.count)
        processes.add(*means)
        self._mean_x, self.mean = (mean / total for mean in means)
        self._comoment.addr_(mine[0] - self._mean_x, mine[1] - self.mean, alpha=self.count)
        processes.add(self._comoment)
        self.count = int(total)

    def matrix(self) -> torch.Tensor:
        """The covariance [m, n] (divided by the count)."""
        return self._comoment / self.count

    def about_zero(self) -> CrossCovariance:
        """The same with raw second moments in place of covariances, and a mean of zero."""
        raw = CrossCovariance(*self._comoment.shape, self.mean.device)
        raw.count, raw._comoment = self.count, torch.addr(self._comoment, self._mean_x, self.mean, alpha=self.count)
        return raw


class SquareSum:
    """Sum of squares [n] over all rows given to :meth:`update`, not centred: the squared column norms."""

    def __init__(self, size: int, device=None):
        self.total = torch.zeros(size, device=device)

    def update(self, rows: torch.Tensor) -> None:
        """Takes in rows [tokens, n], float32."""
        self.total += rows.square().sum(0)

    def merge(self) -> None:
        """Takes in the rows that the other processes of the run have been given."""
        processes.add(self.total)

    def norm(self) -> torch.Tensor:
        """The Euclidean norm of each column over all rows, [n]."""
        return self.total.sqrt()


class PairMoments:
    """Means, variances and covariance [n] of two streams of rows [tokens, n], column by column.

    In recovery x is what the kept columns give (Ŷ in docs/method.md) and y the output before pruning (Y).
    """

    def __init__(self, size: int, device=None):
        self.count = 0
        self.mean_x, self.mean_y, self._xx, self._yy, self._xy = (torch.zeros(size, device=device) for _ in range(5))

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Takes in rows of both streams, [tokens, n] each, float32."""
        count, mean_x, mean_y = x.shape[0], x.mean(0), y.mean(0)
        total = self.count + count
        dx, dy, weight = mean_x - self.mean_x, mean_y - self.mean_y, self.count * count / total
        x, y = x - mean_x, y - mean_y
        self._xx += (x * x).sum(0) + weight * dx * dx
        self._yy += (y * y).sum(0) + weight * dy * dy
        self._xy += (x * y).sum(0) + weight * dx * dy
        self.mean_x, self.mean_y = self.mean_x + dx * (count / total), self.mean_y + dy * (count / total)
        self.count = total

    def merge(self) -> None:
        """Takes in the rows that the other processes of the run have been given."""
        if processes.count() == 1:
            return
        mine = torch.stack([self.mean_x, self.mean_y])
        weighted = mine * self.count
        [total] = processes.total(self.count)
        processes.add(weighted)
        self.mean_x, self.mean_y = weighted / total
        dx, dy = mine - weighted / total
        for moment, product in ((self._xx, dx * dx), (self._yy, dy * dy), (self._xy, dx * dy)):
            moment += self.count * product
        processes.add(self._xx, self._yy, self._xy)
        self.count = int(total)

    def about_zero(self) -> PairMoments:
        """The same with raw second moments in place of variances and covariance, and means of zero."""
        raw = PairMoments(len(self.mean_x), self.mean_x.device)
        raw.count = self.count
        for name, a, b in (("_xx", self.mean_x, self.mean_x), ("_yy", self.mean_y, self.mean_y), ("_xy", self.mean_x, self.mean_y)):
            setattr(raw, name, getattr(self, name) + self.count * a * b)
        return raw

    @property
    def var_x(self) -> torch.Tensor:
        """Variance of each column of the first stream, [n]."""
        return self._xx / self.count

    @property
    def cov_xy(self) -> torch.Tensor:
        """Covariance of each column of the first stream with the same column of the second, [n]."""
        return self._xy / self.count

    def relative_error(self) -> float:
        """The share of the output's variance that the pruned output misses: sum of mean((Y - Ŷ)^2) / sum of Var(Y) over columns; 0 is best.

        Ŷ, the pruned output, is the first stream, and Y, the output before pruning, the second.
        """
        var_y = self._yy / self.count
        error = var_y - 2 * self.cov_xy + self.var_x + (self.mean_y - self.mean_x) ** 2
        return float(error.sum().clamp_min(0) / var_y.sum().clamp_min(torch.finfo(torch.float32).tiny))
