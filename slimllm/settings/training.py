"""Every setting of a post-training run, and its command line."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

from ..cli import check_choices, check_range, check_types, flag, given, without_effect
from ..errors import UserError
from .common import short_name

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

    prune_model: str | None = flag(
        "model", "checkpoint to train: a folder that hf_prune.py wrote (a dense model works too) (required)", leading=True, often=True
    )
    device: str = flag("model", "where to train; auto takes a GPU if there is one", "auto")

    teacher: str | None = flag(
        "teacher",
        "dense model to learn from: the divergence of its next-token distribution from the trained one's joins the loss; "
        "it has the same tokens, or those and others, and is the one that was pruned or a larger one",
    )
    instruction_weight: float = flag("teacher", "with --teacher: weight of the ordinary loss beside its own; 0: its own alone", 1.0)
    tmp_dir: str | None = flag("teacher", "folder for the teacher's states that do not fit in memory [TMPDIR, or the system's]")

    data_path: str = flag(
        "data",
        "hub name, or a .json or .jsonl file of instruction / input / output, of text, of messages or of ShareGPT conversations",
        "yahma/alpaca-cleaned",
        often=True,
    )
    cache_dataset: bool = flag("data", "keep the tokenized data in ~/.cache/slimllm and use it again", False)
    val_set_size: int | None = flag("data", "rows held out, for the validation loss [2000, at most a tenth of the rows]")
    extra_val_dataset: tuple[str, ...] | None = flag(
        "data",
        "texts whose perplexity is taken before and after: wikitext2, ptb, c4, python_manual, NAME=FILE, FILE, or none "
        "[wikitext2 ptb; python_manual where the hub is out of reach]",
    )
    eval_limit: int | None = flag("data", "of these texts, only the first N blocks; the figures are marked as limited [all]")
    cutoff_len: int = flag("data", "tokens per row; what is longer is cut", 256)
    prompt_template_name: str = flag("data", "how an instruction is put to the model", "alpaca", choices=TEMPLATES)
    no_instruction: bool = flag("data", "rows are plain text, not instructions", False)
    train_on_inputs: bool = flag("data", "learn the prompt too, not only the response", False)
    add_eos_token: bool = flag("data", "end each row with the end-of-text token, so that the model learns to stop", True, negatable=True)
    group_by_length: bool = flag("data", "batches of rows of similar length: less padding, a bumpier loss", False)

    batch_size: int = flag("training", "rows per optimizer step, over all processes", 64)
    micro_batch_size: int = flag("training", "rows per forward pass of one process", 4)
    num_epochs: float = flag("training", "passes over the data", 2.0)
    learning_rate: float = flag("training", "peak learning rate", 1e-4)
    seed: int = flag("training", "seed of the adapter, the held-out rows and their order", 42)

    lora_r: int = flag("lora", "rank", 8)
    lora_alpha: int = flag("lora", "the update is scaled by lora_alpha / lora_r", 16)
    lora_dropout: float = flag("lora", "dropout in front of the update, 0 to 1", 0.05)
    lora_target_modules: str | None = flag("lora", "projections that get an update, with commas [all of attention and feed-forward part]")

    output_dir: str | None = flag(
        "output", "folder for the adapter, record, log and loss curve [tune_log/NAME of the checkpoint]", often=True
    )
    merge: bool = flag("output", "also write OUTPUT_DIR/merged: the checkpoint with the update added to its weights", False, often=True)
    resume_from_checkpoint: str | None = flag("output", "a checkpoint-N folder of a stopped run, or last")
    overwrite: bool = flag("output", "replace what OUTPUT_DIR holds", False)
    wandb_project: str = flag("output", "send the losses to this Weights & Biases project; without it nothing is sent", "")

    def __post_init__(self):
        check_types(self)
        if not self.prune_model:
            raise UserError("--prune_model is required: a folder that hf_prune.py wrote")
        check_choices(self)
        for name in ("batch_size", "micro_batch_size", "lora_r", "lora_alpha", "eval_limit"):
            check_range(self, name, 1)
        check_range(self, "cutoff_len", 2)
        check_range(self, "val_set_size", 0)
        check_range(self, "seed", 0, 2**32 - 1)  # numpy takes no other
        check_range(self, "instruction_weight", 0)
        if self.teacher is None and self.instruction_weight != 1.0:
            raise UserError(f"--instruction_weight {self.instruction_weight:g}: weighs the loss against that of a --teacher; name one")
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
            self.output_dir = str(Path("tune_log") / short_name(self.prune_model))

    def remarks(self) -> list[str]:
        """A line for each setting that was given and changes nothing."""
        because = [
            (self.teacher is None, ("tmp_dir",), "only a --teacher has states to keep there"),
            (self.no_instruction, ("prompt_template_name", "train_on_inputs"), "with --no_instruction rows have no prompt"),
            (self.extra_val_dataset == ("none",), ("eval_limit",), "no text is measured on"),
        ]
        return without_effect(given(self), because)

    def models(self) -> list[tuple[str, str]]:
        """The models that a run reads, and the options that name them."""
        return [(name, option) for name, option in ((self.prune_model, "--prune_model"), (self.teacher, "--teacher")) if name]

    def inputs(self) -> list[str | None]:
        """The files and folders that a run reads, where these are no names on the hub."""
        texts = [item.rpartition("=")[2] for item in self.extra_val_dataset or ()]
        return [self.prune_model, self.teacher, self.data_path, self.tmp_dir, self.resume_from_checkpoint, *texts]

    def to_dict(self) -> dict:
        return asdict(self)
