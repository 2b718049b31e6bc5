"""Each ingredient of the method off or changed in turn, at equal kept parameters: ``slimllm ablation --base_model M``."""

from __future__ import annotations

import logging
from pathlib import Path

from ..models import loading
from ..models.families import family_of
from ..reporting.figures import recovery_curves
from ..reporting.trial_tables import ablation_table
from ..settings.ablation import AblationConfig
from ..settings.methods import RECOVERIES
from ..settings.pruning import PruneConfig
from ..utils.files import write_text
from .trials import Trial, measure

log = logging.getLogger("slimllm")

# (ingredient, variant, the settings that make it). The first row is the paper's method, what each other row changes.
ROWS = (
    ("the paper's method", "", {}),
    ("head choice", "no greedy search", {"head_choice": "leave_one_out"}),
    ("head unit", "whole KV groups", {"head_unit": "group"}),
    ("channel score", "no eigenvalue weights", {"channel_score": "unweighted"}),
    ("channel score", "Wanda", {"channel_score": "wanda"}),
    ("channel score", "magnitude", {"channel_score": "magnitude"}),
    ("channel score", "random", {"channel_score": "random"}),
    ("channel score", "keep_lowest 0", {"keep_lowest": 0.0}),
    ("recovery", "none", {"recovery": "none"}),
    ("recovery", "bias", {"recovery": "bias"}),
    ("recovery", "least_squares", {"recovery": "least_squares"}),
    ("recovery", "rotation", {"recovery": "rotation"}),
    ("layer ratio", "alpha 5", {"alpha": 5.0}),
    ("layer ratio", "alpha 20", {"alpha": 20.0}),
    ("layer ratio", "uniform", {"layer_ratio": "uniform"}),
    ("layer ratio", "auto", {"layer_ratio": "auto"}),
    ("samples", "8", {"num_examples": 8}),
    ("samples", "128", {"num_examples": 128}),
    ("recovery and samples", "least_squares, 128", {"recovery": "least_squares", "num_examples": 128}),
    ("recovery and samples", "least_squares, 32, half own", {"recovery": "least_squares", "self_share": 0.5}),
    ("recovery and samples", "least_squares, 128, half own", {"recovery": "least_squares", "num_examples": 128, "self_share": 0.5}),
    ("the best recipe", "", {"recipe": "best"}),
)
MIXTURE_ROWS = (  # the same of a mixture of experts
    ("the paper's method", "", {}),
    ("expert score", "REAP", {"expert_score": "reap"}),
    ("expert score", "frequency", {"expert_score": "frequency"}),
    ("expert score", "random", {"expert_score": "random"}),
    ("recovery", "none", {"recovery": "none"}),
    ("recovery", "least_squares", {"recovery": "least_squares"}),
    *(
        (f"recovery least_squares, {what} go", variant, {"recovery": "least_squares", "num_examples": 192, "prune": prune, **change})
        for what, prune in (("experts", "experts"), ("channels", "channels"), ("both", "both"))
        for variant, change in (("192 samples", {}), ("192 samples, look_back 0.3", {"look_back": 0.3}))
    ),
    ("recovery none, channels go", "", {"recovery": "none", "prune": "channels"}),
    ("recovery none, both go", "", {"recovery": "none", "prune": "both"}),
)
CURVE = (0.2, 0.35, 0.5)  # shares removed at which every recovery is measured for the picture


def cases(shares: tuple, mixture: bool = False) -> list[Trial]:
    """Every pruning: the rows at each share, and the recoveries along CURVE."""
    rows = MIXTURE_ROWS if mixture else ROWS
    found = [Trial(ingredient, variant, share, change) for share in shares for ingredient, variant, change in rows]
    for share in CURVE:
        for name in RECOVERIES:
            same = name == PruneConfig(base_model="x").recovery
            if share not in shares:
                found.append(Trial("the paper's method" if same else "recovery", "" if same else name, share, {"recovery": name}))
    return found


def run(config: AblationConfig) -> None:
    """Measures, then writes and prints table and picture."""
    mixture = family_of(loading.load_config(config.base_model)).is_mixture
    rows = measure(config, cases(config.target_sparsity, mixture))["rows"]
    folder = Path(config.output)
    lines = ablation_table(rows, config.target_sparsity)
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    recovery_curves(rows, folder)
    log.info("\n%s\n\neverything lies in %s/", "\n".join(lines), folder)
