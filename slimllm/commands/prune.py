"""``slimllm prune`` and ``hf_prune.py``: settings -> prune -> save, evaluate, record."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import cli, forecast, stages
from ..data import calibration
from ..footprint import check_room, footprint, sizes_of
from ..models import hub, loading
from ..models.checked import warn_of_length
from ..pruning.allocation.inputs import Allocation
from ..reporting import record, tables
from ..reporting.summary import summary
from ..run import Run
from ..streaming import journal
from ..streaming.progress import bar_on_terminal
from ..streaming.sizes import Footprint
from ..utils import processes
from ..utils.device import pruning_dtype, saving_dtype
from ..utils.outputs import atomic_dir, complete

log = logging.getLogger("slimllm")


def run(config) -> None:
    """One run, as its settings say. Raises UserError for a mistake in them, or in what they name."""
    if not processes.is_first():
        log.setLevel(logging.ERROR)
    foreseen = foresee(config)
    work = foreseen.work
    check_room(foreseen.takes, work.run)
    if config.dry_run:
        stored = loading.stored_dtype(config.base_model, work.run.model_config)
        before = loading.bytes_on_disk(config.base_model, stored or work.run.dtype, work.run.shape)
        log.info("%s", tables.dry_run(work.run, foreseen.likely, foreseen.how, foreseen.takes, before, foreseen.seconds()))
    else:
        _prune(work, foreseen.takes)


@dataclass(frozen=True)
class Foreseen:
    """What a run is expected to do: its ``work``, the ``likely`` allocation and ``how`` that was found, the room that it ``takes``."""

    work: stages.Work
    likely: Allocation
    how: str
    takes: Footprint
    own: torch.dtype | None

    def seconds(self) -> dict[str, float]:
        """Of its stages, about; takes a second to measure the machine."""
        run = self.work.run
        return forecast.seconds(run, self.likely.plans, sizes_of(run, self.own, self.work.save_dtype))


def foresee(config) -> Foreseen:
    """From the settings and the model's config alone. Raises UserError for a mistake in them, or in what they name."""
    calibration.check_source(config.calibration)
    run = Run.of(config, loading.load_config(config.base_model))
    config = run.config
    warn_of_length(run.model_config, seq_len=config.seq_len, max_seq_len=config.max_seq_len)
    work = stages.Work(run, given=config.calibration, plans=stages.plans_of(run))
    own = loading.own_dtype(config.base_model, run.model_config)
    stored = loading.stored_dtype(config.base_model, run.model_config)
    run.dtype = pruning_dtype(config.dtype, run.device, own)
    work.save_dtype = saving_dtype(config.save_dtype, stored, run.dtype)
    likely, how = stages.likely_allocation(work)
    return Foreseen(work, likely, how, footprint(run, likely.plans, own, work.save_dtype), own)


def _prune(work, takes) -> None:
    """The run itself, in one process or in each of several; everything is written into a folder that appears when it is whole."""
    run, config = work.run, work.run.config
    if config.push_to_hub:
        config = run.config = config.having(push_to_hub=hub.check_push(config.push_to_hub))
    target = config.folder
    with processes.group(run.device):
        if not processes.is_first():
            with processes.other():
                _go_through(work, processes.from_first(None), takes)
            return
        rules = dict(resume=bool(config.resume), inputs=config.inputs(), transient=journal.NAME)
        if config.resume is not False:
            rules["worth_keeping"] = journal.Journal.worth_keeping
        with atomic_dir(target, config.overwrite, "choose another --output_dir or --save_ckpt_log_name", **rules) as folder:
            cli.log_to_file(folder / "log.txt")
            processes.from_first(lambda: folder)
            _go_through(work, folder, takes)
        if config.tmp_dir is not None:
            journal.clear_orphans(config.tmp_dir)
    with complete(f"everything lies in {target}/"):
        lines = summary(work.record, str(target), cli.program(), work.exports)
        log.info("%s\n\neverything lies in %s/", "\n".join(lines), target)
        if config.push_to_hub:
            log.info("uploaded to %s", hub.push(target, config.push_to_hub, config.public))


def _go_through(work, folder: Path, takes) -> None:
    """All stages, with a line and a step of the bar for each layer; what a stopped run left in ``folder`` is not done again."""
    run = work.run
    work.folder, work.predicted, run.journal = folder, takes, journal.Journal.of_run(folder, run.config.tmp_dir)
    log.debug("%s", record.command())
    with bar_on_terminal() as run.progress:

        def on_layer(layer):
            if layer.index == 0:
                log.info("%s", tables.LAYERS_HEADING)
            log.info("%s", tables.layer_line(layer, run.shape))
            run.progress("pruning", layer.index + 1, len(run.shape.layers))

        run.on_layer = on_layer
        stages.go_through(stages.ALL, work, log.info)
