"""Reads models, configs and tokenizers from folders, .gguf files and the hub; what goes wrong is one line that names the model."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
from collections.abc import Callable
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from ..errors import UserError, first_line
from ..utils.device import evaluation_dtype
from ..utils.memory import free_memory, return_free_memory
from . import gguf_settings, hub
from .adapter import LayerAdapter
from .checked import check_config
from .families import OF_IMAGES, TEXT_MODELS, UNSAID, family_of
from .gguf_tensors import GgufTensors, gguf_reader, parsed_once
from .quantized import READERS
from .refused import UNSUPPORTED
from .shape import ModelShape, shape_of
from .skeleton import in_float32, skeleton_of, whole_skeleton_of
from .source import ModelSource, stored_tensors
from .stored_names import Inside, Stacked
from .weights import ADAPTER, PickledTensors, Tensors, weight_files

# Tensors that old files hold besides the model's, which follow from the config. The model's class may name more.
_FOLLOWS = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"

log = logging.getLogger("slimllm")


def is_gguf(base_model: str) -> bool:
    """Whether this names a .gguf file, rather than a folder or a hub model."""
    return str(base_model).endswith(".gguf") and not os.path.isdir(base_model)


def own_dtype(base_model: str, config) -> torch.dtype | None:
    """What the weights are stored in, by the model's config; None for a .gguf file, whose weights are dequantized as they are read."""
    return None if is_gguf(base_model) else getattr(config, "dtype", None)


def stored_dtype(base_model: str, config) -> torch.dtype | None:
    """The dtype that holds what the model's files hold: that of the config, if it names one, or of most numbers of a .gguf file;
    bfloat16 where these have fewer than 16 bits.
    """
    if not is_gguf(base_model):
        return own_dtype(base_model, config)
    numbers = collections.Counter()
    for tensor in _read("weights", base_model, "--base_model", lambda: gguf_reader(base_model).tensors):
        numbers[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = max(numbers, key=numbers.get, default="")
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def bytes_on_disk(base_model: str, stored: torch.dtype, shape: ModelShape) -> int:
    """Bytes of the model's files, from its config alone except for a .gguf file."""
    if is_gguf(base_model):
        return os.path.getsize(base_model)
    return shape.dense_parameters * stored.itemsize


def _source(base_model: str, option_name: str) -> tuple[str, dict]:
    """(folder or hub name, keyword arguments) for from_pretrained. Raises UserError for a path that is no model."""
    if is_gguf(base_model):
        if not os.path.isfile(base_model):
            raise UserError(f"{option_name} {base_model}: no such file")
        gguf_reader(base_model)
        folder, name = os.path.split(os.path.abspath(base_model))
        return folder, {"gguf_file": name}
    if os.path.isdir(base_model):
        adapter = os.path.isfile(os.path.join(base_model, ADAPTER))
        if not os.path.isfile(os.path.join(base_model, "config.json")):
            if adapter:
                raise UserError(
                    f"{option_name} {base_model}: an adapter, not a model; post_training.py --merge writes the model with the adapter "
                    "in its weights, as does merge_and_unload of peft"
                )
            raise UserError(f"{option_name} {base_model}: the folder has no config.json")
        if adapter:
            raise UserError(
                f"{option_name} {base_model}: the folder holds an adapter ({ADAPTER}), which transformers applies whenever it reads the "
                "model; merge it into the weights first (merge_and_unload of peft), or move it elsewhere"
            )
    elif os.path.exists(base_model):
        raise UserError(f"{option_name} {base_model}: not a model folder, a hub name or a .gguf file")
    elif base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise UserError(f"{option_name} {base_model}: no such folder")
    else:
        hub.reachable()  # without a network, look in the cache at once
    return base_model, {}


def _read(what: str, base_model: str, option_name: str, read):
    """Runs ``read``; an error inside the libraries becomes a UserError of one line that names the model."""
    try:
        with parsed_once() if is_gguf(base_model) else contextlib.nullcontext():
            return read()
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{option_name} {base_model}: a safetensors file is broken ({error}); copy or download it again") from None
    except Exception as error:  # a file may hold anything, and the libraries raise errors of every kind
        if "gated repo" in str(error):
            raise UserError(
                f"{option_name} {base_model}: the model is gated; accept its terms on its page of the hub, then log in with: hf auth login"
            ) from None
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{option_name} {base_model}: its {what} needs code that comes with the model, and no model's code is run here; "
                "name one in a form that transformers knows by itself"
            ) from None
        if isinstance(error, OSError) and not os.path.exists(base_model) and not hub.reachable():
            raise UserError(
                f"{option_name} {base_model}: no folder or file of that name is here, and the hub is out of reach ({first_line(error)})"
            ) from None
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{option_name} {base_model}: cannot read the {what}: {kind}{first_line(error)}") from None


