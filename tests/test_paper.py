"""The paper's experiments as recipes, held against its tables."""

from __future__ import annotations

import re

import pytest
import torch

from maskdm.cli import main
from maskdm.images.order import training_subset
from maskdm.models.build import build_model
from maskdm.paper.tables import experiments, paper_fid, paper_tables
from maskdm.recipe_files import differences, load_recipe, recipe_names
from maskdm.training.gpus import Gpus
from maskdm.training.optim import learning_rate
from maskdm.training.work import stage_work, total_flops

TABLES = paper_tables()
TABLE1 = TABLES["table6"]["table1"]
OF_PAPER = sorted({name for one in experiments().values() for name in one.recipes})


def sized(recipe):
    """The recipe's model without memory: only its sizes matter."""
    with torch.device("meta"):
        return build_model(recipe)


def row_of(stage) -> list:
    """A stage as Tables 6 to 9 list it."""
    rate = round(100 * stage.mask.rate)
    return [rate, stage.lr, stage.batch_size, stage.steps, stage.clip, stage.warmup_steps]


def shared_of(recipe) -> dict:
    """What the tables give for a whole recipe; `flip` is the last stage's."""
    (decay,) = {stage.ema.decay for stage in recipe.stages}
    return {
        "schedule": recipe.final_diffusion.schedule,
        "ema_decay": decay,
        "flip": recipe.flips(recipe.stages[-1]),
        "sampler": recipe.sampling.sampler,
        "sampling_steps": recipe.sampling.steps,
        "num_samples": recipe.evaluation.num,
    }


def test_every_table_and_figure_has_its_recipes():
    """Every packaged recipe of the paper stands in a table or figure, and every row has one."""
    numbered = r"(table\d|fig\d|celeba)"
    assert {name for name in recipe_names() if re.match(numbered, name)} == set(OF_PAPER)
    assert set(TABLES["fid"]) <= set(OF_PAPER)
    names = "1a 1b 1c 2 3 4".split()
    assert {f"table{name}" for name in names} < set(experiments())
    assert {f"fig{name}" for name in "4a 4b 4c 5a 5b 6 7".split()} < set(experiments())


@pytest.mark.parametrize("name", OF_PAPER)
def test_the_papers_recipes_do_as_its_code_where_the_paper_is_silent(name):
    recipe = load_recipe(name)
    assert recipe.model.patch_init == "conv" and recipe.evaluation.features == "inception"
    assert recipe.sampling.eta == (1.0 if recipe.sampling.sampler == "ddim" else 0.0)
    for stage in recipe.stages:
        assert stage.ema.kind == "warmup" and stage.start_from == "raw"
        assert stage.mask.rate == 0 or stage.mask.rounding == "floor"
        assert (stage.betas, stage.weight_decay) == ((0.99, 0.99), 0.03)
    assert recipe.init_weights == "raw" or not re.match("fig5", name)
    assert recipe.model.patch_size == 4 and recipe.model.depth == 13


@pytest.mark.parametrize("name", [name for name in OF_PAPER if name.startswith("table1-")])
def test_recipes_of_table_1_have_its_hyper_parameters(name):
    recipe = load_recipe(name)
    *masked, last = recipe.stages
    assert shared_of(recipe) == TABLE1["shared"]
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


@pytest.mark.parametrize("name", ["celeba64", "celeba128", "celebahq256"])
def test_recipes_of_tables_2_to_4_have_their_hyper_parameters(name):
    recipe, wanted = load_recipe(name), TABLES["table6"][name]
    assert [row_of(stage) for stage in recipe.stages] == wanted["stages"]
    assert shared_of(recipe) == wanted["shared"]


