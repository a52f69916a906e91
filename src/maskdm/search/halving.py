"""Successive halving: which trials come next, and which schedule wins. Pure functions of trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import rankdata

from maskdm.evaluation.compare import welch
from maskdm.metrics import METRICS
from maskdm.search.space import How, Schedule
from maskdm.words import flops_text

GENERATIONS = 3  # in which the shortest trials are proposed, each knowing those before
DENSE_PART = 3  # one in so many places of each rung is for dense schedules
MOST_REPEATS = 10  # fresh seeds, where the budget has room for more than requested


@dataclass(frozen=True)
class Outcome:
    """What a trial gave.

    Attributes:
        score: what orders trials, lower is better; infinite where training diverged.
        scores: all that was measured quickly, by name.
        distance: value and interval of each metric of samples, by name; None = not measured.
        flops: of the whole schedule, also of what other trials had trained before.
        seconds: that the trial took.
        run: name of the run's folder.
    """

    score: float
    scores: dict[str, float]
    distance: dict[str, dict[str, Any]] | None
    flops: int
    seconds: float
    run: str

    def as_json(self) -> dict[str, Any]:
        """Its fields; an infinite score is null."""
        return asdict(self) | {"score": self.score if math.isfinite(self.score) else None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Outcome:
        """An outcome from what `as_json` gave."""
        return cls(**{**values, "score": math.inf if values["score"] is None else values["score"]})


@dataclass(frozen=True)
class Job:
    """A schedule to be trained.

    Attributes:
        schedule: what is trained.
        rung: 0 is the shortest; that after the last has the fresh seeds.
        seed: added to the recipe's.
        generation: among the proposals of rung 0.
        params: the schedule's places in the grids.
    """

    schedule: Schedule
    rung: int
    seed: int = 0
    generation: int = 0
    params: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Trial:
    """A job that is in the search's storage.

    Attributes:
        number: of the trial.
        job: what is trained.
        outcome: what it gave; None = it is not over.
    """

    number: int
    job: Job
    outcome: Outcome | None = None

    @property
    def score(self) -> float:
        """Of a trial that is over."""
        assert self.outcome is not None
        return self.outcome.score


@dataclass(frozen=True)
class Plan:
    """How a search divides its budget.

    Attributes:
        how: numbers of trials.
        budget: FLOPs of all training.
        lengths: FLOPs of a trial on each rung, and of one with a fresh seed.
    """

    how: How
    budget: float
    lengths: tuple[float, ...]

    @classmethod
    def of(cls, how: How, budget: float, full: float) -> Plan:
        """Divides a budget; the longest trial is at most as long as the recipe, `full` FLOPs."""
        top = min(full, budget / trials_of_full_length(how))
        parts = [top / how.keep ** (how.rungs - 1 - rung) for rung in range(how.rungs)]
        return cls(how, budget, (*parts, top))

    @property
    def top(self) -> float:
        """FLOPs of the longest trials."""
        return self.lengths[-1]

    @property
    def last_rung(self) -> int:
        """The rung of the finalists."""
        return self.how.rungs - 1

    @property
    def dense_first(self) -> int:
        """Dense schedules among the first generation."""
        return dense_places_of(self.how.candidates)

    def generation_size(self, generation: int) -> int:
        """How many schedules are proposed in a generation, apart from the dense ones."""
        free = self.how.candidates - self.dense_first
        return free * (generation + 1) // GENERATIONS - free * generation // GENERATIONS


def trials_of_full_length(how: How) -> float:
    """What a search trains at most, in trials of the greatest length."""
    rungs = sum(n / how.keep ** (how.rungs - 1 - rung) for rung, n in enumerate(how.sizes))
    return rungs + 2 * how.repeats


def dense_places_of(size: int) -> int:
    """Places for dense schedules on a rung of that size."""
    return max(1, size // DENSE_PART)


def ordered(trials: Sequence[Trial]) -> list[Trial]:
    """The best first; of equals that which was proposed first."""
    return sorted(trials, key=lambda trial: (trial.score, trial.number))


def promoted(plan: Plan, trials: Sequence[Trial], rung: int) -> list[Job]:
    """The jobs of a rung after the first: the best of the rung before.

    Dense schedules have a part of all places, and masked ones at least one. Where there is a place
    left, the best masked schedule's learning rate and batch are tried on whole images too: else a
    gain that is theirs would count as the mask's.
    """
    best = ordered([one for one in trials if one.job.rung == rung - 1])
    size = plan.how.sizes[rung]
    dense = [one for one in best if one.job.schedule.is_dense][: dense_places_of(size)]
    masked = [one for one in best if not one.job.schedule.is_dense]
    sure = [*dense, *masked[:1]]
    jobs = [Job(one.job.schedule, rung, params=one.job.params) for one in sure]
    tried = {one.job.schedule for one in trials}
    twins = [one.job.schedule.without_masks for one in masked[:1]]
    jobs += [Job(one, rung) for one in twins if one not in tried][: size - len(sure)]
    others = [one for one in best if one not in sure]
    jobs += [Job(one.job.schedule, rung, params=one.job.params) for one in others]
    return jobs[:size]


def finalists(plan: Plan, trials: Sequence[Trial]) -> tuple[Schedule, Schedule | None]:
    """The best dense and the best masked schedule of the last rung."""
    best = ordered([one for one in trials if one.job.rung == plan.last_rung])
    dense = next(one.job for one in best if one.job.schedule.is_dense)
    masked = next((one.job for one in best if not one.job.schedule.is_dense), None)
    return dense.schedule, None if masked is None else masked.schedule


def next_repeats(plan: Plan, trials: Sequence[Trial], spent: float) -> list[Job]:
    """Fresh seeds for both finalists: those requested, and more while the budget has room."""
    dense, masked = finalists(plan, trials)
    if masked is None:
        return []
    known = {one.job.seed for one in trials if one.job.rung == plan.how.rungs}
    if not known:
        seeds = range(1, plan.how.repeats + 1)
    elif len(known) < MOST_REPEATS and spent + 2 * plan.top <= plan.budget:
        seeds = range(len(known) + 1, len(known) + 2)
    else:
        return []
    return [Job(one, plan.how.rungs, seed) for seed in seeds for one in (dense, masked)]


@dataclass(frozen=True)
class Verdict:
    """Which schedule wins.

    Attributes:
        dense, masked: the finalists; masked is None where no mask fits the grid.
        metric: of the samples, that decides.
        distances, losses: of the finalists on fresh seeds: dense, masked.
        distance_gain, loss_gain: dense minus masked, and half of the 95 % interval over seeds.
        masks_pay: whether the distance of the masked one is smaller beyond the noise.
        correlation: of ranks, between the proxy and that distance; None for fewer than 3 trials.
        num_correlated: trials behind it.
    """

    dense: Schedule
    masked: Schedule | None
    metric: str
    distances: tuple[list[float], list[float]]
    losses: tuple[list[float], list[float]]
    distance_gain: tuple[float, float]
    loss_gain: tuple[float, float]
    masks_pay: bool
    correlation: float | None
    num_correlated: int

    @property
    def winner(self) -> Schedule:
        """The masked schedule where it is better beyond the noise; else the dense one."""
        return self.masked if self.masks_pay and self.masked else self.dense


def verdict_of(plan: Plan, trials: Sequence[Trial]) -> Verdict:
    """Compares the finalists of a search that is over."""
    dense, masked = finalists(plan, trials)
    fresh = [one for one in trials if one.job.rung == plan.how.rungs]
    metric = next((name for one in trials for name in _distances(one)), "frechet")
    sides = [[one for one in fresh if one.job.schedule == each] for each in (dense, masked)]
    distances = tuple([_distance(one, metric) for one in side] for side in sides)
    losses = tuple([_loss(one) for one in side] for side in sides)
    gain = _gain(*distances)
    pairs = [
        (one.score, _distance(one, metric))
        for one in trials
        if metric in _distances(one) and math.isfinite(one.score)
    ]
    return Verdict(
        dense,
        masked,
        metric,
        (distances[0], distances[1]),
        (losses[0], losses[1]),
        gain,
        _gain(*losses),
        gain[0] > gain[1],
        rank_correlation(pairs),
        len(pairs),
    )


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, between the two of each pair; None for fewer than 3, or where one is constant."""
    if len(pairs) < 3:
        return None
    first, second = (rankdata(values) for values in zip(*pairs, strict=True))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _distances(trial: Trial) -> list[str]:
    known = (trial.outcome.distance if trial.outcome else None) or {}
    return [name for name in known if name in METRICS and not METRICS[name].higher_is_better]