def load_config(base_model: str, option_name: str = "--base_model"):
    """The model's transformers config, of a model of text and images that of its text model; ``option_name`` is what errors name it by.

    Raises UserError for a missing, broken, unsupported or quantized model.
    """
    source, kwargs = _source(base_model, option_name)
    where = f"{option_name} {base_model}"
    config = _stored_config(source, base_model, option_name, **kwargs)
    quantization = _quantization(config)
    if (text := getattr(config, "text_config", None)) and config.model_type not in UNSUPPORTED:
        if not isinstance(text, PreTrainedConfig):
            raise UserError(f"{option_name} {base_model}: config.json: text_config is {text!r}, not the settings of a model")
        text.transformers_weights = getattr(config, "transformers_weights", None)
        text.dtype = text.dtype or config.dtype
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)  # the head is the outer model's
        config = _read("config", base_model, option_name, lambda: _as_text_model(text))
    family = family_of(config)
    family.settle(config)
    if kwargs and family.is_mixture:
        raise UserError(
            f"{where}: a mixture of experts is read from a folder or the hub, not from a .gguf file; name the model it was made of"
        )
    if kwargs:
        _read("config", base_model, option_name, lambda: gguf_settings.complete(config, gguf_reader(base_model), where))
    config._attn_implementation = None  # a file does not decide how attention is computed
    check_config(config, where if kwargs else f"{where}: config.json")
    _read("config", base_model, option_name, lambda: shape_of(config, family))
    if quantization is not None and not kwargs:
        method = quantization.get("quant_method", "unknown method")
        if method not in READERS:
            raise UserError(
                f"{where}: its weights are quantized ({method}), and only {' and '.join(READERS)} are read; "
                "name the unquantized model it was made from"
            )
        config.__dict__.pop("quantization_config", None)  # its weights are dequantized as they are read
        config.dtype = config.dtype or torch.bfloat16
    return config


def _quantization(config) -> dict | None:
    """What a config says of quantized weights; of a model of text and images that of its text model counts too."""
    found = [getattr(one, "quantization_config", None) for one in (config, getattr(config, "text_config", None))]
    found = next((settings for settings in found if settings is not None), None)
    return found if isinstance(found, dict | None) else found.to_dict()


def _as_text_model(config):
    """The config of a text model as that of the family that it is when it reads text alone."""
    if config.model_type not in TEXT_MODELS:
        return config
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    settings |= UNSAID.get(config.model_type, {})
    settings["rope_parameters"] = {name: value for name, value in config.rope_parameters.items() if name not in OF_IMAGES}
    found = AutoConfig.for_model(TEXT_MODELS[config.model_type], **settings)
    found.architectures = None
    if hasattr(found, "head_dim") and "head_dim" not in settings:  # its class derives it, the family's has a number
        found.head_dim = found.hidden_size // found.num_attention_heads
    return found


def load_tokenizer(base_model: str, option_name: str = "--base_model"):
    """The tokenizer that comes with a model. Raises UserError where there is none or it is broken; ``option_name`` as in errors."""
    source, kwargs = _source(base_model, option_name)
    return _read("tokenizer", base_model, option_name, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs))


def open_source(base_model: str, dtype: torch.dtype | str, option_name: str = "--base_model", config=None) -> ModelSource:
    """The model, dense or pruned, as a source of its parts in ``dtype`` ("auto": its own); no weight is read yet.

    ``config``: what :func:`load_config` gave, where it is at hand. Raises UserError where weights are missing, broken, of another
    shape than the config says, or unsupported; ``option_name`` is what it names the model by.
    """
    config = config or load_config(base_model, option_name)
    if is_gguf(base_model) and hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights are dequantized as they are read; the label would forbid saving
    if dtype == "auto":
        dtype = own_dtype(base_model, config) or torch.float32
    where, (source, kwargs) = f"{option_name} {base_model}", _source(base_model, option_name)
    skeleton = _read("config", base_model, option_name, lambda: skeleton_of(config, dtype))
    names = list(stored_tensors(skeleton))
    weights = _read("weights", base_model, option_name, lambda: _weights(base_model, source, config, names))
    pieces = None
    if not kwargs and (inside := inside_of(base_model, skeleton, weights, option_name)):
        weights.rename(inside.name_of)
        pieces = inside.pieces()
    if _settle_head(config, weights):
        skeleton = skeleton_of(config, dtype)
    if not kwargs and not all(map(weights.is_number, weights.names)):
        weights = _dequantized(weights, _stored_config(source, base_model, option_name), where)
    if family_of(config).is_mixture or (not kwargs and not set(weights.names).issuperset(names)):  # or they have other names there
        weights = Stacked(weights, skeleton, pieces)
    _check_tensors(skeleton, weights, where)
    if not kwargs and (generation := _generation_config(source, base_model, option_name)) is not None:
        skeleton.generation_config = generation
    return ModelSource(skeleton, weights, dtype)


