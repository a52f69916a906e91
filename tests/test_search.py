"""The schedule search: which trials it runs, what it finds, and that it trains nothing twice."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_settings
from safetensors.torch import load_file
from scipy.stats import spearmanr

from maskdm.cli import main
from maskdm.images.store import open_store
from maskdm.models.build import build_model
from maskdm.recipe import Evaluation, Mask, Recipe
from maskdm.recipe_files import load_recipe
from maskdm.runs.checkpoint import read_progress
from maskdm.runs.find import find_checkpoint
from maskdm.runs.lines import read_lines
from maskdm.seeds import derive_seed
from maskdm.settings import changed
from maskdm.training.speed import Speed
from maskdm.training.trainer import train
from maskdm.training.work import stage_work, total_flops

pytest.importorskip("optuna")

from maskdm.search import local  # noqa: E402
from maskdm.search.book import Book  # noqa: E402
from maskdm.search.builder import Builder  # noqa: E402
from maskdm.search.forest import Diverged, Forest, Stopped, name_of  # noqa: E402
from maskdm.search.halving import (  # noqa: E402
    Job,
    Outcome,
    Plan,
    Trial,
    promoted,
    rank_correlation,
    trials_of_full_length,
    verdict_of,
)
from maskdm.search.local import LocalTrainer  # noqa: E402
from maskdm.search.report import (  # noqa: E402
    tree_figure,
    trials_json,
    verdict_text,
    winner_text,
)
from maskdm.search.search import (  # noqa: E402
    Found,
    Search,
    _flops_of_hours,
    _planned,
    carried_out,
    opened,
)
from maskdm.search.space import How, Schedule, Space  # noqa: E402

BEST = ("patch", 0.5)
SPACE = Space(kinds=("patch", "block"), rates=(0.25, 0.5, 0.75), masked_stages=(1,),
              masked_lrs=(1.0,), batches=(1.0,))  # fmt: skip
HOW = How(candidates=27, repeats=2)


def surface(recipe: Recipe, share: float) -> float:
    """A loss whose least value, 1, is at patch 0.5, share 0.4 and twice the recipe's rate."""
    first, last = recipe.stages[0], recipe.stages[-1]
    loss = 1 + 0.05 * math.log2(last.lr / 2e-3) ** 2
    if len(recipe.stages) == 1:
        return loss + 0.2
    loss += 0.1 * (first.mask.kind != BEST[0]) + 0.6 * abs(first.mask.rate - BEST[1])
    return loss + 0.5 * abs(share - 0.4)


class Fake:
    """Trains nothing: it notes what it would train, and its losses lie on a surface."""

    def __init__(self, base: Recipe, loss: Callable[[Recipe, float], float] = surface):
        self.model, self._loss = build_model(base), loss
        self.trained: list[tuple[str, int, int]] = []  # what, from which step to which
        self.flops, self.stop_after, self.kill_after = 0, math.inf, math.inf

    def train(self, recipe: Recipe, folder: Path, start: Path | None) -> None:
        if len(self.trained) >= self.stop_after:
            raise Stopped
        before = None
        if start is not None:
            assert (start / "checkpoints").is_dir()
            before = Recipe(**json.loads((start / "fake.json").read_text()))
            for one, other in zip(before.stages, recipe.stages, strict=False):
                assert changed(one, steps=10**6) == changed(other, steps=10**6)
        self.flops += self._flops(recipe) - (self._flops(before) if before else 0)
        rows = [stage.model_dump() for stage in recipe.stages]
        endless = changed(recipe, stages=[*rows[:-1], {**rows[-1], "steps": 10**9}])
        done = before.num_steps if before else 0
        self.trained.append((name_of(endless), done, recipe.num_steps))
        (folder / "checkpoints").mkdir()
        (folder / "fake.json").write_text(recipe.model_dump_json())
        if recipe.stages[-1].lr > 3.9e-3:
            raise Diverged

    def measure(self, recipe: Recipe, folder: Path) -> dict[str, float]:
        if len(self.trained) >= self.kill_after:
            raise KeyboardInterrupt
        works = stage_work(recipe, self.model)
        masked = sum(w.step_flops * s.steps for w, s in zip(works[:-1], recipe.stages))  # noqa: B905
        seed = derive_seed(recipe.seed, name_of(recipe)) % 2**32
        noise = 0.01 * np.random.default_rng(seed).standard_normal()
        short = 1e10 / self._flops(recipe)
        return {"dense_loss": self._loss(recipe, masked / self._flops(recipe)) + noise + short}

    def distance(self, recipe: Recipe, folder: Path) -> dict[str, dict[str, Any]]:
        value = 10 * self.measure(recipe, folder)["dense_loss"]
        return {"frechet": {"value": value, "interval": [value - 1, value + 1]}}

    def _flops(self, recipe: Recipe) -> int:
        return total_flops(recipe, stage_work(recipe, self.model))


