"""A small mixture of experts that has learned something, to measure on where no real one is at hand: ``slimllm toy-mixture OUT``.

It is a stock Qwen3-MoE of four layers with 16 experts each, of which a token is routed to 2, and a tokenizer made from its text. Every
tenth piece of the text is held out: OUT/train.txt is for calibration, OUT/held_out.txt to measure on.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ..data.calibration import text_files
from ..data.texts import EvalText, blocks_of, load_texts, read_text
from ..deploy import checkpoint
from ..evaluation.perplexity import perplexity
from ..settings.toy_mixture import ToyMixtureConfig
from ..utils.files import write_text
from ..utils.outputs import atomic_dir

log = logging.getLogger("slimllm")

SEQ_LEN, BATCH, RATE, WARMUP = 128, 16, 2e-3, 50
PIECE = 2000  # characters of the text
HELD_OUT = 10  # one piece of so many
TOKENS = 1024  # of the vocabulary
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
BALANCE = 0.01  # weight of the loss that has all experts used alike


def text_of(name: str) -> str:
    """All that ``--text`` names. Raises UserError for what cannot be read."""
    if name == "python_manual":
        return load_texts((name,), "--text")[0].text
    return "\n".join(read_text(path) for path in text_files(name, "--text"))


def split(text: str) -> dict[str, str]:
    """The text to train on, and what is held out of it."""
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    held_out = pieces[HELD_OUT - 1 :: HELD_OUT]
    del pieces[HELD_OUT - 1 :: HELD_OUT]
    return {"train": "".join(pieces), "held_out": "".join(held_out)}


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """A BPE of TOKENS tokens, of bytes, made from ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def new_model(tokenizer, seed: int):
    """The mixture with random weights."""
    torch.manual_seed(seed)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), **SHAPE, **ends))


def train(model, blocks: torch.Tensor, steps: int, seed: int) -> None:
    """Trains ``model`` in place on blocks [samples, length], which are drawn at random, with AdamW and a rate that falls as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rng, begun, model.router_aux_loss_coef = torch.Generator().manual_seed(seed), time.time(), BALANCE
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        ids = blocks[torch.randint(len(blocks), (BATCH,), generator=rng)]
        loss = model(ids, labels=ids, use_cache=False, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log.info("step %d of %d: loss %.3f, %.0f s", step + 1, steps, float(loss.detach()), time.time() - begun)


def run(settings: ToyMixtureConfig) -> None:
    """Trains the model and writes it, with its tokenizer and the two parts of the text. Raises UserError for a text that is too short."""
    parts = split(text_of(settings.text))
    with atomic_dir(Path(settings.output), settings.overwrite, "name another folder", inputs=[settings.text]) as folder:
        tokenizer = tokenizer_of(parts["train"])
        model = new_model(tokenizer, settings.seed)
        blocks = {name: blocks_of(EvalText(name, part, "train"), tokenizer, model.config, SEQ_LEN) for name, part in parts.items()}
        train(model, blocks["train"], settings.steps, settings.seed)
        value = perplexity(model.eval(), blocks["held_out"], "held_out")
        checkpoint.save(model, tokenizer, folder, blocks["held_out"][:2], settings.output)
        for name, part in parts.items():
            write_text(folder / f"{name}.txt", part)
    log.info("%s: %s, perplexity %.2f (%.3f nats) on its held_out.txt", settings.output, type(model).__name__, value, math.log(value))
