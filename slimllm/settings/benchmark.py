"""Settings of ``slimllm benchmark``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_choice, check_range, flag
from .methods import RECIPES

STREAMS = ("7b", "70b_layer")


@dataclass
class BenchmarkConfig:
    """Settings of a benchmark. Raises UserError where a value makes no sense."""

    base_model: str | None = flag(
        "cases", "the small Llama model, multi-head or grouped-query; without it only the single layer is measured"
    )
    skip_layer: bool = flag("cases", "leave the layer of LLaMA-7B's shape out", False)
    stream: tuple[str, ...] = flag(
        "cases", "cases of streaming, with hf_prune.py in a process of its own: 7b (13.5 GB on disk), 70b_layer (2.3 GB)", (), nargs="+"
    )
    recipe: tuple[str, ...] = flag("cases", "recipes that these are pruned with", tuple(RECIPES), nargs="+")
    work_dir: str | None = flag("cases", "folder for these cases' models and results, removed afterwards [TMPDIR, or the system's]")
    repeats: int = flag("measurement", "runs of the package in each case", 3)
    plain_repeats: int = flag("measurement", "runs of the plain transcription of the large layer; the small model has --repeats", 1)
    json: str | None = flag("output", "write the measurements to this file as well")

    def __post_init__(self):
        for case in self.stream:
            check_choice("stream", case, STREAMS)
        for recipe in self.recipe:
            check_choice("recipe", recipe, RECIPES)
        check_range(self, "repeats", 1)
        check_range(self, "plain_repeats", 1)
