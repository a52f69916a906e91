"""A metric is a function and a row: everything else follows from `metrics.METRICS`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_settings

from maskdm.cli import main
from maskdm.evaluation.compare import compare_records
from maskdm.evaluation.curves import Facts, costs_to_quality, curves_of
from maskdm.evaluation.measure import Compared, Measured
from maskdm.evaluation.records import add_record, read_records, records_file
from maskdm.images.store import open_store
from maskdm.metrics import METRICS, Metric, qualities
from maskdm.recipe import Evaluation, Recipe
from maskdm.report.plots import quality_figure
from maskdm.runs.lines import read_lines
from maskdm.settings import SettingsError
from maskdm.training.trainer import train

OLD_RUN = Path(__file__).parent / "data" / "old-run"


def brightness_gap(compared: Compared) -> Measured:
    """A metric of the images themselves."""
    gap = float(compared.images[:].mean()) - float(compared.reference.images[:].mean())
    return Measured(abs(gap), error=0.5)


def contrast(compared: Compared) -> dict[str, Measured]:
    """Two metrics at once, of the features; counts its calls."""
    CALLS.append(compared.is_quick)
    deviation = np.asarray(compared.vectors[:]).std(axis=0)
    return {"contrast": Measured(float(deviation.mean())), "lowest": Measured(deviation.min())}


def num_held_out(compared: Compared) -> Measured:
    assert compared.model is not None
    return Measured(len(compared.model.images), details={"shape": [8, 8]})


def look(compared: Compared) -> dict[str, object]:
    verdict = f"{len(compared.images)} samples were looked at"
    return {"verdict": verdict, "warning": "look again", "num": len(compared.images)}


CALLS: list[bool] = []
TOYS = {
    "gap": Metric("gap in brightness", "of pixels", brightness_gap, is_cheap=True, unit="levels"),
    "contrast": Metric("contrast", "x", contrast, higher_is_better=True, is_cheap=True),
    "lowest": Metric("lowest contrast", "x", contrast, higher_is_better=True),
    "held_out": Metric(
        "held-out images", "x", num_held_out, needs=frozenset({"model"}), is_cheap=True
    ),
    "looked_at": Metric("looked at", "x", look, is_report=True),
}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    for name, row in TOYS.items():
        monkeypatch.setitem(METRICS, name, row)


@pytest.fixture
def runs(toys: None, tmp_path: Path) -> list[str]:
    """Two runs of 60 digits, 7 of them held out, measured at both stages' ends."""
    store = open_store(Recipe(**tiny_settings()).data, progress=False)
    np.savez(tmp_path / "digits.npz", store.images[:60], store.labels[:60])
    for seed in (0, 1):
        settings = {**tiny_settings(), "seed": seed, "evaluate_every": 100, "num_previews": 0}
        settings["data"] |= {"source": str(tmp_path / "digits.npz"), "held_out": 7}
        settings["evaluation"] |= {"quick_num": 8}
        train(Recipe(**settings), tmp_path / f"run-{seed}", show=False)
    return [str(tmp_path / f"run-{seed}") for seed in (0, 1)]


