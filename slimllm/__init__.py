"""SlimLLM: structured width pruning of Llama-family language models (Guo et al., ICML 2025, arXiv 2505.22689).

Importing the package teaches transformers' auto classes to load pruned checkpoints without remote code.
:func:`prune` and :func:`save` are the two commands as functions; :class:`UserError` is what they raise for what you can mend.
"""

import transformers

from .errors import UserError
from .modeling import slim_models
from .models.families import FAMILIES

__version__ = "0.1.0"
__all__ = ["PruneConfig", "PruneResult", "UserError", "prune", "save"]

for _auto, _made in [pair for family in FAMILIES for pair in slim_models(family).items()]:
    transformers.AutoConfig.register(_made.config_class.model_type, _made.config_class, exist_ok=True)
    getattr(transformers, _auto).register(_made.config_class, _made, exist_ok=True)


def __getattr__(name):  # loading a pruned checkpoint needs none of the rest
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
