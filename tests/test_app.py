"""The page on which one draws: as the commands draw, within limits, and closed to everyone else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_settings
from PIL import Image

from maskdm.app.drawing import Wanted, inpainted, marginal, sampled
from maskdm.app.limits import Limits
from maskdm.app.models import IN_TURN, NO_CLASS, Models, short_names
from maskdm.app.pictures import canvas, download_files, painted, sheet, uploaded
from maskdm.app.watching import ESTIMATE, NOISY, Frame, watched
from maskdm.cli import main
from maskdm.images.order import training_subset
from maskdm.images.store import open_store
from maskdm.recipe import Data, Mask, Recipe
from maskdm.sampling.generate import generate
from maskdm.sampling.moments import draw_moments
from maskdm.training.trainer import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
LIMITS = Limits()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits: half of the blocks hidden, then whole images."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(Recipe(**tiny_settings()), folder, show=False)
    return folder


@pytest.fixture(scope="module")
def models(run: Path) -> Models:
    return Models([str(run)], note=print)


def classes_run(folder: Path, names: list[str]) -> str:
    """A run on 16 grey images of these classes."""
    for number in range(16):
        file = folder / "images" / names[number % len(names)] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 9 * number, np.uint8)).save(file)
    settings = tiny_settings()
    settings["data"] |= {"source": str(folder / "images")}
    settings["model"] |= {"num_classes": "auto"}
    settings["stages"] = settings["stages"][:1]
    train(Recipe(**settings), folder / "run", show=False)
    return str(folder / "run")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two models that know cats, by another number each."""
    folder = tmp_path_factory.mktemp("classes")
    runs = [classes_run(folder / "a", ["cat", "dog"]), classes_run(folder / "b", ["ape", "cat"])]
    return Models(runs, note=print)


def arrays(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


# What is drawn


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        (Wanted(3, 5, 4), "--steps 4 --sampler ddim"),
        (Wanted(1, 2, 6, "heun", "sparse", 2.0),
         "--steps 6 --sampler heun --guidance.kind sparse --guidance.scale 2"),
        (Wanted(0, 2, 5, "ddim", "autoguidance", 1.2),
         "--steps 5 --guidance.kind autoguidance --guidance.scale 1.2"),
    ],
)  # fmt: skip
def test_the_page_draws_what_sample_draws(run, models, tmp_path, wanted, flags):
    out = tmp_path / "x.npz"
    how = f"--num {wanted.num} --seed {wanted.seed} {flags}".split()
    assert main(["sample", str(run), "--out", str(out), *how]) == 0
    drawn = sampled(models, "digits", wanted, LIMITS).draw()
    np.testing.assert_array_equal(drawn, arrays(out)["arr_0"])


def test_marginals_are_those_of_sample(run, models, tmp_path):
    assert models.primers == ["digits@hide"]
    assert models.shown("digits@hide").mask == Mask(kind="block", rate=0.5)
    out, mask = tmp_path / "x.npz", Mask(kind="patch", rate=0.75)
    flags = "--num 3 --seed 2 --steps 4 --mask.kind patch --mask.rate 0.75".split()
    assert main(["sample", f"{run}@hide", "--out", str(out), *flags]) == 0
    drawing = marginal(models, "digits@hide", Wanted(2, 3, 4), mask, LIMITS)
    np.testing.assert_array_equal(drawing.draw(), arrays(out)["arr_0"])
    assert "4 of 16 patches" in drawing.text()
    with pytest.raises(ValueError, match="hides nothing"):
        marginal(models, "digits", Wanted(), Mask(), LIMITS)


def test_inpainting_is_that_of_the_command(run, models, tmp_path):
    image = models.training_image("digits", 7)
    unknown = np.zeros((8, 8), bool)
    unknown[2:5, 3:8] = True
    Image.fromarray(image[..., 0]).save(tmp_path / "image.png")
    Image.fromarray(255 * unknown.astype(np.uint8)).save(tmp_path / "mask.png")
    out = tmp_path / "x.npz"
    flags = ["--mask", str(tmp_path / "mask.png"), "--out", str(out), "--num", "2", "--seed", "5"]
    flags += ["--steps", "4", "--resamplings", "3"]
    assert main(["inpaint", str(run), str(tmp_path / "image.png"), *flags]) == 0
    drawing = inpainted(models, "digits", Wanted(5, 2, 4), image, unknown, 3, LIMITS)
    drawn = drawing.draw()
    np.testing.assert_array_equal(drawn, arrays(out)["arr_0"])
    assert (drawn[:, ~unknown] == image[~unknown]).all()
    assert (drawing.lead[0, unknown] == 128).all()
    assert (drawing.lead[0, ~unknown] == image[~unknown]).all()
    with pytest.raises(ValueError, match="nothing is marked"):
        inpainted(models, "digits", Wanted(), image, np.zeros((8, 8), bool), 3, LIMITS)
    with pytest.raises(ValueError, match="taken for another model"):
        inpainted(models, "digits", Wanted(), np.zeros((4, 4, 1), np.uint8), unknown, 3, LIMITS)


