"""The paper's experiments as recipes, held against its tables."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import yaml

from maskdm.models.build import build_model
from maskdm.recipe_files import load_recipe, recipe_names

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
