"""``slimllm train`` and ``post_training.py``: settings -> data -> training -> adapter, merged model, record."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import cli
from ..data.texts import blocks_of, load_texts
from ..deploy import checkpoint
from ..deploy.reference import reload_and_compare
from ..errors import UserError, first_line
from ..evaluation.perplexity import of_loss, perplexity
from ..models import loading
from ..models.checked import warn_of_length
from ..reporting import card
from ..reporting import record as records
from ..reporting.figures import loss_curve
from ..reporting.record import PruningRecord, TrainingRecord
from ..reporting.tables import aligned, limits_line
from ..streaming.journal import check_same
from ..training import trainer as training
from ..training.data import load_data
from ..utils.clock import Stopwatch
from ..utils.device import device_of, name_of, training_dtype
from ..utils.files import writing
from ..utils.memory import peak_memory, return_free_memory
from ..utils.outputs import atomic_dir, check_kind, check_target, read_seal, seal, taken

PARTS, FILES = ("adapter", "merged"), ("post_training.json", "figures/loss.png")  # what is written into the output folder, beside the log
WAY = "choose another --output_dir"
MEASURED_ON = ("data", "sha256", "seq_len", "blocks")  # what tells one figure of a record from another
log = logging.getLogger("slimllm")


def run(config) -> None:
    """One run, as its settings say, on one process or on each of several. Raises UserError for a mistake in them, or in what they name."""
    output = Path(config.output_dir)
    with _held(output), writing(output):
        record, ids = _train(config, output)
        if record is None:
            return  # not the first of several processes
        if config.merge:
            return_free_memory()  # the model that was trained is gone by now; the merged one is read anew
            _write_merged(output, config, record, ids)
        _finish(output, record)


@contextmanager
def _held(output: Path):
    """Holds the name of the output folder while the block runs; the first of several processes holds it for all."""
    if int(os.environ.get("RANK", 0)):
        yield
        return
    check_kind(output, WAY)
    with taken(output, WAY):
        yield


def _train(config, output: Path):
    """The run up to the adapter. Returns (TrainingRecord, token ids [1, length] of a row), or (None, None) but for the first process."""

    device = device_of("device", config.device)
    model_config = loading.load_config(config.prune_model, "--prune_model")
    warn_of_length(model_config, cutoff_len=config.cutoff_len)
    if config.merge:
        _pruning_record(config)
    resume = _resume_point(config, output)
    timed = Stopwatch()
    tokenizer = loading.load_tokenizer(config.prune_model, "--prune_model")
    train, held_out, digest = load_data(config, tokenizer, model_config.vocab_size)
    dtype = training_dtype(device, model_config.dtype or torch.float32)
    arguments = training.training_arguments(config, device, dtype, len(train), bool(len(held_out)))
    main_process = arguments.process_index == 0
    texts = load_texts(config.extra_val_dataset, "--extra_val_dataset")
    blocks = [blocks_of(text, tokenizer, model_config, 128, config.eval_limit) for text in texts]
    identity = _identity(config, digest, arguments.world_size)
    if resume and main_process:
        if before := (read_seal(resume.parent) or {}).get("identity"):
            check_same(before, identity, "--resume_from_checkpoint")
        else:
            log.warning("%s: nothing there says of which run it is, so its data and model could not be compared", resume)
    with timed("loading"):
        model = loading.load_model(config.prune_model, dtype, "--prune_model")
    training.target_modules(model, config)
    if main_process:
        if config.overwrite and output.exists():  # not before everything that can be wrong was read
            check_target(output, True, WAY, config.inputs())
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        seal(output, FILES, PARTS, identity=identity)  # from now on it is known for this program's
        cli.log_to_file(output / "log.txt")
    else:
        log.setLevel(logging.ERROR)
    for line in (records.command(), *config.remarks()):
        log.info("%s", line)
    teacher = None
    if config.teacher is not None:
        with timed("teacher"):
            teacher = training.teacher_of(config, tokenizer, model.config, [*train["input_ids"], *held_out["input_ids"]], device)
    trainer = training.trainer_for(model, train, held_out, config, arguments, teacher)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s: %.2f M of %.1f M parameters are trained", config.prune_model, trained / 1e6, model.num_parameters() / 1e6)
    log.info("%s: %d rows, %d held out; %s on %s", config.data_path, len(train), len(held_out), name_of(dtype), arguments.device)

    def perplexities(stage: str) -> list[float]:
        if not main_process:
            return []
        with timed("evaluation"):
            model.eval()
            values = [perplexity(model, ids, f"{text.name} ({stage})") for text, ids in zip(texts, blocks)]
        for text, value in zip(texts, values):
            log.info("%s: %s perplexity %.3f", stage, text.name, value)
        return values

    with trainer.model.disable_adapter():
        before = perplexities("before")
    with timed("training"):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    after = perplexities("after")
    if not main_process:
        return None, None
    with atomic_dir(output / "adapter", overwrite=True) as folder:
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    log.info("adapter: %s", output / "adapter")
    record = TrainingRecord(
        config=config.to_dict(),
        data={"name": config.data_path, "rows": len(train), "held_out": len(held_out), "sha256": digest},
        parameters={"trained": trained, "model": model.num_parameters() - trained},
        dtype=name_of(dtype),
        processes=arguments.world_size,
        evaluation=[text.figure(ids, config.eval_limit, before=b, after=a) for text, ids, b, a in zip(texts, blocks, before, after)],
        **losses_of(trainer.state.log_history),
        seconds=timed.seconds,
    )
    trainer.accelerator.free_memory()
    return record, torch.tensor([train[0]["input_ids"][:64]])


def _identity(config, digest: str, processes: int) -> dict:
    """All that a run's results follow from; ``digest``: of the training data's tokens."""
    models = [loading.open_source(name, "auto", option) for name, option in config.models()]
    files = [path for model in models for path in model.weights.files]
    return records.identity(config, files, []) | {"the training data": digest, records.PROCESSES: processes}


def _resume_point(config, output: Path) -> Path | None:
    """The checkpoint to go on from. Raises UserError where there is none, or where a new run would mix with, or destroy, something."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    first, filled = not int(os.environ.get("RANK", 0)), output.exists() and any(output.iterdir())
    if config.resume_from_checkpoint == "last":
        point = training.last_checkpoint(output, processes)
        if point is None:
            newest = training.last_checkpoint(output, None)
            why = f" that is whole ({training.fault_of(newest, processes)})" if newest else ""
            raise UserError(f"--resume_from_checkpoint last: {output} holds no finished checkpoint{why}; start anew, without the flag")
    elif config.resume_from_checkpoint:
        point = Path(config.resume_from_checkpoint)
        if not (point / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {point}: not a finished checkpoint folder (checkpoint-N) or last")
        if fault := training.fault_of(point, processes):
            raise UserError(f"--resume_from_checkpoint {point}: {fault}; go on from an earlier checkpoint, or start anew")
    else:
        if first and config.overwrite:
            check_target(output, True, WAY, config.inputs())
        elif first and filled:
            way = "go on with --resume_from_checkpoint last, " if training.last_checkpoint(output, processes) else ""
            raise UserError(f"--output_dir {output}: not empty; {way}choose another, or replace it with --overwrite")
        return None
    if first and filled:
        if read_seal(output) is None:  # the Trainer removes older checkpoints of the folder as it writes new ones
            raise UserError(f"--output_dir {output}: not empty, and no run of this program wrote it; {WAY}")
        for part in PARTS:
            check_target(output / part, True, WAY, config.inputs())
    return point


def losses_of(log_history: list[dict]) -> dict:
    """The losses of each step, and the perplexity of the held-out rows before training and where it was best."""
    history = [entry for entry in log_history if "loss" in entry or "eval_loss" in entry]
    validation = [entry for entry in history if "eval_loss" in entry]
    if not validation:
        return {"validation": None, "history": history}
    # the text's own loss, where a teacher's divergence is part of the one that is trained on
    before, after = (entry.get("eval_text_loss", entry["eval_loss"]) for entry in (validation[0], min(validation, key=_eval_loss)))
    return {"validation": {"before": of_loss(before), "after": of_loss(after)}, "history": history}


def _eval_loss(entry: dict) -> float:
    return entry["eval_loss"]


def _write_merged(output: Path, config, record, ids) -> None:
    """OUTPUT_DIR/merged: the checkpoint with the adapter's update added to its weights, its record and its card."""
    with atomic_dir(output / "merged", overwrite=True) as folder:
        model = training.merged(loading.load_model(config.prune_model, "auto", "--prune_model"), output / "adapter", ids)
        checkpoint.save(model, loading.load_tokenizer(config.prune_model, "--prune_model"), folder, ids, config.prune_model)
        reload_and_compare(folder, model.dtype)
        _describe_merged(folder, output.name, config, record)
    log.info("merged model: %s (the same logits as model and adapter)", output / "merged")


def _describe_merged(folder: Path, name: str, config, training) -> None:
    """Record and card of the merged model: those of the pruned one, and what the training made of it."""
    run = _pruning_record(config)
    if run is None:
        return  # a dense model
    run.post_training = {"command": training.command, "config": training.config, "data": training.data}
    run.config["save_ckpt_log_name"] = name
    after = {tuple(f[key] for key in MEASURED_ON): f["after"] for f in training.evaluation}
    for figure in run.evaluation:
        if (key := tuple(figure[name] for name in MEASURED_ON)) in after:
            figure["tuned"] = after[key]
    run.write(folder)
    card.write(folder, run)


def _pruning_record(config):
    """The PruningRecord of the checkpoint that is trained; None for a dense model. Raises UserError where it is broken."""
    path = Path(config.prune_model) / PruningRecord.FILE
    if not path.is_file():
        return None
    try:
        run = PruningRecord.read(config.prune_model)
        for figure in run.evaluation:
            tuple(figure[name] for name in (*MEASURED_ON, "split", "limited", "dense", "pruned"))
        dict(run.config), run.calibration["source"], run.layers[0]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: broken ({type(error).__name__}: {first_line(error)}), and --merge takes the card's figures from it; "
            "copy it again, or remove it"
        ) from None
    return run


def _finish(output: Path, record) -> None:
    """Picture, table and, last, the record."""
    record.peak_memory = peak_memory()
    record.write(output)
    loss_curve(record, output / "figures")
    seal(output, FILES, PARTS, identity=(read_seal(output) or {}).get("identity"))
    rows = [["text", "before", "after"]]
    for f in record.evaluation:
        rows.append([f["data"], *(f"{f[when]:.2f}{'*' if f['limited'] else ''}" for when in ("before", "after"))])
    if record.validation:
        rows.append(["held-out rows", *(f"{record.validation[when]:.2f}" for when in ("before", "after"))])
    lines = [*aligned(rows), *limits_line(record.evaluation)]
    log.info("\nperplexity\n%s\n\neverything lies in %s/", "\n".join(lines), output)
