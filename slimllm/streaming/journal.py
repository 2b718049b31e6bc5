"""What a run has finished, kept in a folder, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from ..models.tensor_file import TensorFile
from ..models.weights import Tensors
from ..utils import processes
from ..utils.files import fsync, write_text
from .activations import ActivationStore

NAME = ".journal"  # inside the folder of a run that is not finished
_STATES, _OF = "slimllm-states-", "of"  # a folder of states in another place, and the file in it that holds the journal's path
_ELSEWHERE = "elsewhere-"  # the file, one for each process, that holds that folder's path


class Journal:
    """Results by name, and for each finished layer its report and the states after it.

    Every entry is a file that appears whole and is on the disk before the next one is begun. Numbers are kept exactly. Of several
    processes each keeps its own states, and the first writes the rest. The states are large: ``tmp_dir`` takes them, where one is named.
    """

    def __init__(self, folder: Path, tmp_dir: str | None = None):
        self.folder = self.states = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        elsewhere = self.folder / f"{_ELSEWHERE}{processes.rank()}"
        begun = elsewhere.is_file() or any(self.folder.glob("states-*.safetensors"))  # in the place where it began they stay
        if tmp_dir is not None and not begun:
            clear_orphans(tmp_dir)
            self.states = Path(tempfile.mkdtemp(prefix=_STATES, dir=tmp_dir)).resolve()
            write_text(self.states / _OF, str(self.folder.resolve()))
            write_text(elsewhere, str(self.states))
        elif elsewhere.is_file():
            self.states = Path(elsewhere.read_text(encoding="utf-8"))

    @classmethod
    def of_run(cls, folder: Path, tmp_dir: str | None = None) -> Journal:
        """The journal of the run whose folder this is."""
        return cls(Path(folder) / NAME, tmp_dir)

    @staticmethod
    def worth_keeping(folder: Path) -> bool:
        """Whether the run whose folder this is has finished anything."""
        return any(path.name != "identity.json" for path in (Path(folder) / NAME).glob("*.json"))

    def check(self, identity: dict, free: Collection[str] = ()) -> None:
        """Keeps the identity of the run. Raises UserError, naming the first difference, where another run left this journal.

        ``free``: what in it may differ by now.
        """
        identity = json.loads(json.dumps(identity, default=str))
        before = self.get("identity", dict)
        if before is None:
            self.put("identity", identity)
            return
        check_same(before | {name: identity[name] for name in free}, identity, "--resume")

    def get(self, name: str, kind: type = object):
        """The entry ``name``, or None where there is none. Raises UserError for one that is broken, or not of this ``kind``."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        with resuming(path):
            value = json.loads(path.read_text())
            if not isinstance(value, kind):
                raise TypeError(f"a {type(value).__name__}, not a {kind.__name__}")
            return value

    def put(self, name: str, value) -> None:
        """Keeps ``value``, which JSON can hold, as the entry ``name``, in place of an older one; only the first process writes."""
        if processes.is_first():
            write_text(self.folder / f"{name}.json", json.dumps(value))

    def layers(self) -> list[dict]:
        """The reports of the finished layers, in order."""
        reports = []
        while (report := self.get(f"layer-{len(reports):05d}", dict)) is not None:
            reports.append(report)
        return reports

    def finish_layer(self, index: int, report: dict, streams: dict[str, ActivationStore]) -> None:
        """Keeps a layer's report, and the states after it, by name; those after the layer before it go."""
        beside = {f"{name}/{what}": own for name, store in streams.items() for what, own in store.beside.items()}
        streams = streams | beside
        layout = {f"{name}.{i}": (states.dtype, states.shape) for name, store in streams.items() for i, states in enumerate(store)}
        path = self._states(index)
        if layout:
            with TensorFile(path.with_suffix(".partial"), layout) as file:
                for name, store in streams.items():
                    for i, states in enumerate(store):
                        file.write(f"{name}.{i}", states)
            path.with_suffix(".partial").replace(path)
            fsync(self.states)
        processes.wait()
        self.put(f"layer-{index:05d}", report)
        processes.wait()  # until then a run that is stopped needs the older ones
        self._states(index - 1).unlink(missing_ok=True)

    def restore(self, index: int, name: str, store: ActivationStore, device) -> ActivationStore:
        """Fills ``store`` with the states ``name`` after layer ``index``. Raises UserError where they are gone."""
        if not self._states(index).is_file():
            raise UserError(f"--resume: {self._states(index)}, which the stopped run had written, is gone; start anew without the flag")
        with resuming(self._states(index)):
            tensors = Tensors([self._states(index)])
        own = {key.rpartition(".")[0] for key in tensors.names}
        beside = {prefix: store.store_beside(prefix.removeprefix(f"{name}/")) for prefix in own if prefix.startswith(f"{name}/")}
        for prefix, into in ({name: store} | beside).items():
            while (key := f"{prefix}.{len(into)}") in tensors.names:
                into.append(tensors.read(key).to(device))
        return store

    def _states(self, index: int) -> Path:
        return self.states / f"states-{index:05d}-{processes.rank()}.safetensors"


@contextlib.contextmanager
def resuming(path: Path):
    """Converts what goes wrong while ``path`` is read, a file that a stopped run left, to a UserError with the way out."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError, UserError) as error:
        raise UserError(f"--resume: {path}, which the stopped run had written, is broken ({error}); start anew without the flag") from None


def clear_orphans(tmp_dir: str) -> None:
    """Removes from ``tmp_dir`` the states of runs that are gone: finished, or cleared by a later one of their name."""
    for folder in Path(tmp_dir).glob(f"{_STATES}*"):
        with contextlib.suppress(OSError):
            if not Path((folder / _OF).read_text(encoding="utf-8")).is_dir():
                shutil.rmtree(folder)


def check_same(before: dict, now: dict, flag: str) -> None:
    """Raises UserError, naming the first difference, where the stopped run that ``flag`` is to resume was not this one."""
    now = json.loads(json.dumps(now, default=str))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{flag}: the stopped run had {name} {_short(before.get(name))}, this one has {_short(now.get(name))}; "
                f"give the same command, or leave out {flag} to start anew"
            )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
