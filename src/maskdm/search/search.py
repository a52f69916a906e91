"""`maskdm search`: which schedule is best for its FLOPs, by successive halving."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from maskdm.engine import make_accelerator
from maskdm.files import refuse_unwritable, write_text
from maskdm.images.order import num_held_out
from maskdm.images.store import Store
from maskdm.models.backbone import Backbone
from maskdm.models.build import build_model
from maskdm.recipe import Budget, Recipe
from maskdm.runs.find import read_settings
from maskdm.search.book import BUSY, Book
from maskdm.search.builder import Builder
from maskdm.search.forest import Forest, Stopped, Trainer
from maskdm.search.halving import Job, Outcome, Plan, Trial, Verdict, plan_text, verdict_of
from maskdm.search.local import LocalTrainer
from maskdm.search.space import PROXIES, How, Schedule, Space
from maskdm.settings import changed
from maskdm.training.budget import FEWEST_SAMPLES, MOST_LOSSES, MOST_ON_MEASURING
from maskdm.training.planning import RunOptions, ThisMachine, planned
from maskdm.training.start import open_images, refuse_recipe
from maskdm.training.work import stage_work, total_flops
from maskdm.words import figure, flops_text

HELD_OUT = 0.05  # part of the images that a search holds out where the recipe holds out none
ON_TRAINING = 0.7  # part of a search's hours that goes to training; the rest to measuring
POLL_SEC = 2.0  # between two looks at what other processes have finished


@dataclass(frozen=True)
class Search:
    """A search that may be under way.

    Attributes:
        folder: its own.
        plan: how it divides its budget.
        builder: makes recipes of schedules.
        forest: what it has trained.
        book: its trials.
        trainer: trains and measures.
    """

    folder: Path
    plan: Plan
    builder: Builder
    forest: Forest
    book: Book
    trainer: Trainer


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        recipe: the winner's, at the length of the recipe that was searched for.
        verdict: why it is the winner.
        trials: all of them.
        spent: FLOPs of everything that was trained.
    """

    recipe: Recipe
    verdict: Verdict
    trials: list[Trial]
    spent: int


def search(
    recipe: Recipe,
    folder: Path,
    *,
    hours: float | None = None,
    flops: float | None = None,
    how: How | None = None,
    space: Space | None = None,
    storage: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Search, Found | None]:
    """Searches for the best schedule of a recipe; a search in the folder goes on.

    Args:
        recipe: what is trained; its stages give all that is not searched, and the length.
        folder: of the search; processes that work on one search share it.
        hours, flops: the budget of all training in the search; exactly one. Hours are turned into
            FLOPs at the speed of this machine.
        how, space: how it is searched, and among what.
        storage: URL of a storage of Optuna's; None = SQLite in the folder.
        say: is told each trial, in a line.

    Returns:
        The search, and what it has found; None where a signal stopped it.

    Raises ValueError for a budget that is too small, another search in the folder, and what
    `train` refuses.
    """
    if (hours is None) == (flops is None):
        raise ValueError("give one budget for the search: --hours or --flops")
    how, space = how or How(), space or Space()
    refuse_unwritable(folder, "--out", is_folder=True)
    if recipe.sampling.guidance.kind == "autoguidance":
        raise ValueError(
            "a search draws from dense models too, which have no primer: add "
            "--sampling.guidance.kind none"
        )
    accelerator, _, _ = make_accelerator(recipe.precision)
    if accelerator.num_processes > 1:
        raise ValueError(
            "a search trains on one device: start the command once for each, without a launcher"
        )
    refuse_recipe(recipe, folder, 1)
    store = open_images(recipe, accelerator, True)
    machine = ThisMachine(accelerator, say)
    base = _with_held_out(_planned(_with_most_losses(recipe), folder, store, machine), say)
    model = build_model(base)
    if flops is None:
        assert hours is not None
        flops = _flops_of_hours(folder, base, hours, machine)
    plan = Plan.of(how, flops, total_flops(base, stage_work(base, model)))
    base = _with_quick_num(base, plan, model)
    _refuse_unmeasured(base, store, how)
    for text in plan_text(plan, total_flops(base, stage_work(base, model))):
        say(text)
    trainer = _make_trainer(base, store)
    this = opened(base, model, folder, plan, space, trainer, storage, hours)
    found = carried_out(this, say)
    if found is None:
        return this, None
    # What the search changed, to measure, is the recipe's own again.
    own = changed(found.recipe, data=recipe.data, evaluation=recipe.evaluation)
    return this, replace(found, recipe=own)


