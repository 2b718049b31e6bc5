"""``slimllm export-transformers DIR OUT``: a pruned checkpoint whose layers all have one width as a plain stock model; with
``--into MODEL`` inside the model of text and images that it was taken from.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from ..deploy import checkpoint, reference, whole_model
from ..deploy.runtimes import as_stock_model
from ..errors import UserError
from ..models import loading
from ..settings.export_transformers import StockConfig
from ..utils.outputs import atomic_dir

log = logging.getLogger("slimllm")


def run(settings: StockConfig) -> None:
    """Writes the model in its family's own class, where that is asked for inside the whole that it belongs to, and compares it with the
    checkpoint.

    Raises UserError for layers that differ, naming them and the flag that would have avoided it, and as saving does.
    """
    source, target = settings.folders
    inputs = [source, *([settings.into] if settings.into else [])]
    with atomic_dir(Path(target), settings.overwrite, "name another folder", inputs=inputs) as folder:
        if settings.into is None:
            name = _write_stock(source, folder)
        else:
            with tempfile.TemporaryDirectory(prefix=".text.", dir=folder) as text:
                _write_stock(source, Path(text))
                whole_model.put_back(Path(text), settings.into, folder)
            name = _proved(folder)
    log.info("%s: %s, the same logits", target, name)


def _write_stock(source: str, folder: Path) -> str:
    """Writes the checkpoint ``source`` in its family's own class, and returns the name of that."""
    model = loading.load_model(source, "auto", "DIR")
    if not (Path(source) / reference.REFERENCE).is_file():
        raise UserError(f"{source}: it has no {reference.REFERENCE}; name a checkpoint of hf_prune.py or post_training.py")
    ids = load_file(Path(source) / reference.REFERENCE)["ids"]
    as_stock_model(model)
    checkpoint.save(model, loading.load_tokenizer(source, "DIR"), folder, ids, source)
    reference.reload_and_compare(folder, model.dtype)
    return type(model).__name__


def _proved(folder: Path) -> str:
    """The class of the whole model in ``folder``, which loads and gives the pruned text model's logits. Raises UserError else."""
    difference, limit = whole_model.compare(folder)
    if not reference.agrees(difference, limit):
        raise UserError(
            f"the whole does not give the logits of the text model (they differ by {difference:.3g}): its settings, or the rest of it, are "
            "another model's; give --into the one that the text model was taken from"
        )
    return whole_model.class_name(folder)
