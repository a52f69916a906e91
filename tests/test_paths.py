"""Where results go: `~`, names with dots, places that cannot be written, image folders."""

from __future__ import annotations

import json
import os
import pwd
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import maskdm
from maskdm.cli import main
from maskdm.images.output import refuse_output, save_images
from maskdm.images.store import cache_dir
from maskdm.recipe_files import load_recipe
from maskdm.runs.find import find_model
from maskdm.settings import changed
from maskdm.training.planning import named_folder
from maskdm.training.trainer import train

PHOTOS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run and the photos that it was trained on."""
    from conftest import tiny_settings

    from maskdm.recipe import Recipe

    home = tmp_path_factory.mktemp("home")
    (home / "photos").mkdir()
    for i in range(PHOTOS):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "photos" / f"{i:02d}.png")
    settings = tiny_settings()
    settings["data"]["source"] = str(home / "photos")
    train(Recipe(**settings), home / "run", show=False)
    return home


@pytest.fixture
def home(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it as the home folder; the working folder is elsewhere."""
    home = shutil.copytree(trained, tmp_path / "home")
    recipe = home / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained), str(home)))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(home))
    return home


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


# ~


def test_every_command_knows_the_home_folder(home, capsys):
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(home / "mask.png")
    few = ["--num=2", "--steps=2"]
    for command in (
        ["check", "~/photos", "--size=32", "--sheet=~/sheet.png"],
        ["pack", "~/photos", "~/store", "--size=8"],
        ["sample", "~/run", *few, "--out=~/a.npz", "--mask-image=~/mask.png"],
        ["sample", "~/run@hide", *few, "--out=~/b"],
        ["inpaint", "~/run", "~/photos/00.png", "--mask=~/mask.png", *few, "--out=~/c.png"],
        ["evaluate", "~/run", "--num=8", "--steps=2", "--save-statistics=~/d.npz"],
        ["evaluate", "~/run@hide", "--num=8", "--steps=2"],
        ["evaluate", "~/a.npz", "--reference=~/a.npz", "--out=~/e.json"],
        ["compare", "~/run", "~/run@hide"],
        ["train", "~/run/recipe.yaml", "--out=~/again"],
        ["train", "~/run"],
        ["plan", "~/run"],
    ):
        code = main(command)
        expected = 2 if command[1] == "~/a.npz" else 0  # two images are too few to be compared
        assert code == expected, (command, capsys.readouterr().err)
    for name in "sheet.png store a.npz b c.png d.npz again".split():
        assert (home / name).exists(), name
    for name in ("evaluation.json", "evaluation-hide.json"):
        assert (home / "run" / name).exists(), name
    assert not os.listdir()  # nothing in the working folder, and no folder named ~


def test_python_knows_the_home_folder(home):
    train(maskdm.load_recipe("~/run/recipe.yaml"), "~/third", show=False)
    assert (home / "third" / "model").is_dir() and not os.listdir()
    assert find_model("~/run@hide").folder == home / "run" / "checkpoints" / "step-00000006"
    assert maskdm.load("~/third").trained is not None


def test_without_a_home_folder_a_source_is_checked(home, monkeypatch, capsys):
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "MASKDM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert main(["check", str(home / "photos"), "--size", "32"]) == 0
    assert cache_dir().is_absolute()
    text = refusal(capsys, "check", "~/photos", "--size", "32")
    assert "~/photos" in text and "HOME" in text
    text = refusal(capsys, "sample", home / "run", "--num", "1", "--out=~/a.npz")
    assert "~/a.npz" in text and "HOME" in text


# Names