def inside_of(base_model: str, skeleton, weights, option_name: str) -> Inside | None:
    """The names of the tensors of a text model inside another, where its files have them by the other's rules and not by its own behind a
    mark. ``skeleton``: the text model's; ``weights``: the reader of the files.
    """
    names = set(stored_tensors(skeleton))
    if names.issubset(weights.names):
        return None
    whole = _stored_config(base_model, base_model, option_name)
    if getattr(whole, "text_config", None) is None or names.issubset(Stacked(weights, skeleton).names):
        return None
    return _read("config", base_model, option_name, lambda: Inside(whole_skeleton_of(whole), LayerAdapter(skeleton.config)))


def _dequantized(weights, stored, where: str):
    """``weights`` as numbers of the dtype that the model's files say, whatever it is computed in. ``stored``: their config.

    Raises UserError, naming ``where``, where scales are missing or do not fit.
    """
    quantization = _quantization(stored)
    if quantization is None:
        return weights
    dtype = getattr(getattr(stored, "text_config", None), "dtype", None) or stored.dtype or torch.bfloat16
    reader = READERS[quantization["quant_method"]](weights, dtype, quantization)
    reader.check(where)
    return reader


def _stored_config(source: str, base_model: str, option_name: str, **kwargs):
    """What config.json says, as it stands there."""
    return _read("config", base_model, option_name, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False, **kwargs))


def _generation_config(source: str, base_model: str, option_name: str) -> GenerationConfig | None:
    """The generation config that comes with a model; None where it has none. Raises UserError for a broken one."""
    local = os.path.isdir(source)
    if local and not os.path.isfile(os.path.join(source, "generation_config.json")):
        return None

    def read():
        generation = GenerationConfig.from_pretrained(source)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(generation, name)
            if not all(isinstance(index, int) for index in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
                raise ValueError(f"{name} is {ids}, neither a token id nor a list of them")
        return generation

    try:
        return _read("generation_config.json", base_model, option_name, read)
    except UserError:
        if local:
            raise
        return None  # the hub's may have none


def _settle_head(config, weights) -> bool:
    """Settles by the files, as transformers does, whether the output head is the embeddings; returns whether the config was wrong.

    Where the config ties them, files with two different ones keep both, and a head alone in the files serves as the embeddings too.
    """
    family = family_of(config)
    head, embeddings = f"{family.head}.weight", f"{family.decoder}.{family.embedding}.weight"
    if not config.tie_word_embeddings or head not in weights.names:
        return False
    if embeddings not in weights.names:
        weights.call(embeddings, head)
    elif not weights.equal(head, embeddings):
        config.tie_word_embeddings = False
    return not config.tie_word_embeddings


def _check_tensors(skeleton, weights, where: str) -> None:
    """Raises UserError where the files do not hold the model of the config: tensors missing, of another shape, of no use, or unknown."""
    expected, stored_names = stored_tensors(skeleton), set(weights.names)
    missing = [name for name in expected if name not in stored_names]
    patterns = "|".join([_FOLLOWS, *(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or [])])
    strange = [name for name in stored_names - set(skeleton.state_dict()) if not re.search(patterns, name)]
    if missing:
        instead = f"; the files name others, such as {min(strange)}: rename them, or download the model again" if strange else ""
        raise UserError(f"{where}: {len(missing)} weights are missing, the first {min(missing)}{instead}")
    if strange:
        more = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UserError(
            f"{where}: the files hold {min(strange)}{more}, of which the model that config.json describes has none; "
            "transformers would drop it and compute another model: correct config.json, or remove the tensors"
        )
    wrong = [name for name, tensor in expected.items() if list(tensor.shape) != list(weights.shape(name))]
    if wrong:
        name = min(wrong)
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{where}: {name} is {list(weights.shape(name))} in the weights and "
            f"{list(expected[name].shape)} by config.json{more}; the two do not belong together"
        )
    odd = [name for name, tensor in expected.items() if tensor.is_floating_point() and not weights.is_number(name)]
    if odd:
        raise UserError(
            f"{where}: {min(odd)} is {weights.dtype_name(min(odd))}, as in quantized weights; name the unquantized model it was made from"
        )


