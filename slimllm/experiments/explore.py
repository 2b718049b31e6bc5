"""What pruning a model by any share would cost, before it is pruned: ``slimllm explore MODEL``.

The price list is measured once; each share is then planned from it in a moment, and ``--check`` prunes some of them for good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shlex
from pathlib import Path

from .. import cli, stages
from ..data import calibration
from ..errors import UserError
from ..models import loading
from ..plan import removed_parameters
from ..pruning import vocabulary
from ..pruning.allocation import price_list, prices
from ..pruning.allocation.budget import of_parameters
from ..pruning.allocation.inputs import AllocationInputs
from ..pruning.allocation.price_list import PriceList
from ..pruning.allocation.sizing import Sizing
from ..pruning.allocation.solver import predicted, solve
from ..reporting import record
from ..reporting.figures import loss_against_size
from ..reporting.tables import aligned
from ..run import Run
from ..settings.common import short_name
from ..settings.explore import ExploreConfig
from ..streaming.progress import bar_on_terminal
from ..utils.device import pruning_dtype
from ..utils.files import write_text
from .trials import Trial, measure

log = logging.getLogger("slimllm")

GENTLE = 0.1  # nats per token: perplexity rises by a tenth
BEND = 2.0  # where each further per cent costs so many times what the first ones cost


def run(config: ExploreConfig) -> None:
    """Measures or reads the price list, writes it, and prints and draws what each share costs."""
    calibration.check_source(config.calibration)
    file = record.results_in(Path(config.output), price_list.NAME)
    continues = config.price_list is not None and file.exists() and file.samefile(config.price_list)
    way = "name another --output, or replace it with --overwrite"
    if os.path.lexists(file) and not continues and not config.overwrite:
        raise UserError(f"{file}: an earlier run measured it; plan from it with --price_list {file}, {way}")
    with record.results_at(file, config.overwrite and not continues, ours=price_list.is_list):
        _explore(config, file.parent)


def _explore(config: ExploreConfig, folder: Path) -> None:
    run = Run.of(config.pruning(0.1), loading.load_config(config.base_model))
    if config.vocab != "keep":
        run.tokenizer, run.config = loading.load_tokenizer(config.base_model), config.with_tokens(0.1).resolved(run.shape)
        vocabulary.check(run)
    _check_shares(run, config)
    found = _price_list(run, config)
    folder.mkdir(parents=True, exist_ok=True)
    found.write(folder)
    sizes = _vocabularies(run, config)
    points = [point for share in config.target_sparsity if (point := _point(run, found, config, share))]
    if config.check:
        for row in _checked(config, folder / price_list.NAME):
            dense = {figure["data"]: figure["pruned"] for figure in row["dense"]}
            nats = {f["data"]: math.log(f["pruned"] / dense[f["data"]]) for f in row["perplexity"]}
            points.append(_point(run, found, config, row["share"]) | {"measured": nats})
    for point in points if sizes else []:
        point |= _with_tokens(run, found, config, point["smaller"], sizes)
    measured = {point["share"] for point in points if "measured" in point}
    points = [point for point in points if "measured" in point or point["share"] not in measured]
    points.sort(key=lambda point: point["share"])
    lines = [*table(points), "", *said(points)]
    write_text(folder / "table.md", "\n".join(lines) + "\n")
    loss_against_size(points, short_name(config.base_model), GENTLE, folder)
    words = _words(config, folder / price_list.NAME, min((point["share"] for point in points), key=lambda share: abs(share - 0.2)))
    log.info("\n%s\n\neverything lies in %s/; this prunes from it, with no price measured again:", "\n".join(lines), folder)
    log.info("  %s prune %s", cli.program(), shlex.join(words))


def _words(config: ExploreConfig, file: Path, share: float) -> list[str]:
    """The flags of a pruning by the list in ``file`` with the settings that it was made with, which are those that take it."""
    others = cli.given(config) & {*config.settings} - {"recipe", "prices", "price_list"}
    words = [config.base_model, "--recipe", config.recipe, "--price_list", str(file), "--target_sparsity", str(share)]
    return words + [word for name in config.settings if name in others for word in (f"--{name}", str(getattr(config, name)))]


def _check_shares(run: Run, config: ExploreConfig) -> None:
    """Raises UserError before anything is measured where the layers cannot give up a share that is to be checked, or any at all."""
    alike = PriceList.alike(run.shape, run.config)  # what can go is the same whatever it costs
    for option, shares in (("target_sparsity", config.target_sparsity), *(("check", (share,)) for share in config.check)):
        if not any(_point(run, alike, config, share) for share in shares):
            raise UserError(f"--{option} {' '.join(map(str, shares))}: the layers cannot give up as much; ask for less")


def _price_list(run: Run, config: ExploreConfig) -> PriceList:
    if config.price_list is not None and config.vocab == "keep":
        return PriceList.read(config.price_list, run.shape, run.config)
    run.dtype = pruning_dtype(config.dtype, run.device, loading.own_dtype(config.base_model, run.model_config))
    run.tokenizer = loading.load_tokenizer(config.base_model)
    run.source = loading.open_source(config.base_model, run.dtype, config=run.model_config)
    with bar_on_terminal() as run.progress:
        stages.calibrate(stages.Work(run, given=config.calibration))
        if config.price_list is not None:
            return PriceList.read(config.price_list, run.shape, run.config)
        found = prices.measured(AllocationInputs(run.shape, run.config, run))
    log.info("price list: %d prices in %.1f s", len(found.prices), found.seconds)
    return found


def _vocabularies(run: Run, config: ExploreConfig) -> list[tuple[int, float]]:
    """(a number of tokens, what these alone cost), where fewer of them are looked at."""
    if config.vocab == "keep":
        return []
    with bar_on_terminal() as run.progress:
        return list(vocabulary.losses(vocabulary.Ranked(run), functools.partial(stages.perplexity_held_out, run)))


def _with_tokens(run: Run, found: PriceList, config: ExploreConfig, smaller: float, sizes: list[tuple[int, float]]) -> dict:
    """What making the whole model smaller by this share costs, with as many tokens as cost least, and how many these are."""
    settings, offers = config.with_tokens(smaller).resolved(run.shape), []
    for tokens, nats in sizes:
        with contextlib.suppress(UserError):
            offers.append((nats + vocabulary.of_layers(run, settings, found, tokens), tokens))
    loss, tokens = min(offers)
    return {"loss_with_tokens": loss, "tokens": tokens}


def _point(run: Run, found: PriceList, config: ExploreConfig, share: float) -> dict | None:
    """What removing this share of the decoder costs by the price list; None where that much cannot go."""
    settings = config.pruning(share).resolved(run.shape)
    sizing = Sizing(run.shape, settings)
    try:
        plans = solve(found, sizing, of_parameters(run.shape, settings))
    except UserError:
        return None
    gone, units = removed_parameters(run.shape, plans, settings), [plan.units for plan in plans]
    return {
        "share": share,
        "parameters": run.shape.parameters - gone,
        "smaller": gone / run.shape.parameters,
        "cache": run.shape.cache_numbers(units) / max(run.shape.cache_numbers(), 1),
        "loss": predicted(found, sizing, plans),
    }


def _checked(config: ExploreConfig, file: Path) -> list[dict]:
    """The shares to check, pruned from the price list and measured; beside each the dense model's perplexities."""
    settings = {**config.settings, "price_list": str(file)}
    trials = [Trial("dense", "", 0.0, {})] + [Trial(config.recipe, "", share, settings) for share in config.check]

    def dense(bench, trial):
        return bench.model, {"name": trial.name, "variant": "", "share": 0.0, "settings": {}, "seconds": 0.0, "removed": 0.0}

    there = dataclasses.replace(config, output=str(Path(config.output) / "check"))
    rows = measure(there, trials, unpruned=dense, identity=config.settings)["rows"]
    [base] = [row for row in rows if not row["share"]]
    return [row | {"dense": base["perplexity"]} for row in rows if row["share"] in config.check]


