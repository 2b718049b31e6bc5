"""Prunes a Llama-family model with SlimLLM: flags -> settings -> pipeline -> save, evaluate, record."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

from slimllm.cli import device_of, guarded, logging_to_console, memory_errors

OUTPUT = Path("prune_log")
log = logging.getLogger("slimllm")


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""

    def prune():
        from slimllm.config import parse_args

        run(parse_args(argv))

    return guarded("hf_prune.py", prune)


def run(config) -> None:
    """One run, as its settings say. Raises UserError for what the user can mend."""
    from slimllm import allocation, calibration, checkpoint, families, hub, report

    with logging_to_console() as lines, memory_errors("use --device cpu, --eval_device cpu or --dtype bfloat16"):
        calibration.check_source(config.calibration)
        model_config = families.load_config(config.base_model)
        shape = families.shape_of(model_config, families.family_of(model_config))
        config.resolve(shape)
        device, eval_device = device_of("device", config.device), device_of("eval_device", config.eval_device)
        dtype = families.pruning_dtype(config.dtype, device, model_config)
        if config.dry_run:
            uniform = dataclasses.replace(config, layer_ratio="uniform")
            plans = allocation.plan(shape, [0.0] * shape.layers, uniform)
            log.info("%s", report.dry_run(shape, plans, uniform, dtype))
            return
        allocation.plan(shape, [0.0] * shape.layers, config)  # a budget that cannot be met fails before anything is read
        if config.push_to_hub:
            hub.check_push(config.push_to_hub)
        target = OUTPUT / config.save_ckpt_log_name
        with checkpoint.staged(target, config.overwrite, "choose another --save_ckpt_log_name") as folder:
            lines.to_file(folder / "log.txt")
            result = _prune_into(folder, config, shape, device, eval_device, dtype)
        log.info("\n%s\n\neverything lies in %s/", report.table([(config.save_ckpt_log_name, result)]), target)
        if config.push_to_hub:
            log.info("uploaded to %s", hub.push(target, config.push_to_hub))


def _prune_into(folder: Path, config, shape, device, eval_device, dtype) -> dict:
    """The run itself; everything is written to ``folder``. Returns the record."""
    from slimllm import calibration, card, checkpoint, evaluation, families, record, report

    timed = record.Stopwatch()
    log.info("%s", record.command())
    texts = evaluation.load_texts(config.eval_data)
    with timed("loading"):
        tokenizer = families.load_tokenizer(config.base_model)
        blocks = [evaluation.blocks_of(text, tokenizer, config.max_seq_len, config.eval_limit) for text in texts]
        model = families.load_model(config.base_model, dtype)
    size, family = model.num_parameters(), model.config.model_type
    log.info("%s: %s, %d layers, %.1f M parameters, %s", config.base_model, family, shape.layers, size / 1e6, dtype)
    with timed("calibration"):
        samples = calibration.load(config, model, tokenizer)
        if config.layer_ratio == "auto" and samples.held_back is None:
            with evaluation.evaluating(model, eval_device):
                samples.held_back = calibration.held_back(model, tokenizer, config)
    samples.save(folder)
    log.info("calibration: %d samples of %d tokens, %s, sha256 %s", *samples.ids.shape, samples.source, samples.sha256[:12])

    def evaluate(stage: str) -> list[float]:
        with timed("evaluation"), evaluation.evaluating(model, eval_device):
            if config.test_after_train:
                for text in evaluation.continuations(model, tokenizer, config):
                    log.info("[%s] %s", stage, text)
            values = [evaluation.perplexity(model, ids, f"{text.name} ({stage})") for text, ids in zip(texts, blocks)]
        for text, value in zip(texts, values):
            log.info("%s: %s perplexity %.3f", stage, text.name, value)
        return values

    dense = evaluate("dense")
    with timed("pruning"):
        layers = _prune(model, samples, config, device, shape)
    checkpoint.in_runtime_form(model, config.runtime)
    if config.save_model:
        with timed("saving"):
            checkpoint.save(model, tokenizer, folder, samples.ids[:2, :64], config.base_model)
            model = checkpoint.reload_and_compare(model, folder)
        log.info("saved, loaded again and compared: the same logits")
    pruned = evaluate("pruned")
    eval_dtype = record.name_of(evaluation.evaluation_dtype(dtype, eval_device))
    result = {
        **record.of_run(config),
        "model": {
            "name": Path(config.base_model).name,
            "type": family,
            **card.origin_of(config.base_model),
            "dtype": record.name_of(dtype),
            "device": str(device),
            "shape": dataclasses.asdict(shape),
        },
        "calibration": samples.to_dict(),
        "parameters": record.parameters(size, model.num_parameters(), shape.decoder_parameters),
        "evaluation": [
            text.figure(
                ids,
                config.eval_limit,
                dtype=eval_dtype,
                calibration_overlap=calibration.overlap(samples.ids, ids.flatten()),
                dense=before,
                pruned=after,
            )
            for text, ids, before, after in zip(texts, blocks, dense, pruned)
        ],
        "seconds": timed.seconds,
        "peak_memory": record.peak_memory(),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    (folder / "pruning.json").write_text(record.dumps(result), encoding="utf-8")
    report.figures(result, folder / "figures")
    if config.save_model:
        card.write(folder, result)
    return result


def _prune(model, samples, config, device, shape) -> list:
    """Prunes ``model`` with a line and a step of the bar for each layer."""
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from slimllm import pipeline, report

    with logging_redirect_tqdm([log]), tqdm(total=shape.layers, desc="pruning", unit="layer", disable=None) as bar:

        def on_layer(layer):
            log.info("%s", report.layer_line(layer, shape))
            bar.update()

        return pipeline.prune(model, samples.ids, config, device, on_layer, samples.held_back)


if __name__ == "__main__":
    sys.exit(main())