def test_a_class_is_the_same_by_name_in_every_model(classes):
    assert classes.given == ["a/run", "b/run"]
    assert classes.classes() == [
        ("all in turn", IN_TURN), ("cat", 0), ("dog", 1), ("no class", NO_CLASS)
    ]  # fmt: skip
    assert [classes.class_of(name, 0) for name in classes.given] == [0, 1]
    assert classes.class_of("b/run", NO_CLASS) == 2
    with pytest.raises(ValueError, match="no class 'dog'"):
        classes.class_of("b/run", 1)
    drawing = sampled(classes, "b/run", Wanted(num=2, steps=2, label=0), LIMITS)
    assert drawing.classes().tolist() == [1, 1] and "class cat (number 1)" in drawing.text()
    in_turn = sampled(classes, "b/run", Wanted(num=3, steps=2), LIMITS)
    assert in_turn.classes().tolist() == [0, 1, 0]
    image = classes.training_image("a/run", 0)
    drawing = inpainted(classes, "a/run", Wanted(num=1), image, np.ones((8, 8), bool), 1, LIMITS)
    assert drawing.labels.tolist() == [2]  # no class, as `maskdm inpaint` has it by default
    assert "classifier-free" in classes.guidance_kinds()
    # Guidance by classes would change nothing there, at twice the cost.
    guided = Wanted(num=1, guidance="classifier-free", scale=4.0)
    drawing = inpainted(classes, "a/run", guided, image, np.ones((8, 8), bool), 1, LIMITS)
    assert drawing.settings.guidance.kind == "none"
    guided = replace(guided, label=0)
    drawing = inpainted(classes, "a/run", guided, image, np.ones((8, 8), bool), 1, LIMITS)
    assert drawing.settings.guidance.kind == "classifier-free"


def test_models_without_classes_offer_none(models):
    assert models.classes() == [] and "classifier-free" not in models.guidance_kinds()
    with pytest.raises(ValueError, match="digits has no classes"):
        models.class_of("digits", 3)


def test_training_images_are_as_the_model_saw_them(models):
    store = open_store(Recipe(**tiny_settings()).data, progress=False)
    np.testing.assert_array_equal(models.training_image("digits", 11), store.images[11])
    with pytest.raises(ValueError, match=r"image 1797: digits was trained on images 0 to 1,796"):
        models.training_image("digits", 1797)


