"""The Hugging Face hub, where it can be reached."""

from __future__ import annotations

import functools
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import get_session, validate_repo_id

from ..errors import UserError, first_line
from .weights import ADAPTER, WEIGHTS, listed_in

_TIMEOUT_SECONDS = 5
BESIDE = ["*.json", "*.jinja", "*.txt", "*.model"]  # configs, tokenizer and processor, which stand beside a model's weights
# The hub takes a repository with a .gguf file for a model for llama.cpp, and tokenizer.gguf holds a tokenizer alone.
NOT_UPLOADED = ["log.txt", ".*", "tokenizer.gguf"]


@functools.cache
def reachable() -> bool:
    """Whether the hub answers its own client (proxies and certificates included) within seconds.

    Where it does not, its libraries are told to use their cache only: without that they would try each file again for half a minute.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
    except (HTTPError, OSError):
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def _cached_datasets() -> bool:
    """Whether the cache of hub data sets holds anything."""
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(huggingface_hub.constants.HF_HOME) / "datasets")
    return folder.is_dir() and any(folder.iterdir())


def rows(path: str, column: str | None = None, stream: bool = False, **kwargs):
    """Iterates over a hub data set's rows, or one column of them.

    With ``stream`` (for data sets too large to keep) they are read as they are needed where the hub can be reached; otherwise
    the data set is downloaded once and read from the cache ever after, with or without a network.
    Raises OSError where the data set cannot be had.
    """
    online = reachable()
    if not online and not _cached_datasets():
        raise OSError(f"hub data set {path}: the hub is out of reach, or offline mode is set, and no data set is in the cache")
    import datasets  # takes seconds and 80 MB, and only hub data needs it

    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        data = datasets.load_dataset(path, streaming=stream and online, **kwargs)
        for row in data:
            if column is not None and column not in row:
                raise ValueError(f"it has no column {column}, but {', '.join(row)}")
            yield row if column is None else row[column]
    except Exception as error:  # each storage backend raises its own kind
        raise OSError(f"hub data set {path}: {first_line(error)}") from error


def download_weights(name: str, named: str | None = None) -> str:
    """The local snapshot of a hub model with the files of its weights, as :func:`weights.weight_files` finds them.

    ``named``: what its config names in place of the usual ones. Raises OSError where the model cannot be had.
    """
    beside = ["generation_config.json", ADAPTER]
    for file_name in (named,) if named else WEIGHTS:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[file_name, *beside]))
        if (folder / file_name).is_file():
            break
    if file_name.endswith(".index.json") and (folder / file_name).is_file():
        huggingface_hub.snapshot_download(name, allow_patterns=[file_name, *listed_in(folder / file_name), *beside])
    return str(folder)


def cached(name: str, file: str) -> Path | None:
    """A file of a hub model, where it is in the cache."""
    try:
        found = huggingface_hub.try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def download_beside(name: str) -> str:
    """The local snapshot of a hub model with what stands beside its weights: configs, tokenizer and processor."""
    return huggingface_hub.snapshot_download(name, allow_patterns=BESIDE)


def card_data(folder: str | os.PathLike) -> dict:
    """What the model card in ``folder`` (README.md) has at its head, as YAML; empty where there is none, or none that can be read."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front_matter = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        data = yaml.safe_load(front_matter[1]) if front_matter else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def check_push(name: str) -> str:
    """The id, USER/NAME, of the model repository ``name``. Raises UserError where nothing could be uploaded to it: its form, no hub in
    reach, no login.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name}: {error}") from None
    if not reachable():
        raise UserError(f"--push_to_hub {name}: the hub is out of reach, or offline mode is set (HF_HUB_OFFLINE); leave the flag out")
    with _hub_errors(name, "nothing was done yet"):
        user = huggingface_hub.HfApi().whoami()
    return name if "/" in name else f"{user['name']}/{name}"


def push(folder: Path, name: str, public: bool = False) -> str:
    """Uploads a checkpoint folder to the model repository ``name``, made (private unless ``public``) where it does not exist.

    A name without a user means a repository of the user who is logged in. Returns its address. Raises UserError where
    the hub refuses.
    """
    api = huggingface_hub.HfApi()
    with _hub_errors(name, f"the checkpoint is complete in {folder}; upload it with: hf upload {name} {folder}"):
        address = api.create_repo(name, exist_ok=True, private=not public)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Pruned with SlimLLM", ignore_patterns=NOT_UPLOADED)
    return str(address)


@contextmanager
def _hub_errors(name: str, state: str):
    try:
        yield
    except (HTTPError, OSError) as error:
        raise UserError(f"--push_to_hub {name}: {first_line(error)}; {state}") from None
