"""LoRA post-training of a pruned model: instruction data to token rows, and a training run with peft and the Trainer.

Settings, prompt and masking are those of the published recovery stage (LLM-Pruner's, which SlimLLM uses): low-rank
updates of all seven projections on Alpaca.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import cli, hub, record
from .cli import UserError, check_choices, check_range, flag, nearest
from .evaluation import evaluation_dtype

log = logging.getLogger("slimllm")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORED = -100  # the label of a token that is not learned
MAX_STEPS_BETWEEN_CHECKPOINTS = 200
WARMUP_STEPS = 100
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimllm"

# name -> (with an input, without one)
TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "alpaca_short": (
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
}


@dataclass
class TrainConfig:
    """Settings of a post-training run. Raises UserError where a value, or two together, make no sense."""

    prune_model: str = flag("model", "checkpoint to train: a folder that hf_prune.py wrote (a dense model works too) (required)")
    device: str = flag("model", "where to train; auto takes a GPU if there is one", "auto")

    data_path: str = flag("data", "hub name, or a .json or .jsonl file of instruction / input / output or of text", "yahma/alpaca-cleaned")
    cache_dataset: bool = flag("data", "keep the tokenized data in ~/.cache/slimllm and use it again", False)
    val_set_size: int = flag("data", "rows held out, for the validation loss [2000, at most a tenth of the rows]", type=int)
    extra_val_dataset: tuple = flag(
        "data",
        "texts whose perplexity is taken before and after: wikitext2, ptb, python_manual, NAME=FILE, FILE, or none "
        "[wikitext2 ptb; python_manual where the hub is out of reach]",
        nargs="+",
    )
    eval_limit: int = flag("data", "of these texts, only the first N blocks; the figures are marked as limited [all]", type=int)
    cutoff_len: int = flag("data", "tokens of a row; what is longer is cut", 256, type=int)
    prompt_template_name: str = flag("data", "how an instruction is put to the model", "alpaca", choices=tuple(TEMPLATES))
    no_instruction: bool = flag("data", "rows are plain text, not instructions", False)
    train_on_inputs: bool = flag("data", "learn the prompt too, not only the response", False)
    add_eos_token: bool = flag("data", "end each row with the end-of-text token", False)
    group_by_length: bool = flag("data", "batches of rows of similar length: less padding, a bumpier loss", False)

    batch_size: int = flag("training", "rows an optimizer step, over all processes", 64, type=int)
    micro_batch_size: int = flag("training", "rows a forward pass of one process", 4, type=int)
    num_epochs: float = flag("training", "passes over the data", 2.0, type=float)
    learning_rate: float = flag("training", "peak learning rate", 1e-4, type=float)
    seed: int = flag("training", "seed of the adapter, the held-out rows and their order", 42, type=int)

    lora_r: int = flag("lora", "rank", 8, type=int)
    lora_alpha: int = flag("lora", "the update is scaled by lora_alpha / lora_r", 16, type=int)
    lora_dropout: float = flag("lora", "dropout in front of the update, 0 to 1", 0.05, type=float)
    lora_target_modules: str = flag("lora", "projections that get an update, with commas", ",".join(PROJECTIONS))

    output_dir: str = flag("output", "folder for the adapter, record, log and loss curve [tune_log/NAME of the checkpoint]")
    merge: bool = flag("output", "also write OUTPUT_DIR/merged: the checkpoint with the update added to its weights", False)
    resume_from_checkpoint: str = flag("output", "a checkpoint-N folder of a stopped run, or last")
    overwrite: bool = flag("output", "replace what OUTPUT_DIR holds", False)
    wandb_project: str = flag("output", "send the losses to this Weights & Biases project; without it nothing is sent", "")

    def __post_init__(self):
        if not self.prune_model:
            raise UserError("--prune_model is required: a folder that hf_prune.py wrote")
        check_choices(self)
        for name in ("batch_size", "micro_batch_size", "lora_r", "lora_alpha", "eval_limit"):
            check_range(self, name, 1)
        check_range(self, "cutoff_len", 2)
        check_range(self, "val_set_size", 0)
        check_range(self, "num_epochs", 0, left_open=True)
        check_range(self, "learning_rate", 0, left_open=True)
        check_range(self, "lora_dropout", 0, 1, right_open=True)
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            raise UserError(f"--wandb_project {self.wandb_project}: wandb is not installed; pip install wandb")
        if self.overwrite and self.resume_from_checkpoint:
            raise UserError("--overwrite and --resume_from_checkpoint: a run either starts anew or continues")
        if self.batch_size % self.micro_batch_size:
            raise UserError(f"--batch_size {self.batch_size}: must be a multiple of --micro_batch_size {self.micro_batch_size}")
        if self.extra_val_dataset is not None:
            self.extra_val_dataset = tuple(name for item in self.extra_val_dataset for name in item.split(",") if name)
        if self.output_dir is None:
            self.output_dir = str(Path("tune_log") / Path(self.prune_model).name)

    @property
    def target_modules(self) -> list[str]:
        return [name for name in self.lora_target_modules.split(",") if name]

    def to_dict(self) -> dict:
        return asdict(self)


def parse_args(argv=None) -> TrainConfig:
    """Flags of ``post_training.py``. Raises UserError."""
    return cli.parse(build_parser(), TrainConfig, argv)


def build_parser():
    return cli.build_parser(
        TrainConfig,
        prog="post_training.py",
        usage="python post_training.py --prune_model prune_log/NAME [flags]",
        description="Recovers a pruned model with LoRA on instruction data; the defaults are the paper's run.",
    )


def check_targets(model, names: list[str]) -> None:
    """Raises UserError for a --lora_target_modules name that no Linear of the model has."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    for name in names:
        if name not in linear:
            raise UserError(f"--lora_target_modules {name}: the model has {', '.join(sorted(linear))}{nearest(name, linear)}")
    if not names:
        raise UserError("--lora_target_modules is empty")


