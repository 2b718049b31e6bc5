"""A LoRA run with peft and transformers' Trainer on a pruned (or dense) model."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import UserError, nearest
from ..models import loading
from ..models.families import family_of
from ..models.source import all_finite
from ..models.vocabulary import trimmed_source
from ..settings.training import TrainConfig
from ..streaming.divergence import Divergence
from .data import IGNORED, collate
from .teacher import Teacher

log = logging.getLogger("slimllm")

ADAPTER = "adapter_model.safetensors"
MAX_STEPS_BETWEEN_CHECKPOINTS = 200
WARMUP_STEPS = 100
MAX_SKIPPED_STEPS = 20  # in float16, while the loss scale is looked for


def target_modules(model, config: TrainConfig) -> list[str]:
    """The projections that get an update: those that ``--lora_target_modules`` names, or all of the family's.

    Raises UserError for a name that no Linear of a layer has.
    """
    family = family_of(model.config)
    if config.lora_target_modules is None:
        return list(family.projections)
    names = [name for name in config.lora_target_modules.split(",") if name]
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {family.head}
    for name in names:
        if name not in linear:
            raise UserError(f"--lora_target_modules {name}: the model has {', '.join(sorted(linear))}{nearest(name, linear)}")
    if not names:
        raise UserError("--lora_target_modules is empty")
    return names


def last_checkpoint(folder: Path, processes: int | None = 1) -> Path | None:
    """The newest checkpoint-N in ``folder`` without a :func:`fault_of` it; with ``processes`` None the newest of any kind."""
    checkpoints = [
        path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if path.parent.name.rpartition("-")[2].isdecimal()
    ]
    checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in checkpoints if processes is None or fault_of(path, processes) is None), None)


def fault_of(checkpoint: Path, processes: int = 1) -> str | None:
    """Why a run of so many processes cannot go on from a checkpoint-N folder, naming the file; None where it can."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        best, _ = state["best_model_checkpoint"], state["global_step"]
    except (OSError, ValueError, LookupError, TypeError):
        return f"{checkpoint / 'trainer_state.json'} is broken"
    ranks = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    scaler = ["scaler.pt"] if (checkpoint / "scaler.pt").exists() else []  # float16's
    for name in ("optimizer.pt", "scheduler.pt", *scaler, *ranks):
        if not (checkpoint / name).is_file():
            other = ", as after a run of another number of processes" if name in ranks else ""
            return f"{checkpoint / name} is missing{other}"
        if not _is_whole(checkpoint / name):
            return f"{checkpoint / name} is broken"
    for folder in dict.fromkeys([checkpoint, Path(best)] if best and Path(best).is_dir() else [checkpoint]):
        try:
            tensors = load_file(folder / ADAPTER)
        except (OSError, SafetensorError):
            return f"{folder / ADAPTER} is missing or broken"
        if not all(map(all_finite, tensors.values())):
            return f"{folder / ADAPTER} holds numbers that are not finite"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file of torch.save, which is a zip archive, was written to its end and reads as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def teacher_of(config: TrainConfig, tokenizer, model_config, rows: list[list[int]], device: torch.device) -> Teacher:
    """The ``--teacher`` of these rows; of a model that has some of its tokens only, what it predicts among these.

    Raises UserError for one that has not all the tokens of the model that is trained.
    """
    source = loading.open_source(config.teacher, "auto", "--teacher")
    theirs, own = (each.get_vocab() for each in (loading.load_tokenizer(config.teacher, "--teacher"), tokenizer))
    if theirs != own or source.config.vocab_size != model_config.vocab_size:
        kept = [theirs.get(text) for text in sorted(own, key=own.get)]
        if None in kept or len(kept) != model_config.vocab_size:
            raise UserError(
                f"--teacher {config.teacher}: its vocabulary is not that of {config.prune_model}; name the model it was pruned from"
            )
        source = trimmed_source(source, kept)
        log.info("%s: of its %d tokens it predicts the %d that the model has", config.teacher, len(theirs), len(kept))
    log.info("%s: computing what it predicts on %d rows", config.teacher, len(rows))
    return Teacher(source, rows, device, tmp_dir=config.tmp_dir)