def base_recipe(seed: int = 0) -> Recipe:
    settings = tiny_settings()
    stages = [{**stage, "steps": 5000, "warmup": 50} for stage in settings["stages"]]
    stages[-1]["lr_schedule"] = "cosine"
    data = {**settings["data"], "held_out": 0.1}
    return Recipe(**{**settings, "stages": stages, "data": data, "seed": seed})


def begin(folder: Path, fake: Fake, seed: int = 0, budget: float = 5, how: How = HOW) -> Search:
    """A search with a budget in lengths of the recipe."""
    base = base_recipe(seed)
    full = total_flops(base, stage_work(base, fake.model))
    return opened(base, fake.model, folder, Plan.of(how, budget * full, full), SPACE, fake)


def run(search: Search) -> Found:
    found = carried_out(search, lambda text: None)
    assert found is not None
    return found


def outcomes(found: Found) -> list[tuple[Any, float]]:
    return [(trial.job, trial.score) for trial in found.trials]


def refuse_twice(trained: list[tuple[str, int, int]]) -> None:
    """No step of any training is there twice."""
    for prefix in {name for name, _, _ in trained}:
        parts = sorted((begin, end) for name, begin, end in trained if name == prefix)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts)), parts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Found, Fake]:
    """A search that nothing has interrupted."""
    fake = Fake(base_recipe())
    search = begin(tmp_path_factory.mktemp("whole"), fake)
    return search, run(search), fake


def test_it_spends_within_its_budget_and_trains_nothing_twice(whole):
    search, found, fake = whole
    refuse_twice(fake.trained)
    assert found.spent == fake.flops <= search.plan.budget
    assert any(begin for _, begin, _ in fake.trained)  # some went on from others
    by_rung = {trial.job.rung: 0 for trial in found.trials}
    for trial in found.trials:
        by_rung[trial.job.rung] += 1
        if trial.job.rung < 2:
            continue
        length = search.plan.lengths[trial.job.rung]
        assert 0.9 * length < trial.outcome.flops <= length
    assert [by_rung[rung] for rung in range(3)] == [27, 9, 3] and by_rung[3] >= 4
    for rung in range(4):
        schedules = [one.job.schedule for one in found.trials if one.job.rung == rung]
        assert any(one.is_dense for one in schedules) and not all(one.is_dense for one in schedules)


def test_it_finds_the_best_of_a_known_surface_in_most_seeds(tmp_path, whole):
    found = [whole[1]]
    for seed in (1000, 2000):
        fake = Fake(base_recipe(seed))
        search = begin(tmp_path / str(seed), fake, seed)
        found.append(run(search))
        assert fake.flops <= search.plan.budget
    good = [
        one.verdict.masks_pay and one.verdict.winner.masks == (BEST,) and one.verdict.winner.lr >= 1
        for one in found
    ]
    assert sum(good) >= 2, [str(one.verdict.winner) for one in found]
    best = whole[1].recipe
    assert [stage.name for stage in best.stages] == ["masked-1", "whole"]
    full = base_recipe()
    assert total_flops(best, stage_work(best, whole[2].model)) == pytest.approx(
        total_flops(full, stage_work(full, whole[2].model)), rel=0.01
    )


def test_killed_and_continued_it_gives_the_same_and_trains_nothing_twice(whole, tmp_path):
    trained = list[tuple[str, int, int]]()
    for stop_after, kill_after in ((5, math.inf), (math.inf, 9), (math.inf, math.inf)):
        fake = Fake(base_recipe())
        fake.stop_after, fake.kill_after = stop_after, kill_after
        search = begin(tmp_path, fake)
        if kill_after < math.inf:
            with pytest.raises(KeyboardInterrupt):
                carried_out(search, lambda text: None)
        else:
            found = carried_out(search, lambda text: None)
            assert (found is None) == (stop_after < math.inf)
        trained += fake.trained
    assert trained == whole[2].trained
    assert outcomes(found) == outcomes(whole[1]) and found.spent == whole[1].spent
    assert found.verdict == whole[1].verdict


