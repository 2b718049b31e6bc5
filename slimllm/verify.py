"""``python -m slimllm.verify DIR [FILE.gguf ...]``: proves that what was written is the model that was pruned.

The checkpoint against what the model gave in memory before it was saved; cached against uncached generation; a padded batch
against single texts; and each GGUF file, in llama.cpp, against the checkpoint in transformers: tokens, log-probabilities of
real text, greedy continuations. One table; exit status 1 where a check fails.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import checkpoint, cli, evaluation, families, report
from .cli import UserError, check_range, flag
from .llama_cpp import LlamaCpp

log = logging.getLogger("slimllm")

# Mean |difference| of a token's log-probability, in nats, that the type of a GGUF file's weights explains.
GGUF_TOLERANCE = {"F32": 1e-3, "F16": 2e-2, "BF16": 2e-1, "Q8_0": 2e-1}
OTHER_TOLERANCE = 0.5  # smaller types
GREEDY_TOKENS = 24


@dataclass
class VerifyConfig:
    """Settings of a verification. Raises UserError where a value makes no sense."""

    paths: tuple = flag("checkpoint", "checkpoint folder, then any .gguf files made from it", positional=True, nargs="*")
    text: str = flag("checkpoint", "file with the text to compare on [the Python manual]")
    blocks: int = flag("checkpoint", "pieces of the text", 2, type=int)
    seq_len: int = flag("checkpoint", "tokens a piece", 96, type=int)

    def __post_init__(self):
        if not self.paths:
            raise UserError("name a checkpoint folder: python -m slimllm.verify prune_log/NAME [FILE.gguf ...]")
        check_range(self, "blocks", 1)
        check_range(self, "seq_len", 4)
        self.folder, *self.files = self.paths
        if self.folder.endswith(".gguf"):
            raise UserError(f"{self.folder}: name the checkpoint folder first, then its .gguf files")


@dataclass
class Check:
    """One row of the table: a difference (or count) and what is allowed."""

    what: str
    measured: float
    allowed: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.allowed  # not where it is not a number

    def row(self) -> list[str]:
        return [self.what, f"{self.measured:.3g} {self.unit}".strip(), f"{self.allowed:.3g}", "ok" if self.passed else "FAILED"]


@torch.no_grad()
def greedy(model, ids: torch.Tensor, tokens: int, banned: list[int], cached: bool = True) -> list[int]:
    """The ``tokens`` ids that follow ids [length], each the most probable that is not ``banned`` (special tokens end a text)."""
    attention = torch.ones_like(ids[None])
    settings = dict(do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None, suppress_tokens=banned or None)
    output = model.generate(ids[None], attention_mask=attention, max_new_tokens=tokens, **settings)
    return output[0, len(ids) :].tolist()


def checks_of_folder(folder: str, model, tokenizer, blocks: torch.Tensor) -> list[Check]:
    """The checks that need transformers only. ``model`` is the one of ``folder`` in float32, ``blocks`` [n, length] text."""
    own = checkpoint.load(folder)  # in the dtype that it was saved in
    difference, allowed = checkpoint.compare_with_reference(own, folder)
    checks = [Check("saved model against the model in memory: logits", difference, allowed)]
    del own
    prompt = blocks[0, : blocks.shape[1] // 2]
    cached, plain = (greedy(model, prompt, GREEDY_TOKENS, tokenizer.all_special_ids, use) for use in (True, False))
    checks.append(Check("greedy generation with KV cache against without", _lost(model, prompt, plain, cached), 1e-3, "nats"))
    checks.append(Check("padded batch against single texts: logits", *_padding(model, blocks)))
    return checks


@torch.no_grad()
def _padding(model, blocks: torch.Tensor) -> tuple[float, float]:
    """(largest difference of the last logits of texts of different lengths, padded on the left and alone; what is allowed)"""
    length = blocks.shape[1]
    lengths = [length, length // 2, length // 3]
    batch, attention = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    texts = [blocks[i % len(blocks), :n] for i, n in enumerate(lengths)]
    for row, text in enumerate(texts):
        batch[row, length - len(text) :], attention[row, length - len(text) :] = text, 1
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    together = model(batch, attention_mask=attention, position_ids=positions, use_cache=False).logits[:, -1].float()
    alone = torch.cat([model(text[None], use_cache=False).logits[:, -1].float() for text in texts])
    return float((together - alone).abs().max()), 10 * checkpoint.tolerance(model.dtype) * float(alone.abs().max())


def checks_of_file(path: str, model, tokenizer, text: str, blocks: torch.Tensor) -> list[Check]:
    """The checks of one GGUF file, run by llama.cpp, against ``model`` in float32. Raises UserError where it cannot be loaded."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
        context = int(reader.fields[f"{reader.fields['general.architecture'].contents()}.context_length"].contents())
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error}); export it again") from None
    kind = max(set(kinds), key=kinds.count)
    name, allowed = Path(path).name, GGUF_TOLERANCE.get(kind, OTHER_TOLERANCE)
    length = min(blocks.shape[1], context - 1)
    blocks, tokens = blocks[:, :length], min(GREEDY_TOKENS, context - length // 2 - 1)
    with LlamaCpp(path, min(context, 2 * blocks.shape[1] + GREEDY_TOKENS)) as llama:
        sample = text[:2000]
        expected, found = tokenizer(sample).input_ids, llama.tokenize(sample)
        differing = sum(a != b for a, b in zip(expected, found)) + abs(len(expected) - len(found))
        checks = [Check(f"{name}: tokens of {len(expected)} that differ", differing, 0)]
        with tqdm(total=blocks.numel(), desc=name, unit="token", leave=False, disable=None) as bar:
            values = []
            for block in blocks:
                values.append(llama.log_probabilities(block.tolist()))
                bar.update(len(block))
        with torch.no_grad():
            in_transformers = checkpoint.log_probabilities(model(blocks, use_cache=False).logits.float(), blocks)
        difference = (torch.tensor(values) - in_transformers).abs()
        checks.append(
            Check(f"{name}: mean difference of {difference.numel()} log-probabilities", float(difference.mean()), allowed, "nats")
        )
        prompt = blocks[0, : blocks.shape[1] // 2]
        banned = tokenizer.all_special_ids
        lost = _lost(model, prompt, greedy(model, prompt, tokens, banned), llama.greedy(prompt.tolist(), tokens, banned))
        checks.append(Check(f"{name}: greedy continuation of {tokens} tokens, probability lost", lost, 5 * allowed, "nats"))
    return checks


def _lost(model, prompt: torch.Tensor, wanted: list[int], found: list[int]) -> float:
    """By how many nats the first token of ``found`` that is not in ``wanted`` is less probable to ``model``; 0 where they are equal.

    Two computations of one model may part where two tokens are equally probable, and only there.
    """
    if len(wanted) != len(found):
        return float("inf")
    for t, (a, b) in enumerate(zip(wanted, found)):
        if a != b:
            ids = torch.cat([prompt, torch.tensor(wanted[:t], dtype=torch.long)])[None]
            with torch.no_grad():
                likely = model(ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
            return float(likely[a] - likely[b])
    return 0.0


def run(config: VerifyConfig) -> list[Check]:
    """Every check, in order. Raises UserError for what is no checkpoint or cannot be read."""
    if not Path(config.folder).is_dir():
        raise UserError(f"{config.folder}: no such folder")
    for path in config.files:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
    model = families.load_model(config.folder, torch.float32, "DIR")
    tokenizer = families.load_tokenizer(config.folder, "DIR")
    (text,) = evaluation.load_texts((config.text or "python_manual",), "--text")
    length = min(config.seq_len, model.config.max_position_embeddings - GREEDY_TOKENS - 1)
    blocks = evaluation.blocks_of(text, tokenizer, max(4, length), config.blocks)
    checks = checks_of_folder(config.folder, model, tokenizer, blocks)
    for path in config.files:
        checks += checks_of_file(path, model, tokenizer, text.text, blocks)
    return checks


def main(argv=None) -> int:
    """Exit status: 0, 1 where a check fails, 2 for a user's mistake (one line on stderr), 130 when interrupted."""
    failed = []

    def prove(config):
        checks = run(config)
        log.info("%s", "\n".join(report.aligned([["check", "measured", "allowed", ""], *(check.row() for check in checks)])))
        failed.extend(check for check in checks if not check.passed)

    description = "Proves that a checkpoint, and GGUF files made from it, are the model that was pruned."
    return cli.program(VerifyConfig, "slimllm.verify", "DIR [FILE.gguf ...] [flags]", description, prove, argv) or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
