"""Checks that what was written is the model that was pruned.

The files against their hashes, and the widths against the record's plan; the checkpoint against what the model gave in memory before it
was saved; cached against uncached generation; a padded batch against single texts; and each GGUF file in llama.cpp, and the checkpoint in
vLLM, against the checkpoint in transformers: tokens, log-probabilities of real text, greedy continuations.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..errors import UserError, first_line
from ..models.loading import open_source
from ..models.parts import Units
from ..plan import by_part, is_gone
from ..settings.common import OUTTYPES
from ..utils import outputs
from . import reference, vllm
from .llama_cpp import LlamaCpp

log = logging.getLogger("slimllm")

PLAN = "pruning.json"  # the record of a pruning run: what it kept of each layer
# Mean |difference| of a token's log-probability, in nats, that the type of a GGUF file's weights explains in any model; where it is more,
# what the type does to this model is measured.
GGUF_TOLERANCE = {"F32": 1e-3, "F16": 2e-2, "BF16": 2e-1, "Q8_0": 2e-1}
OTHER_TOLERANCE = 0.5  # smaller types
ROUNDED = 3.0  # times what rounding the weights alone does: a runtime rounds what it multiplies them by, too
LEAST = -80.0  # nats: below that a probability in float32, which llama.cpp takes the logarithm of, has few digits or is 0
VLLM_TOLERANCE = 1e-3
GREEDY_TOKENS = 24


@dataclass
class Check:
    """One row of the table: a difference (or count) and what is allowed."""

    what: str
    measured: float
    allowed: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether the measured difference is allowed; one that is not a finite number is not."""
        return reference.agrees(self.measured, self.allowed)

    def row(self) -> list[str]:
        """The cells of its row: what, measured with its unit, allowed, ``ok`` or ``FAILED``."""
        return [self.what, f"{self.measured:.3g} {self.unit}".strip(), f"{self.allowed:.3g}", "ok" if self.passed else "FAILED"]


@torch.no_grad()
def greedy(model, ids: torch.Tensor, tokens: int, banned: list[int], cached: bool = True) -> list[int]:
    """The ``tokens`` ids that follow ids [length], each the most probable that is not ``banned`` (special tokens end a text)."""
    attention = torch.ones_like(ids[None])
    settings = dict(do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None, suppress_tokens=banned or None)
    output = model.generate(ids[None], attention_mask=attention, max_new_tokens=tokens, **settings)
    return output[0, len(ids) :].tolist()


def checks_of_bytes(folder: str) -> list[Check]:
    """Whether the files are those that were written, by their seal, and the widths those of the record; loads no weight.

    A folder from before there were seals has no check of its files, which is logged.
    """
    checks, wrong = [], outputs.altered(Path(folder))
    if wrong is None:
        log.warning("%s: it has no %s, so its files cannot be compared with those that were written", folder, outputs.SEAL)
    else:
        named = f": not {', '.join(wrong)}" if wrong else ""
        checks.append(Check(f"files with the SHA-256 that {outputs.SEAL} holds{named}", len(wrong), 0, "differ"))
        if unknown := outputs.unsealed(Path(folder)):
            log.warning("%s: not from the run that wrote the rest, so not compared: %s", folder, ", ".join(unknown))
    if (planned := planned_units(Path(folder))) is not None and not wrong:
        source = open_source(folder, "auto", "DIR")  # which refuses weights of other widths than the config's
        widths = source.adapter.units(source.model)
        differing = [index for index, (a, b) in enumerate(zip(planned, widths)) if a != b]
        differing += [len(widths)] * (len(planned) != len(widths))
        named = f": not layer {', '.join(map(str, differing))}" if differing else ""
        checks.append(Check(f"widths of the layers that {PLAN} holds{named}", len(differing), 0, "differ"))
    return checks


def planned_units(folder: Path) -> list[dict[str, Units]] | None:
    """What each part of each layer kept by the run's record; None where the folder has none. Raises UserError for a broken one."""
    try:
        layers = json.loads((folder / PLAN).read_text(encoding="utf-8"))["layers"]
        parts = [by_part(layer)["kept"] for layer in layers]
        staying = [layer for layer in parts if not is_gone(layer)]
        return [
            {kind: {sort: _different(kept) for sort, kept in own.items()} for kind, own in layer.items() if any(own.values())}
            for layer in staying
        ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / PLAN}: not the record of a pruning run ({first_line(error)})") from None


def _different(indices: list) -> int:
    """How many different units these are; of the channels of experts, listed by expert, the least of them."""
    return min(map(_different, indices)) if indices and isinstance(indices[0], list) else len({int(i) for i in indices})