def _distance(trial: Trial, metric: str) -> float:
    """Infinite where training diverged."""
    known = (trial.outcome.distance if trial.outcome else None) or {}
    return float(known[metric]["value"]) if metric in known else math.inf


def _loss(trial: Trial) -> float:
    assert trial.outcome is not None
    return float(trial.outcome.scores.get("dense_loss", math.inf))


def _gain(dense: Sequence[float], masked: Sequence[float]) -> tuple[float, float]:
    """Dense minus masked, and half of its 95 % interval; a side that diverged has lost."""
    if len(masked) < 2 or not np.isfinite(masked).all():
        return -math.inf, 0.0
    if not np.isfinite(dense).all():
        return math.inf, 0.0
    return welch(dense, masked)


def plan_text(plan: Plan, full: float) -> list[str]:
    """A plan in lines for people."""
    rungs = ", then ".join(
        f"{size} of {flops_text(length)}"
        for size, length in zip(plan.how.sizes, plan.lengths, strict=False)
    )
    most = sum(n * length for n, length in zip(plan.how.sizes, plan.lengths, strict=False))
    most += 2 * plan.how.repeats * plan.top
    return [
        f"budget  {flops_text(plan.budget)} of training; at most {flops_text(most)} are needed",
        f"plan    {rungs}; then 2 finalists on {plan.how.repeats} fresh seeds each",
        f"length  the longest trials have {100 * plan.top / full:.3g} % of the recipe's FLOPs",
    ]