def test_new_metrics_are_measured_compared_and_plotted(runs, tmp_path, capsys):
    assert CALLS == [True] * 4  # in training, at each stage's end
    for run in runs:
        CALLS.clear()
        for line in read_lines(Path(run) / "quality.jsonl"):
            assert line["gap"] > 0 and line["gap_error"] == 0.5
            assert line["contrast"] > 0 and line["contrast_error"] is None
            assert line["held_out"] == 7 and line["held_out_shape"] == [8, 8]
            assert "lowest" not in line and "looked_at" not in line
        assert main(["evaluate", run]) == 0
        (record,) = json.loads((Path(run) / "evaluation.json").read_text())
        assert list(record["metrics"])[-3:] == ["gap", "contrast", "lowest"]
        assert record["metrics"]["gap"]["interval"] is not None
        assert record["looked_at"]["num"] == 16 and "held_out" not in record["metrics"]
        text = capsys.readouterr().out
        assert "gap in brightness  " in text and "lowest contrast  " in text
        assert "looked at 16 samples were looked at" in text and "look again" in text
        assert CALLS == [False]  # once for two rows

    assert main(["compare", *runs, "--metric", "contrast", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["runs"]
    best = max(compared, key=lambda run: compared[run]["metrics"]["contrast"]["value"])
    assert compared[best]["is_best"] == ["contrast"]
    assert main(["compare", *runs]) == 0
    assert "lowest contrast, differences with" in capsys.readouterr().out

    out = tmp_path / "curves.png"
    assert main(["compare", *runs, "--x", "images", "--y", "contrast", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("contrast ") and out.is_file()
    assert main(["evaluate", runs[0], "--metrics", "gap", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"gap"}


def line(images: float, **more: object) -> dict[str, object]:
    return {"step": 1, "stage": "show", "images": images, "flops": 1, "elapsed_sec": 1, **more}


def test_curves_follow_a_metrics_direction_and_title(toys):
    lines = {
        "a": [line(100, contrast=1.0, gap=9.0), line(200, contrast=3.0, gap=5.0)],
        "b": [line(100, contrast=2.0, gap=9.0), line(200, contrast=4.0, gap=1.0)],
    }
    facts = dict.fromkeys(lines, Facts())
    for y, at, label in (
        ("contrast", 150, "contrast\nhigher is better"),
        ("gap", 150, "gap in brightness\nlevels"),
    ):
        curves, _ = curves_of(lines, facts, "images", y)
        target, (base, other) = costs_to_quality(curves, None)
        assert target == lines["a"][-1][y] and base.cost == 200
        assert other.cost == pytest.approx(at) and other.ratio == pytest.approx(200 / at)
        axes = quality_figure(curves, "images", y, target).axes[0]
        assert axes.get_ylabel() == label
        assert axes.get_yscale() == ("linear" if y == "contrast" else "log")


def test_names_are_checked_and_may_have_hyphens(toys):
    assert Evaluation(metrics=["inception-score"]).metrics == ("inception_score",)
    with pytest.raises(SettingsError, match="unknown metric 'precison': did you mean precision?"):
        Evaluation(metrics=["precison"])
    with pytest.raises(SettingsError, match="held_out is measured in training only"):
        Evaluation(metrics=["held_out"])


def test_every_metric_is_whole():
    for name, row in METRICS.items():
        assert callable(row.compute) and row.help and row.title
        assert row.title_in("inception") and row.heading_in("pca"), name
    assert qualities() == ("sliced", "kid", "dense_loss")
    assert METRICS["frechet"].heading_in("inception") == "FID"
    assert METRICS["frechet"].heading_in("pca") == "Frechet (pca)"
    assert METRICS["sliced"].heading_in("pca") == "sliced"


# Records of an earlier version


def test_records_of_an_earlier_version_are_read_and_compared_as_todays(tmp_path):
    """Its sampling had guidance in flat settings; the same sampling is alike in both forms."""
    (old,) = read_records(OLD_RUN / "evaluation.json")
    assert old["samples"]["sampling"]["guidance"] == {
        "kind": "classifier-free", "scale": 2.0, "start": 0.1, "end": 0.9, "weak": "primer",
        "rate": 0.5,
    }  # fmt: skip
    assert old["samples"]["diffusion"]["weighting"]["kind"] == "uniform"
    recipe = Recipe(**old["recipe"])
    new = {**old, "recipe": recipe.model_dump(mode="json")}
    new["recipe"]["seed"] += 1
    comparison = compare_records({"old": [old], "new": [json.loads(json.dumps(new))]})
    assert len(comparison.groups) == 1  # retrainings of one recipe
    assert not any("sampling differs" in note for note in comparison.notes)
    # A new record of the same samples replaces the old one.
    path = tmp_path / "evaluation.json"
    path.write_text((OLD_RUN / "evaluation.json").read_text())
    add_record(path, new)
    assert len(read_records(path)) == 1


def test_settings_of_guidance_without_guidance_make_no_difference():
    (old,) = read_records(OLD_RUN / "evaluation.json")

    def notes(**guidance: object) -> list[str]:
        sampling = old["samples"]["sampling"]
        sampling = {**sampling, "guidance": {**sampling["guidance"], **guidance}}
        other = {**old, "samples": {**old["samples"], "sampling": sampling}}
        plain = {**sampling, "guidance": {**sampling["guidance"], "scale": 3.0}}
        base = {**old, "samples": {**old["samples"], "sampling": plain}}
        found = compare_records({"a": [base], "b": [other]}).notes
        return [note for note in found if "sampling differs" in note]

    assert notes(kind="none") == []
    assert "guidance.scale 3.0 (a), 2.0 (b)" in notes()[0]


def test_the_file_for_records_follows_from_the_runs_name(tmp_path):
    assert records_file(str(tmp_path)) == tmp_path / "evaluation.json"
    assert records_file(f"{tmp_path}@hide") == tmp_path / "evaluation-hide.json"
    assert records_file(str(tmp_path / "samples.npz")) is None
