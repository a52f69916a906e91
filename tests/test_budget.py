"""Budgets become steps, runs grow, and settings that change no weight may change."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_training import assert_same_bits, metrics, quiet, state, train_until

from maskdm.commands.compare import with_control
from maskdm.evaluation.quick import QuickLook
from maskdm.models.build import build_model
from maskdm.recipe import Average, Budget, Recipe, Stage
from maskdm.recipe_files import load_recipe, recipe_names
from maskdm.runs.checkpoint import Progress
from maskdm.runs.find import Location, find_model, training_of
from maskdm.training import budget, controls, planning, speed
from maskdm.training.budget import scaled
from maskdm.training.ema import decay_of, make_average, update_average
from maskdm.training.optim import learning_rate
from maskdm.training.remaining import Remaining
from maskdm.training.speed import Speed
from maskdm.training.trainer import train
from maskdm.training.work import stage_work, total_flops
from maskdm.words import about


class FixedSpeed:
    """A machine of known speed."""

    def speed(self, recipe: Recipe) -> Speed:
        return Speed((0.02, 0.04), 0.001)

    def flops_per_sec(self) -> float:
        return 1e12


class ByFlops:
    """A machine that needs a second for a MFLOP."""

    def speed(self, recipe: Recipe) -> Speed:
        works = stage_work(recipe, build_model(recipe))
        return Speed(tuple(work.step_flops / 1e6 for work in works), 0.001)


FREE = {"steps": 0, "warmup": "10%", "ema": {"kind": "power", "width": 0.1}}


def saved(run: Path) -> Recipe:
    return load_recipe(run / "recipe.yaml")


@pytest.fixture
def shared(changed):
    """The tiny recipe with stages that divide a budget, one third and two thirds."""

    def make(**budget: float) -> Recipe:
        recipe = changed()
        shares = zip(recipe.stages, (1.0, 2.0), strict=True)
        stages = [{**stage.model_dump(), **FREE, "share": share} for stage, share in shares]
        return changed(stages=stages, budget=budget, log_every="50%", checkpoint_every="100%")

    return make


def test_a_budget_in_flops_is_spent_in_the_stages_shares(shared, tmp_path):
    quiet(shared(flops=2e9), tmp_path / "run")
    recipe = saved(tmp_path / "run")
    works = stage_work(recipe, build_model(recipe))
    spent = [w.step_flops * s.steps for w, s in zip(works, recipe.stages, strict=True)]
    for part, work, share in zip(spent, works, (1 / 3, 2 / 3), strict=True):
        assert abs(part - share * 2e9) <= work.step_flops / 2 + 1
    assert metrics(tmp_path / "run")[-1]["flops"] == sum(spent)


@pytest.mark.parametrize(("unit", "amount", "images"), [("images", 800, 800), ("epochs", 0.5, 898)])
def test_a_budget_in_images_is_spent(shared, tmp_path, unit, amount, images):
    quiet(shared(flops=1e9), tmp_path / "run", **{unit: amount})
    recipe = saved(tmp_path / "run")
    assert abs(sum(8 * stage.steps for stage in recipe.stages) - images) <= 16
    assert getattr(recipe.budget, unit) == amount and recipe.budget.flops is None


def test_hours_count_training_previews_and_measuring(shared, tmp_path):
    recipe = Recipe(
        **{
            **shared(hours=1).model_dump(),
            "preview_every": "50%",
            "num_previews": 10,
            "preview_steps": 20,
            "evaluate_every": "50%",
            "data": {"source": "digits", "channels": 1, "held_out": 100},
            "evaluation": {"quick_num": 50},
        }
    )
    planned = budget.with_steps(recipe, 1797, 1697, FixedSpeed())
    training = 0.02 * planned.stages[0].steps + 0.04 * planned.stages[1].steps
    # Set points: half of the run, its end, and the first stage's end.
    previews = 3 * 10 * 20 * 0.001
    measuring = 3 * (10 * (100 + 256) + 50 * 20) * 0.001
    assert training + previews + measuring == pytest.approx(3600, abs=0.1)
    flops = [w.step_flops for w in stage_work(planned, build_model(planned))]
    ratio = flops[1] * planned.stages[1].steps / (flops[0] * planned.stages[0].steps)
    assert ratio == pytest.approx(2, rel=1e-3)


def test_measured_evaluations_are_those_that_a_look_takes(tiny, changed, tmp_path, monkeypatch):
    """The count of network evaluations of a measurement equals what is really computed."""
    recipe = changed(
        data={"source": "digits", "channels": 1, "held_out": 30},
        evaluation={"quick_num": 20, "quick_loss_num": 40, "num_components": 4},
        evaluate_every=100,
        num_previews=0,
    )
    counted = []
    look = QuickLook.__call__

    def counting(self, trained, progress):
        def count(module, arguments):
            counted.append(len(arguments[0]))

        hook = trained.model.register_forward_pre_hook(count)
        try:
            return look(self, trained)
        finally:
            hook.remove()

    monkeypatch.setattr(QuickLook, "__call__", counting)
    quiet(recipe, tmp_path / "run")
    assert sum(counted) == budget.besides(saved(tmp_path / "run"), 1797).measuring


def test_speed_is_measured_once_and_remembered(tiny, monkeypatch):
    accelerator = Accelerator(cpu=True)
    said: list[str] = []
    first = speed.measure_speed(tiny, accelerator, said.append)
    assert len(said) == 1 and len(first.step_sec) == 2 and first.forward_sec > 0
    monkeypatch.setattr(speed, "_step_sec", lambda *_: pytest.fail("measured again"))
    longer = tiny.model_copy(update={"seed": 3})
    assert speed.measure_speed(longer, accelerator, said.append) == first and len(said) == 1


@pytest.mark.parametrize("name", [*recipe_names()])
def test_any_recipe_shrinks_without_losing_its_shape(name):
    recipe = load_recipe(name)
    small = scaled(recipe, 0.01)
    for stage, less in zip(recipe.stages, small.stages, strict=True):
        if stage.steps:
            assert less.steps == max(1, round(stage.steps / 100))
            assert less.warmup_steps <= less.steps
            before, now = (decay_of(s.ema, 10**6) for s in (stage, less))
            if stage.ema.kind == "constant":  # what is left of the first weights stays the same
                assert now**less.steps == pytest.approx(before**stage.steps, rel=0.2, abs=1e-6)
    if recipe.budget.hours:
        assert small.budget.hours == recipe.budget.hours / 100


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"flops": 1e6}, "the budget leaves 1 step of .* for stage hide: give more, or lower"),
        ({"flops": -1}, "flops -1: expected a number above 0"),
        ({"images": "+80"}, "holds no run that could grow"),
        ({"hours": "soon"}, "hours 'soon': expected a number above 0"),
        ({"hours": 1, "images": 5}, "give one budget, not hours and images"),
    ],
)
def test_budgets_that_cannot_be_are_refused_in_a_line(shared, tmp_path, budget, message):
    with pytest.raises(ValueError, match=message):
        quiet(shared(flops=1e9), tmp_path / "run", **budget)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("images", "batch"), [(64_000, 64), (63_000, 32), (9_000, 8), (2_000, 8)])
def test_a_short_run_has_smaller_batches_and_so_a_thousand_steps(shared, images, batch):
    settings = shared(images=images).model_dump()
    settings["stages"] = [
        stage | {"batch_size": 64, "smallest_batch": 8} for stage in settings["stages"]
    ]
    planned = budget.with_steps(Recipe(**settings), 1797, 1697, FixedSpeed())
    assert [stage.batch_size for stage in planned.stages] == [batch, batch]
    assert planned.num_steps * batch == pytest.approx(images, abs=batch)
    assert planned.num_steps >= 999 or batch == 8
    settings["stages"][1] |= {"smallest_batch": None}
    planned = budget.with_steps(Recipe(**settings), 1797, 1697, FixedSpeed())
    assert [stage.batch_size for stage in planned.stages] == [batch, 64]


def test_a_run_in_small_batches_goes_on_in_them_and_so_does_its_control(
    shared, tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "ENOUGH_STEPS", 100)
    settings = shared(images=480).model_dump()
    settings["stages"] = [
        stage | {"batch_size": 8, "smallest_batch": 4} for stage in settings["stages"]
    ]
    recipe, run = Recipe(**settings), tmp_path / "run"
    for control, folder in (("none", run), ("dense", tmp_path / "run-dense")):
        for _ in range(2):  # the second time the same command goes on
            quiet(recipe, folder, control=control)
            assert {stage.batch_size for stage in saved(folder).stages} == {4}
        quiet(recipe, folder, control=control, images=1600)  # 200 steps of 8
        assert {stage.batch_size for stage in saved(folder).stages} == {4}
        assert metrics(folder)[-1]["images"] == pytest.approx(1600, rel=0.3)


class Laptop:
    """Two CPU cores, with the smallest model of `photos32`."""

    def speed(self, recipe: Recipe) -> Speed:
        return Speed((0.14, 0.21), 0.0011)


def test_a_short_run_measures_losses_on_fewer_images():
    """As many as take a twentieth of the training, within limits; so two minutes are enough."""
    photos = load_recipe("photos32").model_dump()
    photos["model"] |= {"size": None, "num_classes": 0, "embed_dim": 96, "depth": 5, "num_heads": 4}
    short, middle, long = (
        budget.with_steps(
            Recipe(**photos | {"budget": {"hours": minutes / 60}}), 50_000, 47_500, Laptop()
        )
        for minutes in (2, 10, 60)
    )
    num = middle.evaluation.quick_loss_num
    assert short.evaluation.quick_loss_num == 32 < num < long.evaluation.quick_loss_num == 256
    model = build_model(middle)
    looks = len(budget.set_points(middle, middle.evaluate_every))
    flops = looks * num * 2 * 10 * model.forward_flops(64)  # held out and trained on, at ten times
    assert 0.045 < flops / total_flops(middle, stage_work(middle, model)) <= 0.05
    # A run that goes on keeps its number.
    assert Recipe(**photos).evaluation.planned_as(middle.evaluation).quick_loss_num == num


def test_a_budget_that_looking_would_use_up_names_what_to_leave_out(shared):
    """Each preview of 1,000 images takes 20 s; without them a minute is enough."""
    recipe = shared(hours=1 / 60)
    looks = {"num_previews": 1000, "preview_steps": 20, "preview_every": "50%"}
    looking = Recipe(**{**recipe.model_dump(), **looks})
    with pytest.raises(ValueError, match="--evaluate-every 0 --num-previews 0"):
        budget.with_steps(looking, 1797, 1697, FixedSpeed())
    less = {"num_previews": 0, "evaluate_every": 0}
    planned = budget.with_steps(
        Recipe(**{**looking.model_dump(), **less}), 1797, 1697, FixedSpeed()
    )
    assert planned.stages[0].steps > 100
    # Without a clock it is stages of given length that use a budget up.
    stages = [{**recipe.stages[0].model_dump(), "steps": 10**6}, recipe.stages[1].model_dump()]
    long = Recipe(**{**recipe.model_dump(), "stages": stages, "budget": {"flops": 1e9}})
    with pytest.raises(ValueError, match=r"give more, or shorten them with --stages\.N\.steps"):
        budget.with_steps(long, 1797, 1697, FixedSpeed())


def test_a_run_without_steps_or_budget_is_refused(shared):
    with pytest.raises(ValueError, match="stages.0.steps is needed where the run has no budget"):
        shared()


def test_the_same_budget_continues_the_run(shared, tmp_path):
    recipe = shared(flops=2e9)
    train_until(recipe, tmp_path / "run", 4)
    quiet(recipe, tmp_path / "run")
    quiet(recipe, tmp_path / "whole")
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_that_grows_equals_one_planned_so(tiny, changed, tmp_path):
    """With a constant learning rate, bit for bit; also where a kill comes in between."""
    longer = [tiny.stages[0].model_dump(), {**tiny.stages[1].model_dump(), "steps": 9}]
    quiet(changed(stages=longer, log_every=1), tmp_path / "whole")
    quiet(changed(log_every=1), tmp_path / "run")
    train_until(changed(stages=longer, log_every=1), tmp_path / "run", 13)
    quiet(changed(stages=longer, log_every=1), tmp_path / "run")
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_decayed_rate_starts_again_where_the_run_grows(tiny, changed, tmp_path):
    decaying = {**tiny.stages[1].model_dump(), "lr_schedule": "cosine", "steps": 6}
    quiet(changed(stages=[decaying]), tmp_path / "run")
    quiet(load_recipe(tmp_path / "run/recipe.yaml"), tmp_path / "run", images="+48")
    (stage,) = saved(tmp_path / "run").stages
    assert (stage.steps, stage.restarts) == (12, (6,))
    rates = [learning_rate(stage, step) for step in range(12)]
    assert rates[:6] == [learning_rate(Stage(**decaying), step) for step in range(6)]
    assert rates[6:] == rates[:6]
    assert metrics(tmp_path / "run")[-1]["step"] == 12
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert "stages.0.steps: 6 -> 12" in starts[-1]["changes"]


def test_only_stages_that_are_not_over_can_grow(tiny, changed, tmp_path):
    train_until(tiny, tmp_path / "run", 10)  # the last checkpoint is that of step 9
    stages = [{**tiny.stages[0].model_dump(), "steps": 8}, tiny.stages[1].model_dump()]
    with pytest.raises(ValueError, match=r"stages.0.steps: 6 -> 8"):
        quiet(changed(stages=stages), tmp_path / "run")
    quiet(tiny, tmp_path / "run", images="+16")
    assert [stage.steps for stage in saved(tmp_path / "run").stages] == [6, 7]


def test_an_unfinished_run_grows_in_all_stages_that_are_left(tiny, tmp_path):
    train_until(tiny, tmp_path / "run", 4)
    works = stage_work(tiny, build_model(tiny))
    quiet(tiny, tmp_path / "run", flops=f"+{total_flops(tiny, works)}")
    assert [stage.steps for stage in saved(tmp_path / "run").stages] == [12, 10]


def test_what_changes_no_weight_may_change_and_is_recorded(tiny, changed, tmp_path):
    quiet(tiny, tmp_path / "whole")
    train_until(tiny, tmp_path / "run", 4)
    free = {"num_previews": 2, "checkpoint_every": 4, "sampling": {"steps": 3}}
    quiet(changed(**free), tmp_path / "run")
    assert state(tmp_path / "run").keys() == state(tmp_path / "whole").keys()
    for name, value in state(tmp_path / "whole").items():
        assert torch.equal(state(tmp_path / "run")[name], value)
    assert saved(tmp_path / "run").num_previews == 2
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert "num_previews: 4 -> 2" in starts[-1]["changes"]


def test_learning_rates_change_only_on_request(tiny, changed, tmp_path):
    train_until(tiny, tmp_path / "run", 4)
    stages = [{**stage.model_dump(), "lr": 5e-4} for stage in tiny.stages]
    with pytest.raises(ValueError, match="add --change to go on with these"):
        quiet(changed(stages=stages), tmp_path / "run")
    quiet(changed(stages=stages), tmp_path / "run", change=True)
    assert saved(tmp_path / "run").stages[0].restarts == (3,)  # where the last checkpoint is
    with pytest.raises(ValueError, match="diffusion.prediction: x0 -> v"):
        quiet(changed(stages=stages, diffusion={"prediction": "v"}), tmp_path / "run", change=True)


def test_a_rate_that_was_too_high_can_be_changed_again(tiny, changed, tmp_path):
    run, rates = tmp_path / "run", (1e-1, 5e-4)
    high, low = (
        changed(stages=[{**stage.model_dump(), "lr": rate} for stage in tiny.stages])
        for rate in rates
    )
    train_until(tiny, run, 4)
    train_until(high, run, 5, change=True)  # dies before it has saved anything
    quiet(low, run, change=True)
    assert (saved(run).stages[0].restarts, saved(run).stages[0].lr) == ((3,), 5e-4)


@pytest.mark.parametrize("kinds", [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_goes_on_without_the_moments_of_the_former(
    tiny, changed, tmp_path, kinds
):
    first, second = (
        changed(stages=[{**stage.model_dump(), "optimizer": kind} for stage in tiny.stages])
        for kind in kinds
    )
    train_until(first, tmp_path / "run", 4)
    quiet(second, tmp_path / "run", change=True)
    names = {name.rpartition(".")[2] for name in state(tmp_path / "run") if ".qkv." in name}
    assert names >= {"momentum" if kinds[1] == "muon" else "exp_avg"}
    assert not names & {"momentum" if kinds[1] == "adamw" else "exp_avg"}


def test_how_a_step_is_computed_may_change(tiny, changed, tmp_path):
    train_until(tiny, tmp_path / "run", 4)
    stages = [
        {**stage.model_dump(), "micro_batch_size": 4, "activation_checkpointing": True}
        for stage in tiny.stages
    ]
    data = {**tiny.data.model_dump(), "resident": "on"}
    quiet(changed(stages=stages, data=data, compile="off"), tmp_path / "run")
    assert saved(tmp_path / "run").stages[1].micro_batch_size == 4


def test_a_run_that_grows_is_found_by_its_newest_checkpoint(tiny, tmp_path):
    run = tmp_path / "run"
    quiet(tiny, run)
    assert find_model(run).folder == run / "model"
    longer = {"images": "+80"}
    train_until(tiny, run, 14, **longer)
    location = find_model(run)
    assert location.folder.name == "step-00000012"  # and not the model of the former end
    assert training_of(location)["step"] == 12
    assert training_of(Location(run / "model", run)) is None  # nothing says how far it was trained
    quiet(saved(run), run)
    assert find_model(run).folder == run / "model"
    assert training_of(find_model(run))["step"] == saved(run).num_steps


def test_more_hours_pay_for_more_previews_and_measurements(tiny, changed):
    recipe = changed(preview_every=2, num_previews=100)
    machine, done = ByFlops(), Progress(step=6, stage=1)

    def seconds(one: Recipe) -> float:
        speed = machine.speed(one)
        steps = sum(row.steps * sec for row, sec in zip(one.stages, speed.step_sec, strict=True))
        return steps + budget.besides(one, 1797, after=6).total * speed.forward_sec

    grown = budget.longer(recipe, Budget(hours=0.1), done, machine, 1797, 1700)
    looks = budget.besides(grown, 1797, 6).total - budget.besides(recipe, 1797, 6).total
    assert looks * machine.speed(recipe).forward_sec > 30
    assert seconds(grown) - seconds(recipe) == pytest.approx(360, abs=8)
    with pytest.raises(ValueError, match="too small: .* go to previews and measuring: give more"):
        budget.longer(
            changed(preview_every=2, num_previews=10**6),
            Budget(hours=0.1),
            done,
            machine,
            1797,
            1700,
        )


def test_the_images_may_be_named_differently(changed, tmp_path, image_folder, monkeypatch):
    data = {"source": str(image_folder), "size": 8, "channels": 1}
    train_until(changed(data=data), tmp_path / "run", 5)
    monkeypatch.chdir(image_folder.parent)
    for source in (f"{image_folder}/", os.path.relpath(image_folder)):
        quiet(changed(data={**data, "source": source}), tmp_path / "run")


def test_the_dense_control_spends_the_same(tiny, tmp_path):
    quiet(tiny, tmp_path / "run")
    quiet(tiny, tmp_path / "dense", control="dense")
    ends = [metrics(tmp_path / name)[-1] for name in ("run", "dense")]
    dense = saved(tmp_path / "dense")
    (stage,) = dense.stages
    (work,) = stage_work(dense, build_model(dense))
    assert stage.mask.kind == "none" and stage.lr == tiny.stages[-1].lr
    assert abs(ends[0]["flops"] - ends[1]["flops"]) <= work.step_flops / 2
    runs = (str(tmp_path / "run-dense"), str(tmp_path / "run"))
    quiet(tmp_path / "run", None, control="dense")
    assert with_control(runs[1:]) == with_control(runs[:1]) == runs
    assert with_control((str(tmp_path / "dense"),)) == (str(tmp_path / "dense"),)  # of no run
    assert saved(tmp_path / "run-dense").stages == dense.stages
    quiet(tiny, tmp_path / "steps", control="dense", control_equal="steps")
    assert saved(tmp_path / "steps").stages[0].steps == 11


@pytest.mark.parametrize("equal", ["flops", "time", "steps"])
def test_an_unmasked_control_differs_in_the_masks_alone(tiny, changed, equal):
    first, last = (stage.model_dump() for stage in tiny.stages)
    recipe = changed(stages=[{**first, "lr": 4e-3, "steps": 60, "warmup": 50}, last])
    control = controls.unmasked_control(recipe, equal, ByFlops())
    masked, whole = (stage_work(one, build_model(one)) for one in (recipe, control))
    for stage, own, before, now in zip(recipe.stages, control.stages, masked, whole, strict=True):
        kept = {"steps", "warmup", "mask"}
        assert stage.model_dump(exclude=kept) == own.model_dump(exclude=kept)
        assert own.mask.rate == 0 and own.warmup_steps <= own.steps
        spent = [before.step_flops * stage.steps, now.step_flops * own.steps]
        if equal == "steps":
            assert own.steps == stage.steps
        else:
            assert spent[1] == pytest.approx(spent[0], abs=now.step_flops / 2)
    assert control.stages[1].steps == 5 and control.budget == recipe.budget


def test_a_dense_control_leaves_out_what_it_cannot_have(tiny, changed):
    """A primer to be guided by, and a warm-up that is longer than its fewer, dearer steps."""
    masked = {**tiny.stages[0].model_dump(), "steps": 60, "warmup": 60}
    guided = {"kind": "autoguidance", "weak": "primer"}
    stages = [masked, {**masked, "name": "last"}]
    recipe = changed(stages=stages, sampling={"guidance": guided})
    (stage,) = controls.dense_control(recipe).stages
    assert stage.warmup == stage.steps < 120
    assert controls.dense_control(recipe).sampling.guidance.kind == "none"
    other = changed(sampling={"guidance": {**guided, "weak": "runs/other"}})
    assert controls.dense_control(other).sampling.guidance.weak == "runs/other"


def test_an_unmasked_control_lies_beside_its_run(tiny, tmp_path):
    quiet(tiny, tmp_path / "run")
    quiet(tiny, tmp_path / "run-unmasked", control="unmasked")
    dense = saved(tmp_path / "run-unmasked")
    assert [stage.mask.rate for stage in dense.stages] == [0, 0] and dense.stages[0].steps < 6
    runs = with_control((str(tmp_path / "run"),))
    assert runs == (str(tmp_path / "run-unmasked"), str(tmp_path / "run"))


def test_the_control_of_a_run_that_has_grown_grows_alike(tiny, changed, tmp_path):
    """Its decayed rate begins anew, as the run's does, and recipe.yaml says so."""
    decaying = {**tiny.stages[1].model_dump(), "lr_schedule": "cosine", "steps": 6}
    for extra in ({}, {"images": "+48"}):
        quiet(changed(stages=[decaying]), tmp_path / "run", **extra)
        control = saved(tmp_path / "run")
        quiet(control, tmp_path / "run-dense", control="dense")
    (stage,) = saved(tmp_path / "run-dense").stages
    assert (stage.steps, stage.restarts) == (12, (6,))
    assert stage.restarts == saved(tmp_path / "run").stages[0].restarts


