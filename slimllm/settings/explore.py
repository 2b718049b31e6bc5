"""Settings of ``slimllm explore``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import drop_repeats, flag
from ..errors import UserError
from ..models.shape import RUNTIMES
from .methods import PRICES, RECIPES
from .pruning import HEAD_UNITS, PARTS, VOCABULARIES, PruneConfig
from .trials import TrialsConfig

PRICED = tuple(name for name, recipe in RECIPES.items() if recipe.settings.get("layer_ratio") == "auto")
SHARES = tuple(round(0.05 * step, 2) for step in range(1, 15))


@dataclass
class ExploreConfig(TrialsConfig):
    """Settings of an exploration. Raises UserError where a value makes no sense."""

    base_model: str | None = flag("model", "local folder, hub name or .gguf file (required)", positional=True, nargs="?")
    target_sparsity: tuple[float, ...] = flag("sparsity", "shares of the decoder's parameters to look at, 0 to 1", SHARES)
    check: tuple[float, ...] = flag("sparsity", "shares to prune for good, in memory, and to measure the perplexity of", (), nargs="+")
    recipe: str = flag("sparsity", "the recipe that is planned for", "best", choices=PRICED)
    prune: str | None = flag("sparsity", "as for hf_prune.py: attention heads, feed-forward channels, or both [both]", choices=PARTS[:3])
    head_unit: str = flag("sparsity", "as for hf_prune.py", "query", choices=HEAD_UNITS)
    runtime: str = flag("sparsity", "as for hf_prune.py: what has to run the pruned model", "any", choices=RUNTIMES)
    round_to: int | None = flag("sparsity", "as for hf_prune.py: keep channels in multiples of this")
    prices: str = flag("sparsity", "as for hf_prune.py: how the price list is measured", "gradient", choices=PRICES)
    price_list: str | None = flag("sparsity", "take the prices from this file; nothing is measured then")
    vocab: str = flag(
        "vocabulary", "auto: what each size would cost with fewer tokens too; keep: layers alone", "keep", choices=VOCABULARIES
    )
    vocab_text: tuple[str, ...] | None = flag("vocabulary", "as for hf_prune.py: text of the kind that the model is for")
    vocab_scripts: tuple[str, ...] | None = flag("vocabulary", "as for hf_prune.py: scripts that stay")
    num_examples: int | None = flag("calibration", "as for hf_prune.py: calibration samples")

    PROGRAM = "explore"

    def __post_init__(self):
        super().__post_init__()
        drop_repeats(self, "check")
        for share in self.check:
            if not 0 < share < 1:
                raise UserError(f"--check {share}: must be above 0 and below 1")
        if self.vocab == "keep" and (self.vocab_text or self.vocab_scripts):
            raise UserError("--vocab_text and --vocab_scripts say which tokens stay: add --vocab auto, or leave them out")
        self.pruning(0.1)

    def pruning(self, share: float, **others) -> PruneConfig:
        """The settings of a pruning by this share. Raises UserError where they make no sense."""
        return PruneConfig(base_model=self.base_model, target_sparsity=share, **self.settings, **others)

    def with_tokens(self, smaller: float) -> PruneConfig:
        """The settings of a pruning that makes the whole model smaller by this share, of its vocabulary too."""
        tokens = {name: getattr(self, name) for name in ("vocab", "vocab_text", "vocab_scripts")}
        return PruneConfig(base_model=self.base_model, smaller=smaller, **self.settings, **tokens)

    @property
    def settings(self) -> dict:
        """What this program and a pruning have in common."""
        names = ("recipe", "prune", "head_unit", "runtime", "round_to", "prices", "price_list", "num_examples", "calibration", "seed")
        return {name: getattr(self, name) for name in (*names, "dtype", "device")}
