"""The book of a search: its trials, in a storage of Optuna's, and who is training which."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FixedTrial, TrialState, create_trial

from maskdm.files import write_text
from maskdm.search.halving import (
    GENERATIONS,
    Job,
    Outcome,
    Plan,
    Trial,
    next_repeats,
    promoted,
)
from maskdm.search.space import Schedule, Space, dense_places, suggested
from maskdm.seeds import derive_seed

TRIES = 10  # for each place, of proposing a schedule that is possible and new
BUSY = "busy"
Distributions = dict[str, BaseDistribution]


class Book:
    """Hands out the trials of a search one by one, to any number of processes.

    What comes next depends on the plan and the outcomes alone, not on how many processes work or
    when they were killed. Outcomes lie in FOLDER/trials; the storage holds the proposals and their
    scores.

    Args:
        folder: of the search, on a disk that all its processes share.
        storage: URL of any storage of Optuna's; None = FOLDER/search.db, in SQLite.
        name: of the study in the storage.
        plan, space: of the search.
        seed: of the proposals.
        is_possible: whether a schedule can be trained.
        spent: FLOPs of all that was trained so far.
    """

    def __init__(
        self,
        folder: Path,
        storage: str | None,
        name: str,
        plan: Plan,
        space: Space,
        seed: int,
        is_possible: Callable[[Schedule], bool],
        spent: Callable[[], float],
    ):
        self._folder, self._plan, self._space, self._seed = folder, plan, space, seed
        self._is_possible, self._spent = is_possible, spent
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "search.lock")
        self._claims: dict[int, FileLock] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = storage or f"sqlite:///{(folder / 'search.db').absolute()}"
        with self._lock:
            try:
                self._study = optuna.create_study(
                    storage=url, study_name=name, direction="minimize", load_if_exists=True
                )
            except Exception as error:  # of any of Optuna's storages and their drivers
                raise ValueError(f"storage {url} cannot be used: {error}") from None

    def take(self, on_new: Callable[[list[Job]], None]) -> Trial | str | None:
        """Claims the next trial for this process.

        Args:
            on_new: is called, while no other process trains, with jobs that are new.

        Returns:
            The trial; `BUSY` while others train what the next trials depend on; None when the
            search is over.
        """
        with self._lock:
            trials, begun = self.trials(), self._begun()
            if begun or all(trial.outcome for trial in trials):
                jobs = self._next(trials[: len(trials) - begun])
                if not jobs:
                    return None
                on_new([job for job, _ in jobs])
                for place in range(begun, len(jobs)):
                    self._add(*jobs[place], (place, len(jobs)))
                trials = self.trials()
            for trial in trials:
                if trial.outcome is None and self._claim(trial.number):
                    return trial
        return BUSY

    def finish(self, trial: Trial, outcome: Outcome) -> None:
        """Writes down what a trial gave, and gives it back."""
        content = {**_job_as_json(trial.job), "number": trial.number, **outcome.as_json()}
        with self._lock:
            write_text(self._file(trial.number), json.dumps(content, indent=1) + "\n")
            self._study.tell(trial.number, outcome.score)
        self.leave(trial)

    def leave(self, trial: Trial) -> None:
        """Gives a trial back, so that any process may go on with it."""
        self._claims.pop(trial.number).release()

    def trials(self) -> list[Trial]:
        """All trials by number."""
        trials = []
        for one in self._study.get_trials(deepcopy=False):
            job = _job_of(one.user_attrs, one.params)
            outcome = self._read(one.number)
            if outcome is not None and one.state is TrialState.RUNNING:  # a kill came between
                self._study.tell(one.number, outcome.score)
            trials.append(Trial(one.number, job, outcome))
        return trials

    def _begun(self) -> int:
        """How many of the newest jobs are there, where a kill came before their last; or 0."""
        stored = self._study.get_trials(deepcopy=False)
        place, num = stored[-1].user_attrs.get("batch", (0, 1)) if stored else (0, 1)
        return place + 1 if place + 1 < num else 0

    def _next(self, trials: Sequence[Trial]) -> list[tuple[Job, Distributions]]:
        """What follows when all trials are over; empty = nothing."""
        plan, known = self._plan, {trial.job.rung for trial in trials}
        generations = [trial.job.generation for trial in trials if trial.job.rung == 0]
        for generation in range(max(generations, default=-1) + 1, GENERATIONS):
            if max(known, default=0) == 0 and (jobs := self._proposed(trials, generation)):
                return jobs
        for rung in range(1, plan.how.rungs):
            if rung not in known:
                return [(job, {}) for job in promoted(plan, trials, rung)]
        return [(job, {}) for job in next_repeats(plan, trials, self._spent())]

    def _proposed(
        self, trials: Sequence[Trial], generation: int
    ) -> list[tuple[Job, Distributions]]:
        """A generation of new schedules, the first with the dense ones before it."""
        taken = {trial.job.schedule for trial in trials}
        found: list[tuple[Job, Distributions]] = []
        if generation == 0:
            for place in dense_places(self._space):
                fixed = FixedTrial(place)
                schedule = suggested(self._space, _suggest(fixed))
                if len(found) < self._plan.dense_first and self._is_possible(schedule):
                    job = Job(schedule, 0, params=fixed.params)
                    found.append((job, fixed.distributions))
            taken |= {job.schedule for job, _ in found}
        wanted = self._plan.generation_size(generation)
        wanted += self._plan.dense_first if generation == 0 else 0
        seed = derive_seed(self._seed, "search", generation) % 2**32
        study = self._memory(trials, seed if generation else None)
        # Constant liar: proposals of one generation are kept apart as if each had turned out badly.
        lie = max([one.score for one in trials if math.isfinite(one.score)], default=0.0)
        at_random = RandomSampler(seed)
        for number in range(TRIES * wanted):
            if len(found) == wanted:
                break
            if generation == 0 or number >= TRIES * wanted // 2:
                study.sampler = at_random
            trial = study.ask()
            schedule = suggested(self._space, _suggest(trial))
            if schedule not in taken and self._is_possible(schedule):
                taken.add(schedule)
                job = Job(schedule, 0, generation=generation, params=trial.params)
                found.append((job, trial.distributions))
            study.tell(trial, lie)
        return found

    def _memory(self, trials: Sequence[Trial], seed: int | None) -> optuna.Study:
        """A study in memory that knows the shortest trials, to draw proposals from."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls some of its options experimental
            sampler = TPESampler(n_startup_trials=1, seed=seed, multivariate=True, group=True)
        study = optuna.create_study(sampler=sampler)
        stored = {one.number: one for one in self._study.get_trials(deepcopy=False)}
        for trial in trials:
            one = stored[trial.number]
            study.add_trial(
                create_trial(params=one.params, distributions=one.distributions, value=trial.score)
            )
        return study

    def _add(self, job: Job, distributions: Distributions, batch: tuple[int, int]) -> None:
        """Writes a job into the storage, whole or not at all.

        Args:
            batch: its place among the jobs that are added together, and their number.
        """
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=job.params if distributions else {},
                distributions=distributions,
                user_attrs={**_job_as_json(job), "batch": batch},
            )
        )

    def _claim(self, number: int) -> bool:
        """Whether no living process trains the trial; if so it is this one's now."""
        lock = FileLock(self._file(number).with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._claims[number] = lock
        return True

    def _read(self, number: int) -> Outcome | None:
        file = self._file(number)
        if not file.is_file():
            return None
        values = json.loads(file.read_text("utf-8"))
        return Outcome.from_json({key: values[key] for key in Outcome.__dataclass_fields__})

    def _file(self, number: int) -> Path:
        return self._folder / "trials" / f"{number:04}.json"


def _suggest(trial: Any) -> Callable[[str, Sequence[Any], bool], Any]:
    """Values from grids; those of an ordered one are suggested by their place, a number."""

    def suggest(name: str, choices: Sequence[Any], has_order: bool) -> Any:
        if has_order:
            return choices[trial.suggest_int(name, 0, len(choices) - 1)]
        return trial.suggest_categorical(name, list(choices))

    return suggest


def _job_as_json(job: Job) -> dict[str, Any]:
    return {
        "rung": job.rung,
        "seed": job.seed,
        "generation": job.generation,
        "schedule": job.schedule.as_json(),
        "text": str(job.schedule),
    }


def _job_of(values: dict[str, Any], params: dict[str, Any]) -> Job:
    schedule = Schedule.from_json(values["schedule"])
    return Job(schedule, values["rung"], values["seed"], values["generation"], params)
