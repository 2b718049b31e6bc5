"""The Kullback-Leibler divergence of one next-token distribution from another, in nats: KL(p || q) = sum of p (log p - log q)."""

from __future__ import annotations

import torch


class Divergence(torch.autograd.Function):
    """Sum over rows of KL(p || q), a number; differentiable in the logits of q.

    ``apply(logits, log_p, p)``, each [rows, V] float32: the logits of q, and p with its logarithm, which several q may share.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, log_p: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        log_q = logits.log_softmax(-1)
        total = torch.dot(p.flatten(), (log_p - log_q).flatten())
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_q.exp_().sub_(p))  # dKL / dlogits = q - p
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None