def test_training_images_are_those_alone_wherever_the_page_is_started(tmp_path, monkeypatch):
    settings, images = tiny_settings(), tmp_path / "images.npy"
    np.save(images, np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2))
    settings["data"] |= {"source": "images.npy", "held_out": 10}
    settings["stages"] = settings["stages"][:1]
    monkeypatch.chdir(tmp_path)
    train(Recipe(**settings), tmp_path / "run", show=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shown = Models([str(tmp_path / "run")], note=print)
    seen = [int(shown.training_image("run", i).mean()) for i in range(30)]
    assert seen == training_subset(40, Recipe(**settings).data).tolist()
    with pytest.raises(ValueError, match="images 0 to 29"):
        shown.training_image("run", 30)
    np.save(images, np.zeros((40, 8, 8, 1), np.uint8))
    fresh = Models([str(tmp_path / "run")], note=print)
    with pytest.raises(ValueError, match="are not those that .* was trained on"):
        fresh.training_image("run", 0)


def test_names_are_as_short_as_keeps_them_apart():
    assert short_names(["runs/a", "runs/b@hide"]) == ["a", "b@hide"]
    assert short_names(["runs/x/model", "runs/y/model"]) == ["x/model", "y/model"]
    for again in ("runs/a", "runs/a/", "./runs/a"):
        with pytest.raises(ValueError, match="runs/a.* is named twice"):
            short_names(["runs/a", again])


# Watching


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_a_look_sees_what_the_sampler_holds_and_what_the_network_answers(models, sampler):
    drawing = sampled(models, "digits", Wanted(4, 3, 5, sampler), LIMITS)
    trained, seen = models.load("digits").trained, []
    images = generate(
        trained,
        drawing.settings,
        [0, 1, 2],
        4,
        look=lambda *what: seen.append(what),
    )
    moments = draw_moments(trained, drawing.settings, 3, range(5), 4)
    assert all(numbers == [0, 1, 2] for numbers, _, _ in seen)
    if sampler == "heun":  # which first guesses each level, and comes back to all but the last
        seen = seen[::2]
    else:
        estimate = ((seen[-1][2] + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        np.testing.assert_array_equal(estimate, images)  # no noise is left after the last step
    first = ((seen[0][1] + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    np.testing.assert_array_equal(first, moments[:, 0])
    assert len(seen) == 5


@pytest.mark.parametrize("show", [NOISY, ESTIMATE])
def test_frames_lead_to_the_images(models, show):
    drawing = sampled(models, "digits", Wanted(1, 20, 30), LIMITS)  # in parts of 8 images
    frames = list(watched(drawing, show, frame_sec=0))
    parts = [frame.part for frame in frames]
    assert len(frames) > 1 and parts == sorted(parts) and parts[0] > 0 and parts[-1] == 1
    assert [frame.is_last for frame in frames] == [False] * (len(frames) - 1) + [True]
    np.testing.assert_array_equal(frames[-1].images, drawing.draw())
    assert frames[0].images.shape == (20, 8, 8, 1)
    assert Frame(frames[0].images, 0.25, 3.0).remaining_sec == 9


def test_a_drawing_that_nobody_watches_any_more_ends(models):
    drawing = sampled(models, "digits", Wanted(0, 64, 1000), LIMITS)
    frames = watched(drawing, frame_sec=0)
    assert next(frames).part < 0.5
    frames.close()
    start = time.perf_counter()
    with models.lock:  # is free once it has ended
        assert time.perf_counter() - start < 2
    for thread in threading.enumerate():
        if thread.daemon and "draw" in thread.name:
            thread.join(1)
            assert not thread.is_alive()


def test_what_a_drawing_raises_reaches_the_page(models):
    drawing = sampled(models, "digits", Wanted(0, 1, 4, "ddim", "classifier-free"), LIMITS)
    with pytest.raises(ValueError, match="classifier-free guidance is not available"):
        list(watched(drawing))


# Limits


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Wanted(num=65), "65 images: from 1 to 64 in one go"),
        (Wanted(num=0), "0 images: from 1 to 64"),
        (Wanted(steps=1001), "1,001 steps: from 1 to 1,000"),
        (Wanted(num=64, steps=1000, sampler="heun"),
         "64 images x 2,000 evaluations of the network are 128,000, more than 100,000 in one go: "
         "at most 50 images, or fewer steps"),
        (Wanted(num=60, steps=900, guidance="sparse"), "60 images x 1,800 evaluations"),
        (Wanted(seed=-1), "seed -1: from 0 to"),
        (Wanted(seed=2**60), "from 0 to 9007199254740991"),
        (Wanted(sampler="dimm"), "did you mean ddim"),
        (Wanted(scale=-1.0), "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_too_much_is_refused_in_a_line(models, wanted, text):
    with pytest.raises(ValueError) as error:
        sampled(models, "digits", wanted, LIMITS)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_resamplings_count(models):
    image, unknown = np.zeros((8, 8, 1), np.uint8), np.ones((8, 8), bool)
    with pytest.raises(ValueError, match="64 images x 2,000 evaluations"):
        inpainted(models, "digits", Wanted(num=64, steps=100), image, unknown, 20, LIMITS)


def test_limits_below_one_are_refused(capsys):
    assert main(["app", "x", "--max-images", "0"]) == 2
    assert "--max-images 0: at least 1" in capsys.readouterr().err


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_uploads_are_prepared_as_training_images_were(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey.repeat(2, 0).repeat(2, 1)).save(tmp_path / "a.png")
    made = uploaded(tmp_path / "a.png", Data(size=8, channels=1), LIMITS)
    np.testing.assert_array_equal(made[..., 0], grey)
    # Crops for one kind of image give way to the middle of others.
    for crop in ("celeba", "none"):
        made = uploaded(tmp_path / "a.png", Data(size=8, channels=1, crop=crop), LIMITS)
        np.testing.assert_array_equal(made[..., 0], grey)


def test_uploads_that_are_too_large_or_no_image_are_refused(tmp_path):
    few, data = Limits(max_upload_mb=1, max_megapixels=1), Data(size=8)
    Image.fromarray(noise(700, 700)).save(tmp_path / "heavy.png")
    with pytest.raises(ValueError, match=r"heavy.png has 1.47 MB: at most 1 MB"):
        uploaded(tmp_path / "heavy.png", data, few)
    Image.new("L", (1001, 1000)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide.png cannot be used: 1001x1000 pixels: at most 1"):
        uploaded(tmp_path / "wide.png", data, few)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="^text.png cannot be used: not an image$"):
        uploaded(tmp_path / "text.png", data, few)


# Pictures


def test_pixels_count_as_painted_from_a_quarter_on():
    layer = np.zeros((32, 32, 4), np.uint8)
    layer[:8, :8, 3] = 255  # of a grid of 4x4: one pixel whole,
    layer[8:10, 8:16, 3] = 255  # another by a quarter,
    layer[16:17, 8:16, 3] = 255  # another by an eighth
    layer[..., :3] = 200  # colours mean nothing
    expected = np.zeros((4, 4), bool)
    expected[0, 0] = expected[1, 1] = True
    np.testing.assert_array_equal(painted([layer], 4, 4), expected)
    other = np.zeros((16, 16, 4), np.uint8)
    other[12:, 12:, 3] = 255
    expected[3, 3] = True
    np.testing.assert_array_equal(painted([layer, other], 4, 4), expected)
    assert not painted([], 4, 4).any()
    with pytest.raises(ValueError, match="no transparent ground"):
        painted([layer[..., :3]], 4, 4)


@pytest.mark.parametrize("shape", [(8, 8, 1), (16, 24, 3), (8, 8, 4), (600, 300, 3)])
def test_canvas_and_sheet_keep_every_pixel_where_there_is_room(shape):
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    big = canvas(image)
    assert big.mode == "RGB" and max(big.size) >= 512
    factor = big.height // shape[0]
    assert big.size == (factor * shape[1], factor * shape[0])
    if shape[-1] == 3:
        small = np.asarray(big)[factor // 2 :: factor, factor // 2 :: factor]
        np.testing.assert_array_equal(small, image)
    assert max(sheet(np.stack([image] * 16)).size) <= 1400


def test_downloads_are_what_the_commands_write(tmp_path):
    images = noise(8, 8)[None].repeat(3, 0)
    png, npz = download_files(images, images[:1], np.arange(3), tmp_path, "x-seed0")
    assert (png.name, npz.name) == ("x-seed0.png", "x-seed0.npz")
    with Image.open(png) as drawn:
        assert drawn.size == (2 * 66 + 2, 2 * 66 + 2)
    np.testing.assert_array_equal(arrays(npz)["arr_0"], images)
    assert arrays(npz)["arr_1"].tolist() == [0, 1, 2]
    old = time.time() - 4000
    os.utime(png.parent, (old, old))
    download_files(images, images[:0], None, tmp_path, "y")
    assert not png.exists() and len(list(tmp_path.glob("*/y.png"))) == 1


# The command


def test_the_missing_extra_is_named(run, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name)
    )
    assert main(["app", str(run)]) == 2
    assert capsys.readouterr().err == ("maskdm: the page needs Gradio: pip install 'maskdm[app]'\n")


def test_wrong_calls_are_refused_in_a_line(run, capsys):
    pytest.importorskip("gradio", reason="pip install 'maskdm[app]'")
    with socket.create_server(("127.0.0.1", 0)) as place:
        taken = str(place.getsockname()[1])
        assert main(["app", str(run), "--port", taken]) == 2
    assert f"--port {taken} is taken: use another, --port" in capsys.readouterr().err
    assert main(["app", str(run), "--port", "70000"]) == 2
    assert "--port 70000: from 0 to 65535" in capsys.readouterr().err
    assert main(["app", str(run), "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "--host 192.0.2.1 --port 0: " in capsys.readouterr().err
    assert main(["app"]) == 2
    assert main(["app", str(run / "nowhere"), "--port", "0"]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