def table(points: list[dict]) -> list[str]:
    """Markdown, one row per share: sizes, predicted loss, and what was measured where it was."""
    texts = list(dict.fromkeys(text for point in points for text in point.get("measured", ())))
    with_tokens = any("tokens" in point for point in points)
    header = ["decoder removed", "model smaller", "parameters", "KV cache kept", "predicted loss, nats", *(f"measured, {t}" for t in texts)]
    header += ["with fewer tokens, nats", "tokens"] if with_tokens else []
    rows = [header]
    for p in points:
        cells = [f"{p['share']:.0%}", f"{p['smaller']:.1%}", f"{p['parameters'] / 1e6:.1f} M", f"{p['cache']:.0%}", f"{p['loss']:.3f}"]
        cells += [f"{p['measured'][t]:.3f}" if t in p.get("measured", ()) else "" for t in texts]
        rows.append(cells + ([f"{p['loss_with_tokens']:.3f}", f"{p['tokens']:,}"] if with_tokens else []))
    return aligned(rows)


def said(points: list[dict]) -> list[str]:
    """What the curve says, in words: up to where little is lost, and from where on it costs much more."""
    curve = sorted({point["share"]: point["loss"] for point in points}.items())
    gentle = [share for share, loss in curve if loss <= GENTLE]
    first = curve[0][1] / curve[0][0]
    steps = zip(curve, curve[1:])
    bend = next((a for (a, low), (b, high) in steps if (high - low) / (b - a) > BEND * first), None)
    up_to = f"up to {gentle[-1]:.0%}" if gentle else f"at no share from {curve[0][0]:.0%} on"
    lines = [f"predicted loss stays below {GENTLE} nats per token (perplexity {math.exp(GENTLE) - 1:.0%} higher) {up_to} of the decoder"]
    if bend is not None:
        lines.append(f"from {bend:.0%} on each further per cent costs more than {BEND:.0f} times what the first ones do")
    return lines
