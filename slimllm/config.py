"""Every setting of a pruning run: declared once, validated once, shown by ``--help``.

A field's metadata is its command-line flag: help text (with unit), group and allowed values.
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import asdict, dataclass, field, fields

from .recovery import RECOVERIES


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the thing and the way out, exit status 2."""


LAYER_RATIOS = ("importance", "uniform")
HEAD_UNITS = ("group", "query")
DTYPES = ("auto", "float32", "float16", "bfloat16")
CALIBRATION_NAMES = ("bookcorpus", "c4", "wikitext2", "self")
EVAL_NAMES = ("wikitext2", "ptb", "python_manual", "none")

# What a recipe sets where the user says nothing. "paper" is Guo et al.; "best" is what measured best (README).
RECIPES = {"paper": {"recovery": "linear"}, "best": {"recovery": "least_squares"}}
# The published code spares the lowest-scoring 1 % of the channels. least_squares, not published, does better without.
PUBLISHED_KEEP_LOWEST = 0.01

# The paper's two settings for 32 layers: (ratio up to which it is used, pruned layers, alpha).
PAPER_SETTINGS = ((0.4, 26, 10.0), (1.0, 30, 7.0))


def nearest(value: str, allowed) -> str:
    """``"; did you mean 'x'?"`` for the allowed name nearest to ``value``, or an empty string."""
    close = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_choice(flag: str, value: str, allowed) -> None:
    if value not in allowed:
        raise UserError(f"--{flag} {value}: not one of {', '.join(allowed)}{nearest(value, allowed)}")


def _flag(group: str, help: str, default=None, **kwargs):
    return field(default=default, metadata={"group": group, "help": help, **kwargs})


