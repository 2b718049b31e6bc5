"""Prunes a Llama-family model with SlimLLM: flags -> settings -> prune -> save, evaluate, record."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from contextlib import contextmanager
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
    """One run, as its settings say. Raises UserError for what the user can mend."""
    from slimllm import api
    from slimllm.data import calibration
    from slimllm.models import hub, loading
    from slimllm.models.checked import warn_of_length
    from slimllm.models.shape import shape_of
    from slimllm.pruning.allocation.layer_ratios import without_scores
    from slimllm.pruning.footprint import check_room, footprint, sizes_of
    from slimllm.reporting import tables
    from slimllm.streaming import journal
    from slimllm.utils import processes
    from slimllm.utils.device import device_of, pruning_dtype, saving_dtype
    from slimllm.utils.memory import memory_errors
    from slimllm.utils.outputs import atomic_dir, complete

    with logging_to_console() as lines, memory_errors("use --device cpu, --eval_device cpu or --dtype bfloat16"):
        calibration.check_source(config.calibration)
        model_config = loading.load_config(config.base_model)
        shape = shape_of(model_config)
        config = config.resolved(shape)
        warn_of_length(model_config, seq_len=config.seq_len, max_seq_len=config.max_seq_len)
        plans = api.plans_of(config, shape)
        device, eval_device = device_of("device", config.device), device_of("eval_device", config.eval_device)
        own = loading.own_dtype(config.base_model, model_config)
        dtype = pruning_dtype(config.dtype, device, own)
        stored = loading.stored_dtype(config.base_model, model_config)
        saved = saving_dtype(config.save_dtype, stored, dtype)
        likely = plans or without_scores(shape, config)
        takes = footprint(shape, likely, config, sizes_of(config, own, dtype, device, eval_device, saved))
        check_room(takes, config.tmp_dir, device)
        if config.dry_run:
            how = f"the plan of {config.plan}" if plans else "all layers taken to matter the same"
            log.info(
                "%s",
                tables.dry_run(shape, likely, config, dtype, how, takes, loading.bytes_on_disk(config.base_model, stored or dtype, shape)),
            )
            return
        if config.push_to_hub:
            config = config.having(push_to_hub=hub.check_push(config.push_to_hub))
        target = OUTPUT / config.save_ckpt_log_name
        with processes.group(device):
            if not processes.is_first():
                log.setLevel(logging.ERROR)
                with processes.other():
                    _prune_into(processes.from_first(None), config, model_config, eval_device, dtype, saved, takes)
                return
            way = "choose another --save_ckpt_log_name"
            rules = dict(resume=bool(config.resume), inputs=config.inputs(), transient=journal.NAME)
            if config.resume is not False:
                rules["worth_keeping"] = journal.Journal.worth_keeping
            with atomic_dir(target, config.overwrite, way, **rules) as folder:
                lines.to_file(folder / "log.txt")
                processes.from_first(lambda: folder)
                record = _prune_into(folder, config, model_config, eval_device, dtype, saved, takes)
            if config.tmp_dir is not None:
                journal.clear_orphans(config.tmp_dir)
        with complete(f"everything lies in {target}/"):
            lines = [tables.table([(config.save_ckpt_log_name, record)]), "", *filter(None, [tables.odd_widths(record.layers)])]
            log.info("\n%s\neverything lies in %s/", "\n".join(lines), target)
            if config.push_to_hub:
                log.info("uploaded to %s", hub.push(target, config.push_to_hub, config.public))


def _prune_into(folder: Path, config, model_config, eval_device, dtype, saved, takes):
    """The run itself, computed in ``dtype`` and saved in ``saved``, and expected to take ``takes``. Everything is written to ``folder``,
    and what a stopped run left there is not done again.

    Returns the PruningRecord, in the first of several processes.
    """
    from slimllm import api
    from slimllm.data import calibration, texts
    from slimllm.deploy.checkpoint import write_tokenizer
    from slimllm.deploy.sink import CheckpointSink
    from slimllm.deploy.weight_files import weight_bytes
    from slimllm.models import loading
    from slimllm.reporting import card, figures, record
    from slimllm.streaming.journal import Journal
    from slimllm.utils import processes
    from slimllm.utils.device import device_of, evaluation_dtype, name_of

    timed, journal = record.Stopwatch(), Journal.of_run(folder, config.tmp_dir)
    log.info("%s", record.command())
    measured = texts.load_texts(config.eval_data)
    written = config.save_model or measured or config.test_after_train or config.distill != "none"
    checkpoint = folder if config.save_model else journal.folder / "checkpoint"
    with timed("loading"):
        tokenizer = loading.load_tokenizer(config.base_model)
        if written and processes.is_first():
            checkpoint.mkdir(exist_ok=True)
            write_tokenizer(tokenizer, checkpoint, config.base_model, model_config)
        blocks = [texts.blocks_of(text, tokenizer, model_config, config.max_seq_len, config.eval_limit) for text in measured]
        source = loading.open_source(config.base_model, dtype, config=model_config)
    size = source.model.num_parameters() / 1e6
    log.info("%s: %s, %d layers, %.1f M parameters, %s", config.base_model, model_config.model_type, len(source), size, dtype)
    processes.from_first(lambda: journal.check(record.identity(config, source.weights.files, measured, (config.calibration, config.plan))))
    with timed("calibration"):
        calibrate = functools.partial(api.calibrate, source, tokenizer, config, config.calibration, eval_device)
        samples = processes.from_first(lambda: _calibrated(folder, journal, calibrate))
    own = f" and {samples.own} of the model's own" if samples.own and samples.source != "self" else ""
    log.info("calibration: %d samples of %d tokens, %s%s, sha256 %s", *samples.ids.shape, samples.source, own, samples.sha256[:12])

    def evaluate(source, stage: str) -> list[float]:
        values = journal.get(stage)
        if values is None:
            with timed("evaluation"):
                values = _evaluate(source, stage, tokenizer, measured, blocks, config, eval_device)
            journal.put(stage, values)
        for text, value in zip(measured, values):
            log.info("%s: %s perplexity %.3f", stage, text.name, value)
        return values

    dense = evaluate(source, "dense")
    sink = None
    if written and processes.is_first():
        sink = CheckpointSink(checkpoint, source, config, samples.ids[:2, :64], device_of("device", config.device), saved)
    teacher = None
    if journal.get("distillation") is None:
        with _progress(len(source)) as progress:
            teacher = api.teach(source, samples, config, progress, timed)
    result = _prune(source, tokenizer, samples, config, timed, sink, None if config.resume is False else journal)
    pruned = []
    if written:
        with timed("saving"):
            if sink:
                sink.finish(compare=journal.get("distillation") is None)
            processes.wait()
        if config.distill != "none":
            result.distillation = _distil(checkpoint, dtype, saved, teacher, config, timed, sink, journal)
        if config.save_model:
            log.info("saved, loaded again and compared: the same logits")
        pruned = evaluate(loading.open_source(str(checkpoint), dtype, "DIR"), "pruned")
    if not processes.is_first():
        return None
    eval_dtype = name_of(evaluation_dtype(dtype, eval_device))
    of_run = result.record(
        text.figure(
            ids,
            config.eval_limit,
            dtype=eval_dtype,
            calibration_overlap=calibration.overlap(samples.ids, ids.flatten()),
            dense=before,
            pruned=after,
        )
        for text, ids, before, after in zip(measured, blocks, dense, pruned)
    )
    of_run.predicted_memory = {"cpu_bytes": takes.host, "gpu_bytes": takes.device}
    if written:
        of_run.bytes = {"dense": sum(path.stat().st_size for path in source.weights.files), "pruned": weight_bytes(checkpoint)}
    of_run.write(folder)
    figures.layer_figure(of_run, folder / "figures")
    if config.save_model:
        card.write(folder, of_run)
    return of_run


def _calibrated(folder: Path, journal, calibrate):
    """The calibration samples: made, or as a stopped run left them."""
    from slimllm.data.calibration import Calibration

    known = journal.get("calibration")
    if known is None:
        samples = calibrate()
        samples.save(folder)
        journal.put("calibration", samples.to_dict())
        return samples
    return Calibration.read(folder, known)


def _evaluate(source, stage: str, tokenizer, measured, blocks, config, device) -> list[float]:
    """Prints the continuations of ``source`` that were asked for, and measures its perplexity on each text."""
    from slimllm.evaluation.perplexity import continuations, perplexities
    from slimllm.models.loading import Voice
    from slimllm.utils import processes
    from slimllm.utils.device import evaluation_dtype

    if config.test_after_train and processes.is_first():
        with Voice(source, device) as voice:
            for text in continuations(voice.whole(), tokenizer, config.seed, config.temperature, config.top_p):
                log.info("[%s] %s", stage, text)
    if not blocks:
        return []
    names = [f"{text.name} ({stage})" for text in measured]
    with _progress(len(source)) as progress:
        return perplexities(source, blocks, names, device, evaluation_dtype(source.dtype, device), progress, config.tmp_dir)


def _prune(source, tokenizer, samples, config, timed, sink, journal):
    """Prunes ``source``, with a line and a step of the bar for each layer."""
    from slimllm import api
    from slimllm.models.shape import shape_of
    from slimllm.reporting.tables import layer_line

    shape = shape_of(source.config)
    with _progress(shape.layers) as progress:

        def on_layer(layer):
            log.info("%s", layer_line(layer, shape))
            progress("pruning", layer.index + 1, shape.layers)

        return api.prune(
            source,
            tokenizer,
            calibration=samples,
            config=config,
            on_layer=on_layer,
            progress=progress,
            timed=timed,
            sink=sink,
            journal=journal,
        )


def _distil(checkpoint: Path, dtype, saved, teacher, config, timed, sink, journal):
    """Distils the model in ``checkpoint`` and writes it there, or takes what a stopped run came to. Returns the Distillation."""
    from safetensors.torch import load_file, save_file

    from slimllm import api
    from slimllm.models import loading
    from slimllm.training.distillation import Distillation, trained_names
    from slimllm.utils import processes
    from slimllm.utils.files import atomic_file

    student = loading.load_model(str(checkpoint), dtype, "DIR")
    names, weights = trained_names(student, config.distill), journal.folder / "distilled.safetensors"
    known = journal.get("distillation")
    if known is not None:
        student.load_state_dict(load_file(weights), strict=False)
        found = Distillation(**known)
    else:
        with _progress(0) as progress:
            found = api.distil(student, teacher, config, progress, timed, saved)
        teacher.close()
        if processes.is_first():
            with atomic_file(weights) as partial:
                save_file({name: student.get_parameter(name).data.contiguous() for name in names}, partial)
            journal.put("distillation", dataclasses.asdict(found))
    with timed("saving"):
        if sink:
            sink.replace(student, names)
        processes.wait()
    return found


@contextmanager
def _progress(total: int):
    """A bar over the layers, or what else is counted, as a function of (what is being done, how many of it are done, of how many)."""
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from slimllm.utils import processes

    silent = None if processes.is_first() else True  # None: where there is no terminal
    with logging_redirect_tqdm([log]), tqdm(total=total, disable=silent, leave=False) as bar:

        def progress(stage, done, total):
            bar.set_description(stage, refresh=False)
            bar.n, bar.total = done, total
            bar.refresh()

        yield progress


if __name__ == "__main__":
    sys.exit(main())
