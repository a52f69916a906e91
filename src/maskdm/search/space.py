"""What a search chooses from: masks, shares, learning rates and batches, and how it is done."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from maskdm import families
from maskdm.choices import choice, known, shown
from maskdm.metrics import METRICS, qualities
from maskdm.settings import Settings

PROXIES = {name: METRICS[name] for name in qualities() if not METRICS[name].higher_is_better}
Factor = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(gt=0, lt=1)]
Suggest = Callable[[str, Sequence[Any], bool], Any]  # name, choices, whether they have an order


class Space(Settings):
    """The schedules that a search chooses from: grids, so that trials share what they train."""

    kinds: tuple[families.MaskName, ...] = Field(("patch", "block", "crop"), min_length=1)
    """Kinds of mask."""
    rates: tuple[Part, ...] = Field((0.25, 0.5, 0.75, 0.9), min_length=1)
    """Fractions hidden."""
    block: int = Field(2, gt=0)
    """Side of a block, in patches (kind block)."""
    masked_stages: tuple[Annotated[int, Field(ge=1, le=3)], ...] = Field((1, 2), min_length=1)
    """Numbers of masked stages before the last one, of whole images. Dense is always there."""
    shares: tuple[Part, ...] = Field((0.2, 0.4, 0.6), min_length=1)
    """Parts of a run's FLOPs that go to its masked stages, in equal parts."""
    lrs: tuple[Factor, ...] = Field((0.25, 0.5, 1.0, 2.0, 4.0), min_length=1)
    """Learning rates of all stages, as multiples of the recipe's."""
    masked_lrs: tuple[Factor, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    """Another multiple for masked stages."""
    batches: tuple[Factor, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    """Batches of all stages, as multiples of the recipe's."""

    @model_validator(mode="after")
    def _consistent(self) -> Space:
        if "none" in self.kinds:
            raise ValueError("kinds: none hides nothing, and is always searched: leave it out")
        for name, values in self:
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"{name}: each only once, not {' '.join(map(str, values))}")
        return self


class How(Settings):
    """How a search divides its budget."""

    candidates: int = Field(27, ge=4)
    """Schedules tried at the shortest length; a third of them, or more, are dense."""
    rungs: int = Field(3, ge=1)
    """Lengths of trials, each `keep` times the one before, with a `keep`-th of the schedules."""
    keep: int = Field(3, ge=2)
    """One in so many schedules goes on to the next rung."""
    repeats: int = Field(3, ge=2)
    """Fresh seeds on which the best masked and the best dense schedule are compared."""
    proxy: Annotated[str, known(PROXIES, "proxy"), shown(PROXIES)] = choice(
        "dense_loss", PROXIES, "What orders the trials, on the way."
    )

    @model_validator(mode="after")
    def _consistent(self) -> How:
        if self.sizes[-1] < 2:
            least = 2 * self.keep ** (self.rungs - 1)
            raise ValueError(
                f"{self.candidates} candidates over {self.rungs} rungs leave no two for the last: "
                f"use {least} candidates or more, or fewer rungs"
            )
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of schedules on each rung."""
        return tuple(self.candidates // self.keep**rung for rung in range(self.rungs))


@dataclass(frozen=True)
class Schedule:
    """A schedule of training.

    Attributes:
        masks: (kind, rate) of each masked stage; none for dense training.
        share: part of the FLOPs that go to masked stages.
        lr, batch: multiples of the recipe's.
        masked_lr: of masked stages, on top of `lr`.
    """

    masks: tuple[tuple[str, float], ...] = ()
    share: float = 0.0
    lr: float = 1.0
    masked_lr: float = 1.0
    batch: float = 1.0

    @property
    def is_dense(self) -> bool:
        """Whether it has no masked stage."""
        return not self.masks

    @property
    def without_masks(self) -> Schedule:
        """Dense training with the same learning rate and batch."""
        return Schedule(lr=self.lr, batch=self.batch)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Schedule:
        """A schedule from what `as_json` gave."""
        masks = tuple((kind, rate) for kind, rate in values["masks"])
        return cls(**{**values, "masks": masks})

    def as_json(self) -> dict[str, Any]:
        """Its fields, for machines."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{kind} {rate:g}" for kind, rate in self.masks] or ["dense"]
        rates = f"lr x{self.lr:g}"
        if self.masks:
            parts = [f"{' then '.join(parts)} for {100 * self.share:g} %"]
            rates += f" (masked x{self.lr * self.masked_lr:g})"
        return ", ".join([*parts, rates, f"batch x{self.batch:g}"])


def suggested(space: Space, suggest: Suggest) -> Schedule:
    """A schedule whose parts something suggests, in a fixed order."""
    num = suggest("masked_stages", (0, *space.masked_stages), True)
    lr, batch = suggest("lr", space.lrs, True), suggest("batch", space.batches, True)
    if not num:
        return Schedule(lr=lr, batch=batch)
    masks = tuple(
        (suggest(f"kind_{i}", space.kinds, False), suggest(f"rate_{i}", space.rates, True))
        for i in range(1, num + 1)
    )
    share = suggest("share", space.shares, True)
    return Schedule(masks, share, lr, suggest("masked_lr", space.masked_lrs, True), batch)


def dense_places(space: Space) -> Iterator[dict[str, int]]:
    """Places of dense schedules in the grids, those nearest to the recipe's own settings first."""

    def distance(place: tuple[int, int]) -> tuple[float, int]:
        # A batch of another size mostly wants another learning rate, so that one comes later.
        rate, batch = (
            abs(math.log2(one)) for one in (space.lrs[place[0]], space.batches[place[1]])
        )
        return rate + 1.5 * batch, place[0]

    places = itertools.product(range(len(space.lrs)), range(len(space.batches)))
    for lr, batch in sorted(places, key=distance):
        yield {"masked_stages": 0, "lr": lr, "batch": batch}
