"""Averages kept in training, their evaluation as a curve, and its comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskdm.cli import main
from maskdm.evaluation.curve_points import points_of
from maskdm.evaluation.curves import Curve, costs_to_quality
from maskdm.plan import make_plan
from maskdm.runs.find import kept_averages
from maskdm.runs.load import load_model
from maskdm.training.speed import Speed
from maskdm.training.trainer import train


@pytest.fixture
def run(changed, tmp_path: Path) -> Path:
    """Steps 1 to 6 hide, 7 to 11 show; every fourth is kept, and both ends."""
    train(changed(keep_every=4, keep_checkpoints=1), tmp_path / "run", show=False)
    return tmp_path / "run"


def steps_of(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in paths]


def evaluate(run: Path, *flags: object) -> list[dict]:
    assert main(["evaluate", str(run), "--curve", "--num", "8", *map(str, flags)]) == 0
    return json.loads((run / "evaluation.json").read_text())


# Keeping


def test_averages_are_kept_at_each_interval_and_at_each_stages_end(run):
    assert steps_of(kept_averages(run)) == [4, 6, 8, 11]
    for step in (6, 11):  # both are checkpoints, too
        kept, checkpoint = (run / f / f"step-{step:08d}" for f in ("kept", "checkpoints"))
        ours, theirs = (
            load_file(kept / "ema.safetensors"),
            load_file(checkpoint / "ema.safetensors"),
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert sorted(path.name for path in kept.iterdir()) == ["ema.safetensors", "progress.json"]


def test_a_run_without_the_setting_keeps_none_and_trains_the_same(run, tiny, tmp_path):
    result = train(tiny, tmp_path / "other", show=False)
    assert not (tmp_path / "other" / "kept").exists()
    ours = load_file(run / "kept" / "step-00000011" / "ema.safetensors")
    theirs = result.ema.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_goes_on_may_begin_to_keep(tiny, changed, tmp_path):
    half = changed(stages=[stage.model_dump() for stage in tiny.stages[:1]])
    assert half.keep_every == 0
    longer = changed(keep_every=2, stages=[{**half.stages[0].model_dump(), "steps": 10}])
    train(half, tmp_path / "run", show=False)
    train(longer, tmp_path / "run", show=False)
    assert steps_of(kept_averages(tmp_path / "run")) == [8, 10]


def test_a_kept_average_is_loaded_by_its_folder_and_has_no_raw_weights(run):
    loaded = load_model(run / "kept" / "step-00000004")
    assert loaded.trained.diffusion == loaded.location.recipe.diffusion_of(
        loaded.location.recipe.stages[0]
    )
    with pytest.raises(ValueError, match="averaged weights only: use init_weights ema"):
        load_model(run / "kept" / "step-00000004", weights="raw")


def test_damaged_averages_and_those_of_steps_that_are_taken_anew_are_left_out(run):
    shutil.copytree(run / "kept" / "step-00000011", run / "kept" / "step-00000012")
    (run / "kept" / "step-00000008" / "ema.safetensors").write_bytes(b"cut")
    assert steps_of(kept_averages(run)) == [4, 6, 11]


def test_plan_counts_the_disk_that_they_take(changed):
    speed = Speed((1.0, 1.0), 1.0)
    plans = [make_plan(changed(keep_every=n), "here", speed, None, None) for n in (0, 4)]
    more = plans[1].disk.checkpoints - plans[0].disk.checkpoints
    assert more == 4 * 4 * plans[0].num_params  # four averages in float32


# Evaluating


def test_a_curve_has_a_record_for_each_average_at_its_cost(run, capsys):
    records = evaluate(run)
    assert [record["training"]["step"] for record in records] == [4, 6, 8, 11]
    assert [record["training"]["stage"] for record in records] == ["hide", "hide", "show", "show"]
    assert [record["training"]["images"] for record in records] == [32, 48, 64, 88]
    assert all(set(record["metrics"]) == {"frechet"} for record in records)
    shown = capsys.readouterr().out
    assert shown.count("Frechet") == 4 and "maskdm compare" in shown
    assert not list((run / "evaluation").rglob("*.npy"))  # images are not kept


def test_a_point_is_what_evaluate_measures_of_that_average(run, tmp_path):
    points = evaluate(run)
    out = tmp_path / "one.json"
    kept = run / "kept" / "step-00000006"
    flags = ["--num", "8", "--metrics", "frechet", "--out", str(out)]
    assert main(["evaluate", str(kept), *flags]) == 0
    (alone,) = json.loads(out.read_text())
    assert alone["metrics"]["frechet"] == points[1]["metrics"]["frechet"]


def test_a_curve_goes_on_where_it_was_and_measures_anew_what_was_asked_otherwise(run, capsys):
    evaluate(run)
    records = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(records[:2]))
    capsys.readouterr()
    again = evaluate(run)
    shown = capsys.readouterr().out
    assert shown.count("evaluated before") == 2 and shown.count("Frechet") == 2
    for one, other in zip(again, records, strict=True):
        assert one["metrics"] == other["metrics"]
    assert len(evaluate(run, "--steps", 3)) == 8
    assert "evaluated before" not in capsys.readouterr().out


def test_points_are_known_by_what_they_were_measured_with_and_not_by_its_name(
    run, changed, tmp_path, capsys
):
    reference, pixels = tmp_path / "other.npz", np.random.default_rng(0).integers(0, 256, (50, 64))
    for shift, known in ((0, 0), (0, 4), (9, 0)):
        np.savez(reference, images=((pixels + shift) % 256).astype(np.uint8).reshape(50, 8, 8, 1))
        evaluate(run, "--reference", reference)
        assert capsys.readouterr().out.count("evaluated before") == known
    # A packed store has the name of what it was made of.
    assert main(["pack", "digits", str(tmp_path / "packed"), "--size", "8", "--channels", "1"]) == 0
    packed = {**changed().data.model_dump(), "source": str(tmp_path / "packed")}
    train(changed(keep_every=4, data=packed), tmp_path / "again", show=False)
    for known in (0, 4):
        evaluate(tmp_path / "again", "--features", "pca")
        assert capsys.readouterr().out.count("evaluated before") == known


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema", "0.1"], "--ema has no effect with --curve"),
        (["--json"], "--json has no effect with --curve"),
    ],
)
def test_flags_that_mean_nothing_for_a_curve_are_refused(run, flags, message, capsys):
    assert main(["evaluate", str(run), "--curve", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_kept_nothing_says_how_to_keep(tiny, tmp_path, capsys):
    train(tiny, tmp_path / "run", show=False)
    assert main(["evaluate", str(tmp_path / "run"), "--curve"]) == 2
    assert "kept no averages for a curve: train with --keep-every" in capsys.readouterr().err
    assert main(["evaluate", "digits", "--reference", "digits", "--curve"]) == 2
    assert "holds images, not a model" in capsys.readouterr().err


# Comparing


def test_curves_of_evaluations_are_compared_and_drawn(run, changed, tmp_path, capsys):
    train(changed(keep_every=4, seed=1), tmp_path / "other", show=False)
    records = {one: evaluate(one) for one in (run, tmp_path / "other")}
    capsys.readouterr()
    figure = tmp_path / "curve.png"
    runs = [str(one) for one in records]
    arguments = ["--x", "images", "--metric", "frechet", "--out", str(figure), "--json"]
    assert main(["compare", *runs, *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    for one, of_run in records.items():
        curve = result["curves"][one.name]
        assert curve["x"] == [32, 48, 64, 88]
        assert curve["y"] == [record["metrics"]["frechet"]["value"] for record in of_run]
        assert curve["error"] == [record["metrics"]["frechet"]["error"] for record in of_run]
    assert figure.stat().st_size > 1000
    assert result["y"] == "frechet" and not any("preview_steps" in n for n in result["notes"])
    assert main(["compare", *runs, *arguments[:-1]]) == 0
    assert "Frechet distance" in capsys.readouterr().out


def test_curves_that_were_measured_otherwise_are_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    evaluate(run)
    evaluate(other, "--steps", 3)
    arguments = ["--x", "flops", "--out", str(tmp_path / "c.png")]
    assert main(["compare", str(run), str(other), *arguments, "--metric", "frechet"]) == 2
    assert "were not evaluated alike" in capsys.readouterr().err
    assert main(["compare", str(run), str(other), *arguments, "--metric", "sliced"]) == 2
    assert "has no evaluation with sliced at a known cost" in capsys.readouterr().err
    evaluate(other)  # and now they share a way
    assert main(["compare", str(run), str(other), *arguments, "--metric", "frechet"]) == 0
    assert main(["compare", str(run), *arguments, "--metric", "frechet", "--y", "sliced"]) == 2
    assert "give one of them" in capsys.readouterr().err


def record_at(step: int, value: float, num: int = 10) -> dict:
    return {
        "metrics": {"frechet": {"value": value, "error": 1.0}},
        "features": {"name": "inception", "sha256": "f"},
        "samples": {"num": num, "sampling": {"steps": 4}, "seeds": [0]},
        "reference": {"source": "x", "sha256": "r"},
        "training": {
            "step": step, "stage": "a", "images": 2 * step, "flops": step, "elapsed_sec": step,
        },
    }  # fmt: skip


def test_the_way_with_the_most_points_in_all_runs_counts_and_the_newest_of_a_step():
    headline = record_at(3, 1.0, num=50)
    records = [record_at(3, 5.0), record_at(1, 9.0), record_at(3, 4.0), headline]
    points = points_of({"a": records, "b": [headline, record_at(2, 6.0), record_at(1, 8.0)]},
                       "frechet")  # fmt: skip
    assert [(line["step"], line["frechet"]) for line in points["a"]] == [(1, 9.0), (3, 4.0)]
    assert [(line["step"], line["frechet"]) for line in points["b"]] == [(1, 8.0), (2, 6.0)]


def curve(name: str, cost: list[float], quality: list[float], error: float | None) -> Curve:
    errors = None if error is None else np.full(len(cost), error)
    return Curve(name, np.array(cost), np.array(quality), errors, ("a",) * len(cost), name)


def test_the_ratio_of_costs_has_the_interval_of_its_closed_form():
    """Straight falling lines: q = 10 - c, and twice as fast; to reach 4 costs 6 and 3.

    Only the two points around each crossing matter. Between c and c + 2 the error of the crossing
    is that of the mean of two points over the slope: sd 0.1 / sqrt(2) and 0.05 / sqrt(2).
    """
    base = curve("base", [5, 7], [5.0, 3.0], 0.1)
    fast = curve("fast", [2.5, 3.5], [5.0, 3.0], 0.1)
    _, (_, reached) = costs_to_quality([base, fast], 4.0)
    assert reached.ratio == pytest.approx(2.0) and reached.ratio_interval is not None
    relative = np.hypot(0.1 / np.sqrt(2) / 6, 0.05 / np.sqrt(2) / 3)
    low, high = reached.ratio_interval
    assert low == pytest.approx(2 * (1 - 1.96 * relative), abs=0.01)
    assert high == pytest.approx(2 * (1 + 1.96 * relative), abs=0.01)


def test_the_interval_says_where_a_run_may_never_be_as_good():
    base = curve("base", [1, 10], [10.0, 5.0], 0.5)
    slow = curve("slow", [1, 10], [10.0, 5.2], 0.5)  # its last point is as likely worse
    _, (first, reached) = costs_to_quality([base, slow], None)
    assert first.ratio_interval is None and reached.ratio is None  # never, by the figures alone
    assert reached.ratio_interval is not None and reached.ratio_interval[0] == 0.0
    _, (_, unknown) = costs_to_quality([base, curve("c", [1, 10], [10.0, 4.0], None)], None)
    assert unknown.ratio_interval is None