def checks_of_folder(folder: str, model, tokenizer, blocks: torch.Tensor) -> list[Check]:
    """The checks that need transformers only. ``model`` is the one of ``folder`` in float32, ``blocks`` [n, length] text."""
    saved = open_source(folder, reference.reference_dtype(folder), "DIR")
    covered, rows = reference.covered_rows(saved, folder)
    if covered < rows:
        log.info("the saved outputs follow from %d of %d rows of the embeddings; the others are compared by SHA-256 alone", covered, rows)
    checks = [Check("saved model against the model in memory: logits", *reference.compare_with_reference(saved, folder))]
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
    return float((together - alone).abs().max()), 10 * reference.tolerance(model.dtype) * float(alone.abs().max())


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
    questions = Questions.of(tokenizer, text, blocks, context)
    with LlamaCpp(path, min(context, 2 * questions.blocks.shape[1] + GREEDY_TOKENS)) as llama:
        tokens, values = llama.tokenize(questions.text), []
        with tqdm(total=questions.blocks.numel(), desc=Path(path).name, unit="token", leave=False, disable=None) as bar:
            for block in questions.blocks.tolist():
                values.append(llama.log_probabilities(block))
                bar.update(len(block))
        continuation = llama.greedy(questions.prompt.tolist(), questions.new_tokens, questions.banned)
    answers, allowed = Answers(tokens, values, continuation), GGUF_TOLERANCE.get(kind, OTHER_TOLERANCE)
    found = questions.compared(Path(path).name, answers, model, tokenizer, allowed)
    if all(check.passed for check in found) or kind.lower() not in OUTTYPES:
        return found
    allowed = max(allowed, ROUNDED * _rounding(model, questions.blocks, kind.lower()))
    return questions.compared(Path(path).name, answers, model, tokenizer, allowed)


@torch.no_grad()
def _rounding(model, blocks: torch.Tensor, outtype: str) -> float:
    """Mean |difference| of the log-probabilities of ``blocks`` [n, length] that rounding the weights to ``outtype`` makes, in nats."""
    from .export_gguf import quantized_bytes

    rounded = copy.deepcopy(model)
    quantized_bytes(rounded, outtype)
    return float((_of_blocks(rounded, blocks) - _of_blocks(model, blocks)).abs().mean())


@torch.no_grad()
def _of_blocks(model, blocks: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of ``blocks`` [n, length], [n, length - 1], as far as a runtime can tell them."""
    return reference.log_probabilities(model(blocks, use_cache=False).logits.float(), blocks).clamp_min(LEAST)


def checks_of_vllm(
    python: str, folder: str, model, tokenizer, text: str, blocks: torch.Tensor, trust_remote_code: bool = False
) -> list[Check]:
    """The checks of a checkpoint in vLLM, run by the interpreter ``python``, against ``model``, both in float32.

    Raises UserError where there is no vLLM or it does not take the model.
    """
    context = min(model.config.max_position_embeddings, 2 * blocks.shape[1] + GREEDY_TOKENS)
    questions = Questions.of(tokenizer, text, blocks, context)
    greedy_of = (questions.prompt.tolist(), questions.new_tokens, questions.banned)
    queries = dict(text=questions.text, prompts=questions.blocks.tolist(), greedy=greedy_of)
    answer = vllm.ask(python, folder, context, trust_remote_code=trust_remote_code, **queries)
    answers = Answers(answer["text"], answer["prompts"], answer["greedy"])
    return questions.compared("vLLM", answers, model, tokenizer, VLLM_TOLERANCE)


@dataclass
class Answers:
    """What another runtime makes of :class:`Questions`: token ids, log-probabilities of each block, the continuation."""

    tokens: list[int]
    log_probabilities: list[list[float]]
    continuation: list[int]


@dataclass
class Questions:
    """What another runtime is asked: ``text`` to tokenize, ``blocks`` [n, length] to give log-probabilities of, ``prompt`` to continue."""

    text: str
    blocks: torch.Tensor
    prompt: torch.Tensor
    new_tokens: int
    banned: list[int]

    @classmethod
    def of(cls, tokenizer, text: str, blocks: torch.Tensor, context: int) -> Questions:
        """As much of ``text`` and ``blocks`` as fits in ``context`` tokens, with room for a continuation."""
        blocks = blocks[:, : min(blocks.shape[1], context - 1)]
        half = blocks.shape[1] // 2
        return cls(text[:2000], blocks, blocks[0, :half], min(GREEDY_TOKENS, context - half - 1), tokenizer.all_special_ids)

    @torch.no_grad()
    def compared(self, name: str, answers: Answers, model, tokenizer, allowed: float) -> list[Check]:
        """What the runtime ``name`` answered against ``model`` in transformers."""
        expected = tokenizer(self.text).input_ids
        differing = sum(a != b for a, b in zip(expected, answers.tokens)) + abs(len(expected) - len(answers.tokens))
        theirs, ours = torch.tensor(answers.log_probabilities).clamp_min(LEAST), _of_blocks(model, self.blocks)
        difference = (theirs - ours).abs()[torch.maximum(theirs, ours) != LEAST]  # the others say nothing; without any there is no proof
        continuation = greedy(model, self.prompt, self.new_tokens, self.banned)
        lost = _lost(model, self.prompt, continuation, answers.continuation)
        return [
            Check(f"{name}: tokens of {len(expected)} that differ", differing, 0),
            Check(f"{name}: mean difference of {difference.numel()} log-probabilities", float(difference.mean()), allowed, "nats"),
            Check(f"{name}: greedy continuation of {self.new_tokens} tokens, probability lost", lost, 5 * allowed, "nats"),
        ]


def _lost(model, prompt: torch.Tensor, expected: list[int], actual: list[int]) -> float:
    """By how many nats the first token in which ``actual`` differs from ``expected`` is less probable to ``model``; 0 where none does.

    Two computations of one model may differ where two tokens are equally probable, and only there.
    """
    if len(expected) != len(actual):
        return float("inf")
    for t, (a, b) in enumerate(zip(expected, actual)):
        if a != b:
            ids = torch.cat([prompt, torch.tensor(expected[:t], dtype=torch.long)])[None]
            with torch.no_grad():
                likely = model(ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
            return float(likely[a] - likely[b])
    return 0.0