@pytest.mark.parametrize("name", ["samples-0.9999", "samples.v2", "step.12000", "plain"])
def test_a_name_with_a_dot_is_a_folder(name, tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    refuse_output(tmp_path / name)
    save_images(images, tmp_path / name)
    assert sorted(os.listdir(tmp_path / name)) == ["000000.png", "000001.png"]
    with pytest.raises(ValueError, match="not an empty folder"):
        refuse_output(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.npy", "a.zip", "a.gif", "a.mp4"])
def test_a_file_of_another_kind_is_not_taken_for_a_folder(name, tmp_path):
    with pytest.raises(ValueError, match=r"end (it|--out) in \.png"):
        refuse_output(tmp_path / name)


def test_suffixes_in_capitals_are_the_same(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for name in ("A.PNG", "B.NPZ"):
        refuse_output(tmp_path / name)
        save_images(images, tmp_path / name)
        assert (tmp_path / name).is_file()
    with Image.open(tmp_path / "A.PNG") as sheet:
        assert sheet.format == "PNG"
    assert np.load(tmp_path / "B.NPZ")["arr_0"].shape == (2, 8, 8, 3)


# Places that cannot be written


def never(*arguments: object, **others: object) -> None:
    raise AssertionError("work began before --out was refused")


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Drawing, measuring, packing and reading images fail the test."""
    import maskdm.evaluation.evaluate  # so that nobody imports the functions put in place here
    import maskdm.training.trainer  # noqa: F401

    for place in (
        "sampling.generate.generate",
        "evaluation.evaluate.evaluate_model",
        "evaluation.evaluate.evaluate_images",
        "images.check.examine",
        "images.build.build_store",
        "images.store.build_store",
        "training.trainer.open_images",
        "evaluation.curves.curves_of",
    ):
        monkeypatch.setattr(f"maskdm.{place}", never)


def test_what_cannot_be_written_is_refused_before_any_work(home, tmp_path, capsys, no_work):
    (home / "file").touch()
    (home / "run" / "quality.jsonl").write_text('{"step": 1, "stage": "show", "sliced": 1}\n')
    if os.name == "posix" and os.geteuid() != 0:
        (home / "locked").mkdir(mode=0o500)
    run, photos = home / "run", home / "photos"
    mask = photos / "00.png"
    for place in [home / "file" / "x", *home.glob("locked")]:
        for command in (
            ("sample", run, "--out", f"{place}/a.npz"),
            ("sample", run, "--out", f"{place}/a"),
            ("inpaint", run, mask, "--mask", mask, "--out", f"{place}/a.png"),
            ("evaluate", run, "--out", f"{place}/a.json"),
            ("evaluate", photos, "--reference", photos, "--out", f"{place}/a.json"),
            ("evaluate", run, "--save-statistics", f"{place}/a.npz"),
            ("check", photos, "--sheet", f"{place}/a.png"),
            ("pack", photos, f"{place}/store", "--size", 8),
            ("train", run / "recipe.yaml", "--out", f"{place}/run"),
            ("compare", run, "--x", "images", "--out", f"{place}/a.png"),
        ):
            text = refusal(capsys, *command)
            assert str(place) in text, (command, text)


def test_a_run_that_cannot_be_written_is_evaluated_into_another_file(
    home, capsys, monkeypatch, no_work
):
    """A run of somebody else's: its folder can be read only."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "/run" not in str(path) and real(path, mode)
    )
    text = refusal(capsys, "evaluate", home / "run")
    assert "evaluation.json" in text and "--out" in text


# Image folders


def test_nothing_is_written_among_the_images(home, capsys, no_work, monkeypatch):
    run, photos = home / "run", home / "photos"
    mask = photos / "00.png"
    monkeypatch.chdir(photos)
    before = sorted(os.listdir(photos))
    for command in (
        ("check", photos, "--sheet", photos / "sheet.png"),
        ("check", ".", "--sheet", "sheet.png"),
        ("sample", run, "--out", photos / "grid.png"),
        ("sample", run, "--out", photos / "drawn"),
        ("inpaint", run, mask, "--mask", mask),  # ./inpainted.png
        ("evaluate", run, "--out", photos / "e.json"),  # with a sheet beside it
        ("train", run / "recipe.yaml", "--out", photos / "run"),
    ):
        text = refusal(capsys, *command)
        assert "would become" in text, (command, text)
    assert sorted(os.listdir(photos)) == before


def test_a_relative_source_is_known_from_another_folder(home, changed, monkeypatch, capsys):
    monkeypatch.chdir(home)
    train(changed(data={"source": "photos", "size": 8, "channels": 1}), "second", show=False)
    starts = json.loads((home / "second" / "environment.json").read_text())
    assert starts[-1]["cwd"] == str(home)
    monkeypatch.chdir("/")
    out = home / "photos" / "grid.png"
    assert "would become" in refusal(capsys, "sample", home / "second", "--out", out)


def test_an_array_among_the_images_is_no_image(home):
    out = home / "photos" / "a.npz"
    assert main(["sample", str(home / "run"), "--num=1", "--steps=1", f"--out={out}"]) == 0


@pytest.mark.parametrize(
    ("recipe", "source", "folder"),
    [
        ("table1-a-block2-50", None, "table1-a-block2-50"),
        ("faces", None, "faces"),
        ("photos64", "/data/my cats.zip", "photos64-my-cats"),
        ("celeba64", "hf:someone/birds", "celeba64-birds"),
    ],
)
def test_a_run_is_named_after_its_recipe_and_images_that_are_not_the_recipes(
    recipe, source, folder
):
    whole = load_recipe(recipe)
    if source:
        whole = changed(whole, data=changed(whole.data, source=source))
    assert named_folder(recipe, whole) == Path("runs") / folder
    assert named_folder(recipe, whole, "dense") == Path("runs") / f"{folder}-dense"
