"""Two processes on one machine, over the real launcher, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_settings
from safetensors.torch import load_file

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import make_schedule
from maskdm.evaluation.quick import QuickLook
from maskdm.images.order import ImageOrder, training_subset
from maskdm.images.store import open_store
from maskdm.models.build import build_model
from maskdm.recipe import Recipe, Sampling
from maskdm.recipe_files import load_recipe
from maskdm.runs.lines import read_lines
from maskdm.runs.load import load_model
from maskdm.training.step import draw_batch

pytestmark = pytest.mark.slow


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "maskdm", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def settings() -> dict:
    """The tiny recipe with times that are spread over the global batch: ranks must know theirs."""
    tiny = tiny_settings()
    return {
        **tiny,
        "data": {**tiny["data"], "held_out": 7},
        "diffusion": {**tiny["diffusion"], "times": {"kind": "stratified"}},
        "evaluation": {**tiny["evaluation"], "quick_num": 9},
        "evaluate_every": 4,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings()))))
    done = launch("train", str(folder / "tiny.yaml"), "--out", str(folder / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stage 1/2") == 1  # only one rank speaks
    return folder / "run"


def test_two_ranks_take_the_step_of_one_with_twice_the_batch(run):
    """Plain torch on both ranks' draws, joined into one batch, ends at the same weights."""
    recipe = Recipe(**settings())
    store = open_store(recipe.data, progress=False)
    subset = training_subset(len(store), recipe.data)
    order, schedule = ImageOrder(len(subset), recipe.seed), make_schedule("cosine")
    model, step, losses = build_model(recipe), 0, []
    for stage in recipe.stages:
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=stage.betas, weight_decay=stage.weight_decay
        )
        for i in range(stage.steps):
            images = torch.from_numpy(store.images[subset[order.indices(8 * step, 8)]])
            draws = [
                draw_batch(
                    images[4 * rank : 4 * rank + 4], None, recipe, stage, schedule, step, rank, 2
                )
                for rank in range(2)
            ]  # fmt: skip
            assert not torch.equal(draws[0].noise, draws[1].noise)
            places = torch.cat([draw.t for draw in draws]).sort().values
            assert (places.diff() - 1 / 8).abs().max() < 3e-3  # evenly, up to the table's steps
            x0, visible, t, noise = (
                torch.cat([getattr(draw, name) for draw in draws])
                for name in ("x0", "visible", "t", "noise")
            )
            loss = masked_denoising_loss(
                model, x0, visible, t, noise, schedule, recipe.diffusion
            ).mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (i + 1) / 3)
            optimizer.step()
            step += 1
    trained = load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5)
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.mean(losses[:2]), rel=1e-4)
    assert first["images"] == 16


def test_two_ranks_draw_the_images_that_one_draws(run, tmp_path):
    arguments = ["sample", str(run), "--seed", "5"]
    done = launch(*arguments, f"--out={tmp_path / 'two.npz'}", "--steps", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    from maskdm.cli import main

    assert main([*arguments, "--out", str(tmp_path / "one.npz"), "--steps", "10"]) == 0
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert one.shape == two.shape == (64, 8, 8, 1)
    assert abs(one.astype(int) - two).max() <= 1


def test_two_ranks_measure_what_one_measures_and_draw_each_image_once(run):
    arguments = ["evaluate", str(run), "--batch-size=3", "--seeds=2"]
    done = launch(*arguments, f"--out={run.parent / 'two.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("written to") == 1  # only one rank speaks
    folders = sorted((run / "evaluation").glob("samples-*"))
    for folder in folders:
        numbers = [path.name[:17].split("-") for path in sorted(folder.glob("*.npy"))]
        drawn = [i for start, stop in numbers for i in range(int(start), int(stop))]
        assert drawn == list(range(16))
    (two,) = json.loads((run.parent / "two.json").read_text())
    (run / "evaluation").rename(run / "by-two")
    from maskdm.cli import main

    assert len(folders) == 2 and two["num_ranks"] == 2
    assert main([*arguments, f"--out={run.parent / 'one.json'}"]) == 0
    (one,) = json.loads((run.parent / "one.json").read_text())
    assert one["samples"] == two["samples"] and one["num_ranks"] == 1
    for name, metric in one["metrics"].items():
        assert two["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-3), name


def test_two_ranks_measure_what_one_does(run):
    lines = [json.loads(line) for line in (run / "quality.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6, 8, 11]  # once each
    recipe = Recipe(**settings())
    fast = {"sampler": "dpm-solver", "steps": recipe.preview_steps}
    sampling = Sampling(**{**recipe.sampling.model_dump(), **fast})
    look = QuickLook(recipe, open_store(recipe.data, progress=False), sampling)
    for name, line in ((f"{run}@hide", lines[1]), (str(run), lines[3])):
        alone = look(load_model(name).trained)
        for key in ("dense_loss", "dense_loss_train", "dense_loss_by_time"):
            np.testing.assert_allclose(line[key], alone[key], rtol=1e-4)
        for key in ("sliced", "sliced_error"):
            if alone[key] is not None:
                assert line[key] == pytest.approx(alone[key], rel=1e-2), key
        assert (line["num"], line["features_sha256"]) == (9, alone["features_sha256"])


def test_a_batch_that_does_not_divide_is_refused(run, tmp_path):
    arguments = ["train", str(run / "recipe.yaml"), "--out", str(tmp_path / "run")]
    done = launch(*arguments, "--stages.1.batch-size", "7")
    assert done.returncode != 0
    assert "stages.1.batch_size 7 does not divide among 2 devices: use 6 or 8" in done.stderr
    assert not (tmp_path / "run").exists()


def test_both_ranks_refuse_bad_images_with_the_same_words(run, image_folder, tmp_path):
    (image_folder / "cat" / "b.png").write_text("no image")
    recipe = str(run.parent / "tiny.yaml")
    refused = launch(
        "train", recipe, "--out", str(tmp_path / "x"), "--data.source", str(image_folder)
    )
    assert refused.returncode != 0 and not (tmp_path / "x").exists()
    assert refused.stderr.count("images cannot be read: cat/b.png (not an image)") >= 1
    assert "Traceback" not in refused.stderr.split("ChildFailedError")[0].replace(
        'Traceback (most recent call last):\n  File "<frozen runpy>"', ""
    )


def test_two_ranks_repeat_a_table(tmp_path):
    out = tmp_path / "out"
    done = launch("reproduce", "table2", "--flops", "1e9", "--no-control", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 1  celeba64") == 1
    (record,) = json.loads((out / "celeba64-0" / "evaluation.json").read_text())
    assert f"{record['metrics']['frechet']['value']:.4g}" in (out / "README.md").read_text()


def test_two_ranks_plan_a_budget_in_minutes_alike(run, tmp_path):
    """They measure their speed together, step by step, and each has a clock of its own."""
    out = tmp_path / "timed"
    arguments = ("--minutes", "0.1", "--evaluate-every", "0", "--num-previews", "0")
    done = launch("train", str(run.parent / "tiny.yaml"), "--out", str(out), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("measuring the speed of this machine") == 1
    recipe = load_recipe(out / "recipe.yaml")
    last = read_lines(out / "metrics.jsonl")[-1]
    assert last["step"] == recipe.num_steps != 11 and recipe.budget.hours == 0.1 / 60
