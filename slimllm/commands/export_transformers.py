"""``python -m slimllm export-transformers DIR OUT``: a pruned checkpoint whose layers all have one width as a plain stock model."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import load_file

from ..deploy import checkpoint, reference
from ..deploy.runtimes import as_stock_model
from ..errors import UserError
from ..models import loading
from ..settings.export_transformers import StockConfig
from ..utils.outputs import atomic_dir

log = logging.getLogger("slimllm")


def run(settings: StockConfig) -> None:
    """Writes the model in its family's own class and compares it with the checkpoint.

    Raises UserError for layers that differ, naming them and the flag that would have avoided it, and as saving does.
    """
    source, target = settings.folders
    with atomic_dir(Path(target), settings.overwrite, "name another folder", inputs=[source]) as folder:
        model = loading.load_model(source, "auto", "DIR")
        if not (Path(source) / reference.REFERENCE).is_file():
            raise UserError(f"{source}: it has no {reference.REFERENCE}; name a checkpoint of hf_prune.py or post_training.py")
        ids = load_file(Path(source) / reference.REFERENCE)["ids"]
        as_stock_model(model)
        checkpoint.save(model, loading.load_tokenizer(source, "DIR"), folder, ids, source)
        reference.reload_and_compare(folder, model.dtype)
    log.info("%s: %s, the same logits", target, type(model).__name__)