class TaughtTrainer(Trainer):
    """A Trainer whose loss is the divergence of a teacher's next-token distribution, plus ``weight`` times the ordinary one.

    Rows have a number, ``row``, by which the ``teacher`` (Teacher) finds them. Both are taken over the tokens that are learned.
    Beside ``eval_loss``, the sum of the two, the log gets ``eval_text_loss``, the ordinary one alone.
    """

    def __init__(self, teacher: Teacher, weight: float, **kwargs):
        super().__init__(**kwargs)
        self.teacher, self.weight = teacher, weight
        self._text_loss = [0.0, 0]  # of the rows that are held out: its sum over them, and their number

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of :func:`collate`, or with ``return_outputs`` (loss, outputs), divided as Trainer divides its own."""
        rows = inputs.pop("row")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        learned = inputs["labels"][:, 1:] != IGNORED
        divergence = loss.new_zeros(())
        for row, mask, logits in zip(rows.tolist(), learned, outputs.logits[:, :-1]):
            log_p = self.teacher.log_probabilities(row)[:-1].to(logits.device)
            mask = mask[: len(log_p)]
            log_p = log_p[mask]
            divergence = divergence + Divergence.apply(logits[: len(mask)][mask].float(), log_p, log_p.exp())
        if num_items_in_batch is None:
            divergence = divergence / learned.sum()
        else:
            divergence = divergence / num_items_in_batch
            if self.args.average_tokens_across_devices:
                divergence = divergence * self.accelerator.num_processes
        if not model.training:
            self._text_loss[0] += float(loss) * len(rows)
            self._text_loss[1] += len(rows)
        loss = divergence + self.weight * loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """As Trainer's; the entry of an evaluation gets ``eval_text_loss`` as well."""
        if "eval_loss" in logs:  # every process comes here
            total, rows = self.accelerator.reduce(torch.tensor(self._text_loss, device=self.args.device)).tolist()
            logs["eval_text_loss"], self._text_loss = total / rows, [0.0, 0]
        super().log(logs, *args, **kwargs)