def _weights(base_model: str, source: str, config, names: list[str]):
    """The reader of a model's files; a hub model is downloaded first, where it is not in the cache."""
    if is_gguf(base_model):
        return GgufTensors(base_model, config, names)
    files = weight_files(weights_folder(source, config), getattr(config, "transformers_weights", None))
    return (Tensors if files[0].suffix == ".safetensors" else PickledTensors)(files)


def weights_folder(source: str, config) -> str:
    """The folder that holds a model's files of weights; a hub model's are downloaded first, where they are not in the cache."""
    return source if os.path.isdir(source) else hub.download_weights(source, getattr(config, "transformers_weights", None))


def load_model(base_model: str, dtype: torch.dtype | str, option_name: str = "--base_model", device: torch.device | str = "cpu"):
    """The whole model, dense or pruned, in ``dtype`` ("auto": its own) on ``device``. Raises UserError as :func:`open_source` does."""
    return open_source(base_model, dtype, option_name).whole(device=device)


@contextmanager
def placed_for_evaluation(model, device: torch.device):
    """The model with its weights on ``device`` in the dtype that evaluation uses; afterwards they are as before.

    Only parameters are cast: position frequencies stay float32, as from_pretrained leaves them.
    """
    dtype = evaluation_dtype(model.dtype, device)
    exact = in_float32(model.config, dtype)
    originals = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    try:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(device=device, dtype=torch.float32 if name in exact else dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device=device)
        yield model
    finally:
        for tensor, data in originals:
            tensor.data = data
        return_free_memory()


SMALL = 2_000_000_000  # bytes that a model may take whole where only its answers to a few prompts need that


class WholeModel:
    """A model, or a ModelSource, that may be needed whole, to write text: then it is read once, in the dtype of evaluation.

    ``progress``: called with what is being done with it, how much of that is done, and of how much.

    Inside a ``with`` block: what was read or moved is given back at its end.
    """

    def __init__(self, model, device: torch.device, progress: Callable[[str, int, int], None] = lambda *_: None):
        self.source, self.device, self.config, self.progress = ModelSource.of(model), device, model.config, progress
        self._stack, self._model = contextlib.ExitStack(), None

    @property
    def fits(self) -> bool:
        """Whether there is room for it. A model in memory has it already."""
        return not self.source.streams or self.bytes < free_memory(self.device)

    @property
    def is_small(self) -> bool:
        """Whether it may be read whole although nothing else in a run needs that."""
        return self.fits and self.bytes <= SMALL

    @property
    def bytes(self) -> int:
        """What it takes: the weights, and a tenth for what is computed with them."""
        return round(1.1 * self.source.weight_bytes(evaluation_dtype(self.source.dtype, self.device)))

    @staticmethod
    def peak_bytes(parameters: int, sizes) -> int:
        """What it takes of a run whose numbers have these ``sizes`` (streaming.Sizes), where the run needs it."""
        whole = round(1.15 * parameters * sizes.evaluation)
        may = sizes.may_generate or (sizes.answers and whole <= SMALL)
        return whole if sizes.generates or (may and whole < sizes.free) else 0

    def model(self):
        """The model; a ModelSource is read the first time. Raises UserError where it does not fit."""
        if self._model is not None:
            return self._model
        if not self.fits:
            raise UserError(
                f"the model's own text: the whole model needs {self.bytes / 1e9:.1f} GB on {self.device}, and "
                f"{free_memory(self.device) / 1e9:.1f} GB are free; name a text with --calibration"
            )
        if not self.source.streams:
            self._model = self._stack.enter_context(placed_for_evaluation(self.source.model, self.device))
        else:
            log.info("to write text, the whole model is read into memory: %.2f GB on %s", self.bytes / 1e9, self.device)
            self._model = self.source.whole(evaluation_dtype(self.source.dtype, self.device), self.device)
        return self._model

    def close(self) -> None:
        """Gives back what was read or moved to the device."""
        self._model = None
        self._stack.close()
        return_free_memory()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
