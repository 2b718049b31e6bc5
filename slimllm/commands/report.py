"""``python -m slimllm report``: tables from the records of runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ..cli import flag
from ..errors import UserError
from ..reporting import paper_table, record, tables

log = logging.getLogger("slimllm")


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
            raise UserError("name records: python -m slimllm report prune_log/NAME ...")


def run(config: ReportConfig) -> None:
    """Prints one table. Raises UserError for what is no record."""
    try:
        if all(path.endswith(".json") for path in config.records):
            results = [record.read_json(path) for path in config.records]
            if any("fingerprint" not in result for result in results):
                raise ValueError("not results of python -m slimllm evaluate")
            log.info("%s", "\n".join(paper_table.paper_table(results)))
            if config.output:
                paper_table.write_paper_table(results, Path(config.output))
        else:
            log.info("%s", tables.table([(Path(folder).name, record.PruningRecord.read(folder)) for folder in config.records]))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
