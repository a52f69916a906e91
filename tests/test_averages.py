"""Averages of any width, made of the snapshots that training keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import assert_same_bits, quiet, train_until

from maskdm.cli import main
from maskdm.models.power_average import gamma_of_width, inner_product
from maskdm.recipe import Average, Recipe
from maskdm.runs.averages import combination, num_snapshots, save_snapshot, snapshots_of
from maskdm.runs.load import load_model
from maskdm.training.ema import Averages, decay_of, make_average, update_average


@pytest.fixture
def averaged(tiny, changed) -> Recipe:
    """The tiny recipe with power averages and a longer second stage."""
    ema = {"kind": "power", "width": 0.1}
    stages = [{**stage.model_dump(), "ema": ema} for stage in tiny.stages]
    stages[1]["steps"] = 60
    return changed(stages=stages)


def test_inner_products_of_profiles_are_the_integrals():
    tau = np.linspace(0, 1, 200_001)

    def profile(gamma: float, end: float) -> np.ndarray:
        return np.where(tau <= end, (gamma + 1) * tau**gamma / end ** (gamma + 1), 0)

    for one, other in [
        ((3.0, 1.0), (7.0, 1.0)),
        ((3.0, 0.4), (7.0, 1.0)),
        ((6.9, 0.9), (2.5, 0.3)),
    ]:
        integral = np.trapezoid(profile(*one) * profile(*other), tau)
        assert inner_product(one, other) == pytest.approx(integral, rel=1e-3)


def test_a_profile_that_is_among_the_snapshots_is_found():
    profiles = [(gamma_of_width(w), t) for t in (250.0, 500.0, 1000.0) for w in (0.05, 0.1)]
    shares = combination(profiles, (gamma_of_width(0.05), 1000.0))
    assert shares == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.15, 0.2])
def test_an_average_made_afterwards_is_near_the_one_that_was_tracked(width, tmp_path):
    """Weights on a random walk; sixteen snapshots of two averages give a third."""
    model = torch.nn.Linear(20, 20, bias=False)
    tracked, stage_steps = make_average(model), 1600
    stage = Recipe(
        stages=[{"name": "a", "steps": stage_steps, "batch_size": 1, "lr": 1,
                 "ema": {"kind": "power", "width": 0.1}}]
    ).stages[0]  # fmt: skip
    averages = Averages(model)
    averages.enter_stage(stage, model, begins=True)
    generator = torch.Generator().manual_seed(0)
    wanted = Average(kind="power", width=width)
    for step in range(stage_steps):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn(20, 20, generator=generator)
        averages.update(model, averages.shares(stage, step))
        update_average(tracked, model, decay_of(wanted, step + 1))
        if (step + 1) % 100 == 0:
            save_snapshot(tmp_path, stage, step + 1, step + 1, averages.by_width(stage))
    from maskdm.runs.averages import averaged_weights

    made = averaged_weights(tmp_path, "a", stage_steps, stage_steps, width)["weight"]
    error = (made - tracked.weight).norm() / (tracked.weight - model.weight).norm()
    assert error < 0.05
    assert torch.allclose(
        averaged_weights(tmp_path, "a", stage_steps, stage_steps, 0.1)["weight"],
        averages.main.weight,
        atol=0.02,  # half precision
    )


def test_runs_keep_snapshots_and_draw_from_any_average(averaged, tmp_path, capsys):
    run = tmp_path / "run"
    quiet(averaged, run)
    kept = snapshots_of(run, "show", 10**9)
    assert len(kept) == 16 == num_snapshots(averaged.stages[1])
    assert kept[-1].stage_step == 60 and kept[-1].widths == (0.1, 0.05)
    own = load_model(run).trained.model.state_dict()
    same = load_model(run, width=0.1).trained.model.state_dict()
    wider = load_model(run, width=0.2).trained.model.state_dict()
    for name in own:
        assert torch.allclose(own[name], same[name], atol=1e-3), name
    assert any(not torch.allclose(own[name], wider[name], atol=1e-3) for name in own)
    out = str(tmp_path / "s.npz")
    assert main(["sample", str(run), "--num", "2", "--ema", "0.15", "--out", out]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--num", "8", "--ema", "0.05", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "average of relative width 0.05" in text and "average of relative width 0.2" in text


def test_runs_with_power_averages_resume_bit_for_bit(averaged, tmp_path):
    quiet(averaged, tmp_path / "whole")
    train_until(averaged, tmp_path / "run", 30)
    quiet(averaged, tmp_path / "run")
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name / "averages").iterdir()}
             for name in ("run", "whole")]  # fmt: skip
    assert files[0] == files[1]


def test_runs_without_snapshots_say_what_keeps_them(tiny, tmp_path):
    quiet(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="ema.kind power, which keeps them"):
        load_model(tmp_path / "run", width=0.1)
    with pytest.raises(ValueError, match="has one average only: name its run's folder"):
        Path(tmp_path / "run" / "model").rename(tmp_path / "model")
        load_model(tmp_path / "model", width=0.1)


def test_widths_that_cannot_be_made_are_refused(averaged, tmp_path):
    quiet(averaged, tmp_path / "run")
    for width in (0.01, 0.3):
        with pytest.raises(ValueError, match="cannot be made of widths 0.05, 0.1: use 0.025 to"):
            load_model(tmp_path / "run", width=width)
