"""Prunes a Llama-family model with SlimLLM: flags -> settings -> prune -> save, evaluate, record."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from slimllm.cli import guarded, logging_to_console

OUTPUT = Path("prune_log")
log = logging.getLogger("slimllm")


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""

    def prune():
        from slimllm.settings.pruning import parse_args

        run(parse_args(argv))

    return guarded("hf_prune.py", prune)


def run(config) -> None:
    """One run, as its settings say. Raises UserError for a mistake in them, or in what they name."""
    from slimllm import stages
    from slimllm.data import calibration
    from slimllm.footprint import check_room, footprint
    from slimllm.models import loading
    from slimllm.models.checked import warn_of_length
    from slimllm.reporting import tables
    from slimllm.run import Run
    from slimllm.utils.device import pruning_dtype, saving_dtype
    from slimllm.utils.memory import memory_errors

    with logging_to_console() as lines, memory_errors("use --device cpu, --eval_device cpu or --dtype bfloat16"):
        calibration.check_source(config.calibration)
        run = Run.of(config, loading.load_config(config.base_model))
        config = run.config
        warn_of_length(run.model_config, seq_len=config.seq_len, max_seq_len=config.max_seq_len)
        work = stages.Work(run, given=config.calibration, plans=stages.plans_of(run))
        own = loading.own_dtype(config.base_model, run.model_config)
        stored = loading.stored_dtype(config.base_model, run.model_config)
        run.dtype = pruning_dtype(config.dtype, run.device, own)
        work.save_dtype = saving_dtype(config.save_dtype, stored, run.dtype)
        likely, how = stages.likely_plans(work)
        takes = footprint(run, likely, own, work.save_dtype)
        check_room(takes, run)
        if config.dry_run:
            before = loading.bytes_on_disk(config.base_model, stored or run.dtype, run.shape)
            log.info("%s", tables.dry_run(run, likely, how, takes, before))
        else:
            _prune(work, takes, lines)


def _prune(work, takes, lines) -> None:
    """The run itself, in one process or in each of several; everything is written into a folder that appears when it is whole."""
    from slimllm.models import hub
    from slimllm.reporting import tables
    from slimllm.streaming import journal
    from slimllm.utils import processes
    from slimllm.utils.outputs import atomic_dir, complete

    run, config = work.run, work.run.config
    if config.push_to_hub:
        config = run.config = config.having(push_to_hub=hub.check_push(config.push_to_hub))
    target = OUTPUT / config.save_ckpt_log_name
    with processes.group(run.device):
        if not processes.is_first():
            log.setLevel(logging.ERROR)
            with processes.other():
                _go_through(work, processes.from_first(None), takes)
            return
        rules = dict(resume=bool(config.resume), inputs=config.inputs(), transient=journal.NAME)
        if config.resume is not False:
            rules["worth_keeping"] = journal.Journal.worth_keeping
        with atomic_dir(target, config.overwrite, "choose another --save_ckpt_log_name", **rules) as folder:
            lines.to_file(folder / "log.txt")
            processes.from_first(lambda: folder)
            _go_through(work, folder, takes)
        if config.tmp_dir is not None:
            journal.clear_orphans(config.tmp_dir)
    with complete(f"everything lies in {target}/"):
        shown = [tables.table([(config.save_ckpt_log_name, work.record)]), "", *filter(None, [tables.odd_widths(work.record.layers)])]
        log.info("\n%s\neverything lies in %s/", "\n".join(shown), target)
        if config.push_to_hub:
            log.info("uploaded to %s", hub.push(target, config.push_to_hub, config.public))


def _go_through(work, folder: Path, takes) -> None:
    """All stages, with a line and a step of the bar for each layer; what a stopped run left in ``folder`` is not done again."""
    from slimllm import stages
    from slimllm.reporting import record, tables
    from slimllm.streaming.journal import Journal
    from slimllm.streaming.progress import bar_on_terminal

    run, shape = work.run, work.run.shape
    work.folder, work.predicted, run.journal = folder, takes, Journal.of_run(folder, run.config.tmp_dir)
    log.info("%s", record.command())
    with bar_on_terminal(log) as run.progress:

        def on_layer(layer):
            log.info("%s", tables.layer_line(layer, shape))
            run.progress("pruning", layer.index + 1, len(shape.layers))

        run.on_layer = on_layer
        stages.go_through(stages.ALL, work)


if __name__ == "__main__":
    sys.exit(main())
