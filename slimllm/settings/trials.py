"""Settings that programs of many prunings have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_choices, check_range, drop_repeats, flag
from ..errors import UserError
from .common import DTYPES, short_name


@dataclass
class TrialsConfig:
    """Settings that all trials share. Raises UserError where a value makes no sense."""

    base_model: str | None = flag("model", "local folder, hub name or .gguf file (required)", leading=True)
    dtype: str = flag("model", "dtype of weights and compute: float32 on a CPU, the checkpoint's own on a GPU", "auto", choices=DTYPES)
    device: str = flag("model", "where layers and perplexity are computed; auto takes a GPU if there is one", "auto")
    target_sparsity: tuple[float, ...] = flag("sparsity", "shares of the decoder's parameters to remove, 0 to 1", (0.2, 0.5))
    calibration: str | None = flag(
        "calibration", "as for hf_prune.py: a name, file or folder [bookcorpus; self where the hub is out of reach]"
    )
    seed: int = flag("calibration", "seed of the calibration samples", 42)
    eval_data: tuple[str, ...] | None = flag(
        "evaluation",
        "any of wikitext2, ptb, c4, python_manual, NAME=FILE, FILE [wikitext2 ptb; python_manual where the hub is out of reach]",
    )
    eval_limit: int | None = flag("evaluation", "only the first N blocks of 128 tokens; the figures are marked as limited [all]")
    output: str | None = flag("output", "folder for what comes of it [eval_log/PROGRAM_NAME of the model]")
    overwrite: bool = flag("output", "start anew", False)

    PROGRAM = "trials"

    def __post_init__(self):
        if not self.base_model:
            raise UserError("--base_model is required: a local folder, hub name or .gguf file")
        check_choices(self)
        drop_repeats(self, "target_sparsity")
        check_range(self, "eval_limit", 1)
        for share in self.target_sparsity:
            if not 0 < share < 1:
                raise UserError(f"--target_sparsity {share}: must be above 0 and below 1")
        if self.output is None:
            self.output = f"eval_log/{self.PROGRAM}_{short_name(self.base_model)}"
