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
        from slimllm.pruning.config import parse_args

        run(parse_args(argv))

    return guarded("hf_prune.py", prune)


def run(config) -> None:
    """One run, as its settings say. Raises UserError for what the user can mend."""
    from slimllm import api
    from slimllm.data import calibration
    from slimllm.models import hub, loading
    from slimllm.models.shape import shape_of
    from slimllm.pruning.allocation.layer_ratios import without_scores
    from slimllm.reporting import tables
    from slimllm.utils.device import device_of, pruning_dtype
    from slimllm.utils.files import atomic_dir
    from slimllm.utils.memory import memory_errors

    with logging_to_console() as lines, memory_errors("use --device cpu, --eval_device cpu or --dtype bfloat16"):
        calibration.check_source(config.calibration)
        model_config = loading.load_config(config.base_model)
        shape = shape_of(model_config)
        plans = api.plans_of(config, shape)
        device, eval_device = device_of("device", config.device), device_of("eval_device", config.eval_device)
        dtype = pruning_dtype(config.dtype, device, loading.own_dtype(config.base_model, model_config))
        if config.dry_run:
            how = f"the plan of {config.plan}" if plans else "all layers taken to matter the same"
            log.info("%s", tables.dry_run(shape, plans or without_scores(shape, config, "uniform"), config, dtype, how))
            return
        if config.push_to_hub:
            hub.check_push(config.push_to_hub)
        target = OUTPUT / config.save_ckpt_log_name
        with atomic_dir(target, config.overwrite, "choose another --save_ckpt_log_name") as folder:
            lines.to_file(folder / "log.txt")
            record = _prune_into(folder, config, shape, eval_device, dtype)
        log.info("\n%s\n\neverything lies in %s/", tables.table([(config.save_ckpt_log_name, record)]), target)
        if config.push_to_hub:
            log.info("uploaded to %s", hub.push(target, config.push_to_hub, config.public))


def _prune_into(folder: Path, config, shape, eval_device, dtype):
    """The run itself; everything is written to ``folder``. Returns the PruningRecord."""
    from slimllm import api
    from slimllm.data import calibration, texts
    from slimllm.evaluation.perplexity import continuations, perplexity
    from slimllm.models import loading
    from slimllm.reporting import card, figures, record
    from slimllm.utils.device import evaluation_dtype, name_of

    timed = record.Stopwatch()
    log.info("%s", record.command())
    measured = texts.load_texts(config.eval_data)
    with timed("loading"):
        tokenizer = loading.load_tokenizer(config.base_model)
        blocks = [texts.blocks_of(text, tokenizer, config.max_seq_len, config.eval_limit) for text in measured]
        model = loading.load_model(config.base_model, dtype)
    size = model.num_parameters() / 1e6
    log.info("%s: %s, %d layers, %.1f M parameters, %s", config.base_model, model.config.model_type, shape.layers, size, dtype)
    with timed("calibration"):
        samples = api.calibrate(model, tokenizer, config, config.calibration, eval_device)
    samples.save(folder)
    log.info("calibration: %d samples of %d tokens, %s, sha256 %s", *samples.ids.shape, samples.source, samples.sha256[:12])

    def evaluate(model, stage: str) -> list[float]:
        if not blocks and not config.test_after_train:
            return []
        with timed("evaluation"), loading.placed_for_evaluation(model, eval_device):
            if config.test_after_train:
                for text in continuations(model, tokenizer, config.seed, config.temperature, config.top_p):
                    log.info("[%s] %s", stage, text)
            values = [perplexity(model, ids, f"{text.name} ({stage})") for text, ids in zip(measured, blocks)]
        for text, value in zip(measured, values):
            log.info("%s: %s perplexity %.3f", stage, text.name, value)
        return values

    dense = evaluate(model, "dense")
    result = _prune(model, tokenizer, samples, config, shape, timed)
    del model
    if config.save_model:
        with timed("saving"):
            api.write_checkpoint(result, folder)
        log.info("saved, loaded again and compared: the same logits")
    pruned = evaluate(result.model, "pruned")
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
    of_run.write(folder)
    figures.layer_figure(of_run, folder / "figures")
    if config.save_model:
        card.write(folder, of_run)
    return of_run


def _prune(model, tokenizer, samples, config, shape, timed):
    """Prunes ``model``, with a line and a step of the bar for each layer."""
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from slimllm import api
    from slimllm.reporting.tables import layer_line

    with logging_redirect_tqdm([log]), tqdm(total=shape.layers, unit="layer", disable=None) as bar:

        def progress(stage, done, total):
            bar.set_description(stage, refresh=False)
            bar.n, bar.total = done, total
            bar.refresh()

        def on_layer(layer):
            log.info("%s", layer_line(layer, shape))
            progress("pruning", layer.index + 1, shape.layers)

        return api.prune(model, tokenizer, calibration=samples, config=config, on_layer=on_layer, progress=progress, timed=timed)


if __name__ == "__main__":
    sys.exit(main())
