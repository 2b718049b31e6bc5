"""Multiple-choice tasks with lm-eval's own definitions, from the hub or from local files, scored faster.

The task definitions (prompts, targets, metrics) are lm-eval's. What differs is where the rows can come from, and that
the choices of one question share one pass of the question's tokens.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..data.texts import check_vocabulary
from ..errors import UserError, first_line
from ..models import hub
from ..models.adapter import LayerAdapter
from ..models.families import family_of
from ..models.shape import window_of
from ..settings.tasks import MATH, TASKS, Task
from ..streaming.runner import LOGIT_ROWS
from ..utils import processes

TOKENS_AT_ONCE = 4096
DEV = "dev"  # the split of solved examples


def local_file(name: str, data_dir: str) -> Path:
    """``data_dir``/NAME.jsonl. Raises UserError where there is none."""
    path = Path(data_dir) / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(
            f"--data_dir {data_dir}: it has no {path.name}; leave {name} out of --tasks, or leave out --data_dir to use the hub"
        )
    return path


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file in the hub's schema. Raises UserError naming file and line."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: the file is empty")
    return rows


def _load_task(name: str, task: Task, data_dir: str | None, scratch: Path):
    """lm-eval's task manager and task; with ``data_dir`` the definition is included and only the source of its rows replaced."""
    import lm_eval.tasks

    definition = Path(lm_eval.tasks.__file__).parent / task.definition
    if data_dir is not None:
        files = {task.split: local_file(name, data_dir)} | ({DEV: local_file(f"{name}.{DEV}", data_dir)} if task.shots else {})
        for path in files.values():
            read_rows(path)
        override = {
            "include": str(definition),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}, "cache_dir": str(scratch)},
            **{f"{kind}_split": task.split if task.split == kind else None for kind in ("training", "validation", "test")},
        }
        definition = scratch / f"{name}.yaml"
        definition.write_text(json.dumps(override))
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(definition.parent))
    found = manager.load([str(definition)])["tasks"][name]
    if task.shots:
        found.set_config("num_fewshot", task.shots)
    return manager, found


@contextlib.contextmanager
def quietly():
    """lm-eval and what it loads data with, without their prints and warnings; their bars are drawn on a terminal alone."""
    hub.reachable()  # without a network, look in the cache at once
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()  # lm-eval draws its own wherever it runs, in log files too
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(bars):
        yield


def score(model, tokenizer, name: str, data_dir: str | None = None, limit: int | None = None) -> dict:
    """One task in full, or its first ``limit`` questions.

    Returns:
        {"metrics": {"acc": .., "acc_stderr": .., ...}, "questions": how many, "version": of lm-eval's definition, "reported": the
        metric that tables show, "limited": whether ``limit`` was given}.
    Raises:
        UserError: the task's data cannot be had or does not have the hub's schema.
    """
    from lm_eval import simple_evaluate

    definition = (TASKS | MATH)[name]
    where = f"--data_dir {data_dir}: {name}.jsonl" if data_dir else f"task {name}"
    with tempfile.TemporaryDirectory(prefix="slimllm-") as scratch, quietly():
        try:
            manager, task = _load_task(name, definition, data_dir, Path(scratch))
        except UserError:
            raise
        except Exception as error:  # the hub's libraries raise their own kinds, the templates too
            hint = "not in the schema of the hub's data set" if data_dir else "cannot be had; name local files with --data_dir"
            raise UserError(f"{where}: {hint} ({type(error).__name__}: {first_line(error)})") from None
        results = simple_evaluate(
            harness_model(model, tokenizer), tasks=[task], limit=limit, bootstrap_iters=0, log_samples=False, task_manager=manager
        )
    (metrics,) = results["results"].values()
    values = {key.split(",")[0]: value for key, value in metrics.items() if key.endswith(",none")}
    return {
        "metrics": {key: value for key, value in values.items() if isinstance(value, int | float)},
        "questions": results["n-samples"][name]["effective"],
        "version": results["versions"][name],
        "reported": definition.reported,
        "limited": limit is not None,
    }


