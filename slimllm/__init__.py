"""SlimLLM: structured width pruning of Llama-family language models (Guo et al., ICML 2025, arXiv 2505.22689).

Importing the package teaches transformers' auto classes to load pruned checkpoints without remote code.
:func:`prune` and :func:`save` are the two commands as functions; :class:`UserError` is what they raise for what you can mend.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .errors import UserError
from .modeling import slim_models
from .models.families import FAMILIES

__version__ = "0.1.0"
__all__ = ["PruneConfig", "PruneResult", "UserError", "prune", "save"]

for _model, _causal_lm in map(slim_models, FAMILIES):
    AutoConfig.register(_causal_lm.config_class.model_type, _causal_lm.config_class, exist_ok=True)
    AutoModel.register(_causal_lm.config_class, _model, exist_ok=True)
    AutoModelForCausalLM.register(_causal_lm.config_class, _causal_lm, exist_ok=True)


def __getattr__(name):  # loading a pruned checkpoint needs none of the rest
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
