"""SlimLLM: structured width pruning of Llama-family language models (Guo et al., ICML 2025, arXiv 2505.22689).

Importing the package teaches transformers' auto classes to load pruned checkpoints without remote code.
:func:`prune` and :func:`save` are the two commands as functions; both raise :class:`UserError` for a mistake in what they are given.
"""

import importlib

from . import auto_classes
from .errors import UserError

__version__ = "0.1.0"
__all__ = ["PruneConfig", "PruneResult", "UserError", "prune", "save"]

auto_classes.register_in_time()


def __getattr__(name):  # help, errors and loading a pruned checkpoint need none of the rest
    if name in __all__:
        module = ".settings.pruning" if name == "PruneConfig" else ".api"
        return getattr(importlib.import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