def harness_model(model, tokenizer):
    """lm-eval's model for ``model``, with :func:`score_choices` where the attention implementation allows it."""
    from lm_eval.models.huggingface import HFLM

    class SharedContext(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
            longest = min(self.max_length, window_of(self.config) or self.max_length)
            if not shares_contexts(self.config) or any(len(c) + len(a) > longest for c, a in pairs):
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # one request, one row
            return score_shares(self.model, pairs, longest, bar=not disable_tqdm)

    return SharedContext(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=16, softmax_dtype=torch.float32)


def shares_contexts(config) -> bool:
    """Whether a mask alone keeps several answers to one context apart: not where states run through the tokens of a row."""
    return config._attn_implementation == "sdpa" and not family_of(config).is_hybrid


def score_shares(model, pairs: list[tuple[tuple, tuple]], longest: int, bar: bool = False) -> list[tuple[float, bool]]:
    """:func:`score_choices`, each process of the run its share of the contexts."""
    contexts = {context: number for number, context in enumerate(dict.fromkeys(context for context, _ in pairs))}
    owners = [contexts[context] % processes.count() for context, _ in pairs]
    mine = [pair for pair, owner in zip(pairs, owners) if owner == processes.rank()] if processes.count() > 1 else pairs
    shares = [iter(scores) for scores in processes.from_all(score_choices(model, mine, longest, bar and processes.is_first()))]
    return [next(shares[owner]) for owner in owners]


@torch.no_grad()
def score_choices(model, pairs: list[tuple[tuple, tuple]], longest: int, bar: bool = False) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation after its context, and whether greedy decoding would give it.

    Continuations of the same context are laid side by side in one row: each attends to the context and itself only and
    takes the positions that follow the context, so every number is what a row of its own would give.

    Args:
        pairs: (context ids, continuation ids), neither empty. longest: no row is made longer than this.
    Raises UserError for a token that the model does not have.
    """
    used = {token for pair in pairs for part in pair for token in part}
    check_vocabulary(torch.tensor(sorted(used), dtype=torch.long), model.config.vocab_size, "zero-shot questions")
    answers = defaultdict(list)
    for index, (context, _) in enumerate(pairs):
        answers[context].append(index)
    rows = []  # (context, [index of the pair, ...]) with a total of at most `longest` tokens
    for context, indices in answers.items():
        row, length = [], len(context)
        for index in indices:
            more = len(pairs[index][1]) - 1
            if row and length + more > longest:
                rows.append((length, context, row))
                row, length = [], len(context)
            row.append(index)
            length += more
        rows.append((length, context, row))
    rows.sort(key=lambda row: -row[0])
    results: list = [None] * len(pairs)
    with tqdm(total=len(pairs), desc="answers", leave=False, disable=None if bar else True) as progress:
        while rows:
            count = max(1, TOKENS_AT_ONCE // rows[0][0])
            batch, rows = rows[:count], rows[count:]
            for index, result in _score_rows(model, pairs, batch):
                results[index] = result
            progress.update(sum(len(indices) for _, _, indices in batch))
    return results


def _score_rows(model, pairs, batch):
    """Yields (index of the pair, (log-likelihood, greedy)) for the rows of one batch."""
    width = batch[0][0]
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros(len(batch), width, dtype=torch.long)
    segment = torch.full((len(batch), width), -1)  # 0: context, 1..: the continuations, -1: padding
    state_rows, targets, spans = [], [], []  # row of the flattened states -> its target; how many rows each pair has
    for r, (_, context, indices) in enumerate(batch):
        end = len(context)
        ids[r, :end], positions[r, :end], segment[r, :end] = torch.tensor(context), torch.arange(end), 0
        for number, index in enumerate(indices, 1):
            continuation = pairs[index][1]
            part = slice(end, end + len(continuation) - 1)
            ids[r, part] = torch.tensor(continuation[:-1], dtype=torch.long)
            positions[r, part] = len(context) + torch.arange(len(continuation) - 1)
            segment[r, part] = number
            state_rows += [r * width + len(context) - 1, *range(r * width + part.start, r * width + part.stop)]
            targets += continuation
            spans.append((index, len(continuation)))
            end = part.stop
    key, query = segment[:, None, :], segment[:, :, None]
    mask = ((key == query) | (key == 0)) & torch.ones(width, width, dtype=torch.bool).tril()
    device = model.device
    adapter = LayerAdapter(model.config)
    inputs = {"position_ids": positions.to(device), "attention_mask": mask[:, None].to(device)}
    states = adapter.last_states(model, ids.to(device), **inputs).flatten(0, 1)
    targets = torch.tensor(targets, device=device)
    head, likelihood, greedy = adapter.head(model), [], []
    for rows, target in zip(states[torch.tensor(state_rows, device=device)].split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
        logits = adapter.logits(head, rows)
        likelihood.append(-torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        greedy.append(logits.argmax(-1) == target)
    likelihood, greedy = torch.cat(likelihood).double().cpu(), torch.cat(greedy).cpu()
    start = 0
    for index, length in spans:
        yield index, (float(likelihood[start : start + length].sum()), bool(greedy[start : start + length].all()))
        start += length
