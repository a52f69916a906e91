"""Commands on a run that has begun: what they say counts, and what they leave open is the run's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_budget import ByFlops, saved
from test_training import metrics, quiet, train_until

from maskdm.cli import main
from maskdm.recipe import Recipe
from maskdm.training import planning, speed


@pytest.fixture
def shares(changed):
    """The tiny recipe with stages that halve a budget, and a checkpoint every third step."""

    def make(**changes: object) -> Recipe:
        stages = [{**stage.model_dump(), "steps": 0, "warmup": "20%"} for stage in changed().stages]
        return changed(**{"stages": stages, "budget": {"images": 320}, **changes})

    return make


def with_rows(recipe: Recipe, **settings: object) -> Recipe:
    """The recipe with other settings in all stages."""
    stages = [stage.model_dump() | settings for stage in recipe.stages]
    return Recipe(**{**recipe.model_dump(), "stages": stages})


def changes_of(run: Path) -> list[str]:
    """What the newest start has changed."""
    return json.loads((run / "environment.json").read_text())[-1]["changes"]


def test_a_size_and_rates_that_are_given_count_where_the_size_was_auto(shares, tmp_path):
    run, auto = tmp_path / "run", shares(model={"patch_size": 2, "size": "auto"})
    train_until(auto, run, 4)
    assert saved(run).model.embed_dim == 96
    small = shares(model={"patch_size": 2, "size": "small"})
    with pytest.raises(ValueError, match=r"model.embed_dim: 96 -> 256"):
        quiet(small, run, change=True)
    slow = with_rows(auto, lr=1e-5)
    with pytest.raises(ValueError, match=r"stages.1.lr: 0.001 -> 1e-05.* add --change"):
        quiet(slow, run)
    train_until(slow, run, 5, change=True)
    assert [stage.lr for stage in saved(run).stages] == [1e-5, 1e-5]
    assert "stages.1.lr: 0.001 -> 1e-05" in changes_of(run)
    train_until(with_rows(auto, lr=1e-5), run, 7)  # `auto` is still the size that was chosen
    quiet(with_rows(shares(model={"patch_size": 2, "size": "tiny"}), lr=1e-5), run)


def test_rates_of_a_wider_model_are_the_recipes_by_its_width(shares, tmp_path, monkeypatch):
    sizes = {"mini": dataclasses.replace(planning.MODEL_SIZES["mini"], num_params=1)}
    monkeypatch.setattr(planning, "MODEL_SIZES", sizes)
    auto = shares(model={"patch_size": 2, "size": "auto"})
    train_until(auto, tmp_path / "run", 4)
    assert saved(tmp_path / "run").stages[0].lr == 1e-3 * 96 / 160
    train_until(auto, tmp_path / "run", 5)
    assert changes_of(tmp_path / "run") == []


def test_settings_beside_a_budget_count_in_a_run_that_grows(changed, tmp_path):
    run, recipe = tmp_path / "run", changed(checkpoint_every=1, preview_every=50)
    train_until(recipe, run, 5, images=176)  # all lengths are twice the recipe's
    assert (saved(run).log_every, saved(run).stages[1].warmup) == (4, 4)
    # Of the run's own recipe: also the value of the first command.
    own = saved(run).model_copy(update={"log_every": 2, "keep_every": 5})
    train_until(own, run, 6, images="+16")
    assert (saved(run).log_every, saved(run).keep_every, saved(run).preview_every) == (2, 5, 100)
    # Of the recipe: those of the first command stay as that budget has scaled them.
    train_until(changed(checkpoint_every=1, preview_every=7), run, 7, images=208)
    assert (saved(run).preview_every, saved(run).checkpoint_every) == (7, 2)
    other = with_rows(recipe, ema={"decay": 0.9})
    with pytest.raises(ValueError, match=r"stages.1.ema.decay: 0\.999\d* -> 0.9\).* add --change"):
        quiet(other, run, images=224)
    quiet(other, run, images=224, change=True)
    assert (saved(run).stages[1].ema.decay, saved(run).stages[1].warmup) == (0.9, 4)


def test_settings_beside_a_budget_count_in_runs_of_earlier_versions(changed, tmp_path):
    """Which have not written down what their first commands said."""
    run, recipe = tmp_path / "run", changed(checkpoint_every=1, preview_every=50)
    train_until(recipe, run, 5, images=176)
    starts = json.loads((run / "environment.json").read_text())
    assert starts[0].pop("lengths")["stages.1.warmup"] == 2
    (run / "environment.json").write_text(json.dumps(starts))
    train_until(changed(checkpoint_every=1), run, 6, images=176)
    assert changes_of(run) == []
    own = saved(run).model_copy(update={"log_every": 2})
    quiet(own, run, images="+16")
    assert (saved(run).log_every, saved(run).preview_every) == (2, 100)


def test_the_same_settings_beside_the_same_budget_change_nothing(changed, tmp_path):
    """Also where they are lengths, which the budget has scaled."""
    recipe = with_rows(changed(log_every=1, checkpoint_every=1), warmup=1)
    train_until(recipe, tmp_path / "run", 5, images=176)
    assert (saved(tmp_path / "run").log_every, saved(tmp_path / "run").stages[1].warmup) == (2, 2)
    train_until(recipe, tmp_path / "run", 7, images=176)
    assert changes_of(tmp_path / "run") == []


@pytest.mark.parametrize("control", ["none", "dense"])
def test_the_command_that_made_a_run_grow_continues_it(shares, tmp_path, control):
    """Its warm-up was 20 % of the stage, and keeps its length at a constant rate."""
    run, how = tmp_path / "run", {"control": control}
    train_until(shares(), run, 4, images=320, **how)
    warmup = saved(run).stages[0].warmup_steps
    train_until(shares(), run, 7, images=400, **how)
    train_until(shares(), run, 10, images=400, **how)
    assert (saved(run).stages[0].warmup, changes_of(run)) == (warmup, [])
    train_until(shares(), run, 13, images=480, **how)  # it grows once more
    near_end = saved(run).num_steps - 3  # in the last stage
    train_until(shares(), run, near_end, images=480, **how)
    quiet(shares(), run, images=480, **how)
    assert (saved(run).stages[0].warmup, changes_of(run)) == (warmup, [])


def test_a_stage_of_given_steps_that_has_grown_continues_by_the_same_command(shares, tmp_path):
    first, last = (stage.model_dump() for stage in shares().stages)
    recipe, run = shares(stages=[{**first, "steps": 8}, last]), tmp_path / "run"
    for step, images in ((4, 400), (5, 600), (7, 600)):
        train_until(recipe, run, step, images=images)
    assert saved(run).stages[0].steps > 8 and changes_of(run) == []


def test_a_start_that_saved_nothing_decides_nothing(shares, tmp_path):
    """Out of memory at the first step, say: smaller batches then take as many images."""
    run = tmp_path / "run"
    train_until(shares(), run, 2, images=640)
    assert saved(run).num_steps == 80
    train_until(with_rows(shares(), batch_size=4), run, 2, images=640)
    assert saved(run).num_steps == 160
    train_until(shares(), run, 2, images=320)  # a smaller budget, too
    assert saved(run).num_steps == 40
    quiet(run, None)  # the run's own recipe, with what it was planned for
    assert saved(run).budget.images == 320 and metrics(run)[-1]["step"] == 40
    quiet(shares(), run, images=400)
    assert saved(run).budget.images == 400


def test_a_start_that_saved_nothing_fixes_no_images(shares, tmp_path):
    """Nor does it leave averages behind, which the run would mix with its own."""
    run = tmp_path / "run"
    train_until(shares(keep_every=1), run, 2, images=640)
    assert (run / "kept" / "step-00000001").is_dir()
    before = (run / "data.png").read_bytes()
    other = shares(data={"source": "digits", "size": 16, "channels": 1})
    quiet(other, run, images=320)
    assert saved(run).data.size == 16 and (run / "data.png").read_bytes() != before
    assert not (run / "kept" / "step-00000001").exists()
    with pytest.raises(ValueError, match="are not those that the run"):
        quiet(shares(), run, images=320)


def test_sizes_that_a_size_by_name_would_overwrite_are_refused(capsys):
    with pytest.raises(ValueError, match="size auto sets embed_dim: use --model.size None with"):
        Recipe(model={"size": "auto", "embed_dim": 64}, stages=[{"name": "a"}])
    flags = ["--model.depth", "5", "--model.num-heads", "4"]
    assert main(["train", "photos32", "--out", "x", *flags]) == 2
    assert "size auto sets depth and num_heads: use --model.size None" in capsys.readouterr().err
    flags += ["--model.embed-dim", "64", "--model.size", "None", "--data.source", "faces:64@32"]
    assert main(["plan", "photos32", "--gpu", "t4", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["model"]["embed_dim"] == 64


def test_a_control_keeps_its_size_where_the_machine_looks_faster(shares, tmp_path, monkeypatch):
    def fast(recipe: Recipe, *_: object) -> speed.Speed:
        return speed.Speed(tuple(sec / 1e3 for sec in ByFlops().speed(recipe).step_sec), 1e-6)

    sizes = {
        name: dataclasses.replace(planning.MODEL_SIZES[name], num_params=num)
        for name, num in (("tiny", 1), ("mini", 1e5))
    }
    monkeypatch.setattr(planning, "MODEL_SIZES", sizes)
    monkeypatch.setattr(speed, "measure_speed", fast)
    auto = shares(model={"patch_size": 2, "size": "auto"}, budget={"hours": 1})
    for step, flops_per_sec in ((4, 1.0), (5, 1e12)):
        monkeypatch.setattr(speed.ThisMachine, "flops_per_sec", lambda self, n=flops_per_sec: n)
        train_until(auto, tmp_path / "run", step, control="dense")
        assert saved(tmp_path / "run").model.embed_dim == 96
    assert changes_of(tmp_path / "run") == []
    train_until(auto, tmp_path / "other", 4, control="dense")
    assert saved(tmp_path / "other").model.embed_dim == 160


def test_a_control_in_hours_keeps_its_length_where_the_machine_looks_slower(
    shares, tmp_path, monkeypatch
):
    """It continues by the command that began it; one of another kind does not."""
    factor, run = [1.0], tmp_path / "run"

    def measured(recipe: Recipe, *_: object) -> speed.Speed:
        return speed.Speed(tuple(factor[0] * s for s in ByFlops().speed(recipe).step_sec), 1e-6)

    monkeypatch.setattr(speed, "measure_speed", measured)
    hours = shares(budget={"hours": 0.1})
    train_until(hours, run, 4, control="dense")
    first = saved(run).num_steps
    for factor[0] in (3.0, 0.3):
        train_until(hours, run, 5, control="dense")
        assert (saved(run).num_steps, changes_of(run)) == (first, [])
    slower = with_rows(hours, lr=1e-5)
    train_until(slower, run, 6, control="dense", change=True)
    assert (saved(run).num_steps, saved(run).stages[0].lr) == (first, 1e-5)
    assert len(saved(run).stages[0].restarts) == 1  # another rate begins with its warm-up
    with pytest.raises(ValueError, match="holds a control of equal flops: name a new folder"):
        quiet(hours, run, control="dense", control_equal="steps")
    factor[0] = 1.0
    quiet(slower, run, control="dense", hours=0.2)
    assert saved(run).num_steps == pytest.approx(2 * first, abs=1)


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "inf"])
def test_a_factor_that_shrinks_to_nothing_is_refused_in_a_line(tmp_path, capsys, factor):
    for command in (["train", "digits", "--out", str(tmp_path / "run")], ["plan", "digits"]):
        assert main([*command, "--shrink", factor]) == 2
        assert f"maskdm: shrink {factor}: expected a number above 0\n" in capsys.readouterr().err


def test_the_recipe_of_a_run_that_was_extended_is_refused_for_its_steps(tiny, changed, tmp_path):
    """And not for the restart of its rate, which nobody gave."""
    decaying = changed(
        stages=[{**tiny.stages[1].model_dump(), "lr_schedule": "cosine", "steps": 6}]
    )
    quiet(decaying, tmp_path / "run")
    quiet(saved(tmp_path / "run"), tmp_path / "run", images="+48")
    with pytest.raises(ValueError, match=r"another recipe \(stages.0.steps: 12 -> 6\)"):
        quiet(decaying, tmp_path / "run")
