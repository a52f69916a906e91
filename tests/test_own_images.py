"""The images of a run: found again from another folder, and refused where they have changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm.cli import main
from maskdm.training.trainer import train

NUM = 24


def save_photo(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def run(changed, tmp_path: Path, monkeypatch) -> Path:
    """A run on the images in `photos`, named relative to the folder `work`."""
    work = tmp_path / "work"
    (work / "photos").mkdir(parents=True)
    for i in range(NUM):
        save_photo(work / "photos" / f"{i:02d}.png", i)
    monkeypatch.chdir(work)
    train(changed(data={"source": "photos", "size": 8, "channels": 1}), "run", show=False)
    return work / "run"


def evaluated(run: Path, *flags: str) -> dict:
    assert main(["evaluate", str(run), "--num", "8", *flags]) == 0
    return json.loads((run / "evaluation.json").read_text())[-1]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.splitlines()[-1]


def test_a_relative_source_is_found_from_another_folder(run, tmp_path, monkeypatch):
    here = evaluated(run)
    monkeypatch.chdir(tmp_path)
    assert evaluated(run)["reference"]["sha256"] == here["reference"]["sha256"]
    # Other images of the same name are here now: those of the run are meant.
    (tmp_path / "photos").mkdir()
    for i in range(NUM):
        save_photo(tmp_path / "photos" / f"{i:02d}.png", 100 + i)
    again = evaluated(run)
    assert again["reference"]["sha256"] == here["reference"]["sha256"]
    assert again["memorization"] is not None


@pytest.mark.parametrize("change", ["added", "replaced", "removed"])
def test_changed_images_are_refused_and_reference_is_the_way_out(run, capsys, change):
    photo = run.parent / "photos" / "05.png"
    if change == "removed":
        photo.unlink()
    else:
        save_photo(photo.with_name("zz.png") if change == "added" else photo, 999)
    text = refusal(capsys, "evaluate", str(run), "--num", "8")
    assert "photos" in text and "--reference photos" in text
    assert not (run / "evaluation.json").exists()
    record = evaluated(run, "--reference", "photos")
    num = NUM + {"added": 1, "replaced": 0, "removed": -1}[change]
    assert record["reference"]["num"] == num
    assert record["memorization"] is None  # which of them were trained on is unknown


def test_a_run_without_the_hash_of_its_images_is_evaluated(run):
    (run / "environment.json").unlink()
    save_photo(run.parent / "photos" / "zz.png", 999)
    assert evaluated(run)["reference"]["num"] == NUM + 1


def test_a_run_on_few_images_is_evaluated_with_a_note(changed, tmp_path, capsys):
    """With fewer images than components of `pca`, in training as afterwards."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (21, 8, 8), np.uint8))
    data = {"source": str(tmp_path / "a.npy"), "size": 8, "channels": 1}
    recipe = changed(data=data, evaluation={"num": 24, "quick_num": 8}, evaluate_every=5)
    train(recipe, tmp_path / "run", show=False)
    record = evaluated(tmp_path / "run")
    assert record["features"]["dim"] == 20
    assert any("20 components instead of 32" in note for note in record["notes"])


def test_images_that_are_nowhere_are_named(run, tmp_path, monkeypatch, capsys):
    (run.parent / "photos").rename(tmp_path / "moved")
    text = refusal(capsys, "evaluate", str(run), "--num", "8")
    assert "photos does not exist" in text
    # The same images under another name are no longer the run's own, but can be compared with.
    record = evaluated(run, "--reference", str(tmp_path / "moved"))
    assert record["reference"]["num"] == NUM