@dataclass
class PruneConfig:
    """Settings of one run. Raises UserError where a value, or two together, make no sense.

    Fields that default to None are resolved in ``__post_init__`` (from the recipe) or, where they depend on the
    model's depth, by :meth:`resolve_depth`.
    """

    base_model: str = _flag("model", "local folder, hub name or .gguf file (required)")
    dtype: str = _flag("model", "dtype of weights and compute: float32 on a CPU, the checkpoint's own on a GPU", "auto", choices=DTYPES)
    device: str = _flag("model", "where the layers are computed; auto takes a GPU if there is one", "auto")
    eval_device: str = _flag("model", "where perplexity is computed", "auto")

    pruning_ratio: float = _flag(
        "budget",
        "mean share of heads and channels removed from the pruned layers, 0 to 1 (paper: 0.25 for 20 %%, 0.55 for 50 %%) [0.25]",
        type=float,
    )
    target_sparsity: float = _flag(
        "budget",
        "share of the decoder layers' parameters to remove, 0 to 1, met to within one channel; instead of --pruning_ratio",
        type=float,
    )
    pruned_layers: int = _flag(
        "budget", "how many layers are pruned [26 of 32, or 30 of 32 from ratio 0.4 on, scaled to the depth]", type=int
    )
    alpha: float = _flag("budget", "how strongly layer importance spreads the ratios (Eq. 11) [10, or 7 from ratio 0.4 on]", type=float)
    layer_ratio: str = _flag(
        "budget", "ratios by layer importance, or the same for the least important layers", "importance", choices=LAYER_RATIOS
    )
    head_unit: str = _flag(
        "budget", "grouped-query attention: remove whole KV groups, or as many query heads out of each group", "query", choices=HEAD_UNITS
    )
    round_to: int = _flag("budget", "keep channels, and heads x head size, in multiples of this", 1, type=int)

    recipe: str = _flag("method", "paper: the published method; best: what measured best", "paper", choices=tuple(RECIPES))
    recovery: str = _flag("method", "what the kept output weights become [linear; best: least_squares]", choices=tuple(RECOVERIES))
    ridge: float = _flag("method", "least_squares: ridge as a multiple of the mean input variance", 1.0, type=float)
    keep_lowest: float = _flag(
        "method",
        "share of a layer's channels, the lowest-scoring, that stays all the same as in the published code [0.01; with least_squares 0]",
        type=float,
    )
    no_greedy: bool = _flag("method", "no swaps after the first choice of heads", False)
    slimllm: bool = _flag("method", "accepted for old command lines; the method is always SlimLLM", False)

    calibration: str = _flag(
        "calibration",
        "bookcorpus, c4, wikitext2 (hub), self (sampled from the model), a .txt or .jsonl file, a folder of them, "
        "or a calibration.safetensors [bookcorpus; self where the hub is out of reach]",
    )
    num_examples: int = _flag("calibration", "samples", 32, type=int)
    seq_len: int = _flag("calibration", "tokens a sample", 128, type=int)
    seed: int = _flag("calibration", "seed of every random choice", 42, type=int)

    eval_data: tuple = _flag(
        "evaluation",
        "any of wikitext2, ptb, python_manual, NAME=FILE, FILE, or none [wikitext2 ptb; python_manual where the hub is out of reach]",
        nargs="+",
    )
    max_seq_len: int = _flag("evaluation", "tokens a block of text for perplexity", 128, type=int)
    eval_limit: int = _flag("evaluation", "only the first N blocks; the figures are marked as limited [all]", type=int)
    test_after_train: bool = _flag("evaluation", "print continuations of a few prompts, before and after", False)
    temperature: float = _flag("evaluation", "of these continuations; 0 is greedy", 1.0, type=float)
    top_p: float = _flag("evaluation", "nucleus of these continuations, 0 to 1", 0.95, type=float)

    save_ckpt_log_name: str = _flag("output", "NAME: everything goes to prune_log/NAME/", "llama_prune")
    save_model: bool = _flag("output", "write the pruned model (--no_save_model: only the record)", True, negatable=True)
    overwrite: bool = _flag("output", "replace an existing prune_log/NAME/", False)
    dry_run: bool = _flag("output", "print the plan from the model's config alone and stop", False)

    def __post_init__(self):
        if not self.base_model:
            raise UserError("--base_model is required: a local folder, hub name or .gguf file")
        for f in fields(self):
            if f.metadata.get("choices") and getattr(self, f.name) is not None:
                check_choice(f.name, getattr(self, f.name), f.metadata["choices"])
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.keep_lowest is None:
            self.keep_lowest = 0.0 if self.recovery == "least_squares" else PUBLISHED_KEEP_LOWEST
        if self.pruning_ratio is not None and self.target_sparsity is not None:
            raise UserError("--pruning_ratio and --target_sparsity both say how much to remove: give one of them")
        if self.target_sparsity is None and self.pruning_ratio is None:
            self.pruning_ratio = 0.25
        self._check_range("pruning_ratio", 0, 1, right_open=True)
        self._check_range("target_sparsity", 0, 1, right_open=True)
        self._check_range("keep_lowest", 0, 1, right_open=True)
        self._check_range("top_p", 0, 1)
        self._check_range("alpha", 0, float("inf"))
        self._check_range("temperature", 0, float("inf"))
        for name in ("num_examples", "round_to", "eval_limit", "pruned_layers"):
            self._check_range(name, 1, float("inf"))
        for name in ("seq_len", "max_seq_len"):
            self._check_range(name, 2, float("inf"))
        if not 0 < self.ridge < float("inf"):
            raise UserError(f"--ridge {self.ridge}: must be above 0")
        name = self.save_ckpt_log_name
        if not name or name.startswith(("/", ".")) or ".." in name.split("/"):
            raise UserError(f"--save_ckpt_log_name {name}: must be a name inside prune_log/, not hidden and not a path out of it")
        self.eval_data = tuple(self.eval_data) if self.eval_data else None

    def _check_range(self, name: str, low: float, high: float, right_open: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not low <= value <= high or (right_open and value == high):
            bound = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {'below ' if right_open else ''}{high:g}"
            raise UserError(f"--{name} {value}: must be {bound}")

    def resolve_depth(self, num_layers: int) -> None:
        """Sets pruned_layers and alpha where the user gave none: the paper's, scaled to ``num_layers``."""
        amount = self.pruning_ratio if self.target_sparsity is None else self.target_sparsity
        layers, alpha = next((n, a) for limit, n, a in PAPER_SETTINGS if amount < limit)
        if self.pruned_layers is None:
            self.pruned_layers = max(1, round(layers * num_layers / 32))
        if self.alpha is None:
            self.alpha = alpha
        if self.pruned_layers > num_layers:
            raise UserError(f"--pruned_layers {self.pruned_layers}: the model has {num_layers} layers")

    def to_dict(self) -> dict:
        return asdict(self)


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage text."""

    def error(self, message):
        raise UserError(message)


class _Formatter(argparse.HelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) and not action.const
        return action.help + (" [%(default)s]" if shown else "")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``hf_prune.py``, one flag for each field of PruneConfig."""
    parser = _Parser(
        prog="hf_prune.py",
        usage="python hf_prune.py --base_model MODEL [flags]",
        allow_abbrev=False,
        formatter_class=_Formatter,
        description="Prunes whole attention heads and feed-forward channels of a Llama-family model (SlimLLM, arXiv 2505.22689).",
    )
    groups: dict = {}
    for f in fields(PruneConfig):
        meta = dict(f.metadata)
        name = meta.pop("group")
        group = groups.setdefault(name, parser.add_argument_group(name))
        choices = meta.pop("choices", None)
        if choices:  # checked by PruneConfig, which names the nearest
            meta["metavar"] = "{" + ",".join(choices) + "}"
        if isinstance(f.default, bool):
            negatable = meta.pop("negatable", False)
            group.add_argument(f"--{f.name}", action="store_true", default=f.default, **meta)
            if negatable:
                group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
        else:
            meta.setdefault("metavar", f.name.upper() if "type" not in meta else "N" if meta["type"] is int else "X")
            group.add_argument(f"--{f.name}", default=f.default, **meta)
    return parser


def parse_args(argv=None) -> PruneConfig:
    """Flags to a validated PruneConfig. Raises UserError, also for an unknown flag (naming the nearest)."""
    parser = build_parser()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}")
    return PruneConfig(**vars(namespace))
