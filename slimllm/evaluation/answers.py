"""What a model answers to a few prompts, greedily, and what is plainly wrong with an answer."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from ..data.conversations import as_text
from ..data.texts import as_it_came
from ..errors import UserError

# (for a model with a chat template, for one without)
PROMPTS = (
    ("What is the capital of France?", "The capital of France is"),
    ("Write one sentence about the sea.", "The sea is"),
    ("Why do we sleep? Answer in one sentence.", "We sleep because"),
)
NEW_TOKENS = 40
LOOP = 12  # tokens of repetition that are no accident
STOPS, LOOPS = "stops at once", "repeats itself"


def prompts_of(tokenizer, own: tuple[str, ...] | None = None) -> list[str]:
    """What is asked: the user's ``own`` prompts, or those of this module in the form that fits the model."""
    return list(own) if own else [asked if tokenizer.chat_template else begun for asked, begun in PROMPTS]


def as_chat(tokenizer, messages: list[dict]) -> list[int]:
    """The token ids of a conversation by the model's chat template, up to where its answer begins.

    A model without a template goes on from the last message.
    """
    if tokenizer.chat_template:
        ids = tokenizer(as_text(tokenizer, messages, answer_next=True), add_special_tokens=False).input_ids
    else:
        ids = tokenizer(messages[-1]["content"]).input_ids
    if not ids:
        raise UserError("the message comes to no token at all; write something")
    return ids


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str]) -> list[dict]:
    """One entry per prompt: ``text``, the greedy answer in at most NEW_TOKENS tokens, and ``fault``, what is plainly wrong or None."""
    found = []
    with as_it_came(tokenizer):
        for prompt in prompts:
            ids = torch.tensor([as_chat(tokenizer, [{"role": "user", "content": prompt}])], device=model.device)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings_of(model, tokenizer, NEW_TOKENS))
            written = output[0, ids.shape[1] :].tolist()
            text = tokenizer.decode(written, skip_special_tokens=True)
            found.append({"text": text.strip(), "fault": STOPS if not text.strip() else LOOPS if loops(written) else None})
    return found


def settings_of(model, tokenizer, new_tokens: int, temperature: float = 0.0) -> GenerationConfig:
    """How to generate: greedily, or sampled at ``temperature``, up to the model's own end of text."""
    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    first = end[0] if isinstance(end, list) else end
    pad = next((token for token in (tokenizer.pad_token_id, first) if token is not None), 0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    return GenerationConfig(max_new_tokens=new_tokens, eos_token_id=end, pad_token_id=pad, **sampling)


def loops(tokens: list[int]) -> bool:
    """Whether the tokens end in one piece written again and again, for LOOP tokens at least, and twice at least."""
    for length in range(1, len(tokens) // 2 + 1):
        times = max(2, -(-LOOP // length))
        if times * length <= len(tokens) and tokens[-times * length :] == tokens[-length:] * times:
            return True
    return False
