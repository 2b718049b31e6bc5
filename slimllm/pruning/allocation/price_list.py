"""The price list: what each part of each layer costs, in nats per token, at some numbers of units kept, and how the rest follows."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ...errors import UserError
from ...models.parts import EXPERT_CHANNELS, ChannelSteps, PartShape, Units, all_steps, goes
from ...models.shape import ModelShape
from ...settings.pruning import PruneConfig
from ...utils.files import check_plain, write_text

log = logging.getLogger("slimllm")

NAME = "price_list.json"
FORMAT = 1
MOST_NATS = 1e9  # that a price can be: no model is known to lose as much
LEVELS = (0.125, 0.25, 0.5, 0.75)  # shares of a part whose removal is priced; what lies between follows from a curve through them
_DECIDED_BY = ("method", "recovery", "head_choice", "channel_score", "expert_score", "head_unit", "new_bias", "keep_lowest", "prices")


@dataclass(frozen=True)
class Price:
    """What one part costs, in nats per token, where it keeps these ``units``, loses this ``share`` of them, and all others are whole."""

    layer: int
    part: str
    units: Units
    share: float
    nats: float


@dataclass
class PriceList:
    """Prices of one model, on one text, for one way to choose units and to recover outputs.

    ``prices``: of every part of every layer that loses units, at some levels; of experts, and of the channels of each, apart.
    ``settings``: those that they follow from. ``calibration``: the SHA-256 of the samples; ``tokens``: how many the model was asked about.
    ``seconds``: that it took.
    """

    model: str
    units: list[dict[str, Units]]
    settings: dict
    calibration: str
    tokens: int
    prices: list[Price]
    seconds: float = 0.0
    format: int = field(default=FORMAT)

    @classmethod
    def of(cls, shape: ModelShape, config: PruneConfig, calibration: str, tokens: int, prices: list[Price], seconds: float) -> PriceList:
        settings = {name: getattr(config, name) for name in _DECIDED_BY}
        return cls(Path(config.base_model).name, shape.units, settings, calibration, tokens, prices, seconds)

    @classmethod
    def alike(cls, shape: ModelShape, config: PruneConfig) -> PriceList:
        """That of a model whose parts all cost the same per parameter, from its shape alone."""
        prices = []
        for index, layer in enumerate(shape.layers):
            for part, level in levels_in(layer.parts, config, shape.is_mixture):
                share = part.parameters() / shape.decoder_parameters
                prices.append(Price(index, part.kind, level.units, level.share, share * level.share**1.5))
        return cls.of(shape, config, "", 0, prices, 0.0)

    @cached_property
    def curves(self) -> dict[tuple[int, str, str], tuple[float, float]]:
        """(layer, part, sort of units) -> its :func:`curve`; what has nothing to give has none."""
        found = {}
        for price in self.prices:
            found.setdefault((price.layer, price.part, self._sort_of(price)), []).append(price)
        return {key: curve(prices) for key, prices in found.items()}

    def _sort_of(self, price: Price) -> str:
        """The sort of units that a price is of: the first that the part has fewer of. KV heads go with query heads."""
        whole = self.units[price.layer][price.part]
        return next(sort for sort, count in price.units.items() if count != whole[sort])

    def curve_of(self, layer: int, part: str, sort: str) -> tuple[float, float]:
        """The curve of a part's units of a sort; what has nothing to give costs nothing."""
        return self.curves.get((layer, part, sort), (0.0, 1.0))

    @property
    def mean(self) -> float:
        """What the whole of a part costs by its curve, nats per token, in the mean over the parts."""
        return sum(scale for scale, _ in self.curves.values()) / max(len(self.curves), 1)

    def of_halves(self, layers: int) -> list[float]:
        """What half of all parts of each layer costs, nats per token."""
        costs = [0.0] * layers
        for (layer, *_), (scale, exponent) in self.curves.items():
            costs[layer] += scale * 0.5**exponent
        return costs

    def of_part(self, layer: int, part: str, sort: str | None = None) -> list[Price]:
        """The prices of a part, or of its units of one sort."""
        prices = [price for price in self.prices if (price.layer, price.part) == (layer, part)]
        return prices if sort is None else [price for price in prices if self._sort_of(price) == sort]

    def write(self, folder: Path) -> None:
        """Writes price_list.json into ``folder``."""
        write_text(folder / NAME, json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: dict) -> PriceList:
        """What asdict made of a list, also where JSON held it since. Raises KeyError, TypeError, ValueError or AttributeError else."""
        prices = [Price(**{**entry, "nats": float(entry["nats"]), "share": float(entry["share"])}) for entry in content["prices"]]
        return cls(**{**content, "prices": prices})

    @classmethod
    def read(cls, path: str | os.PathLike, shape: ModelShape, config: PruneConfig) -> PriceList:
        """What :meth:`write` wrote, for a model of this shape. Raises UserError, naming the file, for anything else, and where other
        settings than the ones in ``config`` made it.
        """
        flag = f"--price_list {path}"
        check_plain(path, "--price_list ")
        try:
            found = cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{flag}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{flag}: not a price list, such as the {NAME} of a run or of slimllm explore") from None
        if not isinstance(found.settings, dict):
            raise UserError(f"{flag}: its settings are no JSON object; make a new list (slimllm explore)")
        if found.format != FORMAT or found.units != shape.units:
            raise UserError(f"{flag}: it is of {found.model}, a model of other widths; make one of this model (slimllm explore)")
        for name in _DECIDED_BY:
            now = getattr(config, name)
            made = found.settings.get(name, now)  # older lists, of models without experts, have no score of experts
            if name != "prices" and made != now:
                raise UserError(f"{flag}: it was made with --{name} {made}, and this run has {now}; give the same, or make a new list")
        found._check(flag, shape, config)
        if found.model != Path(config.base_model).name:
            log.info("%s: it was made of %s; the prices of another model, though of the same widths, are not this one's", flag, found.model)
        return found

    def _check(self, flag: str, shape: ModelShape, config: PruneConfig) -> None:
        """Raises UserError for a price of what the model has not, and where something that goes has none, or one that is no number."""
        for index, layer in enumerate(shape.layers):
            for part, level in levels_in(layer.parts, config, shape.is_mixture):
                prices = [price for price in self.of_part(index, part.kind) if price.units == level.units]
                if len(prices) != 1 or not (self._is_usable(prices[0]) and math.isclose(prices[0].share, level.share, abs_tol=1e-6)):
                    raise UserError(f"{flag}: layer {index}: its {part.title} has no usable price; make a new list (slimllm explore)")
        for number, price in enumerate(self.prices):
            if not self._is_usable(price):
                raise UserError(f"{flag}: price {number} is of nothing that this model has, or no number; make a new list")

    def _is_usable(self, price: Price) -> bool:
        """Whether it is a number, of a part of the model that keeps fewer of its units."""
        there = type(price.layer) is int and 0 <= price.layer < len(self.units) and isinstance(price.part, str)
        whole = self.units[price.layer].get(price.part) if there else None
        fewer = whole is not None and isinstance(price.units, dict) and price.units.keys() == whole.keys() and price.units != whole
        fewer = fewer and all(type(count) is int and 0 <= count <= whole[sort] for sort, count in price.units.items())
        return fewer and 0 < price.share <= 1 and is_price(price.nats)


