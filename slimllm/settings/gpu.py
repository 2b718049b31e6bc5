"""Settings of ``slimllm gpu``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import check_choice, check_range, flag

SIZES = ("full", "tiny")


@dataclass
class GpuConfig:
    """Settings of the check. Raises UserError where a value makes no sense."""

    device: str = flag("check", "what is checked against the CPU; auto takes a GPU if there is one", "auto")
    size: str = flag("check", "full, or tiny: models of a few thousand parameters, to rehearse it", "full", choices=SIZES)
    minutes: float = flag("check", "a step that would begin later than this is left out, and one that is running then is stopped", 8.0)
    work_dir: str | None = flag("check", "folder for models and results, 35 GB, removed afterwards [TMPDIR, or the system's]")
    output: str = flag("output", "file for the results", "eval_log/gpu.json")

    def __post_init__(self):
        check_choice("size", self.size, SIZES)
        check_range(self, "minutes", 0, left_open=True)