def test_classes_are_found_and_half_of_them_refused(changed, tmp_path, image_folder):
    model = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": "auto"}
    data = {"source": str(image_folder), "size": 8, "channels": 1}
    quiet(changed(data=data, model=model), tmp_path / "run")
    assert saved(tmp_path / "run").model.num_classes == 2
    (image_folder / "cat" / "a.png").rename(image_folder / "a.png")
    with pytest.raises(ValueError, match="some images of .* have a class and some have none"):
        quiet(changed(data=data, model=model), tmp_path / "other")
    quiet(changed(), tmp_path / "none")
    model_auto = {**model, "num_classes": "auto"}
    flat = image_folder.parent / "flat"
    flat.mkdir()
    for file in image_folder.rglob("*.jpg"):
        file.rename(flat / file.name)
    quiet(changed(data={**data, "source": str(flat)}, model=model_auto), tmp_path / "flat-run")
    assert saved(tmp_path / "flat-run").model.num_classes == 0


def test_larger_budgets_get_larger_models(shared, tmp_path):
    sizes = []
    for flops in (1e12, 1e16, 1e19):
        recipe = shared(flops=flops)
        recipe = Recipe(**{**recipe.model_dump(), "model": {"patch_size": 2, "size": "auto"}})
        chosen = planning.with_size(recipe, 10**7, FixedSpeed())
        sizes.append(chosen.model.embed_dim)
        assert chosen.stages[0].lr * chosen.model.embed_dim == pytest.approx(96 * 1e-3)
    assert sizes == sorted(set(sizes)) and sizes[0] == 96
    few = planning.with_size(recipe, 100, FixedSpeed())  # 100 images of 8x8
    assert few.model.embed_dim == 96


