"""``slimllm evaluate MODEL``: perplexity and the paper's zero-shot tasks of a checkpoint, kept in one JSON file."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path

import torch

from ..data.texts import blocks_of, load_texts
from ..errors import UserError, first_line
from ..evaluation import generation, zero_shot
from ..evaluation.perplexity import nats_per_byte, perplexities
from ..models import loading
from ..models.checked import warn_of_length
from ..reporting import paper_table, record
from ..settings.common import short_name
from ..settings.evaluate import EvalConfig
from ..utils import processes
from ..utils.device import device_of, evaluation_dtype, name_of
from ..utils.files import file_hash

log = logging.getLogger("slimllm")


def run(config: EvalConfig) -> None:
    """Evaluates one model and prints its row of the paper's table."""
    with processes.group(device_of("device", config.device)):
        if not processes.is_first():
            log.setLevel(logging.ERROR)
        results = evaluate(config)
    log.info("\n%s\n\neverything lies in %s", "\n".join(paper_table.paper_table([results])), config.output)


def evaluate(config: EvalConfig) -> dict:
    """Evaluates one model; the file is written anew after each result, so that a stopped run goes on. Returns the results."""
    output = Path(config.output)
    with record.results_at(output, config.overwrite):
        return _evaluate(config, output)


def _evaluate(config: EvalConfig, output: Path) -> dict:
    device = device_of("device", config.device)
    model_config = loading.load_config(config.model, "MODEL")
    warn_of_length(model_config, max_seq_len=config.max_seq_len)
    results = record.continued(output, _identity(config, model_config, device), config.overwrite)
    results |= {name: results.get(name, {}) for name in ("tasks", "generation")} | {"perplexity": results.get("perplexity", [])}
    generation.check(config.generation, config.include_path)
    texts = load_texts(config.eval_data)
    missing = [name for name in config.tasks if results["tasks"].get(name, {}).get("data") != _source(name, config)]
    asked = {name: results["generation"].get(name, {}).get("chat_template") for name in config.generation}
    unwritten = [name for name, template in asked.items() if template is not config.apply_chat_template]
    known = {(f["data"], f["sha256"], f["seq_len"], f["blocks"]) for f in results["perplexity"]}
    tokenizer = loading.load_tokenizer(config.model, "MODEL")
    wanted = [(text, blocks_of(text, tokenizer, model_config, config.max_seq_len, config.eval_limit)) for text in texts]
    wanted = [(text, ids) for text, ids in wanted if (text.name, text.sha256, config.max_seq_len, len(ids)) not in known]
    at_hand = len(known) + len(results["tasks"]) + len(results["generation"])
    log.info("%s: %d tasks and %d texts to do, %d results at hand", output, len(missing) + len(unwritten), len(wanted), at_hand)
    if missing or unwritten or wanted:
        model = source = loading.open_source(config.model, getattr(torch, results["fingerprint"]["dtype"]), "MODEL")
        results["parameters"] = source.model.num_parameters()
        if missing or unwritten or config.adapter:  # tasks need it whole; without them its layers come one at a time
            model = source.whole(device=device)
            model = (_adapted(model, config.adapter) if config.adapter else model).to(device)
        for some in [[one] for one in wanted] if model is not source else [wanted] if wanted else []:
            texts, blocks = zip(*some)
            values = perplexities(model, blocks, [text.name for text in texts], device, tmp_dir=config.tmp_dir)
            for (text, ids), value in zip(some, values):
                nats = nats_per_byte(value, ids, tokenizer)
                results["perplexity"].append(text.figure(ids, config.eval_limit, perplexity=value, nats_per_byte=nats))
                log.info("%s: perplexity %.3f, %.4f nats per byte", text.name, value, nats)
            _save(results, output)
        for name in missing:
            started = time.perf_counter()
            scores = zero_shot.score(model, tokenizer, name, config.data_dir, config.limit)
            reported, seconds = scores["reported"], round(time.perf_counter() - started, 1)
            results["tasks"][name] = {**scores, "data": _source(name, config), "seconds": seconds}
            log.info("%s: %s %.4f (%d questions, %.0f s)", name, reported, scores["metrics"][reported], scores["questions"], seconds)
            _save(results, output)
        for name in unwritten:
            started = time.perf_counter()
            scores = generation.score(model, tokenizer, name, config)
            results["generation"][name] = {**scores, "seconds": round(time.perf_counter() - started, 1)}
            log.info("%s: %s (%d questions)", name, generation.shown(scores), scores["questions"])
            _save(results, output)
    return results


def _source(name: str, config: EvalConfig) -> str:
    """What tells the questions of a task from others: the hash of their file."""
    return file_hash(zero_shot.local_file(name, config.data_dir)) if config.data_dir else "hub"


def _save(results: dict, output: Path) -> None:
    if processes.is_first():
        record.save_results(results, output)


def _identity(config: EvalConfig, model_config, device) -> dict:
    """What must be equal for two runs to share a file of results: weights, dtype and limit; and what the tables say of the model."""
    own = getattr(model_config, "dtype", None) or torch.float32
    dtype = evaluation_dtype(own, device) if config.dtype == "auto" else getattr(torch, config.dtype)
    weights = config.model
    if os.path.isdir(config.model):
        weights = _folder_hash(Path(config.model))
    elif os.path.isfile(config.model):
        weights = file_hash(Path(config.model))
    return {
        "model": short_name(config.model),
        "weights": weights,
        "adapter": _folder_hash(Path(config.adapter)) if config.adapter else None,
        "dtype": name_of(dtype),
        "limit": config.limit,
        "pruning": _pruning_of(Path(config.model)),
    }


def _pruning_of(folder: Path) -> dict | None:
    """How the checkpoint in ``folder`` was pruned, from its record; None for a dense model."""
    if not (folder / record.PruningRecord.FILE).is_file():
        return None
    try:
        found = record.PruningRecord.read(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{first_line(error)}; copy it again, or remove it") from None
    settings = ("method", "recipe", "recovery", "layer_ratio", "distill")
    return {
        "of": found.model.name,
        "removed": found.parameters.decoder_removed,
        **({"tuned": True} if found.post_training else {}),
        **{key: found.config[key] for key in settings if key in found.config},
    }


def _folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's weights and config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def _adapted(model, adapter: str):
    """The model with the adapter's update added to its weights."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--adapter {adapter}: does not fit this model ({first_line(error)})") from None