@pytest.mark.parametrize("adds", [3, 14, 29, 37, 41])
def test_killed_while_it_adds_trials_it_gives_the_same(whole, tmp_path, monkeypatch, adds):
    """In a generation of proposals, between rungs, among fresh seeds."""
    add, done = Book._add, []

    def killed(self: Book, *job: Any) -> None:
        if len(done) == adds:
            raise KeyboardInterrupt
        done.append(job)
        add(self, *job)

    fake = Fake(base_recipe())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Book, "_add", killed)
        run(begin(tmp_path, fake))
    found = run(begin(tmp_path, fake))
    assert outcomes(found) == outcomes(whole[1]) and found.verdict == whole[1].verdict
    assert fake.trained == whole[2].trained


def test_all_processes_take_the_flops_that_the_first_has_measured(tmp_path):
    class Machine:
        def __init__(self, sec: float):
            self.sec = sec

        def speed(self, recipe: Recipe) -> Speed:
            return Speed((self.sec, self.sec), self.sec)

    first, second = (
        _flops_of_hours(tmp_path, base_recipe(), 2.0, Machine(sec)) for sec in (0.1, 0.2)
    )
    assert first == second
    assert _flops_of_hours(tmp_path / "other", base_recipe(), 2.0, Machine(0.2)) == first / 2
    (tmp_path / "hours.json").write_text("{")
    with pytest.raises(ValueError, match="hours.json is damaged"):
        _flops_of_hours(tmp_path, base_recipe(), 2.0, Machine(0.1))


def test_all_processes_take_the_numbers_that_the_first_has_planned(tmp_path):
    """Its hours are steps at its machine's speed; another machine's would be others."""

    class Machine:
        def __init__(self, sec: float):
            self.sec = sec

        def speed(self, recipe: Recipe) -> Speed:
            return Speed((self.sec, self.sec), 1e-6)

    settings = tiny_settings()
    for stage in settings["stages"]:
        stage["steps"] = 0
    recipe = Recipe(**{**settings, "num_previews": 0, "budget": {"hours": 1}})
    store = open_store(recipe.data, progress=False)
    first, second = (_planned(recipe, tmp_path, store, Machine(sec)) for sec in (1.0, 2.0))
    assert first == second and 3000 < first.num_steps < 4000
    other = Recipe(**{**recipe.model_dump(), "seed": 5})
    assert _planned(other, tmp_path, store, Machine(2.0)).num_steps < 2000
    assert _planned(recipe, tmp_path, store, Machine(2.0)) == first


def test_a_trial_that_runs_out_of_memory_counts_as_diverged(tmp_path, monkeypatch):
    recipe = Recipe(**tiny_settings())
    trainer = LocalTrainer(recipe, open_store(recipe.data, progress=False))

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(local, "train", full)
    with pytest.warns(UserWarning, match="ran out of memory"), pytest.raises(Diverged):
        trainer.train(recipe, tmp_path / "run", None)


def test_what_is_not_searched_stays_as_the_recipe_has_it():
    base = base_recipe()
    first, last = (stage.model_dump() for stage in base.stages)
    mask = {**first["mask"], "where": "middle", "rounding": "floor"}
    rows = [{**first, "mask": mask, "probe_flops": 10**6}, {**last, "start_from": "ema"}]
    base = changed(base, stages=rows)
    builder = Builder(base, SPACE, build_model(base), (1e10, 1e10))
    built = builder.recipe(Schedule((("patch", 0.75),), 0.4), 1e10)
    assert built.stages[0].mask == Mask(kind="patch", rate=0.75, where="middle", rounding="floor")
    assert built.stages[1].start_from == "ema" and built.stages[0].probe_flops == 0


def test_finalists_have_a_distance_whatever_the_recipe_measures(tmp_path, monkeypatch):
    asked = []

    def evaluate(loaded: Any, settings: Evaluation, sampling: Any) -> Any:
        asked.append(settings.metrics)
        return SimpleNamespace(record={"metrics": {"frechet": {"value": 1.0}}})

    monkeypatch.setattr(local, "evaluate_model", evaluate)
    monkeypatch.setattr(local, "load_model", lambda folder, note: None)
    for metrics in ((), ("precision", "memorization"), ("recall", "sliced")):
        recipe = base_recipe()
        recipe = changed(recipe, evaluation=changed(recipe.evaluation, metrics=metrics))
        local.LocalTrainer.distance(None, recipe, tmp_path)
    assert asked == [("frechet",), ("precision", "memorization", "frechet"), ("recall", "sliced")]


