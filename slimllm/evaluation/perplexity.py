"""Perplexity as published: every block of the text counts, mean over all tokens that the model predicts; and continuations."""

from __future__ import annotations

import math

import torch
from tqdm.auto import tqdm

from ..errors import UserError
from ..models.adapter import LayerAdapter
from ..pruning.runner import LOGIT_ROWS

TOKENS_PER_BATCH = 1024


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor, description: str = "perplexity") -> float:
    """exp(mean negative log-likelihood) over the tokens that the model predicts: all but the first of each block.

    ``blocks`` [blocks, seq_len] token ids; the losses are taken in float32 and added in float64.
    Raises UserError if the model's loss is not finite.
    """
    adapter = LayerAdapter(model.config)
    head, total = adapter.head(model), 0.0
    batch = max(1, TOKENS_PER_BATCH // blocks.shape[1])
    for ids in tqdm(blocks.split(batch), desc=description, leave=False, disable=None):
        ids = ids.to(model.device)
        states = adapter.last_states(model, ids)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        for rows, wanted in zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
            total += torch.nn.functional.cross_entropy(adapter.logits(head, rows), wanted, reduction="sum").double().item()
    mean = total / (len(blocks) * (blocks.shape[1] - 1))
    if not math.isfinite(mean):
        raise UserError(f"{description}: the loss is not finite in {model.dtype}; try --dtype float32 or bfloat16")
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def continuations(model, tokenizer, seed: int = 42, temperature: float = 1.0, top_p: float = 0.95) -> list[str]:
    """Prompts of the published scripts with 64 sampled tokens each; temperature 0 is greedy."""
    prompts = (
        "I believe the meaning of life is",
        "Simply put, the theory of relativity states that",
        "Building a website can be done in 10 simple steps:\n",
    )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    texts = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            output = model.generate(**inputs, max_new_tokens=64, pad_token_id=tokenizer.pad_token_id or 0, **sampling)
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts
