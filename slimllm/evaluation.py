"""Perplexity as published (rows joined with two newlines, tokenized once, cut into blocks, every block counted), and
``python -m slimllm.evaluation MODEL``: perplexity and the paper's zero-shot tasks of a checkpoint, kept in one JSON file.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import pydoc_data.topics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import cli, families, hub, record, report, zero_shot
from .calibration import read_text
from .cli import UserError, check_choices, check_range, flag, nearest
from .config import DTYPES, EVAL_NAMES, PruneConfig
from .record import return_free_memory
from .runner import LOGIT_ROWS

log = logging.getLogger("slimllm")

HUB_TEXTS = {
    "wikitext2": dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test", column="text"),
    "ptb": dict(path="ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split="validation", column="sentence"),
}
TOKENS_PER_BATCH = 1024


@dataclass
class EvalText:
    """A text to measure on: ``name`` for people, ``text`` as it is tokenized, ``split`` and SHA-256 for the record."""

    name: str
    text: str
    split: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def figure(self, blocks: torch.Tensor, limit: int | None, **values) -> dict:
        """What a record says of perplexities measured on these ``blocks`` [blocks, seq_len] of the text, ``values`` among it."""
        of = {"data": self.name, "split": self.split, "sha256": self.sha256}
        return {**of, "seq_len": blocks.shape[1], "blocks": len(blocks), "limited": limit is not None, **values}


def wikitext_rows(raw: str) -> list[str]:
    """The hub's rows of a wiki.test.raw file: a blank line is an empty row, any other keeps its newline."""
    return [line + "\n" if line.strip() else "" for line in raw.split("\n")[: -1 if raw.endswith("\n") else None]]


def ptb_rows(raw: str) -> list[str]:
    """The hub's rows of a ptb.valid.txt file: its sentences without surrounding blanks."""
    return [line.strip() for line in raw.splitlines() if line.strip()]


def _file_text(name: str | None, path: Path, flag: str) -> EvalText:
    raw = read_text(path)
    if not raw.strip():
        raise UserError(f"{flag} {path}: the file is empty")
    if name == "wikitext2" or (name is None and path.name.startswith("wiki.")):
        return EvalText("wikitext2", "\n\n".join(wikitext_rows(raw)), path.name)
    if name == "ptb" or (name is None and path.name.startswith("ptb.")):
        return EvalText("ptb", "\n\n".join(ptb_rows(raw)), path.name)
    return EvalText(name or path.stem, raw, path.name)


def _python_manual() -> EvalText:
    topics = pydoc_data.topics.topics
    return EvalText(
        "python_manual", "\n\n".join(topics[key] for key in sorted(topics)), f"pydoc_data.topics of Python {platform.python_version()}"
    )


def _hub_text(name: str) -> EvalText:
    source = dict(HUB_TEXTS[name])
    split, column = source["split"], source.pop("column")
    return EvalText(name, "\n\n".join(hub.rows(source.pop("path"), column, **source)), split)


def load_texts(eval_data: tuple | None, flag: str = "--eval_data") -> list[EvalText]:
    """The texts that ``--eval_data`` (or another ``flag``) names. Raises UserError for one that cannot be had.

    Nothing named: wikitext2 and ptb from the hub or, where it cannot be reached, the Python manual that comes with the
    interpreter (pydoc_data.topics).
    """
    if eval_data is None:
        try:
            return [_hub_text(name) for name in HUB_TEXTS]
        except OSError as error:
            log.info("evaluation: %s; using the text of the Python manual instead (%s python_manual)", error, flag)
            return [_python_manual()]
    if "none" in eval_data:
        return []
    return [_named_text(item, flag) for item in eval_data]


def _named_text(item: str, flag: str) -> EvalText:
    if item == "python_manual":
        return _python_manual()
    if item in HUB_TEXTS:
        try:
            return _hub_text(item)
        except OSError as error:
            raise UserError(f"{flag} {item}: {error}; give a local file as {item}=FILE") from None
    name, _, path = item.rpartition("=")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {item}: no such file, and not one of {', '.join(EVAL_NAMES)}{nearest(item, EVAL_NAMES)}")
    return _file_text(name or None, Path(path), flag)


def blocks_of(text: EvalText, tokenizer, seq_len: int, limit: int | None = None) -> torch.Tensor:
    """Token ids [blocks, seq_len] of the text tokenized once; what does not fill a last block is dropped."""
    ids = torch.tensor(tokenizer(text.text, verbose=False).input_ids, dtype=torch.long)
    blocks = len(ids) // seq_len
    if not blocks:
        raise UserError(f"{text.name}: {len(ids)} tokens do not fill one block of {seq_len} tokens")
    return ids[: blocks * seq_len].view(blocks, seq_len)[:limit]


