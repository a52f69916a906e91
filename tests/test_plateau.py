"""Stages until their plateau: decided by forks, paid for, and repeated after a kill."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import Interrupted, assert_same_bits, metrics, quiet, state, train_until

from maskdm.cli import main
from maskdm.models.build import build_model
from maskdm.recipe import Data, Recipe
from maskdm.recipe_files import load_recipe
from maskdm.runs.find import stage_checkpoint
from maskdm.runs.lines import PROBES, read_lines
from maskdm.training import plateau as lengths
from maskdm.training import probe as module
from maskdm.training.controls import dense_control, unmasked_control
from maskdm.training.plateau import forks_of
from maskdm.training.work import stage_work, total_flops

STEPS, HELD_OUT = (40, 110), 4


@pytest.fixture(autouse=True)
def _short_forks(monkeypatch):
    monkeypatch.setattr(lengths, "FEWEST_STEPS", 2)


@pytest.fixture
def plateau(tiny: Recipe) -> Recipe:
    """The tiny recipe, whose masked stage takes 40 steps or ends at one of its fifths before."""
    content = tiny.model_dump(mode="json")
    content["data"]["held_out"] = HELD_OUT
    content |= {"log_every": 10, "checkpoint_every": 10, "num_previews": 0}
    for row, steps in zip(content["stages"], STEPS, strict=True):
        row["steps"] = steps
    content["stages"][0]["until"] = "plateau"
    return Recipe(**content)


def with_stage(recipe: Recipe, number: int = 0, **changes) -> Recipe:
    content = recipe.model_dump(mode="json")
    content["stages"][number] |= changes
    return Recipe(**content)


def flops_of(recipe: Recipe) -> int:
    return total_flops(recipe, stage_work(recipe, build_model(recipe)))


def on_a_surface(patch: pytest.MonkeyPatch, gains: dict[int, float], spread: float = 0.0) -> None:
    """Forks that train nothing: at a step the next stage gains more by so much, on average.

    Args:
        gains: by the step of the stage.
        spread: standard deviation of the difference over images.
    """

    def fork(self, recipe, progress, masked, whole, num_averaged, network):
        noise = torch.linspace(-1, 1, 64, dtype=torch.float64)
        noise = noise / noise.std()
        stays = masked > 0
        return 1.0 + stays * (gains[progress.stage_step] + spread * noise)

    patch.setattr(module.Probe, "_fork", fork)


@pytest.mark.parametrize(
    ("gains", "spread", "end"),
    [
        ({8: np.nan, 16: -0.1, 24: 0.1, 32: 0.3}, 0.0, 24),  # a fork that diverged says nothing
        ({8: 0.2, 16: 0.3, 24: 0.2, 32: 0.2}, 1.0, 16),  # not within 2 standard errors, 0.25
        ({8: -0.1, 16: -0.1, 24: -0.1, 32: 0.0}, 0.0, 40),  # never
    ],
)
def test_a_stage_ends_where_the_next_one_gains_more(
    plateau, tmp_path, monkeypatch, gains, spread, end
):
    on_a_surface(monkeypatch, gains, spread)
    assert quiet(plateau, tmp_path).finished
    settled = load_recipe(tmp_path / "recipe.yaml")
    assert settled.stages[0].steps == end and settled.stages[0].until == "steps"
    lines = read_lines(tmp_path / PROBES)
    assert [line["step"] for line in lines] == [step for step in gains if step <= end]
    assert [line["ends"] for line in lines] == [step == end for step in gains if step <= end]
    assert stage_checkpoint(tmp_path, "hide").name == f"step-{end:08d}"
    # What is saved goes to the next stage, less what the forks have cost: to within half a step.
    works = stage_work(plateau, build_model(plateau))
    forks = forks_of(plateau, 0, works, build_model(plateau), 1797)
    spent = metrics(tmp_path)[-1]["flops"]
    assert settled.stages[0].probe_flops == len(lines) * forks.flops
    assert abs(spent - flops_of(plateau)) <= works[1].step_flops / 2
    assert spent == flops_of(settled)
    assert abs(flops_of(dense_control(settled)) - spent) <= works[1].step_flops / 2
    whole = flops_of(unmasked_control(settled))
    assert abs(whole - spent) <= works[1].step_flops  # half a step of either stage


def test_forks_cost_the_same_and_end_in_the_next_stage_alike(plateau):
    model = build_model(plateau)
    works = stage_work(plateau, model)
    forks = forks_of(with_stage(plateau, steps=4000), 0, works, model, 1797)
    masked, whole = works[0].step_flops, works[1].step_flops
    stays = forks.masked * masked + forks.following * whole
    assert abs(stays - forks.whole * whole) <= whole / 2
    assert forks.masked * masked == pytest.approx(4000 / 200 * masked, abs=whole)
    assert forks.following * whole == pytest.approx(4000 / 200 * masked, abs=whole)
    measuring = 2 * HELD_OUT * 10 * model.forward_flops(model.num_patches)
    assert forks.flops == stays + forks.whole * whole + measuring
    assert forks.points == (800, 1600, 2400, 3200)
    late = forks_of(with_stage(plateau, steps=4000, warmup="25%"), 0, works, model, 1797)
    assert late.points == (1600, 2400, 3200)  # never before the warm-up is over


@pytest.mark.parametrize("start_from", ["raw", "ema"])
def test_forks_leave_no_trace_in_the_run(plateau, tmp_path, monkeypatch, start_from):
    monkeypatch.setattr(module, "NOISE", float("inf"))  # so that none ends the stage
    recipe = with_stage(with_stage(plateau, ema={"kind": "power"}), 1, start_from=start_from)
    quiet(recipe, tmp_path / "forks")
    lines = read_lines(tmp_path / "forks" / PROBES)
    assert len(lines) == 4 and all(line["gain_error"] > 0 for line in lines)
    settled = load_recipe(tmp_path / "forks" / "recipe.yaml")
    quiet(settled, tmp_path / "none")  # the same steps, without forks
    for name, tensor in state(tmp_path / "forks").items():
        assert torch.equal(tensor, state(tmp_path / "none")[name]), name
    assert not (tmp_path / "none" / PROBES).exists()


def test_the_first_steps_of_a_fork_are_those_of_the_run(plateau, tmp_path, monkeypatch):
    """A fork that goes on for so many steps has the weights that the run has after them."""
    monkeypatch.setattr(module, "NOISE", float("inf"))
    seen, real = [], module.update_average

    def first_weights(average, model, decay):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        real(average, model, decay)

    recipe = with_stage(plateau, 1, lr=1e-30, weight_decay=0.0)
    monkeypatch.setattr(module, "update_average", first_weights)
    model = build_model(recipe)
    forks = forks_of(recipe, 0, stage_work(recipe, model), model, 1797)
    train_until(with_stage(recipe, steps=40), tmp_path / "a", 8 + forks.masked)
    # The next stage hardly moves: its weights are those that the masked steps have left.
    quiet(with_stage(recipe, until="steps", steps=8 + forks.masked), tmp_path / "b")
    path = stage_checkpoint(tmp_path / "b", "hide") / "model.safetensors"
    expected = load_file(path)
    for name, tensor in seen[0].items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [12, 29])
def test_a_killed_run_takes_the_same_decision(plateau, tmp_path, monkeypatch, step):
    real = module.Probe._fork

    def fork(self, recipe, progress, masked, *others):
        worse = 1.0 if masked and progress.stage_step >= 24 else 0.0  # the stage ends there
        return real(self, recipe, progress, masked, *others) + worse

    monkeypatch.setattr(module.Probe, "_fork", fork)
    quiet(plateau, tmp_path / "unbroken")
    train_until(plateau, tmp_path / "broken", step)
    assert quiet(plateau, tmp_path / "broken").finished
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")
    lines = [read_lines(tmp_path / name / PROBES) for name in ("unbroken", "broken")]
    assert lines[0] == lines[1] and [line["ends"] for line in lines[0]] == [False, False, True]
    recipes = [load_recipe(tmp_path / name / "recipe.yaml") for name in ("unbroken", "broken")]
    assert recipes[0] == recipes[1]
    # The same command on the finished run changes nothing; nor does its own recipe.
    for again in (plateau, recipes[1]):
        assert quiet(again, tmp_path / "broken").finished
        assert load_recipe(tmp_path / "broken" / "recipe.yaml") == recipes[1]
    with pytest.raises(ValueError, match=r"\(stages.1.lr: 0.001 -> 0.01\)"):
        quiet(with_stage(plateau, 1, lr=0.01), tmp_path / "broken")


def test_a_signal_among_forks_stops_at_once_and_loses_a_step(plateau, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NOISE", float("inf"))
    quiet(plateau, tmp_path / "unbroken")
    real, asked = module.update_average, []

    def signalled(*args):
        real(*args)
        asked.append(os.kill(os.getpid(), signal.SIGTERM))

    with monkeypatch.context() as patch:
        patch.setattr(module, "update_average", signalled)
        result = quiet(plateau, tmp_path / "broken")
    assert not result.finished and len(asked) == 1
    assert result.checkpoint.name == "step-00000007"  # the first fifth is at 8
    assert quiet(plateau, tmp_path / "broken").finished
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")
    lines = [read_lines(tmp_path / name / PROBES) for name in ("unbroken", "broken")]
    assert len(lines[0]) == 4 and lines[0] == lines[1]


def test_a_kill_between_checkpoint_and_recipe_loses_nothing(plateau, tmp_path, monkeypatch):
    on_a_surface(monkeypatch, {8: -0.1, 16: 0.1})
    quiet(plateau, tmp_path / "unbroken")

    def die(*_):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, "write_text", die)
        quiet(plateau, tmp_path / "broken")
    assert load_recipe(tmp_path / "broken" / "recipe.yaml").stages[0].steps == 40
    quiet(plateau, tmp_path / "broken")
    assert_same_bits(tmp_path / "unbroken", tmp_path / "broken")


def test_shares_of_a_budget_are_kept_where_a_stage_ends_early(plateau, tmp_path, monkeypatch):
    content = plateau.model_dump(mode="json")
    for row, share in zip(content["stages"], (1, 3), strict=True):
        row |= {"steps": 0, "share": share, "warmup": "5%"}
    content["budget"] = {"flops": flops_of(plateau)}
    recipe = Recipe(**content)
    monkeypatch.setattr(module, "NOISE", -float("inf"))  # the first probe ends the stage
    quiet(recipe, tmp_path)
    whole = stage_work(recipe, build_model(recipe))[1].step_flops
    spent = metrics(tmp_path)[-1]["flops"]
    assert abs(spent - recipe.budget.flops) <= 2 * whole  # one for planning, one for settling
    settled = load_recipe(tmp_path / "recipe.yaml")
    assert settled.stages[0].steps < settled.stages[1].steps
    assert quiet(recipe, tmp_path).finished  # the same command
    assert load_recipe(tmp_path / "recipe.yaml") == settled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 1}, "stages.1.until plateau compares a stage with the next, and this is the"),
        ({"mask": {}}, "stages.0.until plateau is for stages with a mask"),
        ({"lr_schedule": "cosine"}, "stages.0.until plateau needs lr_schedule constant"),
        ({"held_out": 0}, "stages.0.until plateau needs held-out images: set data.held_out"),
    ],
)
def test_recipes_that_cannot_be_probed_are_refused(plateau, changes, message):
    content = plateau.model_dump(mode="json")
    content["data"]["held_out"] = changes.pop("held_out", HELD_OUT)
    number = changes.pop("stage", 0)
    content["stages"][number] |= {"until": "plateau", **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**content)


def test_forks_that_cost_too_much_are_refused_before_anything_is_written(plateau, tmp_path):
    few = Data(**(plateau.data.model_dump() | {"held_out": 1e-4}))
    for recipe, message in (
        (with_stage(plateau, 1, steps=40), "its forks may cost"),
        (with_stage(plateau, warmup=36), "leaves none of 40 to probe at"),
        (plateau.model_copy(update={"data": few}), "of 1,797 images is none"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_plan_log_and_report_say_what_forks_cost_and_showed(plateau, tmp_path, capsys, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(plateau.to_yaml())
    assert main(["plan", str(path), "--gpu", "h100"]) == 0
    assert re.search(r"forks +at most [\d.]+ [MG]FLOP of the training", capsys.readouterr().out)
    on_a_surface(monkeypatch, {8: -0.25, 16: 0.5})
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    text = "step 16: show gains 0.5 ± 0 more in dense loss than hide for the same FLOPs: hide ends"
    assert f"  {text} here" in out
    report = (tmp_path / "run" / "report.html").read_text()
    assert text.capitalize().replace("flops", "FLOPs")[:40] in report
    assert "S" + text[1:] in report and "Step 8: show gains 0.25 ± 0 less" in report
    first = json.loads((tmp_path / "run" / PROBES).read_text().splitlines()[0])
    assert first["stays"] == 0.75 and first["leaves"] == 1.0


def test_without_it_nothing_changes(tiny, tmp_path):
    quiet(tiny, tmp_path)
    assert not (tmp_path / PROBES).exists()
    assert load_recipe(tmp_path / "recipe.yaml") == tiny