def is_price(nats: float) -> bool:
    """Whether so many nats per token can be what something costs; not so where they are no number."""
    return 0 <= nats <= MOST_NATS


def is_list(path: Path) -> bool:
    """Whether this is a file that :meth:`PriceList.write` wrote."""
    try:
        PriceList.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class Level:
    """What is priced of a part: that it keeps so many ``steps`` of what goes, which leaves it these ``units`` and takes this ``share``."""

    steps: int
    units: Units
    share: float


def levels_of(steps, multiple: int = 1) -> list[int]:
    """The numbers of steps kept that are priced, ascending; ``multiple``: what they are multiples of."""
    kept = {steps.count - max(1, round(share * steps.count)) for share in LEVELS}
    kept = {count // multiple * multiple for count in kept}
    return sorted(count for count in kept if count >= max(steps.least, 1))


def levels_in(parts: tuple[PartShape, ...], config: PruneConfig, mixture: bool) -> list[tuple[PartShape, Level]]:
    """What is priced of the parts of a layer, each with its part. ``mixture``: whether the model is one of experts."""
    found = []
    for part in parts:
        for steps in all_steps(part, config.head_unit):
            multiple = EXPERT_CHANNELS if part.kind == "experts" and isinstance(steps, ChannelSteps) else 1
            for count in levels_of(steps, multiple) if goes(config.prune, part, steps.sort, mixture) else []:
                found.append((part, Level(count, part.units | steps.units(count), 1 - count / steps.count)))
    return found


def curve(prices: list[Price]) -> tuple[float, float]:
    """(a, e) of the curve a q^e through the prices of one part, q the share of it that goes; e from 1 to 3 (Eq. i of docs/method.md).

    Fitted to their logarithms, so that what is measured of small shares counts as much as what is measured of large ones.
    """
    shares = torch.tensor([price.share for price in prices], dtype=torch.float64)
    nats = torch.tensor([price.nats for price in prices], dtype=torch.float64).clamp_min(1e-9)
    x, y = shares.log(), nats.log()
    spread = (x - x.mean()).square().sum()
    exponent = 1.0 if spread == 0 else float((((x - x.mean()) * (y - y.mean())).sum() / spread).clamp(1, 3))
    return float((y - exponent * x).mean().exp()), exponent
