"""How many images are computed at a time, and in which precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskdm.recipe import Recipe, Stage
from maskdm.recipe_files import load_recipe
from maskdm.runs.lines import read_lines
from maskdm.settings import SettingsError
from maskdm.training.ready import largest_that_fits
from maskdm.training.trainer import train


@pytest.mark.parametrize(("room", "found"), [(500, 96), (95, 48), (47, 32), (1, 1)])
def test_the_largest_divisor_that_fits_is_found(room, found):
    tried = []

    def attempt(num: int) -> None:
        tried.append(num)
        if num > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    assert largest_that_fits(96, attempt) == found
    assert all(96 % num == 0 for num in tried)


def test_where_nothing_fits_the_ways_out_are_told():
    def attempt(num: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match="not even one image .* use activation_checkpointing"):
        largest_that_fits(4, attempt)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def attempt(num: int) -> None:
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes don't match"):
        largest_that_fits(4, attempt)


def test_auto_takes_the_whole_batch_on_a_cpu(changed, tmp_path):
    stages = changed().model_dump()["stages"]
    auto = [{**stage, "micro_batch_size": "auto"} for stage in stages]
    train(changed(stages=auto), tmp_path / "auto", show=False)
    train(changed(), tmp_path / "all", show=False)
    losses = [
        [line["loss"] for line in read_lines(tmp_path / run / "metrics.jsonl")]
        for run in ("auto", "all")
    ]
    assert losses[0] == losses[1]


def test_a_micro_batch_is_a_number_or_auto():
    settings = {"name": "a", "steps": 1, "batch_size": 1, "lr": 1e-3}
    assert Stage(**settings, micro_batch_size="auto").micro_batch_size == "auto"
    for wrong in (0, "most"):
        with pytest.raises(SettingsError):
            Stage(**settings, micro_batch_size=wrong)


@pytest.mark.slow
def test_bf16_trains_like_fp32(tmp_path):
    """The demo's losses, smoothed, differ by less than they do between seeds."""
    demo = load_recipe("digits").model_dump()
    short = {"steps": 40, "warmup": 10, "batch_size": 64}
    stages = [{**stage, **short} for stage in demo["stages"]]
    curves = {}
    for name, changes in {
        "fp32": {"precision": "fp32"},
        "bf16": {"precision": "bf16"},
        "seed": {"precision": "fp32", "seed": 1},
    }.items():
        quiet = {"num_previews": 0, "evaluate_every": 0, "log_every": 10}
        recipe = Recipe(**{**demo, "stages": stages, **quiet, **changes})
        train(recipe, tmp_path / name, show=False)
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        curves[name] = np.array([line["loss"] for line in lines])
    between_seeds = np.abs(curves["seed"] - curves["fp32"]).mean()
    assert 0 < np.abs(curves["bf16"] - curves["fp32"]).mean() < between_seeds


@pytest.mark.gpu
def test_auto_finds_what_fits_on_a_gpu(changed, tmp_path, capsys):
    stages = [{**s, "micro_batch_size": "auto"} for s in changed().model_dump()["stages"]]
    train(changed(stages=stages, compile="off"), tmp_path / "run")
    assert "8 of 8 images at a time fit in the memory of cuda" in capsys.readouterr().out
