"""Perplexity as published: every block of the text counts, mean over all tokens that the model predicts; and continuations."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..data.texts import as_it_came, check_vocabulary
from ..errors import UserError
from ..models.shape import ModelShape
from ..models.source import ModelSource
from ..streaming.progress import Progress, no_progress
from ..streaming.runner import LOGIT_ROWS, MIN_ACTIVATION_BYTES, TOKENS_PER_BATCH, LayerRunner
from ..streaming.sizes import Sizes, widest
from ..utils import processes


def perplexity(model, blocks: torch.Tensor, description: str = "perplexity") -> float:
    """The perplexity of one text, as :func:`perplexities` has it, on the device that the model is on."""
    return perplexities(model, [blocks], [description])[0]


@torch.no_grad()
def perplexities(
    model,
    texts: list[torch.Tensor],
    descriptions: list[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
    tmp_dir: str | None = None,
) -> list[float]:
    """exp(mean negative log-likelihood) of each text over the tokens that the model predicts: all but the first of each block.

    The layers run one after the other, each on all blocks of all texts, so that a ``model`` that is a ModelSource is read once. A model in
    memory takes as many blocks at a time as stay in memory with it.

    Args:
        texts: token ids [blocks, seq_len] each, all of one seq_len. descriptions: of the texts, for the progress and for errors.
        device, dtype: what it is computed on and in; by default where and what the model is.
    Returns:
        One figure per text; the losses are taken in float32 and added in float64. Raises UserError if one is not finite.
    """
    source = ModelSource.of(model)
    device = source.home if device is None else torch.device(device)
    shares = [processes.share(ids) for ids in texts]
    blocks = torch.cat(shares)
    chunks = [blocks]
    if not source.streams:
        room = MIN_ACTIVATION_BYTES // (blocks.shape[1] * source.config.hidden_size * (dtype or source.dtype).itemsize)
        chunks = blocks.split(max(1, room))
    parts = [_losses(LayerRunner(source, ids, device, progress, dtype, tmp_dir, split=False), " and ".join(descriptions)) for ids in chunks]
    losses = [float(part.double().sum()) for part in torch.cat(parts).split([len(ids) for ids in shares])]
    counts = [ids[:, 1:].numel() for ids in shares]
    losses, counts = processes.total(*losses), processes.total(*counts)
    return [_perplexity(loss / n, what, dtype or source.dtype) for loss, n, what in zip(losses, counts, descriptions)]


def _losses(runner: LayerRunner, description: str, counted: torch.Tensor | None = None) -> torch.Tensor:
    """The loss of each token but the first of each block, [blocks, seq_len - 1] float32; 0 where not ``counted``, of the same shape."""
    states = runner.last_states(description)
    norm, head = runner.output_modules()
    losses = torch.zeros(runner.ids[:, 1:].shape, device=runner.device)  # filled in place: what lies between large tensors keeps their room
    wanted = (torch.ones_like(losses, dtype=torch.bool) if counted is None else counted.to(runner.device)).split(runner.batch)
    for ids, batch, into, take in zip(runner.ids.split(runner.batch), states, losses.split(runner.batch), wanted):
        rows, targets, into = norm(batch)[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(runner.device), into.view(-1)
        for part in take.flatten().nonzero().squeeze(1).split(LOGIT_ROWS):
            into[part] = nn.functional.cross_entropy(runner.adapter.logits(head, rows[part]), targets[part], reduction="none")
    states.close()
    return losses.cpu()


@torch.no_grad()
def nats_after(
    model,
    pairs: list[tuple[list[int], list[int]]],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
    tmp_dir: str | None = None,
) -> float:
    """Mean negative log-likelihood per token of texts that follow others: of the second token ids of each pair, after the first.

    The shorter pairs are filled up on the right, which nothing before sees. ``device`` to ``tmp_dir`` as of :func:`perplexities`.
    """
    source = ModelSource.of(model)
    longest = max(len(first) + len(then) for first, then in pairs)
    ids = torch.tensor([first + then + [0] * (longest - len(first) - len(then)) for first, then in pairs])
    counted = torch.tensor([[len(first) <= at < len(first) + len(then) for at in range(1, longest)] for first, then in pairs])
    device = source.home if device is None else torch.device(device)
    losses = _losses(LayerRunner(source, ids, device, progress, dtype, tmp_dir, split=False), "answers", counted)
    return float(losses[counted].double().mean())


def _perplexity(mean: float, description: str, dtype: torch.dtype) -> float:
    if not math.isfinite(mean):
        raise UserError(f"{description}: the loss is not finite in {dtype}; try --dtype float32 or bfloat16")
    return of_loss(mean)


def of_loss(mean: float) -> float:
    """The perplexity of a mean loss in nats; infinite where it is too large for a float."""
    return math.exp(mean) if mean < 700 else math.inf


def nats_per_byte(value: float, blocks: torch.Tensor, tokenizer) -> float:
    """What a perplexity of these token ids [blocks, seq_len] is per byte of their text in UTF-8, which other tokens spell as well.

    So models of two vocabularies can be compared, whose perplexities per token cannot. It is the text that the tokens decode to: of a
    tokenizer that changes it (lowercases or normalizes it), that has other bytes than the text that was given.
    """
    predicted = blocks[:, 1:]
    texts = tokenizer.batch_decode(predicted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return math.log(value) * predicted.numel() / max(sum(len(text.encode()) for text in texts), 1)


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
    with as_it_came(tokenizer), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            check_vocabulary(inputs.input_ids, model.config.vocab_size, "the tokenizer is not the model's")
            output = model.generate(**inputs, max_new_tokens=64, pad_token_id=tokenizer.pad_token_id or 0, **sampling)
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def peak_bytes(shape: ModelShape, sizes: Sizes) -> int:
    """Bytes while texts are measured on: their states, a layer as it is stored and computed and what is computed with it, or the head."""
    if not sizes.evaluated_tokens:
        return 0
    largest = max(layer.parameters for layer in shape.layers)
    states = sizes.kept_in_memory(largest * sizes.evaluation, sizes.evaluated_tokens * shape.hidden * sizes.evaluation)
    batch = 4 * TOKENS_PER_BATCH * max(widest(layer) for layer in shape.layers) * sizes.evaluation
    head = shape.vocab * (shape.hidden * sizes.evaluation + 3 * LOGIT_ROWS * 4)
    return states + max(largest * (sizes.evaluation + sizes.stored) + batch, head)
