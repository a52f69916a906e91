"""Times that training draws.

All functions of the family return float32 (B,) in [0, 1): places in a schedule's range of times,
for a rank's share of the batch. `own` is the rank's generator; `shared` gives all ranks of a step
the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maskdm.choices import named
from maskdm.diffusion.schedule import Schedule
from maskdm.families import TIMES
from maskdm.recipe import Times


@dataclass(frozen=True)
class Share:
    """A rank's part of a global batch.

    Attributes:
        num: images of this rank.
        rank: number of the rank.
        num_ranks: how many ranks there are, with `num` images each.
    """

    num: int
    rank: int = 0
    num_ranks: int = 1


def draw_times(
    settings: Times, schedule: Schedule, share: Share, own: Generator, shared: Generator
) -> Tensor:
    """Times of a rank's images: float32 (B,) in [0, 1], on the generators' device.

    For a discrete schedule they are entries of its table, else anything from its t_min to 1.
    """
    draw = named(settings.kind, TIMES, "way to draw times").run
    assert draw is not None
    place: Tensor = draw(settings, schedule, share, own, shared)
    return times_at(place, schedule)


def times_at(place: Tensor, schedule: Schedule) -> Tensor:
    """Times at places in [0, 1) of a schedule's range: float32 (B,), places' own device.

    For a discrete schedule they are entries of its table, else anything from its t_min to 1.
    """
    if schedule.num_times is None:
        return schedule.t_min + (1 - schedule.t_min) * place
    index = (place * schedule.num_times).floor().clamp(max=schedule.num_times - 1)
    return index / (schedule.num_times - 1)


def uniform(
    settings: Times, schedule: Schedule, share: Share, own: Generator, shared: Generator
) -> Tensor:
    """Independent and even (Ho et al. 2020, Algorithm 1)."""
    if schedule.num_times is None:
        return torch.rand(share.num, generator=own, device=own.device)
    index = torch.randint(schedule.num_times, (share.num,), generator=own, device=own.device)
    return (index + 0.5) / schedule.num_times


def stratified(
    settings: Times, schedule: Schedule, share: Share, own: Generator, shared: Generator
) -> Tensor:
    """u0 + i / B modulo 1 over the global batch: even, yet each time uniform by itself.

    Kingma et al. 2021, Appendix I.1: the loss varies less from step to step.
    """
    first = torch.rand(1, generator=shared, device=shared.device)
    number = torch.arange(share.num, device=shared.device) + share.rank * share.num
    place = (first + number / (share.num * share.num_ranks)) % 1
    return place.clamp(max=1 - 2**-24)  # the sum may round up to 1


def logit_normal(
    settings: Times, schedule: Schedule, share: Share, own: Generator, shared: Generator
) -> Tensor:
    """sigmoid of a normal: mostly the middle of the range (Esser et al. 2024, Section 3.1)."""
    z = torch.randn(share.num, generator=own, device=own.device)
    return (settings.mean + settings.std * z).sigmoid().clamp(max=1 - 2**-24)


def soft_truncation(
    settings: Times, schedule: Schedule, share: Share, own: Generator, shared: Generator
) -> Tensor:
    """Uniform above a least place that a step draws with density ~ 1/place from 1e-5 to 1.

    Kim et al. 2021, Section 4 (k = 1): most steps see all times, some only the noisy ones.
    """
    least = 1e-5 ** torch.rand(1, generator=shared, device=shared.device)
    place = torch.rand(share.num, generator=own, device=own.device)
    return (least + (1 - least) * place).clamp(max=1 - 2**-24)
