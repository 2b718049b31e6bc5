"""What a run did: everything that is needed to get its figures again, as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch

from .. import plugins
from ..errors import UserError, first_line
from ..plan import by_part, shape_by_part
from ..utils import processes
from ..utils.files import file_hash, write_text
from ..utils.memory import peak_memory
from ..utils.outputs import check_kind, check_target, is_results, taken, unless

FORMAT = 1
PROCESSES = "the number of processes"  # in the identity of a run
PERPLEXITIES = ("dense", "pruned", "tuned", "perplexity", "before", "after")  # what they are called in an entry
PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy", "peft", "lm_eval")


def environment() -> dict:
    """Versions of the interpreter and the packages, the commit of this code, the machine's compute."""
    import slimllm

    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "slimllm": slimllm.__version__,
        "commit": commit_of_this_program(),
        "python": platform.python_version(),
        **versions,
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "plugins": [[Path(name).name, digest] for name, digest in plugins.loaded.items()],
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def commit_of_this_program() -> str | None:
    """The commit of this program's own repository; None where it was installed, into whatever repository the environment lies in."""
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a git hook's name another

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.splitlines()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD")
        if not root.samefile(top):
            return None
        return commit + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command of this run, as a shell takes it."""
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py" and Path(program).parent.name == "slimllm" or Path(program).stem == "slimllm":
        return shlex.join(["slimllm", *arguments])
    return shlex.join(["python", program, *arguments])


# Flags of where a run's results go, or how it is stopped and resumed, which change nothing in the results.
_NOT_OF_THE_RESULT = ("overwrite", "resume", "push_to_hub", "public", "dry_run", "tmp_dir", "save_ckpt_log_name")
_NOT_OF_THE_RESULT += ("output_dir", "resume_from_checkpoint", "merge", "wandb_project", "cache_dataset")


_OF_FILE = "the file "


def hashes_of(sources: Iterable[str | None]) -> dict[str, str]:
    """The hash of each file among ``sources``, and in the folders among them, by what a message calls it."""
    paths = [Path(name) for name in sources if name]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
    return {f"{_OF_FILE}{path}": file_hash(path) for path in files}


def _is_file(key: str) -> bool:
    return key.startswith(_OF_FILE)


def identity(config, weights: list[Path], texts: list, sources: tuple[str | None, ...] = ()) -> dict:
    """All that a run's results follow from: what has to be equal where a run is resumed.

    ``weights``: the model's files, told by size and date; config and tokenizer beside them, the files and folders among ``sources``,
    and ``texts`` (EvalText), by their hashes.
    """
    flags = {f"--{name}": value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_RESULT}
    folders = dict.fromkeys(path.parent for path in weights if path.suffix != ".gguf")
    beside = [folder / name for folder in folders for name in ("config.json", "tokenizer.json", "tokenizer.model")]
    return {
        **flags,
        **{f"{_OF_FILE}{path.name}": [path.stat().st_size, path.stat().st_mtime_ns] for path in weights},
        **{f"{_OF_FILE}{path.name}": file_hash(path) for path in beside if path.is_file()},
        **hashes_of(sources),
        **{f"the plugin {name}": digest for name, digest in plugins.loaded.items()},
        **{f"the text {text.name}": text.sha256 for text in texts},
        PROCESSES: processes.count(),
        **{package: version for package, version in environment().items() if package in ("slimllm", "torch", "transformers")},
    }


@dataclass
class ModelInfo:
    """The model that a run pruned, ``shape``: its ModelShape as a dict. From ``hub_name`` on, as far as it is known; ``base_model``: what
    it was made of itself, ``pruned_from``: the dense model, where that one was pruned before.
    """

    name: str
    type: str
    dtype: str
    device: str
    shape: dict
    hub_name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] | str | None = None
    base_model: list[str] | str | None = None
    pruned_from: str | None = None


@dataclass
class Parameters:
    """Counts, and the shares of the decoder layers' and of all parameters that were removed.

    ``active``: of a mixture of experts, those that one token is computed with, ``dense`` and ``pruned``.
    """

    dense: int
    pruned: int
    dense_decoder: int
    decoder_removed: float
    removed: float
    active: dict[str, int] | None = None

    @classmethod
    def of(cls, dense: int, pruned: int, dense_decoder: int, vocabulary: int = 0, active: dict[str, int] | None = None) -> Parameters:
        """From the parameters of the dense model, of the pruned one, of the layers of the dense one, and of what went of its vocabulary."""
        return cls(dense, pruned, dense_decoder, (dense - pruned - vocabulary) / dense_decoder, (dense - pruned) / dense, active)


@dataclass
class _Record:
    FILE: ClassVar[str]

    def write(self, folder: Path) -> None:
        """Writes the record, with the number of its format, to its file in ``folder``."""
        write_text(Path(folder) / self.FILE, dumps({"format": FORMAT, **asdict(self)}))


@dataclass
class PruningRecord(_Record):
    """A pruning run, and where its checkpoint was trained afterwards, that run too. ``pruning.json`` holds it.

    ``config``: the PruneConfig. ``evaluation``: one entry per text, as EvalText.figure makes it, with perplexities ``dense``,
    ``pruned`` and ``tuned``. ``layers``: one LayerReport each. ``distillation``: a Distillation, where there was one.
    ``predicted_loss``: what the plan costs by the price list, nats per token, where it goes by one.
    ``predicted_memory``: what was expected of ``peak_memory`` before the run began.
    ``bytes``: of the files of weights, ``dense`` and ``pruned``, where a checkpoint was written. ``vocabulary``: how many tokens
    stay and by which text, where some go. ``answers``: a ``prompt`` each, and what the ``dense`` and the
    ``pruned`` model answer (``text``, ``fault``). ``chat``: a ChatQuality of each of the two, where the model has a chat template.
    """

    FILE: ClassVar[str] = "pruning.json"
    _KINDS: ClassVar[dict[str, type]] = {"config": dict, "calibration": dict, "evaluation": list, "seconds": dict, "layers": list}

    config: dict
    model: ModelInfo
    calibration: dict
    parameters: Parameters
    evaluation: list[dict]
    seconds: dict[str, float]
    layers: list[dict]
    distillation: dict | None = None
    post_training: dict | None = None
    predicted_loss: float | None = None
    predicted_memory: dict[str, int] | None = None
    bytes: dict[str, int] | None = None
    vocabulary: dict | None = None
    answers: list[dict] = field(default_factory=list)
    chat: dict[str, dict] = field(default_factory=dict)
    command: str = field(default_factory=command)
    environment: dict = field(default_factory=environment)
    peak_memory: dict[str, int] = field(default_factory=peak_memory)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> PruningRecord:
        """The record in a run's folder. Raises FileNotFoundError, or ValueError for what is not a record of this format."""
        path = Path(folder) / cls.FILE
        content = read_json(path)
        try:
            values = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            for name, kind in cls._KINDS.items():
                if not isinstance(content[name], kind):
                    raise TypeError(f"{name} is a {type(content[name]).__name__}, not a {kind.__name__}")
            values["layers"] = [by_part(layer) for layer in content["layers"]]
            model = ModelInfo(**content["model"] | {"shape": shape_by_part(content["model"]["shape"])})
            return cls(**values | {"model": model, "parameters": Parameters(**content["parameters"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the record of a pruning run ({error})") from None


@dataclass
class TrainingRecord(_Record):
    """A post-training run. ``validation``: perplexity of the held-out rows before and where it was best; ``history``: its losses."""

    FILE: ClassVar[str] = "post_training.json"

    config: dict
    data: dict
    parameters: dict[str, int]
    dtype: str
    processes: int
    evaluation: list[dict]
    validation: dict[str, float] | None
    history: list[dict]
    seconds: dict[str, float]
    command: str = field(default_factory=command)
    environment: dict = field(default_factory=environment)
    peak_memory: dict[str, int] = field(default_factory=peak_memory)


def dumps(record: dict) -> str:
    """JSON with one line for each short list, so that lists of indices do not fill the page; figures that are not finite are null."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False, default=str)
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m.group()), text) + "\n"


def _finite(value):
    """``value`` with None for each number in it that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(entry: dict) -> dict:
    """An entry of a record with NaN for each perplexity that :func:`dumps` could not write, so that it is a number for who reads it."""
    return entry | {name: math.nan for name in PERPLEXITIES if name in entry and entry[name] is None}


def read_json(path: str | os.PathLike) -> dict:
    """A record's file. Raises FileNotFoundError, or ValueError for what is not a record of this format."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=_figures)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: not a record of format {FORMAT}")
    return record


@contextmanager
def results_at(path: str | os.PathLike | None, overwrite: bool, way: str = "name another --output", ours=is_results):
    """Holds the name of a file of results while the block runs; ``way``: the way out where it cannot be had. Without a path does nothing.

    Raises UserError before anything is computed, with ``overwrite`` also for a file that no run of this program wrote, which ``ours``
    tells from others. Of several processes the first holds it for all.
    """
    if path is None or not processes.is_first():
        yield
        return
    check_kind(path, way)
    if overwrite:
        check_target(Path(path), True, way, foreign=unless(ours))
    with taken(path, way):
        yield


def results_in(folder: Path, name: str) -> Path:
    """The file of results ``name`` in a folder of tables and pictures. Raises UserError for a folder that holds other things only."""
    path = folder / name
    check_kind(folder, "name another --output")
    if folder.is_dir() and any(folder.iterdir()) and not os.path.lexists(path):
        raise UserError(f"{folder}: not empty, and it holds no {name} of this program; name another --output")
    return path


def save_results(results: dict, path: Path) -> None:
    """Writes results with the command, the environment and the peak memory so far."""
    results |= {"command": command(), "environment": environment(), "peak_memory": peak_memory()}
    write_text(path, dumps(results))


def continued(path: Path, fingerprint: dict, overwrite: bool) -> dict:
    """The results that ``path`` holds, to be completed, or a new dict of them. ``fingerprint``: what they are results of.

    Raises UserError where the file is no such record or holds results of something else.
    """
    fingerprint = json.loads(json.dumps(fingerprint))
    if not path.exists() or overwrite:
        return {"format": FORMAT, "fingerprint": fingerprint}
    way = "name another --output, or replace it with --overwrite"
    try:
        results = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of results ({error}); {way}") from None
    earlier = results.get("fingerprint")
    earlier = earlier if isinstance(earlier, dict) else {}
    keys = {*earlier, *fingerprint}
    if not any(map(_is_file, earlier)):  # an older record, which has fewer keys: none of files, and none of what is as it was before
        keys = {key for key in keys if not _is_file(key)}
    different = [key for key in sorted(keys) if earlier.get(key) != fingerprint.get(key)]
    if different:
        shown = ", ".join(key.removeprefix("the ") for key in different)
        raise UserError(f"{path} holds results of another {shown}: {way}")
    return results | {"fingerprint": fingerprint}