def evaluation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 for a float32 model on a CPU with fast bfloat16 matrix products, else the model's own."""
    if device.type == "cpu" and dtype == torch.float32:
        flags = torch.cpu.get_capabilities()
        if flags.get("amx_bf16") or flags.get("avx512_bf16"):
            return torch.bfloat16
    return dtype


@contextmanager
def evaluating(model, device: torch.device):
    """The model with its weights on ``device`` in the dtype that evaluation uses; afterwards they are as before.

    Only parameters are cast: position frequencies stay float32, as from_pretrained leaves them.
    """
    dtype = evaluation_dtype(model.dtype, device)
    originals = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device=device, dtype=dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device=device)
        yield model
    finally:
        for tensor, data in originals:
            tensor.data = data
        return_free_memory()


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor, description: str = "perplexity") -> float:
    """exp(mean negative log-likelihood) over the tokens that the model predicts: all but the first of each block.

    ``blocks`` [blocks, seq_len] token ids; the losses are taken in float32 and added in float64.
    Raises UserError if the model's loss is not finite.
    """
    total = 0.0
    batch = max(1, TOKENS_PER_BATCH // blocks.shape[1])
    for ids in tqdm(blocks.split(batch), desc=description, leave=False, disable=None):
        ids = ids.to(model.device)
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        for rows, wanted in zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
            total += torch.nn.functional.cross_entropy(model.lm_head(rows).float(), wanted, reduction="sum").double().item()
    mean = total / (len(blocks) * (blocks.shape[1] - 1))
    if not math.isfinite(mean):
        raise UserError(f"{description}: the loss is not finite in {model.dtype}; try --dtype float32 or bfloat16")
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def continuations(model, tokenizer, config: PruneConfig) -> list[str]:
    """Prompts of the published scripts with 64 sampled tokens each; temperature 0 is greedy."""
    prompts = (
        "I believe the meaning of life is",
        "Simply put, the theory of relativity states that",
        "Building a website can be done in 10 simple steps:\n",
    )
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p} if config.temperature else {"do_sample": False}
    texts = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            output = model.generate(**inputs, max_new_tokens=64, pad_token_id=tokenizer.pad_token_id or 0, **sampling)
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


@dataclass
class EvalConfig:
    """Settings of an evaluation. Raises UserError where a value makes no sense."""

    model: str = flag("model", "checkpoint folder, dense or pruned, hub name or .gguf file", positional=True, nargs="?")
    adapter: str = flag("model", "LoRA adapter to apply: OUTPUT_DIR/adapter of post_training.py")
    dtype: str = flag("model", "dtype of the weights; auto: the checkpoint's own, or bfloat16 on a CPU fast in it", "auto", choices=DTYPES)
    device: str = flag("model", "where to evaluate; auto takes a GPU if there is one", "auto")

    tasks: tuple = flag("tasks", "zero-shot tasks, or none", tuple(zero_shot.TASKS), nargs="*")
    data_dir: str = flag("tasks", "folder of TASK.jsonl files in the hub's schema, in place of the hub; a task without a file is left out")
    limit: int = flag("tasks", "only the first N questions of each task; the results are marked as limited [all]", type=int)

    eval_data: tuple = flag(
        "perplexity",
        "any of wikitext2, ptb, python_manual, NAME=FILE, FILE, or none [wikitext2 ptb; python_manual where the hub is out of reach]",
        nargs="+",
    )
    max_seq_len: int = flag("perplexity", "tokens a block of text", 128, type=int)
    eval_limit: int = flag("perplexity", "only the first N blocks; the figures are marked as limited [all]", type=int)

    output: str = flag("output", "file for the results; one that holds some of them is completed [eval_log/NAME.json]")
    overwrite: bool = flag("output", "start the file anew", False)

    def __post_init__(self):
        if not self.model:
            raise UserError("name a model: python -m slimllm.evaluation prune_log/NAME")
        self.tasks = tuple(name for item in self.tasks for name in item.split(",") if name not in ("", "none"))
        for name in self.tasks:
            cli.check_choice("tasks", name, zero_shot.TASKS)
        check_choices(self)
        for name in ("limit", "eval_limit"):
            check_range(self, name, 1)
        check_range(self, "max_seq_len", 2)
        if self.data_dir is not None:
            if not os.path.isdir(self.data_dir):
                raise UserError(f"--data_dir {self.data_dir}: no such folder")
            there = tuple(name for name in self.tasks if os.path.isfile(os.path.join(self.data_dir, f"{name}.jsonl")))
            if self.tasks and not there:
                raise UserError(f"--data_dir {self.data_dir}: it has none of {', '.join(f'{name}.jsonl' for name in self.tasks)}")
            self.tasks = there
        if self.adapter is not None and not os.path.isfile(os.path.join(self.adapter, "adapter_config.json")):
            raise UserError(f"--adapter {self.adapter}: no adapter_config.json there; give the adapter folder that post_training.py wrote")
        if self.output is None:
            name = Path(self.model).name
            self.output = f"eval_log/{name}{'_tuned' if self.adapter else ''}.json"


