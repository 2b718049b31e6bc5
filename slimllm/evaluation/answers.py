"""What a model answers to a few prompts, greedily, what is plainly wrong with an answer, and how likely another model finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from ..data.conversations import as_text
from ..data.texts import as_it_came
from ..errors import UserError
from ..utils.memory import return_free_memory
from .perplexity import nats_after

# (for a model with a chat template, for one without)
PROMPTS = (
    ("What is the capital of France?", "The capital of France is"),
    ("Write one sentence about the sea.", "The sea is"),
    ("Why do we sleep? Answer in one sentence.", "We sleep because"),
)
# What a chat is measured by, as models are asked: facts, explanations, lists, sums, code, letters, small talk.
CHAT = (
    "What is the capital of Italy?",
    "Who wrote Romeo and Juliet?",
    "How many days are there in a week?",
    "What is the largest planet of the solar system?",
    "Which gas do plants take from the air?",
    "What colour do you get when you mix blue and yellow?",
    "Name three animals that live in the sea.",
    "Name five fruits.",
    "List the four seasons.",
    "What do bees make?",
    "Explain in two sentences why the sky is blue.",
    "Explain to a child what a computer is.",
    "What is the difference between a lake and a river?",
    "How does a bicycle stay upright?",
    "Why do leaves fall in autumn?",
    "What is inflation? Answer in two sentences.",
    "How do I boil an egg?",
    "Give me three tips to sleep better.",
    "How can I learn a new language?",
    "What should I pack for a weekend in the mountains?",
    "What is 12 plus 30?",
    "I have 5 apples and eat 2. How many are left?",
    "Which number comes next: 2, 4, 6, 8?",
    "Is 17 a prime number?",
    "Write a Python function that adds two numbers.",
    "Write an SQL query that counts the rows of the table users.",
    "What does a for loop do?",
    "Write a short poem about rain.",
    "Write the first sentence of a detective story.",
    "Write a polite email that moves a meeting to Friday.",
    "Thank a neighbour for watering the plants.",
    "Give me a name for a small bakery.",
    "Say this more politely: Give me the report.",
    "Correct this sentence: She go to school every day.",
    "Summarize in one sentence: The train was late because of snow, so we missed the concert.",
    "Translate into French: Good morning.",
    "Is this review good or bad: The food was cold and the waiter rude.",
    "Hello, who are you?",
    "Can you help me with my homework?",
    "Tell me a joke.",
)
NEW_TOKENS = 40
TOGETHER = 22  # prompts that are answered side by side: more take more memory than they save time
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
def answers(model, tokenizer, prompts: list[str], besides: Sequence[str] = ()) -> list[dict]:
    """One entry per prompt, and per prompt ``besides``: ``text``, the greedy answer in at most NEW_TOKENS tokens, and ``fault``, what is
    plainly wrong with it or None.

    TOGETHER are answered side by side, padded on the left. Below float32 that may turn a choice between two tokens of nearly the same
    chance, so there the ``prompts``, whose answers are shown, are answered one by one.
    """
    settings = settings_of(model, tokenizer, NEW_TOKENS)
    end = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    found = []
    with as_it_came(tokenizer):
        asked = [as_chat(tokenizer, [{"role": "user", "content": prompt}]) for prompt in (*prompts, *besides)]
        alone = 0 if model.dtype in (torch.float32, torch.float64) else len(prompts)
        groups = [[row] for row in asked[:alone]] + [asked[start : start + TOGETHER] for start in range(alone, len(asked), TOGETHER)]
        for written in (row for group in groups for row in _written(model, group, settings)):
            written = written[: next((at for at, token in enumerate(written) if token in end), len(written))]
            text = tokenizer.decode(written, skip_special_tokens=True).strip()
            found.append({"text": text, "fault": STOPS if not text else LOOPS if loops(written) else None})
    return found


def _written(model, asked: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """What follows each row of token ids."""
    longest = max(map(len, asked))
    ids = torch.tensor([[settings.pad_token_id] * (longest - len(row)) + row for row in asked], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked], device=model.device)
    written = model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
    return_free_memory()  # a cache that grows with every token leaves much of it in pieces
    return written


@dataclass
class ChatQuality:
    """What became of the prompts of ``CHAT``: how many (``prompts``), in how many answers the model repeats itself (``loops``) or stops at
    once (``stops``), and what the dense model makes of the others, in nats per token (``nats``; None where there are none): it is low for
    what the dense model would have said.
    """

    prompts: int
    loops: int
    stops: int
    nats: float | None

    @property
    def faults(self) -> int:
        return self.loops + self.stops


def chat_quality(entries: list[dict], dense, tokenizer, *where) -> ChatQuality:
    """Of the ``entries`` that :func:`answers` gives for ``CHAT``, as the model or ModelSource ``dense`` finds them; ``where``: what
    :func:`nats_after` takes besides.
    """
    sound = [(prompt, entry["text"]) for prompt, entry in zip(CHAT, entries, strict=True) if entry["fault"] is None]
    with as_it_came(tokenizer):
        pairs = [
            (as_chat(tokenizer, [{"role": "user", "content": prompt}]), tokenizer(text, add_special_tokens=False).input_ids)
            for prompt, text in sound
        ]
    faults = [entry["fault"] for entry in entries]
    return ChatQuality(len(CHAT), faults.count(LOOPS), faults.count(STOPS), nats_after(dense, pairs, *where) if pairs else None)


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
