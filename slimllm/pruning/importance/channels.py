"""Channel importance: the paper's in the feature space of the layer's output (section 3.3), and what it is compared with.

A score takes a ChannelStatistics and gives the importance [I] of each channel: the higher, the more it matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import UserError, first_line


@dataclass
class ChannelStatistics:
    """One feed-forward part. Norms are over tokens, none is centred.

    output_covariance: [D, D] of the output Y. down: W [D, I]. gate, up: G and U [I, D]; G is None where there is no gate. input_norm: [I],
    ||X[:, j]|| of each channel j, a column of down_proj's input X. read_norm: ν [D], of each dimension of the feed-forward part's input.
    input_variance: [I], of X[:, j] over tokens. input_covariance: [I, I], of X. saliency: [I], from gradients (:mod:`taylor`). seed: for
    what is random. Covariances, variance and saliency are None for a score that does not need them (ChannelScore). spectrum: the
    eigendecomposition of output_covariance, where it is known already. Of an expert, X and what it reads are those of the tokens routed to
    it, and X is multiplied by the router's weight.
    """

    output_covariance: torch.Tensor | None
    down: torch.Tensor
    gate: torch.Tensor | None
    up: torch.Tensor
    input_norm: torch.Tensor
    read_norm: torch.Tensor
    input_variance: torch.Tensor | None = None
    input_covariance: torch.Tensor | None = None
    saliency: torch.Tensor | None = None
    seed: int = 0
    spectrum: tuple[torch.Tensor, torch.Tensor] | None = None

    def input_terms(self) -> torch.Tensor:
        """||G[j] * ν|| + ||U[j] * ν||, [I]: how strong the inputs are that each channel reads. Without a gate its term is left out."""
        squared = self.read_norm.square()
        return sum((weight.square() @ squared).sqrt() for weight in (self.gate, self.up) if weight is not None)


def eigendecomposition(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(eigenvalues [D], eigenvectors [D, D]) of a symmetric matrix.

    Where the matrix is close to singular the solver may not converge, on a GPU above all; then once more on the CPU in float64.
    Raises UserError where that fails too.
    """
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
    except torch.linalg.LinAlgError as error:
        raise UserError(
            f"the eigenvalues of a layer's output covariance cannot be computed ({first_line(error)}); try --dtype float32"
        ) from None
    return values.to(matrix), vectors.to(matrix)


def feature_space(s: ChannelStatistics) -> torch.Tensor:
    """The paper's (Eq. c and d): with Cov(Y) = V diag(λ) V^T and ω = sigmoid(λ / mean(λ)),
    ||(W[:, j]^T V) * ω|| * ||X[:, j]|| + ||G[j] * ν|| + ||U[j] * ν||.
    """
    eigenvalues, vectors = s.spectrum or eigendecomposition(s.output_covariance)
    weighted = vectors * torch.sigmoid(eigenvalues / eigenvalues.mean())
    return (s.down.T @ weighted).norm(dim=1) * s.input_norm + s.input_terms()


def unweighted(s: ChannelStatistics) -> torch.Tensor:
    """The paper's without the weights ω of the eigenvectors, which leaves ||W[:, j]|| in their place (V is orthogonal)."""
    return s.down.norm(dim=0) * s.input_norm + s.input_terms()


def wanda(s: ChannelStatistics) -> torch.Tensor:
    """mean_d |W[d, j]| * ||X[:, j]||: Wanda's score of a weight (Sun et al. 2024) over a column, as Wanda-sp has it."""
    return s.down.abs().mean(0) * s.input_norm


def taylor(s: ChannelStatistics) -> torch.Tensor:
    """LLM-Pruner's (Ma et al. 2023): sum of |weight * its gradient| over the channel's rows of G and U and its column of W."""
    return s.saliency


def fluctuation(s: ChannelStatistics) -> torch.Tensor:
    """FLAP's (An et al. 2024): Var(X[:, j]) ||W[:, j]||^2."""
    return s.input_variance * s.down.square().sum(0)


def magnitude(s: ChannelStatistics) -> torch.Tensor:
    """||W[:, j]||: no activations at all."""
    return s.down.norm(dim=0)


def random(s: ChannelStatistics) -> torch.Tensor:
    """Chance, the floor that any score must beat."""
    return torch.rand(s.down.shape[1], generator=torch.Generator().manual_seed(s.seed)).to(s.down.device)


def select_channels(scores: torch.Tensor, removed: int, keep_lowest: float) -> torch.Tensor:
    """The channels to keep, ascending [I - removed].

    The lowest ``round(keep_lowest * I)`` scores stay and the ``removed`` above them go: 0.01 is what the published
    code does, 0 is the paper's text.
    """
    order = torch.argsort(scores, stable=True)
    spared = min(round(keep_lowest * len(scores)), len(scores) - removed)
    return torch.cat([order[:spared], order[spared + removed :]]).sort().values