def run(config: EvalConfig) -> dict:
    """Evaluates one model; the file is written anew after each result, so that a stopped run goes on. Returns the results."""
    output = Path(config.output)
    device = cli.device_of("device", config.device)
    model_config = families.load_config(config.model, "MODEL", pruned=True)
    results = record.continued(output, _identity(config, model_config, device), config.overwrite)
    results |= {"tasks": results.get("tasks", {}), "perplexity": results.get("perplexity", [])}
    texts = load_texts(config.eval_data)
    missing = [name for name in config.tasks if name not in results["tasks"]]
    known = {(f["data"], f["sha256"], f["seq_len"], f["blocks"]) for f in results["perplexity"]}
    tokenizer = families.load_tokenizer(config.model, "MODEL")
    wanted = [(text, blocks_of(text, tokenizer, config.max_seq_len, config.eval_limit)) for text in texts]
    wanted = [(text, ids) for text, ids in wanted if (text.name, text.sha256, config.max_seq_len, len(ids)) not in known]
    log.info("%s: %d tasks and %d texts to do, %d results at hand", output, len(missing), len(wanted), len(known) + len(results["tasks"]))
    if missing or wanted:
        model = families.load_model(config.model, getattr(torch, results["of"]["dtype"]), "MODEL")
        if config.adapter:
            model = _adapted(model, config.adapter)
        results["parameters"] = model.num_parameters()
        model = model.to(device)
        for text, ids in wanted:
            value = perplexity(model, ids, text.name)
            results["perplexity"].append(text.figure(ids, config.eval_limit, perplexity=value))
            log.info("%s: perplexity %.3f", text.name, value)
            record.keep(results, output)
        for name in missing:
            started = time.perf_counter()
            source = record.file_hash(zero_shot.local_file(name, config.data_dir)) if config.data_dir else "hub"
            scores = zero_shot.score(model, tokenizer, name, config.data_dir, config.limit)
            reported = zero_shot.TASKS[name].reported
            seconds = round(time.perf_counter() - started, 1)
            results["tasks"][name] = {
                **scores,
                "reported": reported,
                "limited": config.limit is not None,
                "data": source,
                "seconds": seconds,
            }
            log.info("%s: %s %.4f (%d questions, %.0f s)", name, reported, scores["metrics"][reported], scores["questions"], seconds)
            record.keep(results, output)
    return results


def _identity(config: EvalConfig, model_config, device) -> dict:
    """What must be equal for two runs to share a file of results: weights, dtype and limit; and what the tables say of the model."""
    own = getattr(model_config, "dtype", None) or torch.float32
    dtype = evaluation_dtype(own, device) if config.dtype == "auto" else getattr(torch, config.dtype)
    weights = config.model
    if os.path.isdir(config.model):
        weights = _folder_hash(Path(config.model))
    elif os.path.isfile(config.model):
        weights = record.file_hash(Path(config.model))
    return {
        "model": Path(config.model).name,
        "weights": weights,
        "adapter": _folder_hash(Path(config.adapter)) if config.adapter else None,
        "dtype": record.name_of(dtype),
        "limit": config.limit,
        "pruning": _pruning_of(Path(config.model)),
    }


def _pruning_of(folder: Path) -> dict | None:
    """How the checkpoint in ``folder`` was pruned, from its record; None for a dense model."""
    if not (folder / "pruning.json").is_file():
        return None
    found = record.read(folder)
    settings = ("recipe", "recovery", "layer_ratio")
    return {
        "of": found["model"]["name"],
        "removed": found["parameters"]["decoder_removed"],
        **({"tuned": True} if "post_training" in found else {}),
        **{key: found["config"][key] for key in settings},
    }


def _folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's weights and config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(f"{path.name} {record.file_hash(path)}\n".encode())
    return digest.hexdigest()


def _adapted(model, adapter: str):
    """The model with the adapter's update added to its weights."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--adapter {adapter}: does not fit this model ({next(iter(str(error).splitlines()), '')})") from None


def main(argv=None) -> int:
    """Exit status: 0, 2 for a user's mistake (one line on stderr), 130 when interrupted."""

    def evaluate(config):
        results = run(config)
        log.info("\n%s\n\nresults: %s", "\n".join(report.paper_table([results])), config.output)

    return cli.program(
        EvalConfig,
        "slimllm.evaluation",
        "MODEL [flags]",
        "Perplexity and zero-shot accuracy of a model, dense or pruned, with or without a LoRA adapter.",
        evaluate,
        argv,
        "what is finished is kept; the same command goes on with the rest",
        "use --device cpu or --dtype bfloat16",
    )


if __name__ == "__main__":
    sys.exit(main())
