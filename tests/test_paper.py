"""The paper's experiments as recipes, held against its tables."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import yaml

from maskdm.models.build import build_model
from maskdm.plan import Gpus
from maskdm.recipe_files import differences, load_recipe, recipe_names
from maskdm.training.optim import learning_rate
from maskdm.training.work import stage_work, total_flops

TABLES = yaml.safe_load((resources.files("maskdm") / "paper" / "tables.yaml").read_text("utf-8"))
TABLE1 = TABLES["table1"]


def test_every_cell_of_table_1_has_a_recipe():
    assert {name for name in recipe_names() if name.startswith("table1-")} == set(TABLE1["fid"])


@pytest.mark.parametrize("name", TABLE1["fid"])
def test_recipes_of_table_1_have_its_hyper_parameters(name):
    recipe = load_recipe(name)
    *masked, last = recipe.stages
    assert recipe.final_diffusion.schedule == TABLE1["schedule"]
    assert recipe.sampling.sampler == TABLE1["sampler"]
    assert recipe.sampling.steps == TABLE1["sampling_steps"]
    assert recipe.evaluation.num == TABLE1["num_samples"]
    assert recipe.evaluation.features == "inception" and not recipe.data.flip
    assert all(stage.ema.decay == TABLE1["ema_decay"] for stage in recipe.stages)
    tuned = TABLE1["fine_tune"]
    assert (last.lr, last.batch_size, last.mask.rate) == (tuned["lr"], tuned["batch_size"], 0)
    if name == "table1-scratch":
        assert not masked and last.steps == TABLE1["from_scratch_steps"]
        return
    assert last.steps == tuned["steps"]
    (first,) = masked
    rate = round(100 * first.mask.rate)
    wanted = dict(TABLE1["pre_train"][rate])
    if match := re.search(r"-(\d+)k$", name):  # Table 1b: longer
        wanted["steps"] = 1000 * int(match[1])
    if name.endswith("-256"):  # Table 1b: a larger batch, and a learning rate that grows with it
        wanted["lr"] *= 256 / wanted["batch_size"]
        wanted["batch_size"] = 256
    assert {key: getattr(first, key) for key in wanted} == pytest.approx(wanted)
    assert first.mask.kind == re.search(r"patch|block|crop", name)[0]
    if match := re.search(r"block(\d)", name):
        assert first.mask.block == int(match[1])


def test_rows_of_a_file_are_printed_whole(capsys):
    from maskdm.cli import main

    assert main(["recipes", "table1-b-block2-50-150k"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Table 1b, 50 % hidden, 2x2 blocks, for 150k steps.\n")
    assert "base:" not in text and "source: celeba" in text and "150000" in text and "&" not in text


def test_the_papers_model_is_maskdm_s():
    model = build_model(load_recipe("table1-scratch"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(44e6, rel=0.01)


def row_of(stage) -> list:
    """A stage as Table 7 lists it."""
    rate = round(100 * stage.mask.rate)
    return [rate, stage.lr, stage.batch_size, stage.steps, stage.clip, stage.warmup_steps]


@pytest.mark.parametrize("data", TABLES["table7"])
def test_recipes_of_figure_4_have_the_hyper_parameters_of_table_7(data):
    wanted = TABLES["table7"][data]
    masked, baseline = load_recipe(f"fig4-{data}"), load_recipe(f"fig4-{data}-baseline")
    assert [row_of(stage) for stage in masked.stages] == wanted["stages"]
    assert row_of(baseline.stages[0]) == [*wanted["stages"][-1][:3], wanted["baseline_steps"],
                                          *wanted["stages"][-1][4:]]  # fmt: skip
    for recipe in (masked, baseline):
        assert recipe.final_diffusion.schedule == wanted["schedule"]
        assert recipe.sampling.steps == wanted["sampling_steps"] and recipe.evaluation.num == 10_000
        assert {stage.ema.decay for stage in recipe.stages} == {wanted["ema_decay"]}
    assert {stage.mask.block for stage in masked.stages[:-1]} == {wanted["block"]}
    size = {"celeba64": 44e6, "celeba128": 102e6, "celebahq256": 102e6}[data]
    assert sum(p.numel() for p in build_model(masked).parameters()) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(("table", "masked"), [("table3", "celeba128"), ("table4", "celebahq256")])
def test_baselines_have_the_settings_of_the_fine_tuning(table, masked):
    (stage,) = load_recipe(f"{table}-baseline").stages
    last = load_recipe(masked).stages[-1]
    for name in ("lr", "batch_size", "warmup", "clip", "ema"):
        assert getattr(stage, name) == getattr(last, name)
    assert stage.steps == TABLES["table7"][masked]["baseline_steps"]


@pytest.mark.parametrize(
    ("masked", "more", "equal"), [("celeba128", 1.16, 473_000), ("celebahq256", 1.49, 535_000)]
)
def test_the_papers_baselines_cost_more_than_its_masked_runs(masked, more, equal):
    """As the recipes' comments say; at equal FLOPs they would be shorter."""
    table = {"celeba128": "table3", "celebahq256": "table4"}[masked]
    recipe, baseline = load_recipe(masked), load_recipe(f"{table}-baseline")
    costs = [total_flops(one, stage_work(one, build_model(one))) for one in (recipe, baseline)]
    assert costs[1] / costs[0] == pytest.approx(more, abs=0.01)
    assert baseline.stages[0].steps * costs[0] / costs[1] == pytest.approx(equal, abs=1000)


def test_figure_6_changes_one_thing_at_a_time():
    default = load_recipe("fig6-default")
    assert row_of(default.stages[0])[:3] == [90, 2e-4, 256]
    for name in (name for name in recipe_names() if name.startswith("fig6-")):
        recipe = load_recipe(name)
        changed = {str(change).split(":")[0] for change in differences(default, recipe)}
        assert len(changed - {"diffusion.schedule"}) <= 2, (name, changed)
    assert learning_rate(load_recipe("fig6-warmup").stages[0], 0) == pytest.approx(5e-5, rel=1e-3)


@pytest.mark.parametrize("name", TABLES["gpu_days"])
def test_planned_days_are_within_20_percent_of_the_papers(name):
    """At 22 % of the peak, about what its runs reached."""
    recipe, spent = load_recipe(name), TABLES["gpu_days"][name]
    flops = total_flops(recipe, stage_work(recipe, build_model(recipe)))
    days = flops / Gpus(spent["gpu"], 1, 0.22).flops_per_sec() / 86_400
    assert days == pytest.approx(spent["days"], rel=0.2)
