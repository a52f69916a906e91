"""Comparing runs: what is comparable, what is noise, what a quality cost; on hand-written files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from conftest import tiny_settings
from scipy import stats

from maskdm.cli import main
from maskdm.evaluation.compare import compare_records, welch
from maskdm.evaluation.curves import Facts, costs_to_quality, curves_of, first_reaching
from maskdm.evaluation.retrainings import retrainings, short_names, training_of_recipe
from maskdm.recipe import Recipe
from maskdm.report.plots import loss_figure, quality_figure


def recipe(seed: int = 0, **changes: Any) -> dict[str, Any]:
    return Recipe(**{**tiny_settings(), "seed": seed, **changes}).model_dump(mode="json")


def record(
    value: float = 10.0, error: float | None = 0.3, *, day: int = 1, **changes: Any
) -> dict[str, Any]:
    """A record of an evaluation; changes are of parts: `samples={"num": 5}`."""
    whole = {
        "metrics": {"frechet": {"value": value, "error": error}},
        "features": {"name": "inception", "sha256": "f" * 64},
        "samples": {
            "num": 50_000,
            "weights": "ema",
            "sampling": {"sampler": "ddim", "steps": 50, "batch_size": 64},
        },
        "reference": {"source": "celeba", "fingerprint": "r" * 64, "crop": "celeba", "num": 1000,
                      "shape": [64, 64, 3]},
        "training": {"step": 11, "stage": "show", "images": 1_280_000, "flops": 3.7e15,
                     "elapsed_sec": 3725},
        "recipe": None,
        "notes": [],
        "date": f"2026-12-{day:02} 10:00:00 +0000",
    }  # fmt: skip
    for name, change in changes.items():
        whole[name] = {**whole[name], **change} if isinstance(whole[name], dict) else change
    return whole


def pca(value: float = 1.0, **changes: Any) -> dict[str, Any]:
    return record(value, features={"name": "pca", "sha256": "p" * 64}, **changes)


def evaluated(root: Path, name: str, *records: dict[str, Any]) -> str:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "evaluation.json").write_text(json.dumps(records))
    return str(root / name)


def line(images: float, sliced: float, stage: str = "show", **more: Any) -> dict[str, Any]:
    return {
        "step": int(images), "stage": stage, "images": images, "flops": images * 1e12,
        "elapsed_sec": images * 2, "hidden": 0.0, "sliced": sliced, "sliced_error": 0.1,
        "num": 1000, "features": "pca", "features_sha256": "p" * 64, **more,
    }  # fmt: skip


def trained(root: Path, name: str, *lines: dict[str, Any], **settings: Any) -> str:
    run = root / name
    run.mkdir(parents=True)
    (run / "quality.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (run / "recipe.yaml").write_text(Recipe(**recipe(**settings)).to_yaml())
    (run / "environment.json").write_text(json.dumps([{"images_sha256": "i" * 64}]))
    return str(run)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["compare", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("other", "is_real"), [(10.83, False), (10.84, True), (9.17, False), (9.16, True)]
)
def test_a_difference_is_real_beyond_its_errors_in_quadrature(other, is_real):
    found = {"a": [record(10.0, 0.3)], "b": [record(other, 0.3)]}
    (difference,) = compare_records(found).differences
    assert difference.half == pytest.approx(1.96 * 0.3 * math.sqrt(2))  # 0.8316
    assert difference.value == pytest.approx(10.0 - other) and difference.is_real is is_real


def test_without_an_error_nothing_is_called_real_or_noise(tmp_path, capsys):
    runs = [evaluated(tmp_path, "a", record(10, None)), evaluated(tmp_path, "b", record(20))]
    assert main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert "unknown: an error is missing" in text and "within the noise" not in text


def test_intervals_of_shares_and_of_their_differences_end_at_their_limits():
    """An earlier version wrote intervals that left 0 to 1 into its records."""
    found = {
        name: [record(metrics={"recall": {"value": value, "error": 0.03, "interval": ends}})]
        for name, value, ends in (("a", 1.0, [0.94, 1.06]), ("b", 0.0, [-0.06, 0.06]))
    }
    told = compare_records(found, metric="recall").as_json()
    assert told["runs"]["a"]["metrics"]["recall"]["interval"] == [0.94, 1]
    assert told["runs"]["b"]["metrics"]["recall"]["interval"] == [0, 0.06]
    low, high = told["differences"][0]["interval"]
    assert low == pytest.approx(1 - 1.96 * 0.03 * math.sqrt(2)) and high == 1


def test_the_newest_comparable_evaluations_are_compared():
    found = {
        "a": [pca(1, day=1), record(10, day=2), record(11, day=5, samples={"num": 10_000})],
        "b": [pca(2, day=3), record(20, day=4)],
    }
    comparison = compare_records(found)
    assert [one["metrics"]["frechet"]["value"] for one in comparison.records.values()] == [10, 20]
    older = "older evaluations are comparable, too: features pca"
    assert any(older in note for note in comparison.notes)
    again = {"a": [record(10), record(12, day=3, samples={"seeds": [1]})], "b": found["b"]}
    assert compare_records(again).figures("frechet")["a"].value == 12
    by_name = compare_records(found, features="pca").records
    assert [one["metrics"]["frechet"]["value"] for one in by_name.values()] == [1, 2]
    with pytest.raises(ValueError, match="b has not been evaluated in features clip, but in pca"):
        compare_records({"a": [record(features={"name": "clip"})], "b": found["b"]}, "clip")


def test_evaluations_with_equal_sampling_are_preferred_and_others_noted():
    fast = {"samples": {"sampling": {"sampler": "ddim", "steps": 10}}}
    slow = {"samples": {"sampling": {"sampler": "ddim", "steps": 50}}}
    found = {"a": [record(1, **slow), record(2, **fast)], "b": [record(3, day=2, **slow)]}
    comparison = compare_records(found)
    assert [one["metrics"]["frechet"]["value"] for one in comparison.records.values()] == [1, 3]
    assert not any("sampling differs" in note for note in comparison.notes)
    other = compare_records({"a": [record(2, **fast)], "b": found["b"]})
    assert any("sampling differs: steps 10 (a), 50 (b)" in note for note in other.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": {"num": 10_000}}, r"number of samples: 50,000 \(a, c\), 10,000 \(b\)"),
        (
            {"features": {"name": "pca", "sha256": "p" * 64}},
            r"inception f{12} \(a, c\), pca p{12} \(b\)",
        ),
        ({"features": {"sha256": "0" * 64}}, r"inception f{12} \(a, c\), inception 0{12} \(b\)"),
        ({"reference": {"crop": "center"}}, r"reference: crop celeba \(a, c\), center \(b\)"),
        ({"reference": {"shape": [32, 32, 3]}}, r"shape 64x64x3 \(a, c\), 32x32x3 \(b\)"),
        ({"reference": {"fingerprint": "0" * 64}}, r"fingerprint r{12} \(a, c\), 0{12} \(b\)"),
        ({"reference": {"sha256": "0" * 64}}, r"fingerprint r{12} \(a, c\), 0{12} \(b\)"),
    ],
)
def test_evaluations_that_are_not_comparable_are_refused_with_what_differs(changes, message):
    other = record(**changes)
    with pytest.raises(ValueError, match=message) as error:
        compare_records({"a": [record()], "b": [other], "c": [record()]})
    assert "these evaluations are not comparable" in str(error.value)
    assert str(error.value).count("; in ") == 0  # nothing that is equal is blamed
    found = compare_records({"a": [record()], "b": [other, record()], "c": [record()]})
    assert found.records["b"] == record()


def test_references_with_equal_pixels_are_comparable_whatever_their_names():
    there = {"sha256": "s" * 64, "source": "elsewhere", "fingerprint": "x", "crop": "none"}
    here = {"sha256": "s" * 64}
    runs = {"a": [record(reference=here)], "b": [record(reference=there)]}
    assert compare_records(runs).metrics == ("frechet",)


def test_metrics_that_all_have_are_shown_and_the_best_by_their_direction():
    def both(name: str, value: float) -> dict[str, Any]:
        return record(value, metrics={name: {"value": value, "error": 0.01}})

    found = {"a": [both("precision", 0.5)], "b": [both("precision", 0.6)]}
    comparison = compare_records(found)
    assert comparison.metrics == ("frechet", "precision")
    assert comparison.best("frechet") == ("a",) and comparison.best("precision") == ("b",)
    assert compare_records(found, metric="precision").metrics == ("precision",)
    partly = compare_records({"a": [both("kid", 0.5)], "b": found["b"]})
    assert partly.metrics == ("frechet",)
    assert "kid is left out: not measured for b" in partly.notes
    lacking = "kid was not measured for b; measured were a: frechet, kid; b: frechet, precision"
    with pytest.raises(ValueError, match=lacking):
        compare_records({"a": [both("kid", 0.5)], "b": found["b"]}, metric="kid")


def test_up_to_three_runs_are_compared_in_pairs_more_with_the_best():
    def pairs(*values: float) -> list[tuple[str, str]]:
        found = {name: [record(v)] for name, v in zip("abcd", values, strict=False)}
        return [(one.first, one.second) for one in compare_records(found).differences]

    assert pairs(3, 1, 2) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs(3, 1, 2, 4) == [("a", "b"), ("c", "b"), ("d", "b")]


def test_welchs_interval_is_scipys():
    first, second = [10.1, 10.4, 9.9], [9.0, 9.6, 9.2, 8.8]
    difference, half = welch(first, second)
    wanted = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (difference - half, difference + half) == pytest.approx((wanted.low, wanted.high))
    assert welch([0.1 + 0.2, 0.3], [0.3, 0.3]) == (0.0, 0.0)


def test_retrainings_differ_in_the_seed_and_in_nothing_that_is_trained():
    recipes = {
        "x-0": recipe(0),
        "y-0": recipe(0, precision="bf16"),
        "x-1": recipe(  # measured in another way, saved at other times, computed otherwise
            1, log_every=7, evaluation={"num": 99}, checkpoint_minutes=5, compile="off"
        ),
        "y-1": recipe(1, precision="bf16"),
        "unknown": None,
        "again": recipe(1),  # the seed of x-1 once more
        "other": None,
    }
    groups, notes = retrainings({run: training_of_recipe(one) for run, one in recipes.items()})
    assert groups == {
        "x-* (2)": ("x-0", "x-1"), "y-* (2)": ("y-0", "y-1"),
        "unknown": ("unknown",), "again": ("again",), "other": ("other",),
    }  # fmt: skip
    same = "again has the same recipe and seed as x-1: it is not counted as a retraining"
    assert notes == [same]


def test_retrainings_are_grouped_and_compared_by_their_scatter(tmp_path, capsys):
    dense = {"model": {**tiny_settings()["model"], "depth": 5}}
    values = {"dense-0": 10.0, "masked-0": 9.0, "dense-1": 10.2, "masked-1": 9.4, "dense-2": 9.8}
    runs = [
        evaluated(
            tmp_path,
            name,
            record(v, 0.01, recipe=recipe(int(name[-1]), **(dense if "dense" in name else {}))),
        )
        for name, v in values.items()
    ]
    assert main(["compare", *runs, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    groups = told["groups"]
    assert list(groups) == ["dense-* (3)", "masked-* (2)"]
    assert groups["dense-* (3)"]["runs"] == ["dense-0", "dense-1", "dense-2"]
    assert groups["dense-* (3)"]["metrics"]["frechet"] == pytest.approx({"mean": 10, "std": 0.2})
    (between,) = told["group_differences"]
    # variances of the means 0.04 / 3 and 0.08 / 2
    low, high = between["interval"]
    freedom = (0.04 / 3 + 0.04) ** 2 / ((0.04 / 3) ** 2 / 2 + 0.04**2 / 1)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(0.04 / 3 + 0.04)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half))
    assert between["is_real"] is False  # although each run's samples tell them well apart
    assert all(one["is_real"] for one in told["differences"])
    assert not any("one training" in note for note in told["notes"])

    assert main(["compare", *runs]) == 0
    rows = capsys.readouterr().out.splitlines()
    names = [row.split("  ")[0] for row in rows[3:10]]
    assert names == ["run", "dense-0", "dense-1", "dense-2", "", "masked-0", "masked-1"]
    assert "mean of 3" in rows[7] and "10.000 sd 0.200" in rows[7]
    assert any("dense-* (3) - masked-* (2)" in row and "within the noise" in row for row in rows)


def test_another_moment_of_training_or_sampling_makes_no_retraining():
    def groups(**changes: Any) -> int:
        found = {"a": [record(recipe=recipe(0))], "b": [record(recipe=recipe(1), **changes)]}
        return len(compare_records(found).groups)

    assert groups() == 1
    assert groups(training={"step": 6, "stage": "hide"}) == 0
    assert groups(samples={"sampling": {"sampler": "heun", "steps": 50}}) == 0


def test_retrainings_guided_by_their_own_primers_are_grouped():
    """Whose weights differ, as those of the trainings do."""

    def groups(weak: str) -> int:
        sampling = {"sampler": "ddim", "guidance": {"kind": "autoguidance", "weak": weak}}
        return len(
            compare_records(
                {
                    name: [record(recipe=recipe(seed), samples={"sampling": sampling, **more})]
                    for seed, (name, more) in enumerate(
                        (("a", {"weak_sha256": "a" * 64}), ("b", {"weak_sha256": "b" * 64}))
                    )
                }
            ).groups
        )

    assert groups("primer") == 1 and groups("runs/other") == 0


def test_a_run_is_represented_by_its_own_average():
    """Not by the last width of a sweep, or the last point of a curve."""
    own = record(1.0, samples={"model": "run/model", "ema": None})
    swept = record(9.0, day=2, samples={"model": "run/model", "ema": 0.25})
    point = record(5.0, day=3, samples={"model": "run/kept/step-00000009", "ema": None})
    for records in ([own, swept, point], [point, swept, own], [swept, own]):
        found = compare_records({"a": records, "b": [record(2.0)]})
        assert found.records["a"]["metrics"]["frechet"]["value"] == 1.0
    found = compare_records({"a": [swept], "b": [record(2.0)]})
    assert any("average 0.25 (a), its own (b)" in note for note in found.notes)


def test_single_trainings_are_noted_but_not_for_one_model_sampled_twice():
    def notes(**samples: Any) -> str:
        found = {name: [record(samples=samples)] for name in "ab"}
        return " ".join(compare_records(found).notes)

    each = "one training of each run: retraining with another seed alone moves FID by 1-2 %"
    assert each in notes()
    assert "one training" not in notes(weights_sha256="w" * 64)
    found = {name: [record(recipe=recipe(seed))] for seed, name in enumerate("ab")}
    found["c"] = [record()]
    assert any("one training of c:" in note for note in compare_records(found).notes)


def test_the_table_is_aligned_in_ascii_and_narrow(tmp_path, capsys):
    metrics = {
        name: {"value": value, "error": error}
        for name, value, error in (
            ("kid", 0.00312, 0.0001), ("sliced", 3.0, 0.02), ("precision", 0.7123, 0.004),
            ("recall", 0.5, 0.004), ("inception_score", 3.1, 0.03),
        )
    }  # fmt: skip
    names = ["short", "a-run-with-a-name-that-goes-on-and-on-and-on-0", "other"]
    chance = {"frechet": 1.5, "num": 500}
    runs = [
        evaluated(tmp_path, name, {**record(12.345 + i, metrics=metrics), "chance": chance})
        for i, name in enumerate(names)
    ]
    assert main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert "FID 1.5" in text and "FID, differences" in text and "KID, differences" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("run ")]
    assert len(blocks) == 3  # nine columns don't fit side by side
    for _, *rows in blocks:
        told = [row[:32].strip() for row in rows]
        assert told == ["short", "a-run-with-a-na...nd-on-and-on-0", "other"]
        places = [[found.start() for found in re.finditer(r"\+-", row)] for row in rows]
        assert places[0] == places[1] == places[2]  # signs stand below signs
    assert "12.35 +- 0.59 *" in text and "13.35 +- 0.59\n" not in text
    assert "1.28 M" in text and "3.7 PFLOP" in text and "1:02:05" in text


def test_distances_in_other_features_are_not_called_fid(tmp_path, capsys):
    runs = [evaluated(tmp_path, name, pca()) for name in "ab"]
    assert main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert "Frechet (pca)" in text and "FID " not in text.split("note:")[0]


def test_stages_and_files_are_compared_and_equal_names_made_different(tmp_path, capsys):
    one = evaluated(tmp_path, "x/run", record(1, notes=["mind the step"]))
    other = evaluated(tmp_path, "y/run", record(2))
    stage = tmp_path / "y" / "run" / "evaluation-hide.json"
    stage.write_text(json.dumps([record(3)]))
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps([record(4)]))
    assert main(["compare", one, other, f"{other}@hide", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["runs"]) == ["x/run", "y/run", "run@hide", "theirs"]
    assert told["runs"]["run@hide"]["metrics"]["frechet"]["value"] == 3
    assert "mind the step" in told["notes"]
    assert short_names([Path("/a/b/c"), Path("/a/d/c"), Path("/e/d/c")]) == ["b/c", "a/d/c",
                                                                            "e/d/c"]  # fmt: skip


def test_wrong_usage_is_reported_in_one_line(tmp_path, capsys):
    run = evaluated(tmp_path, "a", record())
    (tmp_path / "empty").mkdir()
    curve = trained(tmp_path, "curve", line(1, 5.0))
    for arguments, message in (
        ((), "name two runs or more"),
        ((run,), "name two runs or more"),
        ((run, run + "/"), "are the same run: name each once"),
        ((run, str(tmp_path / "none")), "(it does not exist)"),
        ((run, str(tmp_path / "empty")), "has no evaluation yet"),
        ((run, f"{run}@hide"), "has no evaluation yet"),
        ((run, run, "--y", "kid"), "--y is for curves: add --x images, flops, time"),
        ((run, run, "--out", "x.png"), "--out is for curves: add --x"),
        ((curve, "--x", "flops", "--metric", "kid"), "has no evaluation yet"),
        ((curve, "--x", "flops", "--metric", "x"), "unknown metric 'x'"),
        ((curve, "--x", "flops", "--features", "pca"), "of evaluations: add --metric"),
        ((curve, "--x", "flops", "--out", "x.txt"), "name a file that ends in .png"),
        ((curve, "--x", "flop"), "unknown cost 'flop': did you mean flops?"),
        ((curve, "--x", "flops", "--y", "recall"), "recall is not measured in training: known: "),
        ((run, "--x", "flops"), "has no quality.jsonl"),
        ((f"{curve}@hide", "--x", "flops"), "is not a run's folder"),
        (("--x", "flops"), "name the runs, the baseline first"),
    ):
        assert message in failure(capsys, *arguments)
    (tmp_path / "a" / "evaluation.json").write_text("{")
    assert "cannot be read" in failure(capsys, run, evaluated(tmp_path, "b", record()))


def test_a_quality_is_reached_on_the_straight_line_between_two_measurements():
    cost, quality = np.array([1.0, 2, 4, 6]), np.array([8.0, 4, 5, 2])
    for target, reached in ((6, 1.5), (4, 2.0), (3, 5.0), (2, 6.0), (8, 1.0), (9, 1.0)):
        assert first_reaching(cost, quality, target) == pytest.approx(reached)
    assert first_reaching(cost, quality, 1.9) is None


def test_costs_to_quality_are_relative_to_the_first_run(tmp_path, capsys):
    runs = [
        trained(tmp_path, "dense", line(100, 9), line(200, 5), line(300, 3)),
        trained(tmp_path, "masked", line(50, 7, "hide"), line(100, 5, "hide"), line(150, 1)),
        trained(tmp_path, "poor", line(100, 9), line(400, 4)),
        trained(tmp_path, "slow", line(100, 9), line(1000, 3)),
        trained(tmp_path, "at-once", line(60, 2)),
    ]
    out = tmp_path / "new" / "curves.png"
    assert main(["compare", *runs, "--x", "flops", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.is_file() and str(out) in text
    assert text.startswith("sliced 3, the last value of dense, is reached after:")
    rows = {row.split()[0]: " ".join(row.split()[1:]) for row in text.splitlines()[1:]}
    assert rows["dense"].startswith("300 TFLOP") and rows["dense"].endswith("the baseline")
    assert rows["masked"].startswith("125 TFLOP")  # 100 + 50 (5 - 3) / (5 - 1)
    assert "2.40 times fewer FLOPs [2.3" in rows["masked"]
    assert "never reached" in rows["poor"]
    assert rows["slow"].endswith("3.33 times more FLOPs [0 to 0.312]")  # maybe never
    assert "at least 5.00 times fewer FLOPs [" in rows["at-once"]
    assert max(map(len, text.splitlines())) <= 100 and text.isascii()

    told_target = ["--x", "time", "--target", "7", "--out", str(out), "--json"]
    assert main(["compare", *runs, *told_target]) == 0
    told = json.loads(capsys.readouterr().out)
    reached = {one["name"]: one for one in told["reached"]}
    assert told["target"] == 7 and reached["dense"]["cost"] == pytest.approx(300)  # seconds
    assert reached["masked"]["ratio"] == pytest.approx(3) and reached["masked"]["is_bound"]
    # a measurement's error of 0.1: the target 0.196 higher or lower, on the line of -0.04 / image
    assert reached["dense"]["within"] == pytest.approx([300 - 2 * 4.9, 300 + 2 * 4.9])
    assert told["curves"]["masked"]["x"] == [100, 200, 300]
    assert told["curves"]["masked"]["stages"] == ["hide", "hide", "show"]


def test_a_target_that_the_baseline_misses_gives_costs_without_ratios():
    lines = {"a": [line(100, 9), line(200, 5)], "b": [line(100, 9), line(200, 1)]}
    curves, _ = curves_of(lines, dict.fromkeys(lines, Facts()), "images", "sliced")
    goal, (base, other) = costs_to_quality(curves, 3.0)
    assert goal == 3 and base.cost is None
    assert other.cost == pytest.approx(175) and other.ratio is None


def test_qualities_that_are_not_comparable_are_refused_with_what_differs(tmp_path, capsys):
    losses = {"dense_loss": 0.1, "dense_loss_num": 256}
    base = trained(tmp_path, "base", line(1, 5.0, **losses), line(2, 4.0, **losses))

    def refused(name: str, *lines: dict[str, Any], y: str = "sliced", **settings: Any) -> str:
        run = trained(tmp_path, name, *lines, **settings)
        return failure(capsys, base, run, "--x", "images", "--y", y, "--out", str(tmp_path / "a"
                       ".png"))  # fmt: skip

    assert "they differ in num 1,000 (base), 500 (few)" in refused("few", line(1, 5.0, num=500))
    other = line(1, 5.0, features_sha256="0" * 64)
    assert "differ in features_sha256 pp" in refused("features", other)
    why = "(trained with evaluation.quick_num 0 or features pca?)"
    bare = refused("bare", line(1, 5.0), y="kid")
    assert f"kid was not measured for base, bare {why}" in bare
    assert "measured were base: sliced, dense_loss; lossless: sliced" in refused(
        "lossless", line(1, 5.0), y="dense_loss"
    )
    linear = {"diffusion": {**tiny_settings()["diffusion"], "schedule": "linear"}}
    with_loss = line(1, 5.0, dense_loss=0.1)
    assert "last stage's noise schedule cosine (base), linear (schedule)" in refused(
        "schedule", with_loss, y="dense_loss", **linear
    )
    fewer = line(1, 5.0, dense_loss=0.1, dense_loss_num=32)
    assert "differ in dense_loss_num 256 (base), 32 (fewer)" in refused(
        "fewer", fewer, y="dense_loss"
    )
    subset = {"data": {**tiny_settings()["data"], "subset_seed": 3}}
    assert "differ in data.subset_seed 0 (base), 3 (part)" in refused(
        "part", with_loss, y="dense_loss", **subset
    )
    moved = trained(tmp_path, "moved", with_loss)
    (Path(moved) / "environment.json").write_text(json.dumps([{"images_sha256": "0" * 64}]))
    for y in ("sliced", "dense_loss"):
        text = failure(capsys, base, moved, "--x", "images", "--y", y, "--out", "/nowhere/a.png")
        assert f"{y} is not comparable between these runs: they differ in images" in text
    assert main(["compare", base, "--x", "images", "--out", str(tmp_path / "a.png")]) == 0


def test_losses_under_another_noise_schedule_are_left_out():
    stages = tiny_settings()["stages"]
    stages[0]["schedule"] = "linear"
    lines = [line(1, 5, "hide", dense_loss=0.01), line(2, 4, dense_loss=0.2), line(3, 3)]
    facts = {"run": Facts(recipe(stages=stages), "i" * 64)}
    (curve,), notes = curves_of({"run": lines}, facts, "images", "dense_loss")
    assert curve.cost.tolist() == [2] and curve.error is None
    assert notes == [
        "run: hide left out: its noise schedule differs from the last stage's, so losses are not "
        "comparable"
    ]
    (curve,), notes = curves_of({"run": lines}, facts, "images", "sliced")
    assert curve.cost.tolist() == [1, 2, 3] and not notes


def test_what_a_cost_does_not_include_is_noted():
    lines = {"a": [line(1, 5)], "b": [line(1, 5)]}
    facts = {
        "a": Facts(recipe(init="runs/before"), "i" * 64, ("1 x NVIDIA H100",)),
        "b": Facts(recipe(preview_steps=9), None, ("8 x NVIDIA A100",)),
    }
    notes = curves_of(lines, facts, "time", "sliced")[1]
    assert "a began from runs/before, whose cost is not counted" in notes
    assert "times depend on the machines, too: 1 x NVIDIA H100 (a), 8 x NVIDIA A100 (b)" in notes
    assert "the training images of b are unknown" in notes
    assert any("sampling differs: preview_steps" in note for note in notes)
    assert not any("machines" in note for note in curves_of(lines, facts, "flops", "sliced")[1])


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path, capsys, monkeypatch):
    run = trained(tmp_path, "run", line(100, 9), line(200, 5))
    with (tmp_path / "run" / "quality.jsonl").open("a") as file:
        file.write('{"step": 300, "sli')
    monkeypatch.chdir(tmp_path)
    assert main(["compare", run, "--x", "images", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["curves"]["run"]["x"] == [100, 200]
    assert Path(told["figure"]).is_file() and told["figure"] == "quality-against-images.png"


def lines_of(figure: Any) -> dict[str, Any]:
    return {one.get_label(): one for one in figure.axes[0].get_lines()}


def test_the_figure_has_each_runs_curve_its_band_and_the_ends_of_stages():
    lines = {
        "dense": [line(3600, 9), line(7200, 5)],
        "masked": [line(1800, 7, "hide"), line(3600, 5, "hide"), line(5400, 1)],
    }
    facts = dict.fromkeys(lines, Facts())
    curves, _ = curves_of(lines, facts, "time", "sliced")
    figure = quality_figure(curves, "time", "sliced", 5.0)
    drawn = lines_of(figure)
    assert drawn["dense"].get_xdata().tolist() == [2, 4]  # hours
    assert drawn["masked"].get_xydata().tolist() == [[1, 7], [2, 5], [3, 1]]
    assert drawn["_end of hide"].get_xydata().tolist() == [[2, 5]]
    assert set(drawn["target 5"].get_ydata()) == {5.0}
    axes = figure.axes[0]
    assert axes.get_xlabel() == "time of training, hours" and axes.get_yscale() == "log"
    band = axes.collections[1].get_paths()[0].vertices  # of masked
    assert band[:, 1].max() == pytest.approx(7.196) and band[:, 1].min() == pytest.approx(0.804)
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["dense", "masked", "end of a stage", "target 5"]

    below = {"a": [line(1, 0.1), line(2, -0.1)]}
    (curve,), _ = curves_of(below, {"a": Facts()}, "flops", "sliced")
    figure = quality_figure([curve], "flops", "sliced", None)
    assert figure.axes[0].get_yscale() == "linear"  # an unbiased distance may be below 0


def test_retrainings_are_thin_lines_around_their_mean():
    lines = {
        "a-0": [line(1, 9), line(2, 5)],
        "a-1": [line(1, 7), line(2, 3)],
        "b": [line(1, 4), line(2, 2)],
    }
    facts = {
        "a-0": Facts(recipe(0)), "a-1": Facts(recipe(1)), "b": Facts(recipe(0, precision="bf16")),
    }  # fmt: skip
    curves, _ = curves_of(lines, facts, "images", "sliced")
    figure = quality_figure(curves, "images", "sliced", None)
    drawn = lines_of(figure)
    assert drawn["a-* (2)"].get_ydata().tolist() == [8, 4]
    thin = [one for one in figure.axes[0].get_lines() if one.get_label() == "_retraining"]
    assert [one.get_ydata().tolist() for one in thin] == [[9, 5], [7, 3]]
    colours = {matplotlib.colors.to_hex(one.get_color()) for one in [*thin, drawn["a-* (2)"]]}
    assert len(colours) == 1 and thin[0].get_linewidth() < drawn["a-* (2)"].get_linewidth()
    assert matplotlib.colors.to_hex(drawn["b"].get_color()) not in colours
    lines["a-1"].pop()  # not so far yet: no mean
    curves, _ = curves_of(lines, facts, "images", "sliced")
    drawn = lines_of(quality_figure(curves, "images", "sliced", None))
    assert drawn["a-* (2)"].get_ydata().tolist() == [9, 5]


@pytest.mark.parametrize(
    ("losses", "most"), [([0.05, 0.8], (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)), ([0.3, 0.31], None)]
)
def test_a_loss_axis_has_round_ticks_over_any_range(losses, most, tmp_path):
    rows = [
        {"step": i, "stage": "show", "hidden": 0.0, "images": 8 * i, "loss": loss}
        for i, loss in enumerate(losses, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    axes = loss_figure(tmp_path).axes[0]
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 3
    if most is not None:
        assert set(np.round(ticks, 6)) <= set(most)
