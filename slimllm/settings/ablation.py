"""Settings of ``slimllm ablation``."""

from __future__ import annotations

from dataclasses import dataclass

from .trials import TrialsConfig


@dataclass
class AblationConfig(TrialsConfig):
    """Settings that all rows share. Raises UserError where a value makes no sense."""

    PROGRAM = "ablation"
