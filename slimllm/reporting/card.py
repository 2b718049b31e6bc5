"""The model card of a checkpoint (README.md): what it is, how it was made, how good it is, how to run it, file by file.

Its text is the template ``card.md.jinja`` beside this file.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..deploy import export_gguf
from ..errors import UserError
from ..models import hub, loading
from ..models.adapter import LayerAdapter
from ..models.families import is_pruned
from ..models.gguf_tensors import gguf_reader, origin_in
from ..models.weights import Tensors, weight_files
from ..settings.methods import source_of
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
    data = ModelCardData(
        base_model=run.model.hub_name or run.model.base_model,
        license=run.model.license,
        license_name=run.model.license_name,
        license_link=run.model.license_link,
        language=run.model.language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slimllm", "structured-pruning", "pruned"],
    )
    name = Path(run.config["save_ckpt_log_name"]).name
    shared = [f"{f['data']} ({f['calibration_overlap']} samples)" for f in run.evaluation if f.get("calibration_overlap")]
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
        shared=", ".join(shared),
        own_code=is_pruned(config),
        biased=any(LayerAdapter(config).is_output_bias(name) for name in Tensors(weight_files(folder)).names),
        picture=next((path.relative_to(folder).as_posix() for path in (folder / "figures").glob("*.png")), None),
        deci=hasattr(config, "block_configs"),
        files_heading=FILES_HEADING,
        method=source_of(run.config.get("method")),
        command=portable(run.command),
        tuning=run.post_training and portable(run.post_training["command"]),
        exports=_exports(folder),
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


def portable(command: str) -> str:
    """A command without the folders of the machine that it ran on: what follows the last slash of each absolute path."""
    try:
        parts = shlex.split(command)
    except ValueError:  # of a record from before commands were quoted
        parts = command.split()
    return shlex.join(re.sub(r"(^|=)(?:[/~]|[A-Za-z]:\\).*[/\\]", r"\1", part.rstrip("/")) for part in parts)


def _exports(folder: Path) -> bool:
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
