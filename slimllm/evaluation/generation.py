"""Tasks in which a model writes (GSM8K, IFEval, HumanEval): everything about them is lm-eval's own; here they are only asked for."""

from __future__ import annotations

import functools
import os

import torch

from ..errors import UserError, first_line, nearest
from ..utils import processes
from .zero_shot import quietly

BATCH = 16


def score(model, tokenizer, name: str, settings) -> dict:
    """One task of lm-eval, by its name there, in full or on its first ``settings.limit`` questions.

    Returns:
        {"metrics": {"exact_match, strict-match": .., ...} without standard errors, "questions": how many, "version": of the definition,
        "limited": whether there was a limit, "chat_template": whether the questions went through it}.
    Raises:
        UserError: its data cannot be had, lm-eval failed, or gives no figure.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if settings.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric asks for besides lm-eval's own confirmation
    with quietly():
        try:
            results = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH),
                tasks=[name],
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=_manager(settings.include_path),
                apply_chat_template=settings.apply_chat_template,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the hub's libraries raise their own kinds, the templates too
            raise UserError(f"task {name}: lm-eval cannot do it ({type(error).__name__}: {first_line(error)})") from error
    entries = {key.replace(",none", "").replace(",", ", "): value for key, value in results["results"].get(name, {}).items()}
    values = {key: value for key, value in entries.items() if isinstance(value, int | float) and "stderr" not in key}
    values.pop("sample_len", None)
    if not values:
        raise UserError(f"task {name}: it has no figure of its own; name what it stands for: {', '.join(results['n-samples'])}")
    return {
        "metrics": values,
        "questions": sum(count["effective"] for count in results["n-samples"].values()),
        "version": results["versions"].get(name),
        "limited": settings.limit is not None,
        "chat_template": settings.apply_chat_template,
    }


def check(names: tuple[str, ...], include_path: str | None) -> None:
    """Raises UserError for a name that is no task of lm-eval's, or stands for several without a result of their own."""
    if not names:
        return
    if processes.expected() > 1:
        raise UserError(f"--generation {names[0]}: it is not shared between processes; start one process")
    with quietly():
        manager = _manager(include_path)
    for name in names:
        if name in manager.all_tags:
            raise UserError(f"--generation {name}: a name for several tasks, without a result of its own; name those that you want")
        if name not in manager.all_tasks:
            where = f", and {include_path} defines none that can be read" if include_path else ""
            raise UserError(f"--generation {name}: lm-eval has no such task{where}{nearest(name, manager.all_tasks)}")


@functools.cache
def _manager(include_path: str | None):
    """lm-eval's list of all its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def shown(scores: dict) -> str:
    """Every metric of a task: ``exact_match, strict-match 0.4200; ...``."""
    return "; ".join(f"{metric} {value:.4f}" for metric, value in scores["metrics"].items())