def test_the_average_of_the_papers_code_copies_first(tiny):
    ema = Average(kind="warmup", decay=0.9999)
    assert decay_of(ema, 1) == decay_of(ema, 101) == 0
    assert decay_of(ema, 102) == pytest.approx(1 - 2 ** (-2 / 3))
    assert decay_of(ema, 10**7) == 0.9999


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_a_power_average_has_its_width_at_any_length(width):
    """Weights that are the step's own number: mean and spread of the profile are known."""
    for num in (200, 2000):
        positions = torch.nn.Linear(1, 2, bias=False)
        average = make_average(positions)
        ema = Average(kind="power", width=width)
        for step in range(1, num + 1):
            with torch.no_grad():
                positions.weight.copy_(torch.tensor([[step / num], [(step / num) ** 2]]))
            update_average(average, positions, decay_of(ema, step))
        mean, square = average.weight.flatten().tolist()
        assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=0.03)


def test_flags_for_all_stages_are_written_out():
    from maskdm.cli import _for_all_stages

    line = "digits --stages.all.betas 0.9 0.99 --out x --stages.all.lr=1e-3".split()
    assert (
        _for_all_stages(line, 2)
        == (
            "digits --stages.0.betas 0.9 0.99 --stages.1.betas 0.9 0.99 --out x "
            "--stages.0.lr=1e-3 --stages.1.lr=1e-3"
        ).split()
    )


