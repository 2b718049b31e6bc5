"""Many prunings of one model, measured alike: what the ablation and the comparison of methods have in common.

The model is read once; every trial prunes a fresh copy. One JSON file holds the rows, so a stopped run goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import stages
from ..data import calibration
from ..data.texts import blocks_in_other_tokens, blocks_of, load_texts
from ..errors import UserError
from ..evaluation import answers, zero_shot
from ..evaluation.perplexity import nats_per_byte, perplexity
from ..models import loading
from ..models.adapter import LayerAdapter
from ..models.loading import WholeModel
from ..models.shape import shape_of
from ..reporting import record
from ..settings.common import short_name
from ..settings.pruning import PruneConfig
from ..settings.trials import TrialsConfig
from ..training.teacher import Teacher
from ..utils.device import device_of, name_of, pruning_dtype

log = logging.getLogger("slimllm")

SEQ_LEN = 128  # tokens per sample and per block of text


@dataclass(frozen=True)
class Trial:
    """One pruning: what it shows (``name``, ``variant``), the share removed, and the settings that make it."""

    name: str
    variant: str
    share: float
    settings: dict

    @property
    def key(self) -> tuple[str, str, float]:
        return self.name, self.variant, self.share


class Bench:
    """The dense model, the texts, and the calibration samples and teachers that were asked for so far."""

    def __init__(self, config: TrialsConfig, dtype, device, trials: list[Trial]):
        self.config, self.device = config, device
        calibration.check_source(config.calibration)
        self.tokenizer = loading.load_tokenizer(config.base_model)
        self.texts = load_texts(config.eval_data)
        self.model = loading.load_model(config.base_model, dtype)
        self.blocks = [blocks_of(text, self.tokenizer, self.model.config, SEQ_LEN, config.eval_limit) for text in self.texts]
        self.adapter, self.shape = LayerAdapter(self.model.config), shape_of(self.model.config)
        self._samples: dict[tuple, calibration.Calibration] = {}
        self._teachers: dict[tuple, tuple[Teacher, float]] = {}  # and the seconds each took
        settings = [self.settings(trial) for trial in trials if trial.share]
        self._distilled = {_kind_of_samples(each): each for each in settings if each.distill != "none"}
        self._last: tuple = (None, None, 0.0)  # settings of the last pruning, what it gave, and its seconds

    def settings(self, trial: Trial) -> PruneConfig:
        """All settings of a pruning, defaults resolved. Raises UserError where they cannot be met."""
        shared = {"base_model": self.config.base_model, "calibration": self.config.calibration, "seed": self.config.seed}
        shared |= {"seq_len": SEQ_LEN, "device": self.config.device, "target_sparsity": trial.share}
        return PruneConfig(**{**shared, **trial.settings}).resolved(self.shape)

    def samples(self, settings: PruneConfig) -> calibration.Calibration:
        """The calibration that these settings ask for; the same tokens wherever two trials ask for the same."""
        kind = _kind_of_samples(settings)
        if kind not in self._samples:
            settings = self._distilled.get(kind, settings)  # which wants the same samples, and others to distil on
            with WholeModel(self.model, self.device) as whole:
                self._samples[kind] = calibration.samples_for(settings, self.config.calibration, whole, self.tokenizer)
        return self._samples[kind]

    def teacher(self, settings: PruneConfig) -> tuple[Teacher, float]:
        """What the dense model makes of the samples to distil on, and the seconds that it took."""
        kind = _kind_of_samples(settings)
        if kind not in self._teachers:
            work = self._work(self.model, settings)
            stages.teach(work)
            self._teachers[kind] = work.teacher, work.run.clock.seconds["distillation"]
        return self._teachers[kind]

    def _work(self, model, settings: PruneConfig) -> stages.Work:
        work = stages.of_model(model, settings)
        work.run.samples = self.samples(settings)
        return work

    def removed(self, model) -> float:
        """The share of the dense decoder's parameters that ``model`` lacks."""
        return 1 - sum(parameter.numel() for parameter in self.adapter.layers(model).parameters()) / self.shape.decoder_parameters

    def figures(self, model, tokenizer=None) -> list[dict]:
        """Perplexities and nats per byte, one entry per text; with the model's own ``tokenizer``, where it is not the dense one's.

        The number of blocks that an entry gives is that of the dense model's, whose text it is.
        """
        blocks, limit = self.blocks, self.config.eval_limit
        if tokenizer is not None:
            old = self.tokenizer
            blocks = [blocks_in_other_tokens(t, ids, old, tokenizer, model.config, limit) for t, ids in zip(self.texts, blocks)]
        with loading.placed_for_evaluation(model, self.device):
            values = [perplexity(model, ids, text.name) for text, ids in zip(self.texts, blocks)]
        nats = [nats_per_byte(value, ids, tokenizer or self.tokenizer) for value, ids in zip(values, blocks)]
        return [t.figure(ids, limit, pruned=v, nats_per_byte=n) for t, ids, v, n in zip(self.texts, self.blocks, values, nats)]

    def scores(self, model, tokenizer, data_dir: str | None, tasks: tuple[str, ...], limit: int | None) -> dict:
        """Zero-shot results, by task; with the model's own ``tokenizer``, where it is not the dense one's."""
        with loading.placed_for_evaluation(model, self.device):
            return {name: zero_shot.score(model, tokenizer or self.tokenizer, name, data_dir, limit) for name in tasks}

    def chat_quality(self, model, tokenizer=None) -> dict | None:
        """How it chats, by the dense model's judgement; None without a chat template. ``tokenizer`` as of :meth:`scores`."""
        asked = tokenizer or self.tokenizer
        if not asked.chat_template:
            return None
        with loading.placed_for_evaluation(model, self.device):
            entries = answers.answers(model, asked, [], answers.CHAT)
        with loading.placed_for_evaluation(self.model, self.device):
            return dataclasses.asdict(answers.chat_quality(entries, self.model, self.tokenizer))

    def other_tokenizer(self, folder: str):
        """The tokenizer of a checkpoint, or None where its tokens are the dense model's."""
        found = loading.load_tokenizer(folder, "--also")
        return None if found.get_vocab() == self.tokenizer.get_vocab() else found

    def prune(self, trial: Trial):
        """(the pruned model, its entry of the results without the measurements).

        One that is distilled is not pruned again where the trial before it was the same without.
        """
        settings = self.settings(trial)
        samples = self.samples(settings)
        start = {**settings.to_dict(), "recipe": None, "distill": "none", "distill_learning_rate": None}
        before, model, seconds = self._last
        self._last = (None, None, 0.0)
        if before != start:
            work = self._work(copy.deepcopy(self.model), settings)
            stages.go_through((stages.drop, stages.allocate, stages.prune, stages.finish), work)
            model, seconds = work.model, work.run.clock.seconds["pruning"]
        if settings.distill == "none":
            self._last = (start, copy.deepcopy(model), seconds)
        else:
            work = self._work(model, settings)
            work.teacher, taught = self.teacher(settings)
            work.lent = True
            stages.distil(work)
            seconds += taught + work.run.clock.seconds["distillation"]
        return model, {
            "name": trial.name,
            "variant": trial.variant,
            "share": trial.share,
            "settings": trial.settings,
            "seconds": round(seconds, 1),
            "removed": self.removed(model),
            "parameters": model.num_parameters(),
            "calibration": samples.to_dict(),
        }


