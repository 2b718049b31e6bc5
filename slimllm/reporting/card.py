"""The model card of a checkpoint (README.md): what it is, how it was made, how good it is, how to run it, file by file.

Its text is the template ``card.md.jinja`` beside this file.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..data.texts import HUB_TEXTS
from ..deploy import export_gguf
from ..errors import UserError
from ..models import hub, loading
from ..models.adapter import LayerAdapter
from ..models.families import is_pruned
from ..models.gguf_tensors import gguf_reader, origin_in
from ..models.parts import KINDS, units_of_kept
from ..models.weights import Tensors, weight_files
from ..plan import is_gone
from ..settings.methods import METHODS, RECIPES, source_of
from ..utils import outputs
from ..utils.files import file_hash, write_text
from .record import PruningRecord
from .tables import aligned

FILE = "README.md"
FILES_HEADING = "## Files"
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write(folder: Path, run: PruningRecord) -> None:
    """Writes the card of the checkpoint in ``folder`` from the record of its run, and the seal, whose hashes it shows: the last of all."""
    hashes = outputs.seal(folder)
    config = loading.load_config(str(folder), "DIR")
    name = Path(run.config["save_ckpt_log_name"]).name
    measured = eval_results(run)
    data = ModelCardData(
        model_name=name if measured else None,
        eval_results=measured or None,
        base_model=run.model.hub_name or run.model.base_model,
        license=run.model.license,
        license_name=run.model.license_name,
        license_link=run.model.license_link,
        language=run.model.language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimllm", "structured-pruning", "pruned"],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        run=run,
        name=name,
        where=run.config.get("push_to_hub") or name,
        base=run.model.name,
        hub_name=run.model.hub_name,
        parameters=run.parameters,
        calibration_source=Path(run.calibration["source"]).name,
        figures=_figures(run.evaluation),
        shared=", ".join(shared_texts(run)),
        own_code=is_pruned(config),
        biased=any(LayerAdapter(config).is_output_bias(name) for name in Tensors(weight_files(folder)).names),
        picture=next((path.relative_to(folder).as_posix() for path in (folder / "figures").glob("*.png")), None),
        deci=hasattr(config, "block_configs"),
        files_heading=FILES_HEADING,
        method=source_of(run.config.get("method")),
        departures=", ".join(departures(run.config)),
        what_went=what_went(run),
        command=portable(run.command),
        tuning=run.post_training and portable(run.post_training["command"]),
        exports=exports(folder),
        files=_files(folder, hashes),
    )
    write_text(folder / FILE, str(card).rstrip() + "\n")


def update_files(folder: Path) -> None:
    """Brings the card's list of files up to date, where the folder has a card."""
    path = folder / FILE
    if path.is_file() and not path.is_symlink() and FILES_HEADING in (text := path.read_text(encoding="utf-8")):
        write_text(path, text.split(FILES_HEADING)[0] + f"{FILES_HEADING}\n\n{_files(folder)}\n")


def origin_of(base_model: str) -> dict:
    """``hub_name``, ``license``, ``license_name``, ``license_link``, ``language`` and ``base_model`` of a model, as far as its name, its
    card or its .gguf metadata tell.

    A hub that does not answer leaves all but the name open.
    """
    path = Path(base_model)
    if path.suffix == ".gguf":
        return origin_in(gguf_reader(path))
    if path.exists():
        return _of_card(hub.card_data(path))
    try:
        validate_repo_id(base_model)
        if "/" in base_model:
            card = ModelCard.load(base_model).data.to_dict() if hub.reachable() else {}
            return {"hub_name": base_model} | _of_card(card)
    except HFValidationError:
        return {}
    except (HTTPError, OSError, ValueError):
        return {"hub_name": base_model}
    return {}


def _of_card(data: dict) -> dict:
    return {name: data[name] for name in ("license", "license_name", "license_link", "language", "base_model") if data.get(name)}


def shared_texts(run: PruningRecord) -> list[str]:
    """The texts measured on that share runs of tokens with calibration samples, in words, such as ``ptb (3 samples)``."""
    return [f"{f['data']} ({f['calibration_overlap']} samples)" for f in run.evaluation if f.get("calibration_overlap")]


