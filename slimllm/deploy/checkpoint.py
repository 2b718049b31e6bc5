"""Saves a pruned model as an ordinary Hugging Face folder, loads it again, and proves that it is the same model."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ..errors import UserError
from ..models.loading import open_source
from ..models.shape import shape_of
from ..models.source import ModelSource, stored_tensors
from ..models.weights import INDEX, Rounded, TensorFile, round_to
from ..pruning import surgery
from ..pruning.allocation.plan import LayerPlan
from ..pruning.config import PruneConfig
from ..pruning.journal import Journal
from ..pruning.runner import LayerRunner
from ..pruning.statistics import ActivationStore
from ..utils.device import name_of
from . import gguf_tokenizer
from .config_files import complete_config, complete_tokenizer_config
from .runtimes import convert_for_runtime

REFERENCE = "reference.safetensors"  # beside each checkpoint: what its model gave in memory
SHARD_BYTES = 5_000_000_000  # of weights in one file, at most; a single tensor may be larger


def load(folder: str | os.PathLike, dtype: torch.dtype | str = "auto", **kwargs):
    """The model of a checkpoint folder, through the class registered by ``import slimllm``."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **kwargs).eval()


def reload_and_compare(folder: str | os.PathLike, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Reads the model in ``folder`` again, layer by layer, and compares it with what was written of its outputs in memory.

    Raises RuntimeError where they differ by more than :func:`tolerance`.
    """
    difference, limit = compare_with_reference(open_source(str(folder), dtype, "DIR"), folder, device)
    if not agrees(difference, limit):
        raise RuntimeError(f"the checkpoint does not load as the model that was saved: logits differ by {difference:.3g}")


def agrees(difference: float, limit: float) -> bool:
    """Whether a difference is allowed; where one of the two is no finite number, it proves nothing and is not."""
    return math.isfinite(difference) and math.isfinite(limit) and difference <= limit


def tolerance(dtype: torch.dtype, same_device: bool = True) -> float:
    """How much two runs of one model may differ, as a share of the largest logit.

    Kernels may choose another order of sums for memory that is aligned differently: 10^-5, or for half precision 10^-2; those of another
    kind of device do, and ten times as much is allowed.
    """
    return (1e-5 if dtype == torch.float32 else 1e-2) * (1 if same_device else 10)


def log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p(ids[:, t] | before) in nats, [samples, length - 1], from logits [samples, length, vocabulary] of ids [samples, length]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def _outputs(runner: LayerRunner, states: ActivationStore) -> dict[str, torch.Tensor]:
    """Log-probability of each next token, and the logits after the last: what tells one model from another in few bytes.

    ``states``: of the runner's token ids, after the last layer.
    """
    norm, head = runner.output_modules()
    rows = torch.cat(list(states))
    found = {"log_probabilities": [], "last_logits": []}
    for ids, row in zip(runner.ids, rows):
        logits = runner.adapter.logits(head, norm(row)).cpu()
        found["log_probabilities"].append(log_probabilities(logits[None], ids[None])[0])
        found["last_logits"].append(logits[-1])
    return {name: torch.stack(values) for name, values in found.items()}


def _reference(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], str, str]:
    """(what stands in :data:`REFERENCE`, the dtype and the kind of device that it was computed in and on).

    The dtype of older ones is "auto", that of the weights. Raises UserError for a folder without it.
    """
    try:
        with safe_open(Path(folder) / REFERENCE, "pt") as file:
            dtype, _, device = (file.metadata() or {}).get("computed", "auto on cpu").partition(" on ")
            found = {name: file.get_tensor(name) for name in file.keys()}
        (samples, length), (rows, vocabulary) = found["ids"].shape, found["last_logits"].shape
        if rows != samples or found["log_probabilities"].shape != (samples, length - 1) or not found["ids"].numel():
            raise ValueError("its shapes do not belong together")
        if not 0 <= int(found["ids"].min()) <= int(found["ids"].max()) < vocabulary:
            raise ValueError("its token ids are not of its vocabulary")
        return found, dtype, device
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable {REFERENCE} ({error}); checkpoints of hf_prune.py and post_training.py have one") from None


@torch.no_grad()
def compare_with_reference(model, folder: str | os.PathLike, device: torch.device | str | None = None) -> tuple[float, float]:
    """(largest difference, how much is allowed) between ``model``'s outputs and those that the saved model gave in memory.

    ``model`` may be a ModelSource; it is computed on ``device``, by default where it is. Raises UserError for a folder without
    :data:`REFERENCE`.
    """
    (reference, _, computed_on), source = _reference(folder), ModelSource.of(model)
    if reference["last_logits"].shape[1] != source.config.vocab_size:
        raise UserError(f"{folder}: {REFERENCE} is of a model with another vocabulary; restore the folder, or make it anew")
    runner = LayerRunner(source, reference["ids"], device or source.home, split=False)
    found = _outputs(runner, runner.last_states())
    difference = float(torch.stack([(found[name] - reference[name]).abs().max() for name in found]).max())  # not a number stays none
    return difference, tolerance(runner.dtype, computed_on == runner.device.type) * float(reference["last_logits"].abs().max())


def covered_rows(source: ModelSource, folder: str | os.PathLike) -> tuple[int, int]:
    """(how many rows of the embeddings the outputs in :data:`REFERENCE` follow from, how many there are)."""
    embeddings, head = source.model.get_input_embeddings().weight, source.adapter.head(source.model).weight
    rows = len(embeddings)
    if embeddings is head:
        return rows, rows  # each is a row of the output head
    return len(_reference(folder)[0]["ids"].unique()), rows


def weight_bytes(folder: str | os.PathLike) -> int:
    """Of the files of weights in a checkpoint folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))


