"""``slimllm report``: tables from the records of runs."""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import UserError
from ..reporting import paper_table, record, tables
from ..settings.report import ReportConfig

log = logging.getLogger("slimllm")


def run(config: ReportConfig) -> None:
    """Prints one table. Raises UserError for what is no record."""
    try:
        if all(path.endswith(".json") for path in config.records):
            results = [record.read_json(path) for path in config.records]
            if any("fingerprint" not in result for result in results):
                raise ValueError("not results of slimllm evaluate")
            log.info("%s", "\n".join(paper_table.paper_table(results)))
            if config.output:
                paper_table.write_paper_table(results, Path(config.output))
        else:
            log.info("%s", tables.table([(Path(folder).name, record.PruningRecord.read(folder)) for folder in config.records]))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
