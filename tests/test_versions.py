"""Runs and models of an earlier version: `maskdm train` of commit 9ee2eda, before settings were
grouped, made tests/data (its recipe is in the run's folder)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import as_array

import maskdm
from maskdm.cli import main
from maskdm.evaluation import evaluate, quick
from maskdm.evaluation.records import read_records
from maskdm.recipe_files import load_recipe, migrated
from maskdm.runs.find import grouped_index, read_index
from maskdm.runs.lines import read_lines

DATA = Path(__file__).parent / "data"
EXPECTED = np.load(DATA / "expected.npz")  # of the run's last step, by the version that began it


@pytest.fixture
def old_run(tmp_path):
    """At step 9 of 12; its last checkpoint."""
    return Path(shutil.copytree(DATA / "old-run", tmp_path / "run"))


def assert_same_images(images: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(images.astype(int) - expected).max() <= 1  # matrix products may round otherwise


def test_an_old_recipe_loads_in_todays_groups():
    recipe = load_recipe(DATA / "old-run" / "recipe.yaml")
    assert recipe.diffusion.weighting.model_dump() == {
        "kind": "min-snr", "snr_clip": 4.0, "gamma": 1.0, "bias": 0.0,
    }  # fmt: skip
    assert recipe.diffusion.times.model_dump() == {"kind": "logit-normal", "mean": 0.3, "std": 1.2}
    assert recipe.sampling.guidance.model_dump() == {
        "kind": "classifier-free", "scale": 2.0, "start": 0.1, "end": 0.9, "weak": "primer",
        "rate": 0.5,
    }  # fmt: skip
    assert [stage.warmup for stage in recipe.stages] == [2, 2]
    today = recipe.model_dump(mode="json")
    assert migrated(today) == today
    assert migrated({"evaluation": {"metrics": ["precision-recall", "kid"]}}) == {
        "evaluation": {"metrics": ["precision", "recall", "kid"]}
    }


def test_an_old_run_resumes_to_the_same_weights_and_measures_the_same(old_run, capsys, monkeypatch):
    for module in (evaluate, quick):  # that version drew all classes in turn
        monkeypatch.setattr(module, "class_counts", lambda real, model: None)
    result = maskdm.train(load_recipe(old_run / "recipe.yaml"), old_run)
    assert "continuing after step-00000009" in capsys.readouterr().out
    weights = result.ema.state_dict()
    names = [name for name in EXPECTED if name.startswith("ema.")]
    assert len(names) == len(weights)
    for name in names:
        np.testing.assert_allclose(weights[name[4:]].numpy(), EXPECTED[name], atol=1e-5)
    last = read_lines(old_run / "quality.jsonl")[-1]
    assert last["step"] == 12
    measured = [last[name] for name in ("dense_loss", "dense_loss_train", "sliced")]
    np.testing.assert_allclose(measured, EXPECTED["quality"], rtol=1e-5)
    images = as_array(maskdm.load(old_run)(32, seed=5).images)
    assert_same_images(images, EXPECTED["samples"])
    assert main(["evaluate", str(old_run), "--num", "64"]) == 0
    records = read_records(old_run / "evaluation.json")
    values = [
        records[-1]["metrics"][m]["value"] for m in ("frechet", "sliced", "precision", "recall")
    ]
    np.testing.assert_allclose(values, EXPECTED["metrics"], rtol=1e-5)
    drawn = [record["samples"]["sampling"] for record in records]
    assert len(drawn) == 2 and drawn[0] == drawn[1]  # the old version's, in today's groups


def test_a_stage_of_an_old_run_is_sampled(old_run, tmp_path):
    checkpoints = old_run / "checkpoints"
    (checkpoints / "step-00000009").rename(checkpoints / "step-00000012")  # as if it had ended so
    out = tmp_path / "x.npz"
    assert main(["sample", f"{old_run}@show", "--num", "4", "--out", str(out)]) == 0
    assert np.load(out)["arr_0"].shape == (4, 8, 8, 1)


def test_old_exported_models_give_the_same_images():
    for load in (maskdm.load, maskdm.MaskDMPipeline.from_pretrained):
        images = as_array(load(DATA / "old-model")(32, seed=5).images)
        assert_same_images(images, EXPECTED["samples"])
        images = as_array(load(DATA / "old-dit")(8, seed=5).images)
        assert_same_images(images, EXPECTED["dit_samples"])
    index = read_index(DATA / "old-model")
    assert (
        index["sampling"]["guidance"]["scale"] == 2.0 and index["diffusion"]["prediction"] == "x0"
    )


def test_an_old_index_of_another_form_is_left_alone():
    today = {"_class_name": "MaskDMPipeline", "diffusion": {}, "sampling": {"steps": 3}}
    other = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    for index in (today, other):
        assert grouped_index(json.loads(json.dumps(index))) == index