def test_set_points_are_each_stages_end_and_the_interval(tiny):
    recipe = scaled(tiny, 10)
    points = budget.set_points(recipe, "25%")
    assert points == {60, 110, *itertools.islice(range(28, 111, 28), 3)}


def test_an_open_number_of_samples_is_settled_where_all_stages_have_steps(tiny, tmp_path):
    settings = tiny.model_dump() | {"evaluation": {"quick_num": "auto", "num_components": 4}}
    quiet(Recipe(**settings), tmp_path / "run", images=200)
    assert saved(tmp_path / "run").evaluation.quick_num == 0  # so short a run measures losses alone


def test_the_time_left_follows_the_speed_of_the_last_seconds(tiny, monkeypatch):
    """Steps of a second, then of half a second: soon the estimate forgets the first."""
    clock = [0.0]
    monkeypatch.setattr("maskdm.training.remaining.time.perf_counter", lambda: clock[0])
    recipe = scaled(tiny, 100)
    model = build_model(recipe)
    works = stage_work(recipe, model)
    remaining, progress = Remaining(recipe, works, model, 1797), Progress()
    remaining.begin(progress)
    assert remaining.seconds(progress) is None
    for seconds in [1.0] * 30 + [0.5] * 200:
        clock[0] += seconds
        progress.step += 1
        progress.stage_step += 1
        progress.images += 8
        progress.flops += works[0].step_flops
        remaining.update(progress)
    assert remaining.images_per_sec == pytest.approx(16, rel=0.05)
    left = remaining.seconds(progress)
    assert left is not None and left[1] > left[0]
    previews = left[0] - (600 - 230) * 0.5
    assert 0 < previews < 600 * 0.5  # the stage's last preview, at the same FLOPs per second


def test_a_run_of_minutes_says_how_long_it_takes_at_best(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("maskdm.training.speed.device_flops", lambda device: 1e6)
    train(tiny, tmp_path / "short")
    assert "at best" not in capsys.readouterr().out
    monkeypatch.setattr("maskdm.training.monitor.WORTH_GUESSING", 0)
    train(tiny, tmp_path / "long")
    text = capsys.readouterr().out
    flops = json.loads((tmp_path / "long" / "metrics.jsonl").read_text().splitlines()[-1])["flops"]
    assert f", at best in {about(flops / 1e6)}\n" in text
