"""A model of text and images whose text model was pruned: the whole again, with the smaller text model in its place.

The text model's tensors are replaced by name, file by file; images, audio and what maps them to the text model are copied as they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig

from ..errors import UserError
from ..models import hub, loading
from ..models.adapter import LayerAdapter
from ..models.families import family_of
from ..models.skeleton import skeleton_of
from ..models.source import stored_tensors
from ..models.stored_names import Inside
from ..models.tensor_file import DTYPES
from ..models.weights import Tensors, weight_files
from .config_files import CONFIG
from .reference import REFERENCE, compare_stock_with_reference, reference_dtype
from .weight_files import WeightFiles

_OF_THE_CLASS = ("architectures", "auto_map", "dtype", "model_type", "rope_parameters", "rope_theta", "transformers_version")
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


def is_whole(model: str | Path) -> bool:
    """Whether a folder, or a hub model in the cache, holds a model of text and images (or of sound), and not a text model alone."""
    path = Path(model) / CONFIG if Path(model).is_dir() else hub.cached(str(model), CONFIG)
    return path is not None and path.is_file() and isinstance(json.loads(path.read_text(encoding="utf-8")).get("text_config"), dict)


def put_back(text: Path, whole: str, folder: Path) -> None:
    """Writes the model ``whole`` into ``folder``, with the stock text model of the checkpoint ``text`` in place of its own.

    ``whole``: the folder or hub name of the model that the text model was taken from. Raises UserError where the two do not belong
    together: no text model inside, another vocabulary or number of layers, another dtype, tensors that have no place.
    """
    where = f"--into {whole}"
    dense, now = loading.load_config(whole, "--into"), loading.load_config(str(text), "DIR")
    outer, _ = PreTrainedConfig.get_config_dict(whole)
    if not isinstance(outer.get("text_config"), dict):
        raise UserError(f"{where}: a text model, with nothing around it to put another into; leave --into out")
    if "quantization_config" in outer or "quantization_config" in outer["text_config"]:
        raise UserError(f"{where}: its weights are quantized, and the checkpoint's are not; name the unquantized model it was made from")
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "rope_parameters", _epsilon_of(dense)):
        had, has = getattr(dense, name, None), getattr(now, name, None)
        if name == "num_hidden_layers" and has < had:
            raise UserError(
                f"{where}: whole layers went, {had - has} of {had}, and a text model with fewer stands by itself; prune without"
            )
        if had != has:
            raise UserError(f"{where}: its text model has {name} {had}, the checkpoint {has}: not the same model")
    _write_weights(text, whole, dense, folder)
    before, after = dense.to_dict(), now.to_dict()
    outer["text_config"] |= {name: after[name] for name in after if after[name] != before.get(name) and name not in _OF_THE_CLASS}
    beside = Path(whole) if Path(whole).is_dir() else Path(hub.download_beside(whole))
    for path in sorted(path for pattern in hub.BESIDE for path in beside.glob(pattern)):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    (folder / CONFIG).write_text(json.dumps(outer, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(text / REFERENCE, folder / REFERENCE)


def _epsilon_of(config) -> str:
    """The config entry of what norms add to the variance; that of the model type where it is a number of the family."""
    name = family_of(config).norm_epsilon
    return name if isinstance(name, str) else "model_type"


def _write_weights(text: Path, whole: str, dense, folder: Path) -> None:
    """The files of weights: those of ``whole``, with what the files of ``text`` hold in place of its text model's."""
    where = f"--into {whole}"
    files = weight_files(loading.weights_folder(whole, dense), getattr(dense, "transformers_weights", None))
    if files[0].suffix != ".safetensors":
        raise UserError(f"{where}: its weights are not in safetensors files; save it again with save_pretrained")
    everything, inside = Tensors(files, text_alone=False), Tensors(files)
    smaller, skeleton = Tensors(weight_files(text), text_alone=False), skeleton_of(dense, dense.dtype)
    if by_rules := loading.inside_of(whole, skeleton, inside, "--into"):
        inside.rename(by_rules.name_of)
        smaller.rename(Inside(skeleton, LayerAdapter(dense)).name_of)
    stored = {name: inside.stored_name(name) for name in inside.names}
    new = sorted((name for name in smaller.names if name not in stored), key=lambda name: ".experts." not in name)
    stored |= {name: _beside(name, stored, where) for name in new}  # biases that a recovery gave
    used = stored_tensors(skeleton)  # published files hold keys and values of layers that share others' instead
    gone = set(inside.names) - set(smaller.names)
    if wrong := sorted(name for name in gone & used.keys() if ".experts." not in name):
        raise UserError(f"{where}: the checkpoint has no {wrong[0]}: not the same model")
    readers = {name: (everything, name) for name in everything.names} | {stored[name]: (smaller, name) for name in smaller.names}
    for name in gone:
        if ".experts." in name:
            del readers[stored[name]]
    layout = {name: (_DTYPE_OF[reader.dtype_name(own)], torch.Size(reader.shape(own))) for name, (reader, own) in readers.items()}
    for name in set(inside.names) - gone:
        if layout[stored[name]][0] != (dtype := _DTYPE_OF[inside.dtype_name(name)]):
            raise UserError(
                f"{where}: its text model is in {inside.dtype_name(name)} and the checkpoint in {smaller.dtype_name(name)}; prune with "
                f"--save_dtype {str(dtype).removeprefix('torch.')}"
            )
    written = WeightFiles(folder, layout)
    for name, (reader, own) in readers.items():
        written.write(name, reader.read(own))
    written.close()


def _beside(name: str, stored: dict[str, str], where: str) -> str:
    """What the files of the whole call a tensor of the text model that they do not have: by the weight of the same module."""
    module, _, last = name.rpartition(".")
    weight = f"{module}.weight"
    if ".experts." in name:
        raise UserError(
            f"{where}: it stores the experts of a layer in another way than the checkpoint, together or each by itself: such a mixture is "
            "not put back; take the text model alone"
        )
    if weight not in stored:
        raise UserError(f"{where}: it has no place for {name} of the checkpoint: not the same model")
    return stored[weight].removesuffix("weight") + last


def class_name(folder: Path) -> str:
    """The class of transformers that the config of a whole model names."""
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architectures")
    return named[0] if named else "AutoModelForImageTextToText"


def compare(folder: Path) -> tuple[float, float]:
    """(largest difference of the logits of text, what is allowed) between the whole model, in its own class of transformers, and the
    pruned text model as it was in memory when it was saved.

    Raises UserError where the class does not take the model, RuntimeError where some weights have no place in it.
    """
    name = class_name(folder)
    made = getattr(transformers, name, transformers.AutoModelForImageTextToText)
    try:
        model, info = made.from_pretrained(folder, dtype=reference_dtype(folder), output_loading_info=True)
    except (ValueError, RuntimeError, AttributeError, TypeError):
        raise UserError(
            f"{name} of transformers does not take a text model of these widths: some such classes derive the size of a head from their "
            "number; prune with --prune channels"
        ) from None
    if wrong := [f"{what}: {min(found)}" for what, found in info.items() if found and "keys" in what]:
        raise RuntimeError(f"{name} does not load as it was written: {'; '.join(map(str, wrong))}")
    return compare_stock_with_reference(model.eval(), folder)