def test_results_are_json_where_something_diverged(whole):
    verdict = replace(whole[1].verdict, masked=None, distance_gain=(-math.inf, 0.0))
    text = trials_json(whole[1].trials, verdict, 1)
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["distance_gain"] == [None, 0.0]


def test_workers_share_a_search(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("maskdm.search.search.POLL_SEC", 0.05)
    fakes, found = [Fake(base_recipe()) for _ in range(3)], list[Found]()

    def work(fake: Fake) -> None:
        found.append(run(begin(tmp_path, fake)))

    workers = [threading.Thread(target=work, args=[fake]) for fake in fakes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    trained = [one for fake in fakes for one in fake.trained]
    refuse_twice(trained)
    assert sorted(trained) == sorted(whole[2].trained)
    assert sum(len(fake.trained) > 0 for fake in fakes) > 1
    assert len(found) == 3 and all(outcomes(one) == outcomes(whole[1]) for one in found)


def test_where_masks_do_not_help_it_says_so_and_gives_the_dense_recipe(tmp_path):
    def without_gain(recipe: Recipe, share: float) -> float:
        return 1 + 0.05 * math.log2(recipe.stages[-1].lr / 5e-4) ** 2 + 0.3 * share

    fake = Fake(base_recipe(), without_gain)
    search = begin(tmp_path, fake)
    found = run(search)
    assert found.verdict.winner == Schedule(lr=0.5)
    text = verdict_text(found.verdict, search.plan, search.builder.full_flops)
    assert any("do not pay here" in line or "may pay, but" in line for line in text)
    (stage,) = found.recipe.stages
    assert stage.mask.kind == "none" and stage.lr == 5e-4 and stage.steps > 5000
    file = tmp_path / "winner.yaml"
    file.write_text(winner_text(found.recipe, None, text))
    assert load_recipe(file) == found.recipe
    assert file.read_text().startswith("# dense   dense, lr x0.5, batch x1\n")
    figure = tree_figure(search.forest.nodes(), found.trials)
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert len(labels) == len(found.trials) and any("diverged" in one for one in labels)


def test_what_a_rate_or_batch_gains_does_not_count_as_the_masks():
    """Where no dense schedule has had the best masked one's, one gets them on the next rung."""
    best = Schedule((BEST,), 0.4, lr=2.0, batch=0.5)
    other = Schedule((("block", 0.5),), 0.4)
    dense, twin = Schedule(), Schedule(lr=2.0, batch=0.5)
    plan = Plan.of(How(candidates=9, rungs=2), 1e12, 1e12)

    def next_after(*scored: tuple[Schedule, float]) -> list[Schedule]:
        outcomes = [Outcome(score, {}, None, 0, 0.0, "") for _, score in scored]
        trials = [Trial(i, Job(scored[i][0], 0), one) for i, one in enumerate(outcomes)]
        return [job.schedule for job in promoted(plan, trials, 1)]

    assert next_after((dense, 3.0), (other, 2.0), (best, 1.0)) == [dense, best, twin]
    # It has had its chance, and the best dense one was better.
    assert next_after((dense, 3), (other, 2), (best, 1), (twin, 4)) == [dense, best, other]
    assert next_after((dense, 3), (other, 1), (best, 2)) == [dense, other, best]


def test_a_gain_within_the_noise_is_none(whole):
    search, found, _ = whole
    trials = [
        replace(one, outcome=replace(one.outcome, distance={"frechet": {"value": value}}))
        if one.job.rung > search.plan.last_rung
        else one
        for one, value in zip(found.trials, itertools.cycle([9.0, 11.0, 10.5]))  # noqa: B905
    ]
    verdict = verdict_of(search.plan, trials)
    assert not verdict.masks_pay and verdict.winner.is_dense and verdict.winner == verdict.dense


def test_a_budget_is_divided_so_that_all_of_it_would_be_needed_without_forks():
    how = How(candidates=27, rungs=3, keep=3, repeats=3)
    assert trials_of_full_length(how) == 27 / 9 + 9 / 3 + 3 + 6
    plan = Plan.of(how, 15e12, 9e12)
    assert plan.lengths == pytest.approx((1e12 / 9, 1e12 / 3, 1e12, 1e12))
    assert Plan.of(how, 15e12, 5e11).top == 5e11


def test_rank_correlation_is_spearmans():
    pairs = [(1.0, 5.0), (2.0, 5.0), (3.0, 1.0), (2.5, 7.0), (9.0, 6.5)]
    assert rank_correlation(pairs) == pytest.approx(spearmanr(*zip(*pairs)).statistic)  # noqa: B905
    assert (
        rank_correlation(pairs[:2]) is None and rank_correlation([(1, 1), (1, 2), (1, 3)]) is None
    )


def test_what_cannot_be_searched_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake = Fake(base_recipe())
    with pytest.raises(ValueError, match="budget of .* is too small: .* steps for a stage"):
        begin(tmp_path / "small", fake, budget=0.01)
    begin(tmp_path / "one", fake)
    with pytest.raises(ValueError, match="another flops and how"):
        begin(tmp_path / "one", fake, budget=6, how=How(candidates=4, rungs=1))
    for arguments, message in (
        ([], "give one budget"),
        (["--flops", "1e9", "--hours", "1"], "give one budget"),
        (["--flops", "1e9", "--how.candidates", "6"], "use 18 candidates"),
        (["--flops", "1e9", "--space.kinds", "none"], "hides nothing"),
        (["--flops", "1e9", "--how.proxy", "x"], "proxy"),
        (["--flops", "1e12", "--data.held-out", "0.0001"], "0.0001 of 1797 images are none"),
        (
            ["--flops", "1e12", "--how.proxy", "kid", "--evaluation.quick-num", "200"],
            "means nothing in features pca",
        ),  # fmt: skip
        (["--flops", "1e3", "--out", str(tmp_path / "y")], "is too small"),
    ):
        assert main(["search", "digits", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_forked_training_is_the_unbroken_one_to_the_bit(tmp_path):
    recipe = Recipe(**tiny_settings(), seed=3)
    settings = recipe.model_dump()
    settings["stages"][0]["warmup"] = 2
    recipe = Recipe(**{**settings, "num_previews": 0})
    store = open_store(recipe.data, progress=False)
    trainer = LocalTrainer(changed(recipe, evaluation={"quick_num": 0}), store)
    forest = Forest(tmp_path / "forest", trainer, build_model(recipe))
    node = forest.grow(recipe, marks=[2, 4], earlier=[])
    train(recipe, tmp_path / "whole", show=False)
    runs = [tmp_path / "whole", forest.folder / node.name]
    files = [find_checkpoint(one / "checkpoints") for one in runs]
    for name in ("model.safetensors", "ema.safetensors"):
        whole, forked = (load_file(one / name) for one in files)
        assert all(torch.equal(whole[key], forked[key]) for key in whole)
    assert read_progress(files[1]).flops == node.flops == forest.spent()
    assert len(forest.nodes()) == 4
    lines = read_lines(forest.folder / node.name / "metrics.jsonl")
    assert lines[0]["step"] == 7 and lines[0]["images"] == 7 * 8  # it has trained its own steps
    assert "dense_loss_train" in trainer.measure(recipe, runs[1])


@pytest.mark.slow
def test_a_real_search_on_digits_writes_a_recipe_that_trains(tmp_path, capsys):
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "search"
    recipe.write_text(Recipe(**tiny_settings()).to_yaml())
    flags = "--flops 6e9 --how.candidates 4 --how.rungs 1 --how.repeats 2 --space.masked-stages 1"
    space = "--space.shares 0.3 --space.batches 1 --stages.all.steps 200 --evaluation.features pca"
    arguments = ["search", str(recipe), "--out", str(out), *flags.split(), *space.split()]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.count("\ntrial ") >= 8 and "result  masks" in text
    assert (out / "tree.png").stat().st_size > 10_000
    result = json.loads((out / "result.json").read_text())
    assert 0 < result["spent_flops"] <= 6e9
    assert main(arguments) == 0  # it is over: the same result, and nothing is trained
    assert json.loads((out / "result.json").read_text()) == result
    winner = load_recipe(out / "winner.yaml")
    assert winner.data.held_out == 0 and sum(one.steps for one in winner.stages) > 200