def opened(
    base: Recipe,
    model: Backbone,
    folder: Path,
    plan: Plan,
    space: Space,
    trainer: Trainer,
    storage: str | None = None,
    hours: float | None = None,
) -> Search:
    """A search in a folder: a new one, or the one that is there.

    Args:
        base: the recipe with all numbers, some of its images held out.
        model: of the recipe.
        folder, space, storage, hours: as in `search`.
        plan: how the budget is divided.
        trainer: trains and measures.

    Raises ValueError for a budget that is too small, and another search in the folder.
    """
    builder = Builder(base, space, model, plan.lengths)
    try:
        builder.recipe(Schedule(batch=max(space.batches)), plan.lengths[0])
    except ValueError as error:
        raise ValueError(
            f"the budget of {flops_text(plan.budget)} is too small: {error}; give more, or fewer "
            "--how.candidates"
        ) from None
    settings = {
        "hours": hours,
        "flops": plan.budget,
        "how": plan.how.model_dump(mode="json"),
        "space": space.model_dump(mode="json"),
        "recipe": base.model_dump(mode="json"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "search.lock"):
        _write_or_check(folder / "search.json", settings)
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    forest = Forest(folder / "runs", trainer, model)
    book = Book(
        folder,
        storage,
        f"maskdm-{name}",
        plan,
        space,
        base.seed,
        builder.is_possible,
        forest.spent,
    )
    return Search(folder, plan, builder, forest, book, trainer)


def carried_out(this: Search, say: Callable[[str], None]) -> Found | None:
    """Runs a search's trials until it is over; None where a signal stopped it.

    Args:
        this: the search.
        say: is told each trial, in a line.
    """
    while True:
        trial = this.book.take(lambda jobs: _make_room(this, jobs))
        if trial is None:
            break
        if trial == BUSY:
            time.sleep(POLL_SEC)
            continue
        assert isinstance(trial, Trial)
        try:
            outcome = _run(this, trial)
        except Stopped:
            this.book.leave(trial)
            return None
        except BaseException:
            this.book.leave(trial)
            raise
        this.book.finish(trial, outcome)
        say(trial_text(this, trial, outcome))
    trials = this.book.trials()
    verdict = verdict_of(this.plan, trials)
    recipe = this.builder.recipe(verdict.winner, this.builder.full_flops)
    return Found(recipe, verdict, trials, this.forest.spent())


def trial_text(this: Search, trial: Trial, outcome: Outcome) -> str:
    """A trial in one line: what was trained, its figures, and what the search has spent."""
    job = trial.job
    rung = f"rung {job.rung + 1}/{this.plan.how.rungs}"
    if job.rung > this.plan.last_rung:
        rung = f"seed +{job.seed}"
    figures = f"{this.plan.how.proxy} {figure(outcome.score)}"
    if not math.isfinite(outcome.score):
        figures = "diverged"
    for name, one in (outcome.distance or {}).items():
        figures += f", {name} {figure(one['value'])}" if "value" in one else ""
    share = 100 * this.forest.spent() / this.plan.budget
    return (
        f"trial {trial.number:3}  {rung:9}  {job.schedule}: {figures}; {outcome.seconds:,.0f} s, "
        f"{share:.0f} % of the budget spent"
    )


def _run(this: Search, trial: Trial) -> Outcome:
    """Trains and measures a trial."""
    job, start = trial.job, time.perf_counter()
    recipe = this.builder.recipe(job.schedule, this.plan.lengths[job.rung], job.seed)
    kept = [this.builder.marks(job.schedule, rung) for rung in range(job.rung + 1)]
    fresh = job.rung > this.plan.last_rung  # nothing was trained with its seed
    earlier = [] if fresh else [steps for one in kept[:-1] for steps in one]
    node = this.forest.grow(recipe, kept[-1], earlier)
    scores, distance, score = dict[str, float](), None, math.inf
    if not node.diverged:
        folder = this.forest.folder / node.name
        scores = this.trainer.measure(recipe, folder)
        score = scores[this.plan.how.proxy]
        score = score if math.isfinite(score) else math.inf
        if job.rung >= this.plan.last_rung:
            distance = this.trainer.distance(recipe, folder)
        this.forest.drop(node)
    seconds = time.perf_counter() - start
    return Outcome(score, scores, distance, node.flops, seconds, node.name)


def _make_room(this: Search, jobs: list[Job]) -> None:
    """Removes checkpoints that no trial of a later rung goes on from."""
    if all(job.rung for job in jobs):
        lengths, build = this.plan.lengths, this.builder.recipe
        this.forest.drop_all_but([build(job.schedule, lengths[job.rung], job.seed) for job in jobs])


def _write_or_check(path: Path, settings: Mapping[str, object]) -> None:
    """Raises ValueError where another search is in the folder."""
    text = json.dumps(settings, indent=1) + "\n"
    if not path.is_file():
        write_text(path, text)
        return
    there, now = read_settings(path), json.loads(text)
    if changes := [name for name in now if there.get(name) != now[name]]:
        raise ValueError(
            f"{path.parent} holds a search with another {' and '.join(changes)}: give the same "
            "settings to continue it, or name a new folder with --out"
        )


def _refuse_unmeasured(base: Recipe, store: Store, how: How) -> None:
    """Raises ValueError where the figure that orders trials would not be measured."""
    num, features = num_held_out(len(store), base.data), base.evaluation.features
    if not num:
        raise ValueError(
            f"{base.data.held_out:g} of {len(store)} images are none, and trials are measured on "
            "held-out images: use --data.held-out 0.2, say, or more images"
        )
    if features in ("auto", "pca") and not PROXIES[how.proxy].in_pca:
        raise ValueError(
            f"--how.proxy {how.proxy} means nothing in features pca: use --how.proxy sliced, or "
            "--evaluation.features inception"
        )


def _make_trainer(base: Recipe, store: Store) -> Trainer:
    trainer: Trainer = LocalTrainer(base, store)
    return trainer


def _with_held_out(base: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with images held out, on which trials are measured."""
    if base.data.held_out:
        return base
    say(f"note    the search holds out {100 * HELD_OUT:g} % of the images, to measure on them")
    return changed(base, data=changed(base.data, held_out=HELD_OUT), budget=Budget())


def _with_most_losses(recipe: Recipe) -> Recipe:
    """The recipe with the loss, which orders trials, on as many images as `auto` can be."""
    if recipe.evaluation.quick_loss_num != "auto":
        return recipe
    return changed(recipe, evaluation=changed(recipe.evaluation, quick_loss_num=MOST_LOSSES))


def _with_quick_num(base: Recipe, plan: Plan, model: Backbone) -> Recipe:
    """The recipe with samples for each trial: a twentieth of the shortest one's FLOPs, or none.

    Where a distance of samples orders the trials, the recipe's own number.
    """
    if plan.how.proxy != "dense_loss":
        if base.evaluation.num_in_training:
            return base
        raise ValueError(f"--how.proxy {plan.how.proxy} needs samples: --evaluation.quick-num 1000")
    one = model.forward_flops(model.num_patches) * base.preview_steps
    num = min(int(MOST_ON_MEASURING * plan.lengths[0] / one), base.evaluation.num_in_training)
    num = num if num >= FEWEST_SAMPLES else 0
    return changed(base, evaluation=changed(base.evaluation, quick_num=num))


def _planned(recipe: Recipe, folder: Path, store: Store, machine: ThisMachine) -> Recipe:
    """The recipe with all numbers: as the first of a search's processes has planned it.

    Others may find that their machines are faster or slower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, asked = folder / "planned.json", recipe.model_dump(mode="json")
    with FileLock(folder / "search.lock"):
        there = read_settings(path) if path.is_file() else None
        if there is not None and there.get("asked") == asked:
            return Recipe(**there["recipe"])
        base = planned(recipe, RunOptions(), folder, store, machine)
        if there is None:
            content = {"asked": asked, "recipe": base.model_dump(mode="json")}
            write_text(path, json.dumps(content) + "\n")
    return base


def _flops_of_hours(folder: Path, base: Recipe, hours: float, machine: ThisMachine) -> float:
    """FLOPs that a search trains in so many hours: as the first of its processes has measured."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "search.lock"):
        for path in (folder / "search.json", folder / "hours.json"):
            there = read_settings(path) if path.is_file() else {}
            if there.get("hours") == hours:
                return float(there["flops"])
        speed = machine.speed(base)
        works = stage_work(base, build_model(base))
        per_sec = min(w.step_flops / sec for w, sec in zip(works, speed.step_sec, strict=True))
        flops = ON_TRAINING * 3600 * hours * per_sec
        write_text(folder / "hours.json", json.dumps({"hours": hours, "flops": flops}) + "\n")
    return flops
