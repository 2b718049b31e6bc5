"""Settings of ``slimllm report``."""

from __future__ import annotations

from dataclasses import dataclass

from ..cli import flag
from ..errors import UserError


@dataclass
class ReportConfig:
    """Settings of a report. Raises UserError where nothing is named."""

    records: tuple[str, ...] = flag(
        "records",
        "folders of pruning runs (prune_log/NAME), a row each; or results (eval_log/*.json), for the paper's table",
        (),
        positional=True,
        nargs="*",
    )
    output: str | None = flag("records", "of results: a folder for table.md, table.tex and table.json")

    def __post_init__(self):
        if not self.records:
            raise UserError("name records: slimllm report prune_log/NAME ...")
