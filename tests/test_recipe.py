from __future__ import annotations

import math
import tracemalloc

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from maskdm import recipe as recipes
from maskdm.models.build import build_model
from maskdm.recipe import Recipe, Stage
from maskdm.recipe_files import differences, load_recipe, recipe_names
from maskdm.settings import Settings

STAGE = {"name": "a", "steps": 1, "batch_size": 1, "lr": 1e-3}


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_come_back_equal_from_their_yaml(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.stages[-1].mask.rate == 0 or name.startswith(
        ("fig5b-vggface2", "fig6-", "fig7-")
    )  # primers
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@given(
    st.floats(1e-8, 10),
    st.floats(0, 0.999),
    st.text(min_size=1, max_size=20).filter(str.strip),
    st.one_of(st.none(), st.floats(1e-3, 1e3)),
    st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
)
def test_any_values_survive_the_file(lr, rate, source, clip, betas):
    stage = {**STAGE, "lr": lr, "mask": {"kind": "patch", "rate": rate}, "clip": clip}
    recipe = Recipe(data={"source": source}, stages=[{**stage, "betas": betas}])
    assert Recipe(**yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_mistake_in_every_stage_is_told_once_and_without_the_whole_of_them():
    with pytest.raises(ValueError) as caught:
        Recipe(stages=[{**STAGE, "steps": "ten"}], data={"size": 8})
    assert str(caught.value).startswith("stages.0.steps: ") and "tuple" not in str(caught.value)


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(7, 50, 7), ("2%", 50, 1), ("12.5 %", 80, 10), ("0%", 9, 0)]
)
def test_a_warmup_is_a_number_of_steps_or_a_part_of_the_stage(warmup, steps, expected, tmp_path):
    recipe = Recipe(stages=[{**STAGE, "steps": steps, "warmup": warmup}], data={"size": 8})
    assert recipe.stages[0].warmup_steps == expected
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    longer = {**recipe.stages[0].model_dump(), "steps": 2 * steps}
    assert Stage(**longer).warmup_steps == (2 * expected if isinstance(warmup, str) else warmup)


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("digits").seed = 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sed": 1}, "sed: unknown setting: did you mean seed"),
        ({"data": {"scource": "x"}}, "data.scource: unknown setting: did you mean source"),
        ({"stages": [{**STAGE, "lrr": 1}]}, "stages.0.lrr: unknown setting: did you mean lr"),
        (
            {"stages": [{**STAGE, "mask": {"rat": 1}}]},
            "stages.0.mask.rat: unknown setting: did you mean rate",
        ),
        ({"stages": [{**STAGE, "mask": {"kind": "patch", "rate": 1}}]}, "less than 1, not 1"),
        ({"stages": [{**STAGE, "mask": {"rate": 0.5}}]}, "stages.0.mask: mask kind none hides"),
        ({"stages": []}, "stages"),
        ({"stages": [{"name": "a"}]}, "stages.0.batch_size: a value is needed"),
        ({"stages": [STAGE, STAGE]}, "stage names must differ, but they are a, a"),
        ({"data": {"size": 30}}, "size 30 is not a multiple of model.patch_size 4: use 28 or 32"),
        ({"data": {"size": 3}}, "use 4$"),
        ({"model": {"depth": 12}}, "depth 12 is even.*use 11 or 13"),
        ({"model": {"embed_dim": 100}}, "embed_dim 100 is not a multiple of 2 x num_heads = 16"),
        ({"sampling": {"steps": 1001}}, "linear has 1000 times, but sampling wants 1001"),
        (
            {
                "diffusion": {"schedule": "vp-sde"},
                "stages": [{**STAGE, "schedule": "linear"}, {**STAGE, "name": "b"}],
                "preview_steps": 1500,
            },
            "schedule linear has 1000 times, but sampling wants 1500",
        ),
        ({"model": {"kind": "dit", "mlp_ratio": 2}}, "mlp_ratio is for kind uvit or vit, not dit"),
        (
            {"sampling": {"guidance": {"kind": "autoguidance"}}},
            "needs two stages, and there is one",
        ),
        ({"sampling": {"guidance": {"kind": "classifier-free"}}}, "needs model.num_classes"),
        ({"sampling": {"eta": 0.5, "sampler": "unipc"}}, "sampling: eta is ddim's noise"),
        ({"model": {"kind": "dit", "final_conv": True}}, "final_conv is for kind uvit"),
        ({"model": {"kind": "dit", "time_mlp": True}}, "time_mlp is for kind uvit, not dit"),
        (
            {"diffusion": {"schedule": "sqrt"}},
            "unknown schedule 'sqrt': known: linear, cos",
        ),
        ({"diffusion": {"schedule": "cosin"}}, "diffusion.schedule: .* did you mean cosine"),
        (
            {"model": {"kind": "unet"}},
            "model.kind: unknown kind .* did you mean unet2d",
        ),
        ({"evaluation": {"metrics": ["fid"]}}, "evaluation.metrics.0: unknown metric 'fid'"),
        ({"stages": [{**STAGE, "warmup": "2"}]}, "a part such as 2%, not 2"),
        ({"stages": [{**STAGE, "warmup": "101%"}]}, "at most 100%"),
        ({"data": {"held_out": math.inf}}, "data.held_out.*: input should be a finite number"),
        ({"stages": [{**STAGE, "lr": math.nan}]}, "stages.0.lr: input should be a finite number"),
        ({"stages": [{**STAGE, "warmup": 2}]}, "warmup 2 outlasts the stage's 1 steps: use"),
        ({"stages": [{**STAGE, "betas": (0.9, 1.0)}]}, r"betas .* must lie in \[0, 1\)"),
    ],
)
def test_mistakes_get_one_line_with_the_rule_and_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe(**{"stages": [STAGE], "data": {"size": 8}, **settings})
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipe_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no recipe 'digts': did you mean digits.*maskdm recipes"):
        load_recipe("digts")
    file = tmp_path / "broken.yaml"
    file.write_text("stages: [")
    with pytest.raises(ValueError, match="broken.yaml is not a YAML file"):
        load_recipe(file)
    for text, message in [
        ("seed: 1\nseed: 2", "'seed' is there twice"),
        ("1: 2", "1 is not a name"),
        ("stages: 2024-99-99", "month must be in"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a YAML file of settings"):
        load_recipe(file)
    file.write_text("- 1")
    with pytest.raises(ValueError, match="not a mapping"):
        load_recipe(file)


def test_differences_name_each_setting_with_both_values(tiny, changed):
    stages = [tiny.stages[0].model_dump(), {**tiny.stages[1].model_dump(), "lr": 1.0}]
    assert list(map(str, differences(tiny, changed(seed=3, stages=stages)))) == [
        "stages.1.lr: 0.001 -> 1.0",
        "seed: 0 -> 3",
    ]
    (fewer,) = differences(tiny, changed(stages=stages[:1]))
    assert str(fewer) == "number of stages: 2 -> 1"
    assert differences(tiny, tiny) == []
    faster = {**tiny.sampling.model_dump(), "batch_size": 3, "compile": "off"}
    assert differences(tiny, changed(sampling=faster)) == []
    (other,) = differences(tiny, changed(sampling={**faster, "steps": 9}))
    assert str(other) == "sampling.steps: 4 -> 9"


def test_every_setting_has_a_help_text():
    groups = [value for value in vars(recipes).values() if isinstance(value, type)]
    for group in groups:
        if issubclass(group, Settings) and group not in (Settings, Recipe, Stage):
            for name, field in group.model_fields.items():
                is_group = isinstance(field.default, Settings)  # it has a docstring
                assert field.description or is_group, f"{group.__name__}.{name}"


def test_the_demos_dense_control_spends_the_same_compute():
    from maskdm.masks import num_visible

    totals = []
    for name in ("digits", "digits-dense"):
        recipe = load_recipe(name)
        flops = build_model(recipe).forward_flops
        totals.append(
            sum(flops(num_visible(s.mask, (4, 4))) * s.batch_size * s.steps for s in recipe.stages)
        )
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)
    rest = [load_recipe(name).model_dump(exclude={"stages"}) for name in ("digits", "digits-dense")]
    assert rest[0] == rest[1]


def test_a_stage_of_billions_of_steps_costs_no_memory():
    stage = {"name": "all", "batch_size": 8, "lr": 1e-3}
    tracemalloc.start()
    assert Stage(**stage, steps=10**9, restarts=(5, 10**8)).steps == 10**9
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    for restarts in ((0,), (5, 5), (7, 5), (10,), (-1, 3)):
        with pytest.raises(ValueError, match="must increase and lie within|greater than 0"):
            Stage(**stage, steps=10, restarts=restarts)
