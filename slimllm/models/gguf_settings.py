"""Settings that the metadata of a .gguf file has and transformers leaves out of the config that it makes of them.

Without these settings the same weights are another model.
"""

from __future__ import annotations

import math

import gguf
import torch

from ..errors import UserError
from .families import family_of
from .parts import head_dim_of
from .shape import rope_of

# architecture -> how many layers the one model has that divides attention scores by the root of hidden size / heads
SCALAR_OF_HIDDEN = {"gemma2": 46, "gemma3": 62}
LLAMA3_TURNS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of each llama3 scaling that was published


def complete(config, reader: gguf.GGUFReader, where: str) -> None:
    """Sets in ``config``, in place, what the file has of soft caps, scores, windows and rotary embeddings.

    Raises UserError, naming ``where``, for rotary embeddings that it has no settings for.
    """
    arch, family = reader.fields["general.architecture"].contents(), family_of(config)

    def value(name: str):
        field = reader.fields.get(f"{arch}.{name}")
        return None if field is None else field.contents()

    for setting, name in (
        (family.attention_softcap, "attn_logit_softcapping"),
        (family.logits_softcap, "final_logit_softcapping"),
    ):
        if setting and hasattr(config, setting) and value(name) is not None:
            setattr(config, setting, value(name))
    if family.attention_scalar:
        of_hidden = SCALAR_OF_HIDDEN.get(arch) == config.num_hidden_layers
        setattr(config, family.attention_scalar, config.hidden_size // config.num_attention_heads if of_hidden else head_dim_of(config))
    pattern = value("attention.sliding_window_pattern")
    if pattern is not None and getattr(config, "layer_types", None):
        layers = range(config.num_hidden_layers)
        sliding = pattern if isinstance(pattern, list) else [not pattern or (i + 1) % pattern != 0 for i in layers]
        config.layer_types = ["sliding_attention" if i else "full_attention" for i in sliding]
    if family.local_rope and (base := value("rope.freq_base_swa")) is not None:
        rope_of(config, "sliding_attention")["rope_theta"] = base
    rope_of(config).update(_scaling(config, reader, value, where))


def _scaling(config, reader, value, where: str) -> dict:
    """The entries of ``rope_parameters`` for a scaling of the rotary frequencies; empty where there is none."""
    factors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    kind = value("rope.scaling.type")
    refusal = UserError(
        f"{where}: a scaling of the rotary embeddings ({kind or ', '.join(factors)}) that cannot be read from a .gguf file; name the "
        "model in the form of transformers"
    )
    if "rope_freqs.weight" in factors:
        divisors = factors.pop("rope_freqs.weight").float()
        settings = _llama3(divisors, rope_of(config)["rope_theta"], head_dim_of(config)) if factors == {} and not kind else None
        if settings is None:
            raise refusal
        return settings
    if factors or kind not in (None, "none", "linear", "yarn"):
        raise refusal
    if kind in (None, "none"):
        return {}
    settings = {"rope_type": kind, "factor": value("rope.scaling.factor")}
    if kind == "yarn":
        settings["original_max_position_embeddings"] = value("rope.scaling.original_context_length")
        settings |= {f"beta_{name}": value(f"rope.scaling.yarn_beta_{name}") for name in ("fast", "slow")}
    return {name: setting for name, setting in settings.items() if setting is not None}


def llama3_factors(rope: dict, head_dim: int) -> torch.Tensor:
    """What each rotary frequency is divided by, [head_dim / 2], where the settings ``rope`` are of the type llama3."""
    turns = rope["original_max_position_embeddings"] * _frequencies(rope["rope_theta"], head_dim) / (2 * math.pi)  # in that context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _llama3(factors: torch.Tensor, theta: float, head_dim: int) -> dict | None:
    """The settings of the type llama3 that give these ``factors`` [head_dim / 2]; none for factors of one, None where there are none."""
    factor, low, high = float(factors.max()), *LLAMA3_TURNS.values()
    if factor == 1:
        return {}
    at = int((factors < factor).sum()) - 1  # the slowest frequency that is not divided by all of it
    if len(factors) != head_dim // 2 or at < 0:
        return None
    smooth = (1 / float(factors[at]) - 1 / factor) / (1 - 1 / factor)
    original = (low + smooth * (high - low)) * 2 * math.pi / float(_frequencies(theta, head_dim)[at])
    original = round(original) if smooth < 1 else math.ceil(original)  # where it is not divided at all, any longer one does
    settings = {"rope_type": "llama3", "factor": factor, **LLAMA3_TURNS, "original_max_position_embeddings": original}
    return settings if torch.allclose(llama3_factors(settings | {"rope_theta": theta}, head_dim), factors, rtol=1e-3) else None


def _frequencies(theta: float, head_dim: int) -> torch.Tensor:
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