def read_rows(config: TrainConfig) -> list[dict]:
    """Rows of the training data: {"instruction", "input", "output"} or {"text"}. Raises UserError naming file and row."""
    path = Path(config.data_path)
    if path.suffix in (".json", ".jsonl"):
        where = f"--data_path {path}"
        try:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
        except FileNotFoundError:
            raise UserError(f"{where}: no such file") from None
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{where}: not {path.suffix[1:].upper()} ({error})") from None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{where}: not a list of rows, or an empty one")
    elif path.exists() or config.data_path.startswith((".", "/", "~")):
        raise UserError(f"--data_path {path}: not a .json or .jsonl file, or not there")
    else:
        where = f"--data_path {config.data_path}"
        try:
            rows = list(hub.rows(config.data_path, split="train"))
        except OSError as error:
            raise UserError(f"{where}: {error}; name a local .json or .jsonl file") from None
    wanted = ("text",) if config.no_instruction or (isinstance(rows[0], dict) and "text" in rows[0]) else ("instruction", "output")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in wanted):
            raise UserError(f"{where}, row {number}: without {' and '.join(wanted)}")
    return rows


def tokenize(row: dict, tokenizer, config: TrainConfig) -> dict:
    """{"input_ids", "labels"} of one row; labels are IGNORED over the prompt unless it is to be learned."""
    if "text" in row and (config.no_instruction or "output" not in row):
        prompt, text = "", row["text"]
    else:
        with_input, without = TEMPLATES[config.prompt_template_name]
        prompt = (with_input if row.get("input") else without).format(instruction=row["instruction"], input=row.get("input"))
        text = prompt + row["output"]
    ids = tokenizer(text, truncation=True, max_length=config.cutoff_len, verbose=False).input_ids
    if config.add_eos_token and len(ids) < config.cutoff_len and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    labels = list(ids)
    if prompt and not config.train_on_inputs:
        hidden = min(len(tokenizer(prompt, verbose=False).input_ids), len(ids))
        labels[:hidden] = [IGNORED] * hidden
    return {"input_ids": ids, "labels": labels}


