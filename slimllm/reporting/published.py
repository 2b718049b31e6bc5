"""What papers report of structured pruning without tuning, each figure with the protocol that it was measured by.

Only figures of one model, one share and one protocol can be compared, and the same words ("20 %") may count other parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

SLIMLLM = "Guo et al. 2025, arXiv 2505.22689"
LORAP = "Li et al. 2024, arXiv 2404.09695"
OLICA = "He and Lin, ICML 2025"
FLAP = "An et al. 2024, arXiv 2312.11983; calibrated on the training split of the text that it is measured on"
TYR = "Li et al. 2025, arXiv 2503.09657"


@dataclass(frozen=True)
class Published:
    """One row of a paper: perplexities of WikiText-2 and, where it reports it, PTB, in blocks of so many ``tokens``.

    ``needs``: what the method takes to prune such a model: calibration samples, gradients, time, as far as it is reported.
    """

    model: str
    share: str
    method: str
    tokens: int
    wikitext2: float
    ptb: float | None
    needs: str
    source: str


PUBLISHED = (
    Published("LLaMA-7B", "20 %", "SlimLLM", 128, 15.95, 26.09, "32 samples of 128 tokens, no gradients", SLIMLLM),
    Published("LLaMA-7B", "20 %", "LoRAP", 128, 15.69, None, "no gradients", LORAP),
    Published("LLaMA-7B", "20 %", "Olica", 128, 15.35, None, "256 samples, no gradients, 7 minutes", OLICA),
    Published("LLaMA-7B", "20 %", "FLAP, in domain", 128, 15.05, None, "1,024 samples of 128 tokens, no gradients", FLAP),
    Published("LLaMA-7B", "50 %", "SlimLLM", 128, 37.89, 67.68, "32 samples of 128 tokens, no gradients", SLIMLLM),
    Published("LLaMA-7B", "50 %", "LoRAP", 128, 56.96, None, "no gradients", LORAP),
    Published("LLaMA-7B", "50 %", "FLAP, in domain", 128, 33.00, None, "1,024 samples of 128 tokens, no gradients", FLAP),
    Published("Llama-2-7B", "20 %", "SlimLLM", 128, 15.28, 27.29, "32 samples of 128 tokens, no gradients", SLIMLLM),
    Published("Llama-2-7B", "20 %", "DDP", 128, 14.39, 26.34, "not known", "quoted at second hand, the paper itself was not read"),
    Published("Llama-3.1-8B", "25 %", "Týr-the-Pruner", 4096, 10.38, None, "every layer pruned at many ratios, a search over them", TYR),
    Published("Llama-3.1-8B", "50 %", "Týr-the-Pruner", 4096, 30.89, None, "every layer pruned at many ratios, a search over them", TYR),
)

ARENA_COLUMNS = (
    *("Keep", "Method", "WT2 PPL", "C4 PPL"),
    *("BoolQ", "ARC-E", "ARC-C", "WinoG.", "PIQA", "HellaS.", "OBQA", "MCQ Avg."),
    *("MathQA", "MMLU-M", "Q. Ret."),
)
ARENA_NOTE = (
    "Not measured here: dense models, some of the low-rank methods, among them the best, and the pruning that these are compared with "
    "(github.com/Zishan-Shao/lowrankarena)."
)
# model, and a row of the leaderboard
ARENA_ROWS = tuple(
    tuple(line.split(" | "))
    for line in """