def eval_results(run: PruningRecord) -> list[EvalResult]:
    """The model's perplexities in the hub's form, each with its protocol; those that are no finite number, or were measured only before
    the model was trained, are left out.

    A text from the hub goes by its data set there, any other by its own name.
    """
    found = []
    for f in run.evaluation:
        value = f.get("tuned") if run.post_training else f["pruned"]
        if value is None or not math.isfinite(value):
            continue
        hub_text = HUB_TEXTS.get(f["data"], {})
        if hub_text.get("split") != f["split"]:  # a file that goes by that name
            hub_text = {}
        limited = f", the first {f['blocks']} blocks only" if f["limited"] else ""
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=hub_text.get("path", f["data"]),
                dataset_name=f["data"],
                dataset_config=hub_text.get("name"),
                dataset_split=f["split"],
                metric_type="perplexity",
                metric_name=f"perplexity per token, blocks of {f['seq_len']} tokens{limited}",
                metric_value=round(value, 3),
            )
        )
    return found


def _figures(figures: list[dict]) -> str:
    """The table of perplexities, empty where there are none."""
    if not figures:
        return ""
    per_byte = all("nats_per_byte" in f and "tuned" not in f for f in figures)
    rows = [["text", "split", "tokens per block", "blocks", "dense", "this model", *(["nats per byte"] if per_byte else [])]]
    for f in figures:
        blocks = f"{f['blocks']}{' (limited)' if f['limited'] else ''}"
        value = f"{f['pruned']:.2f}" + (f" -> {f['tuned']:.2f}" if "tuned" in f else "")
        nats = [" -> ".join(f"{value:.3f}" for value in f["nats_per_byte"].values())] if per_byte else []
        rows.append([f["data"], f["split"], str(f["seq_len"]), blocks, f"{f['dense']:.2f}", value, *nats])
    return "\n".join(aligned(rows))


def departures(config: dict) -> list[str]:
    """The parts of the method that are not those of its method and recipe, in words."""
    usual = vars(METHODS[config["method"]]) if config.get("method") in METHODS else {}
    usual = {**usual, **RECIPES[config["recipe"]].settings} if config.get("recipe") in RECIPES else usual
    names = ("head_choice", "channel_score", "expert_score", "layer_ratio", "recovery") if config.get("plan") is None else ("recovery",)
    return [f"{name.replace('_', ' ')} {config[name]}" for name in names if name in usual and config.get(name) not in (None, usual[name])]


def what_went(run: PruningRecord) -> str:
    """What was removed, in words: ``2 of 30 layers, the attention part of 3 layers, 12 of 90 heads and 9,216 of 46,080 channels``, those of
    such layers and parts too.
    """
    shape = run.model.shape["layers"]
    had, kept = Counter(), Counter()
    for dense, layer in zip(shape, run.layers):
        for part, units in dense.items():
            had.update(units)
            kept.update(units_of_kept(layer["kept"])[part])
    whole = sum(is_gone(layer["kept"]) for layer in run.layers)
    gone = [f"{whole} of {len(shape)} layers"] * bool(whole)
    parts = Counter(
        kind for layer in run.layers if not is_gone(layer["kept"]) for kind, kept in layer["kept"].items() if not any(kept.values())
    )
    gone += [f"the {KINDS[kind].title} part of {count} layer{'s' * (count > 1)}" for kind, count in parts.items()]
    gone += [f"{had[sort] - kept[sort]:,} of {had[sort]:,} {sort.replace('kv_', 'KV ')}" for sort in had if kept[sort] < had[sort]]
    return " and ".join(filter(None, [", ".join(gone[:-1]), *gone[-1:]])) or "nothing of its layers"


def portable(command: str) -> str:
    """A command without the folders of the machine that it ran on: what follows the last slash of each absolute path."""
    try:
        parts = shlex.split(command)
    except ValueError:  # of a record from before commands were quoted
        parts = command.split()
    return shlex.join(re.sub(r"(^|=)(?:[/~]|[A-Za-z]:\\).*[/\\]", r"\1", part.rstrip("/")) for part in parts)


def exports(folder: Path) -> bool:
    """Whether llama.cpp has a form for this checkpoint, and :mod:`export_gguf` writes it."""
    try:
        export_gguf.check(folder)
    except UserError:
        return False
    return True


def _files(folder: Path, hashes: dict[str, str] | None = None) -> str:
    """The table of a checkpoint's files; ``hashes``: those that are at hand, by name."""
    rows, hashes = [["file", "bytes", "sha256"]], hashes or {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in (FILE, "log.txt", outputs.SEAL) and not path.name.startswith("."):
            rows.append([path.name, str(path.stat().st_size), hashes.get(path.name) or file_hash(path)])
    return "\n".join(aligned(rows))
