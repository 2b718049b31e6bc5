"""SlimLLM: structured width pruning of Llama-family language models (Guo et al., ICML 2025, arXiv 2505.22689).

Importing the package teaches transformers' auto classes to load pruned checkpoints without remote code.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .modeling import SLIM_MODELS

__version__ = "0.1.0"

for _model in SLIM_MODELS.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