LLaMA-7B | 100% | Dense FP | 5.67 | 7.20 | 0.737 | 0.726 | 0.445 | 0.693 | 0.786 | 0.749 | 0.408 | 0.649 | 0.261 | 0.278 | 1.000
LLaMA-7B | 80% | SVD-LLM v1 | 7.88 | 16.42 | 0.633 | 0.481 | 0.317 | 0.584 | 0.681 | 0.477 | 0.332 | 0.501 | 0.224 | 0.291 | 0.767
LLaMA-7B | 80% | ASVD | 8.60 | 11.04 | 0.743 | 0.628 | 0.388 | 0.669 | 0.750 | 0.696 | 0.392 | 0.609 | 0.241 | 0.211 | 0.787
LLaMA-7B | 80% | MoDeGPT | 6.92 | 10.87 | 0.647 | 0.587 | 0.353 | 0.637 | 0.724 | 0.582 | 0.336 | 0.552 | 0.254 | 0.304 | 0.880
LLaMA-7B | 60% | Basis Sharing | 12.42 | 41.13 | 0.503 | 0.472 | 0.287 | 0.586 | 0.608 | 0.452 | 0.344 | 0.465 | 0.209 | 0.268 | 0.622
LLaMA-7B | 60% | MoDeGPT | 12.43 | 23.40 | 0.613 | 0.474 | 0.335 | 0.645 | 0.644 | 0.521 | 0.334 | 0.509 | 0.238 | 0.275 | 0.690
Llama-3.1-8B | 100% | Dense FP | 6.24 | 9.10 | 0.831 | 0.824 | 0.549 | 0.746 | 0.812 | 0.793 | 0.454 | 0.716 | 0.396 | 0.437 | 1.000
Llama-3.1-8B | 80% | Basis Sharing | 15.61 | 54.36 | 0.632 | 0.637 | 0.367 | 0.667 | 0.701 | 0.548 | 0.372 | 0.561 | 0.248 | 0.297 | 0.531
Llama-3.1-8B | 80% | MoDeGPT | 9.01 | 17.68 | 0.412 | 0.715 | 0.436 | 0.730 | 0.743 | 0.710 | 0.382 | 0.590 | 0.344 | 0.407 | 0.766
Llama-3.1-8B | 60% | MoDeGPT | 24.50 | 51.82 | 0.622 | 0.460 | 0.312 | 0.672 | 0.629 | 0.516 | 0.316 | 0.504 | 0.241 | 0.213 | 0.446
Qwen3-8B-Base | 100% | Dense FP | 7.00 | 11.78 | 0.830 | 0.800 | 0.570 | 0.727 | 0.793 | 0.787 | 0.420 | 0.704 | 0.542 | 0.729 | 1.000
Qwen3-8B-Base | 80% | ASVD | 11.88 | 20.54 | 0.792 | 0.758 | 0.483 | 0.651 | 0.745 | 0.641 | 0.414 | 0.641 | 0.420 | 0.460 | 0.696
Qwen3-8B-Base | 60% | Basis Sharing | 18.59 | 95.39 | 0.630 | 0.457 | 0.278 | 0.580 | 0.620 | 0.423 | 0.298 | 0.469 | 0.253 | 0.302 | 0.409
Qwen3-8B-Base | 60% | MoDeGPT | 18.40 | 55.66 | 0.509 | 0.414 | 0.293 | 0.569 | 0.625 | 0.460 | 0.328 | 0.457 | 0.228 | 0.246 | 0.400
Llama-3.1-8B | 80% | LLM-Pruner | - | 14.53 | - | - | - | - | - | - | - | 0.625 | - | - | -
Llama-3.1-8B | 50% | LLM-Pruner | - | 55.20 | - | - | - | - | - | - | - | 0.446 | - | - | -
Llama-3.1-8B | 80% | SliceGPT | - | 117.30 | - | - | - | - | - | - | - | 0.527 | - | - | -
Llama-3.1-8B | 50% | SliceGPT | - | 610.05 | - | - | - | - | - | - | - | 0.359 | - | - | -
Llama-3.1-8B | 80% | BlockPruner | - | 21.68 | - | - | - | - | - | - | - | 0.570 | - | - | -
Llama-3.1-8B | 50% | BlockPruner | - | 600.88 | - | - | - | - | - | - | - | 0.365 | - | - | -
""".strip().splitlines()
)