def load_data(config: TrainConfig, tokenizer) -> tuple[list[dict], list[dict], str]:
    """(training rows, held-out rows, SHA-256 of the tokens). Rows with nothing to learn in them are left out."""
    settings = {
        key: getattr(config, key) for key in ("cutoff_len", "prompt_template_name", "no_instruction", "train_on_inputs", "add_eos_token")
    }
    key = hashlib.sha256(json.dumps([config.data_path, settings, tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()
    cached = CACHE / f"tokenized-{key}.json"
    if config.cache_dataset and cached.is_file() and not _newer(config.data_path, cached):
        data = json.loads(cached.read_text())
    else:
        rows = read_rows(config)
        data = [tokenize(row, tokenizer, config) for row in tqdm(rows, desc="tokenizing", leave=False, disable=None)]
        kept = [row for row in data if any(label != IGNORED for label in row["labels"][1:])]
        if len(kept) < len(data):
            log.info(
                "%d of %d rows have no token to learn within --cutoff_len %d and are left out",
                len(data) - len(kept),
                len(data),
                config.cutoff_len,
            )
        data = kept
        if config.cache_dataset:
            record.write(cached, json.dumps(data))
    held_out = min(2000, len(data) // 10) if config.val_set_size is None else config.val_set_size
    if held_out >= len(data):
        raise UserError(f"--val_set_size {held_out}: the data has {len(data)} usable rows, none would be left to train on")
    random.Random(config.seed).shuffle(data)
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    return data[held_out:], data[:held_out], digest


def _newer(path: str, than: Path) -> bool:
    return os.path.exists(path) and os.path.getmtime(path) > than.stat().st_mtime


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest: input_ids, labels (IGNORED there) and attention_mask [rows, length]."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(lists, value):
        return torch.tensor([items + [value] * (length - len(items)) for items in lists])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def training_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """bfloat16 where the device computes in it, else float16 on a GPU and the model's own on a CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return evaluation_dtype(own, device)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint-N in ``folder`` that was written to its end (its trainer_state.json comes last)."""
    found = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except ValueError:
        return False


def trainer_for(model, train: list[dict], held_out: list[dict], config: TrainConfig, arguments):
    """A Trainer with LoRA on ``model`` and a bar; ``arguments`` as from :func:`training_arguments`."""
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, ProgressCallback, Trainer

    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 asks for it under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, lora)
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out or None,
        data_collator=collate,
        callbacks=[_watch(config)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def training_arguments(config: TrainConfig, device: torch.device, dtype: torch.dtype, rows: int, validate: bool):
    """transformers' TrainingArguments; at the same time joins the process group where torchrun or accelerate started us."""
    from transformers import TrainingArguments

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
    return TrainingArguments(
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
        disable_tqdm=True,
        report_to=["wandb"] if config.wandb_project else [],
    )


def _watch(config: TrainConfig):
    """A callback: one bar for the run, a line at each validation, and a stop where the loss is lost."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        bar, first = None, None

        def on_train_begin(self, args, state, control, **kwargs):
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self.first = losses[0] if losses else None
            if state.is_world_process_zero:
                self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None)

        def on_step_end(self, args, state, control, **kwargs):
            if self.bar is not None:
                self.bar.update()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.first = logs["loss"] if self.first is None else self.first
                lost = not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0))
                if lost or logs["loss"] > 2 * self.first:
                    what = "not finite" if lost else f"{logs['loss']:.2f}, twice the first one"
                    good = last_checkpoint(Path(args.output_dir))
                    kept = f"; the last good checkpoint is {good}" if good else ""
                    raise UserError(
                        f"step {state.global_step}: the loss is {what}; lower --learning_rate ({config.learning_rate:g}) "
                        f"or raise --batch_size ({config.batch_size}){kept}"
                    )
                if self.bar is not None:
                    self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            if "eval_loss" in logs and state.is_world_process_zero:
                log.info("step %d of %d: validation loss %.4f", state.global_step, state.max_steps, logs["eval_loss"])

        def on_train_end(self, args, state, control, **kwargs):
            if self.bar is not None:
                self.bar.close()

    return Watch()


@torch.no_grad()
def merged(model, adapter: str | os.PathLike, ids: torch.Tensor):
    """``model`` with the adapter's update added to its weights.

    Its logits on ``ids`` [samples, length] are compared with those of model and adapter side by side.
    Raises RuntimeError where they differ by more than rounding.
    """
    from peft import PeftModel

    both = PeftModel.from_pretrained(model, adapter).eval()
    expected = both(input_ids=ids, use_cache=False).logits.float()
    model = both.merge_and_unload()
    difference = float((expected - model(ids, use_cache=False).logits.float()).abs().max())
    if not difference <= (1e-4 if model.dtype == torch.float32 else 5e-2) * float(expected.abs().max()):
        raise RuntimeError(f"the merged model is not the model and its adapter: logits differ by {difference:.3g}")
    return model