def reference_dtype(folder: str | os.PathLike) -> torch.dtype | str:
    """What the outputs in ``folder`` were computed in, which a comparison has to do too; "auto" is what its weights are saved in."""
    named = _reference(folder)[1]
    return named if named == "auto" else getattr(torch, named)


def _written(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is written in where the weights are written in ``dtype``, or in their own."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _round(module: nn.Module, dtype: torch.dtype, prefix: str = "") -> None:
    """Gives what a checkpoint holds of ``module``, in place, the values that ``dtype`` can hold."""
    for name, tensor in stored_tensors(module).items():
        if tensor.is_floating_point():
            round_to(dtype, tensor.data, prefix + name)


class WeightFiles:
    """The weights of a checkpoint, written one tensor at a time: one file, or several where it is large, and their index.

    ``model`` says what tensors there will be; it may be without weights. ``dtype``: what they are written in, the model's by default.
    """

    def __init__(self, folder: Path, model, dtype: torch.dtype | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.layout = {name: (_written(tensor, dtype), tensor.shape) for name, tensor in stored_tensors(model).items()}
        shards, size, total = [{}], 0, 0
        for name, (dtype, shape) in self.layout.items():
            tensor_bytes = dtype.itemsize * shape.numel()
            if size and size + tensor_bytes > SHARD_BYTES:
                shards, size = [*shards, {}], 0
            shards[-1][name], size, total = (dtype, shape), size + tensor_bytes, total + tensor_bytes
        self._files, self._index = {}, {"metadata": {"total_size": total}, "weight_map": {}}
        for number, layout in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._files |= dict.fromkeys(layout, TensorFile(folder / name, layout))
            self._index["weight_map"] |= dict.fromkeys(layout, name)
        self._folder = folder

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor, whose values the dtype that it is written in can hold."""
        self._files[name].write(name, tensor.to(self.layout[name][0]))

    def sync(self) -> None:
        for file in set(self._files.values()):
            file.sync()

    def close(self) -> None:
        """Writes the index, without which vLLM would take every .safetensors file in the folder for weights."""
        for file in set(self._files.values()):
            file.close()
        (self._folder / INDEX).write_text(json.dumps(self._index, indent=1) + "\n")


@torch.no_grad()
def save(model, tokenizer, folder: Path, ids: torch.Tensor, base_model: str, dtype: torch.dtype | None = None) -> None:
    """Writes a checkpoint of a model in memory: weights (safetensors, sharded when large) and what stands beside them.

    Besides, for :func:`compare_with_reference`, what the model in memory gives for ``ids`` [samples, length]; where ``dtype`` is another
    than the model's, what it gives with weights of that dtype.
    """
    if dtype not in (None, model.dtype):
        model = copy.deepcopy(model)
        _round(model, dtype)
    _write_config(model, folder, dtype)
    files = WeightFiles(folder, model, dtype)
    for name, tensor in stored_tensors(model).items():
        files.write(name, tensor)
    files.close()
    write_tokenizer(tokenizer, folder, base_model, model.config)
    runner = LayerRunner(model, ids, ModelSource.of(model).home, split=False)
    _write_reference(folder, runner, runner.last_states())


def write_tokenizer(tokenizer, folder: Path, base_model: str, config) -> None:
    """Writes the tokenizer of a model with this config, where there is one, and the tokenizer metadata of ``base_model`` if that is a
    .gguf file (or came from one).
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        complete_tokenizer_config(folder, config.max_position_embeddings)
    gguf_tokenizer.carry(base_model, folder)


def _write_reference(folder: Path, runner: LayerRunner, states: ActivationStore) -> None:
    """What the model in memory gives for the runner's token ids; ``states``: of these, after the last layer."""
    found = {"ids": runner.ids.contiguous(), **_outputs(runner, states)}
    how = f"{name_of(runner.dtype)} on {runner.device.type}"
    save_file(found, folder / REFERENCE, {"computed": how})  # one entry: several would come in any order


def _write_config(model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Config, modeling file and generation config of a model that may be without weights. Before the weights: it clears older ones."""
    model.save_pretrained(folder, state_dict={}, save_original_format=False)
    complete_config(folder, model.config, dtype or model.dtype)


class CheckpointSink:
    """The model of a checkpoint, written into a folder layer by layer while ``source`` is pruned; a pipeline's Sink.

    ``ids`` [samples, length]: what the comparison after saving is made on; they follow the layers as these are computed.
    ``dtype``: what the weights are written in, the source's by default. What is rounded is a copy: pruning goes on from the layers as
    they were computed, while what is compared follows from the weights as they are saved.
    ``model``, from :meth:`begin` on: the pruned model without its weights, in the class that the runtime asks for.
    """

    def __init__(self, folder: Path, source: ModelSource, config: PruneConfig, ids: torch.Tensor, device, dtype: torch.dtype | None = None):
        self.folder, self.source, self.config, self.dtype = Path(folder), source, config, dtype or source.dtype
        self._rounds = self.dtype != source.dtype
        self._saved = ModelSource(source.model, Rounded(source.weights, self.dtype), source.dtype) if self._rounds else source
        self._runner = LayerRunner(self._saved, ids, device, split=False)

    def begin(self, plans: list[LayerPlan], done: int, journal: Journal | None) -> None:
        self.model = pruned_skeleton(self.source, [(p.heads, p.kv_heads, p.channels) for p in plans], self.config)
        if not done:
            _write_config(self.model, self.folder, self.dtype)
        self._files = WeightFiles(self.folder, self.model, self.dtype)
        if done:
            self._runner.prepare()
            self._states = journal.restore(done - 1, "reference", self._runner.store(), self._runner.device)
            return
        self._states = self._runner.embed()
        layers = self.source.adapter.layers_name()
        for name in self._files.layout:
            if not name.startswith(layers):
                self._files.write(name, self._saved.tensor(name, self.dtype))

    def layer(self, index: int, layer: nn.Module) -> None:
        prefix = self.source.adapter.layer_name(index)
        if self._rounds:
            layer = copy.deepcopy(layer)
            _round(layer, self.dtype, prefix)
        tensors = stored_tensors(layer)
        for name, (dtype, shape) in self._files.layout.items():
            if name.startswith(prefix):  # a bias that only the runtime asks for is zero
                tensor = tensors.get(name.removeprefix(prefix))
                self._files.write(name, torch.zeros(shape, dtype=dtype) if tensor is None else tensor)
        self._files.sync()
        self._runner.advance(self._states, layer, index)

    def streams(self) -> dict[str, ActivationStore]:
        return {"reference": self._states}

    def finish(self, compare: bool = True) -> None:
        """Completes the folder, reads the model back from it, and compares. Raises RuntimeError where it is another one.

        ``compare`` is not for what a stopped run has begun to :meth:`replace`.
        """
        self._files.close()
        if not compare:
            return
        _write_reference(self.folder, self._runner, self._states)
        reload_and_compare(self.folder, self.source.dtype, self._runner.device)

    @torch.no_grad()
    def replace(self, model, names: list[str]) -> None:
        """Writes the parameters ``names`` of ``model``, the finished one trained further, in place of what is there; compares again.

        They are rounded in ``model`` to what is written.
        """
        files = WeightFiles(self.folder, model, self.dtype)
        for name in names:
            parameter = model.get_parameter(name).data
            round_to(self.dtype, parameter, name)
            files.write(name, parameter)
        files.close()
        runner = LayerRunner(model, self._runner.ids, ModelSource.of(model).home, split=False)
        _write_reference(self.folder, runner, runner.last_states())
        reload_and_compare(self.folder, self.source.dtype, runner.device)


def pruned_skeleton(source: ModelSource, widths: list[tuple[int, int, int]], config: PruneConfig):
    """The model that pruning ``source`` to these widths (heads, KV heads, channels of each layer) gives, without its weights."""
    model = copy.deepcopy(source.model)
    surgery.slice_skeleton(source.adapter, model, widths, config.adds_bias(shape_of(source.config)))
    return convert_for_runtime(model, config.runtime)