def trainer_for(model, train, held_out, config: TrainConfig, arguments: TrainingArguments, teacher: Teacher | None = None) -> Trainer:
    """A Trainer with LoRA on ``model``; rows as from :func:`load_data`, ``arguments`` as from :func:`training_arguments`.

    With a ``teacher``, of the training rows and then of those held out, its divergence is part of the loss.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(model, config),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with _without_peft_warnings():
        adapted = get_peft_model(model, lora)
    make = Trainer
    if teacher is not None:
        make = functools.partial(TaughtTrainer, teacher, config.instruction_weight)
        train = train.add_column("row", range(len(train)))
        held_out = held_out.add_column("row", range(len(train), len(train) + len(held_out)))
    trainer = make(
        model=adapted,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out if len(held_out) else None,
        data_collator=collate,
        callbacks=[Watch(config)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if sys.stderr.isatty():
        trainer.add_callback(LossBar)
    return trainer


@contextmanager
def _without_peft_warnings():
    """Hides a warning: peft 0.21 reads a property of transformers by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def training_arguments(config: TrainConfig, device: torch.device, dtype: torch.dtype, rows: int, validate: bool) -> TrainingArguments:
    """transformers' TrainingArguments; at the same time joins the process group where torchrun or accelerate started us.

    Without such a launcher the run stays on ``device``, however many GPUs there are.
    """
    if config.wandb_project:
        os.environ["WANDB_PROJECT"] = config.wandb_project
    processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = config.batch_size // config.micro_batch_size
    if accumulation % processes:
        raise UserError(
            f"--batch_size {config.batch_size}: {processes} processes of --micro_batch_size {config.micro_batch_size} do not divide it"
        )
    steps = math.ceil(math.ceil(rows / config.batch_size) * config.num_epochs)
    between = max(1, min(MAX_STEPS_BETWEEN_CHECKPOINTS, steps // 5))
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation // processes,
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        warmup_steps=min(WARMUP_STEPS, steps // 10),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validate else "no",
        eval_on_start=validate and not config.resume_from_checkpoint,
        eval_steps=between,
        save_steps=between,
        save_total_limit=2,
        load_best_model_at_end=validate,
        prediction_loss_only=True,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        report_to=["wandb"] if config.wandb_project else [],
    )
    if processes == 1:
        stay_on(arguments, device)
    return arguments


def stay_on(arguments: TrainingArguments, device: torch.device) -> None:
    """Keeps the Trainer on one device: by itself it takes the first GPU and spreads each batch over all of them (DataParallel)."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
        arguments._n_gpu = 1
        arguments.__dict__["_setup_devices"] = device  # the cached value that arguments.device gives


class LossBar(ProgressCallback):
    """transformers' bar, with the loss beside it in place of a line per step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the newest loss."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


class Watch(TrainerCallback):
    """Logs a line at each validation, and stops a run whose loss is not finite, or twice the first one."""

    def __init__(self, config: TrainConfig):
        self.config, self.first, self.skipped = config, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Where a run is resumed, its first loss is that of the stopped one."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.first = losses[0] if losses else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Raises UserError for a loss at which the run must stop; logs that of a validation."""
        if "loss" in logs:
            self.check(args, state.global_step, logs["loss"], logs.get("grad_norm", 0.0))
        if "eval_loss" in logs and state.is_world_process_zero:
            log.info("step %d of %d: validation loss %.4f", state.global_step, state.max_steps, logs["eval_loss"])

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Raises UserError where the last step left weights that are not finite."""
        if not all(all_finite(parameter) for parameter in model.parameters() if parameter.requires_grad):
            self.check(args, state.global_step, math.nan, 0.0)  # no loss is computed after the last step

    def check(self, args, step: int, loss: float, grad_norm: float) -> None:
        """Raises UserError for a loss or gradient that is not finite, and for a loss of twice the first."""
        overflow = math.isfinite(loss) and not math.isfinite(grad_norm)
        self.skipped = self.skipped + 1 if overflow else 0
        if overflow and args.fp16 and self.skipped <= MAX_SKIPPED_STEPS:
            return  # the loss scale is too large yet: the step is skipped and the scale halved
        lost = overflow or not math.isfinite(loss)
        self.first = loss if self.first is None else self.first
        if lost or loss > 2 * self.first:
            what = "not finite" if lost else f"{loss:.2f}, twice the first one"
            good = last_checkpoint(Path(args.output_dir), args.world_size)
            kept = f"; the last good checkpoint is {good}" if good else ""
            raise UserError(
                f"step {step}: the loss is {what}; lower --learning_rate ({self.config.learning_rate:g}) "
                f"or raise --batch_size ({self.config.batch_size}){kept}"
            )


@torch.no_grad()
def merged(model, adapter: str | os.PathLike, ids: torch.Tensor):
    """``model`` with the adapter's update added to its weights, in place.

    Its logits on ``ids`` [samples, length] are compared with those of model and adapter side by side.
    Raises RuntimeError where they differ by more than rounding.
    """
    from peft import PeftModel

    with _without_peft_warnings():
        both = PeftModel.from_pretrained(model, adapter).eval()
    expected = both(input_ids=ids, use_cache=False).logits.float()
    model = both.merge_and_unload()
    difference = float((expected - model(ids, use_cache=False).logits.float()).abs().max())
    if not difference <= (1e-4 if model.dtype == torch.float32 else 5e-2) * float(expected.abs().max()):
        raise RuntimeError(f"the merged model is not the model and its adapter: logits differ by {difference:.3g}")
    return model
