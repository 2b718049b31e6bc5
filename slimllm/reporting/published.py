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