def test_rows_of_a_file_are_printed_whole(capsys):
    assert main(["recipes", "table1-b-block2-50-150k"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Table 1b, 50 % hidden, 2x2 blocks, 150k steps.\n")
    assert "base:" not in text and "source: celeba" in text and "150000" in text and "&" not in text


def test_the_papers_model_is_maskdm_s():
    model = sized(load_recipe("table1-scratch"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(44e6, rel=0.01)


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
    assert sum(p.numel() for p in sized(masked).parameters()) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(("table", "masked"), [("table3", "celeba128"), ("table4", "celebahq256")])
def test_baselines_have_the_settings_of_the_fine_tuning(table, masked):
    (stage,) = load_recipe(f"{table}-baseline").stages
    last = load_recipe(masked).stages[-1]
    for name in ("lr", "batch_size", "warmup", "clip", "ema"):
        assert getattr(stage, name) == getattr(last, name)
    assert stage.steps == TABLES["table7"][masked]["baseline_steps"]


@pytest.mark.parametrize(
    ("masked", "more", "equal"), [("celeba128", 1.16, 476_000), ("celebahq256", 1.49, 535_000)]
)
def test_the_papers_baselines_cost_more_than_its_masked_runs(masked, more, equal):
    """As the recipes' comments say; at equal FLOPs they would be shorter."""
    table = {"celeba128": "table3", "celebahq256": "table4"}[masked]
    recipe, baseline = load_recipe(masked), load_recipe(f"{table}-baseline")
    costs = [total_flops(one, stage_work(one, sized(one))) for one in (recipe, baseline)]
    assert costs[1] / costs[0] == pytest.approx(more, abs=0.01)
    assert baseline.stages[0].steps * costs[0] / costs[1] == pytest.approx(equal, abs=1000)


@pytest.mark.parametrize("column", TABLES["table8"]["columns"])
def test_recipes_of_figure_5a_have_the_hyper_parameters_of_table_8(column):
    table = TABLES["table8"]
    tuned, scratch = load_recipe(f"fig5a-{column}"), load_recipe(f"fig5a-{column}-scratch")
    wanted = {name: table[name] for name in ("ema_decay", "num_samples")}
    wanted |= table["columns"][column]
    assert shared_of(tuned) == shared_of(scratch) == wanted
    assert row_of(tuned.stages[-1]) == table["fine_tune"]
    (only,) = scratch.stages
    *first, length = row_of(only)[:4]
    assert (first, length) == (table["fine_tune"][:3], table["baseline_steps"])


@pytest.mark.parametrize("name", ["fig5a-vpsde", "fig5a-vpcosine", "table1-a-block2-50"])
def test_the_primer_of_figure_5a_is_that_of_table_1(name):
    """DDPM's linear schedule, not mirrored, for 50k steps: what --init RUN@pre-train takes."""
    recipe = load_recipe(name)
    primer = recipe.stages[0]
    assert row_of(primer) == TABLES["table8"]["pre_train"]
    assert primer.mask.block == TABLES["table8"]["block"] and not recipe.flips(primer)
    assert recipe.diffusion_of(primer).schedule == "linear" and primer.ema.decay == 0.999


@pytest.mark.parametrize(("part", "num"), [("10", 3000), ("1", 300)])
def test_recipes_of_figure_5b_have_the_hyper_parameters_of_table_9(part, num):
    table = TABLES["table9"]
    both, tuned, scratch = (
        load_recipe(f"fig5b-{part}{end}") for end in ("", "-from-vggface2", "-scratch")
    )
    assert [row_of(stage) for stage in both.stages] == [table["celebahq"], table["fine_tune"]]
    assert [row_of(stage) for stage in tuned.stages] == [table["fine_tune"]]
    (only,) = scratch.stages
    assert row_of(only)[:4] == [*table["fine_tune"][:3], table["baseline_steps"]]
    for recipe in (both, tuned, scratch):
        assert shared_of(recipe) == table["shared"]
        assert len(training_subset(30_000, recipe.data)) == num


def test_the_primer_of_figure_5b_has_the_hyper_parameters_of_table_9():
    recipe = load_recipe("fig5b-vggface2")
    assert [row_of(stage) for stage in recipe.stages] == [TABLES["table9"]["vggface2"]]
    assert shared_of(recipe) == TABLES["table9"]["shared"]


def test_figure_7_compares_falling_with_fixed_rates_over_as_many_steps():
    falling = load_recipe("fig7-progressive")
    wanted = TABLES["table7"]["celebahq256"]["stages"][:2]
    assert [row_of(stage) for stage in falling.stages] == wanted
    for name, stage in zip(("fixed-90", "fixed-50"), falling.stages, strict=True):
        (only,) = load_recipe(f"fig7-{name}").stages
        assert row_of(only)[:3] == row_of(stage)[:3] and only.steps == falling.num_steps


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
    flops = total_flops(recipe, stage_work(recipe, sized(recipe)))
    days = flops / Gpus(spent["gpu"], 1, 0.22, "fp16").flops_per_sec() / 86_400
    assert days == pytest.approx(spent["days"], rel=0.2)


def test_recipes_are_listed_by_table_with_the_papers_fid_and_hours(capsys):
    """Within 80 columns; the hours are those of the compute at 22 % of a V100's 125 TFLOP/s."""
    assert main(["recipes", "--gpu", "v100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, one in experiments().items():
        heading = next(line for line in lines if line.startswith(one.title))
        assert heading.endswith("V100 hours"), name
        under = lines[lines.index(heading) + 1 :]
        section = under[: under.index("")] if "" in under else under
        rows = {line.split()[0]: line.split() for line in section if line[2] != " "}
        assert list(rows) == list(one.recipes)
        for recipe, words in rows.items():
            if (fid := paper_fid(recipe)) is not None:
                assert words[-2] == f"{fid:.2f}"
    hours = next(line.split()[-1] for line in lines if line.startswith("  celeba64 "))
    assert float(hours) == pytest.approx(4.64e18 / (0.22 * 125e12) / 3600, rel=0.01)
    assert any(line.startswith("  digits ") for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu abacus", "unknown GPU 'abacus'"),
        ("--share 0.2", "--share is of a GPU's peak: add --gpu"),
        ("--gpu a100 --share 22", "--share 22: a part of the GPU's peak"),
        ("digits --gpu a100", "maskdm plan digits --gpu a100"),
    ],
)
def test_wrong_flags_of_the_list_say_the_way_out(flags, message, capsys):
    assert main(["recipes", *flags.split()]) == 2
    assert message in capsys.readouterr().err