def _kind_of_samples(settings: PruneConfig) -> tuple:
    """What decides which calibration samples a pruning of one model takes, given source and seed."""
    return settings.num_examples, settings.self_share, settings.chat_share, settings.distill_examples


def state_of_model(name: str) -> list:
    """What tells a model from another: its name on the hub; of a folder or file its own, and size and date of config and weights."""
    path = Path(name)
    if not path.exists():
        return [name]
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.name == "config.json" or "model" in file.name)
    return [short_name(name), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file())]


def measure(
    config: TrialsConfig,
    trials: list[Trial],
    also: Callable[[Bench, object, object, dict], None] = lambda bench, model, tokenizer, row: None,
    unpruned: Callable[[Bench, Trial], tuple] | None = None,
    identity: dict | None = None,
    finish: Callable[[TrialsConfig, list[dict]], bool] = lambda config, rows: False,
) -> dict:
    """All ``trials`` that the results file does not hold yet; it is written anew after each. Returns the results.

    ``also(bench, model, tokenizer, row)`` may measure more of each model; ``identity``: what its outcome depends on.
    ``unpruned(bench, trial)`` gives model and entry where the share is 0, with its ``folder`` where it has one. ``finish(config, rows)``
    adds to the rows, once all are there, and says whether it did.
    """
    device = device_of("device", config.device)
    model_config = loading.load_config(config.base_model)
    dtype = pruning_dtype(config.dtype, device, loading.own_dtype(config.base_model, model_config))
    fingerprint = {"model": state_of_model(config.base_model), "dtype": name_of(dtype), "calibration": config.calibration}
    fingerprint |= {"seed": config.seed, "eval_data": config.eval_data, "eval_limit": config.eval_limit, **(identity or {})}
    file = record.results_in(Path(config.output), "results.json")
    with record.results_at(file, config.overwrite):
        results = record.continued(file, fingerprint, config.overwrite)
        rows = results.setdefault("rows", [])
        for row in rows:
            if "folder" in row and row.get("files") != state_of_model(row["folder"]):
                raise UserError(f"{file}: {row['folder']} was written anew since it was measured; name another --output, or --overwrite")
        done = {(row["name"], row["variant"], row["share"]) for row in rows}
        missing = [trial for trial in trials if trial.key not in done]
        log.info("%s: %d prunings to do, %d at hand", file, len(missing), len(done))
        bench = Bench(config, dtype, device, missing) if missing else None
        texts = {text.name: text.sha256 for text in bench.texts} if bench else {}
        for figure in (figure for row in rows for figure in row["perplexity"]):
            if texts.get(figure["data"], figure.get("sha256")) != figure.get("sha256"):
                raise UserError(f"{file}: the text {figure['data']} was changed since; name another --output, or --overwrite")
        for trial in missing:
            model, row = bench.prune(trial) if trial.share else unpruned(bench, trial)
            tokenizer = None
            if "folder" in row:
                tokenizer, row["files"] = bench.other_tokenizer(row["folder"]), state_of_model(row["folder"])
            row["other_tokens"] = tokenizer is not None
            row["perplexity"] = bench.figures(model, tokenizer)
            also(bench, model, tokenizer, row)
            del model
            rows.append(row)
            shown = ", ".join(f"{figure['data']} {figure['pruned']:.1f}" for figure in row["perplexity"])
            took = f" ({row['seconds']:.0f} s)" if row["seconds"] else ""
            log.info("%.0f %%, %s %s: %s%s", 100 * trial.share, trial.name, trial.variant, shown, took)
            record.save_results(results, file)
        if finish(config, rows):
            record.save_results(results, file)
        return results
