"""`sample --strip`, `--video` and `--interpolate`: what the pictures show."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm.cli import main
from maskdm.diffusion.schedule import make_schedule
from maskdm.export.pipeline import make_pipeline, save_pipeline
from maskdm.families import SAMPLERS
from maskdm.images.video import save_video
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling.generate import initial_noise
from maskdm.sampling.interpolate import Between, slerp
from maskdm.sampling.moments import draw_moments, moments_of
from maskdm.sampling.samplers import sampling_levels

SIZES = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2}
X0 = Diffusion(schedule="vp-cosine", prediction="x0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model of three classes with random weights, which answers with clean images."""
    torch.manual_seed(0)
    model = UViT(**SIZES, num_classes=3)
    with torch.no_grad():
        model.head.weight *= 50  # images of contrast
    path = tmp_path_factory.mktemp("views") / "model"
    save_pipeline(make_pipeline(TrainedModel(model.eval(), X0), Sampling(steps=6)), path)
    return path


def cells(path, columns: int, side: int = 8) -> np.ndarray:
    """The images of a sheet: uint8 (rows, columns, side, side, C); they are enlarged 8 times."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    pitch = side * 8 + 2
    rows = (pixels.shape[0] - 2) // pitch
    assert pixels.shape[:2] == (rows * pitch + 2, columns * pitch + 2)
    shown = pixels[2:, 2:].reshape(rows, pitch, columns, pitch, -1).swapaxes(1, 2)
    return shown[:, :, : side * 8 : 8, : side * 8 : 8]


def sampled(folder, tmp_path, *flags: str) -> np.ndarray:
    assert main(["sample", str(folder), "--out", str(tmp_path / "x.npz"), *flags]) == 0
    return np.load(tmp_path / "x.npz")["arr_0"]


def failure(capsys, folder, *flags: str) -> str:
    capsys.readouterr()
    assert main(["sample", str(folder), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm-solver"])
def test_moments_are_what_the_solver_holds_there(sampler):
    """Where every answer is the same image, x_t = alpha x0 + sigma noise on the whole way."""
    model = UViT(**SIZES)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(0.25)
    settings = Sampling(sampler=sampler, steps=20)
    trained = TrainedModel(model.eval(), X0)
    at = [0, 7, 13, 19]
    moments = draw_moments(trained, settings, 3, at, seed=5)
    assert moments.shape == (3, 5, 8, 8, 3) and moments.dtype == np.uint8
    t = 1 - torch.tensor([[at]]).double() / 20
    schedule, noise = make_schedule("vp-cosine"), initial_noise(5, [0, 1, 2], (8, 8, 3))
    x_t = schedule.alpha(t) * 0.25 + schedule.sigma(t) * noise.reshape(3, -1, 1)
    expected = ((x_t + 1) * 127.5).clamp(0, 255).reshape(3, 8, 8, 3, 4).movedim(-1, 1).numpy()
    assert np.abs(moments[:, :4] - expected).max() < 1.5
    assert set(moments[:, 4].flat) == {159}  # 1.25 x 127.5


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_moment_is_the_image_that_is_drawn_without_looking(folder, tmp_path, name):
    flags = ["--sampler", name, "--spacing", "log-snr", "--steps", "12", "--num", "4"]
    images = sampled(folder, tmp_path, *flags)
    strip = tmp_path / "strip.png"
    assert main(["sample", str(folder), "--strip", "--out", str(strip), *flags]) == 0
    shown = cells(strip, columns=8)
    assert shown.shape == (4, 8, 8, 8, 3) and np.array_equal(shown[:, -1], images)
    noise = initial_noise(0, range(4), (8, 8, 3)).numpy()
    assert np.abs(shown[:, 0] - ((noise + 1) * 127.5).clip(0, 255)).max() < 1
    assert (
        main(["sample", str(folder), "--strip", "--moments", "13", "--out", str(strip), *flags])
        == 0
    )
    assert np.array_equal(cells(strip, columns=13)[:, [0, -1]], shown[:, [0, -1]])


@pytest.mark.parametrize("spacing", ["uniform", "log-snr", "karras"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "flow", "vp-sde"])
def test_the_noise_fades_as_evenly_as_the_steps_allow(schedule, spacing):
    levels = sampling_levels(make_schedule(schedule), Sampling(steps=200, spacing=spacing))
    for num in (1, 2, 7, 200):
        numbers = moments_of(levels, num)
        assert numbers[0] == 0 and len({*numbers}) == num and numbers == sorted(numbers)
    angles = (-levels / 2).exp().atan()[moments_of(levels, 6)]
    wanted = angles[0] * (1 - torch.arange(6) / 6)
    assert (angles - wanted).abs().max() < 0.06  # of 1.57
    assert moments_of(levels[:3], 3) == [0, 1, 2] and moments_of(levels, 0) == []


def test_points_between_two_noises_are_as_long_as_they(tmp_path):
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    third = slerp(east, north, 1 / 3)
    torch.testing.assert_close(third, torch.tensor([3**0.5 / 2, 0.5]))
    noise = Between(1, 2, 5).noise([0, 1, 2, 3, 4], (64, 64, 3))
    assert torch.equal(noise[[0]], initial_noise(1, [0], (64, 64, 3)))
    assert torch.equal(noise[[4]], initial_noise(2, [0], (64, 64, 3)))
    assert (noise.flatten(1).std(dim=1) - 1).abs().max() < 0.02
    steps = noise.flatten(1).diff(dim=0).norm(dim=1)
    assert (steps / steps.mean() - 1).abs().max() < 0.01


@pytest.mark.parametrize("flags", [(), ("--sampler", "ddpm"), ("--label", "2")])
def test_interpolation_goes_from_one_seeds_image_to_anothers(folder, tmp_path, flags):
    way = sampled(folder, tmp_path, "--interpolate", "3", "8", "--num", "9", *flags)
    labels = np.load(tmp_path / "x.npz")["arr_1"]
    assert labels.tolist() == [2 if "--label" in flags else 0] * 9  # one class, kept
    first, last = (sampled(folder, tmp_path, "--seed", s, "--num", "1", *flags)[0] for s in "38")
    assert np.abs(way[0].astype(int) - first).max() <= 1
    if "ddpm" not in flags:  # whose own noise is the first seed's on the whole way
        assert np.abs(way[-1].astype(int) - last).max() <= 1
    far = np.abs(way[0].astype(float) - way[-1]).mean()
    steps = np.abs(np.diff(way.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert far > 10 and steps.max() < 0.6 * far


def test_a_sheet_of_an_interpolation_has_rows_of_eight(folder, tmp_path):
    out = tmp_path / "way.png"
    assert (
        main(["sample", str(folder), "--interpolate", "3", "8", "--num", "12", "--out", str(out)])
        == 0
    )
    shown = cells(out, columns=8)
    way = sampled(folder, tmp_path, "--interpolate", "3", "8", "--num", "12")
    assert np.array_equal(shown.reshape(16, 8, 8, 3)[:12], way)


def gif_frames(path) -> tuple[list[np.ndarray], list[int]]:
    frames, times = [], []
    with Image.open(path) as video:
        assert video.info["loop"] == 0  # endlessly
        for number in range(video.n_frames):
            video.seek(number)
            frames.append(np.asarray(video.convert("RGB")).astype(int))
            times.append(video.info["duration"])
    return frames, times


def test_a_gif_shows_each_step_and_stays_on_the_images(folder, tmp_path):
    grid, video = tmp_path / "grid.png", tmp_path / "new" / "x.gif"
    assert (
        main(["sample", str(folder), "--num", "4", "--out", str(grid), "--video", str(video)]) == 0
    )
    frames, times = gif_frames(video)
    assert len(frames) == 7 and times == [80] * 6 + [1500]  # the noise and 6 steps
    with Image.open(grid) as last:
        assert np.abs(frames[-1] - np.asarray(last)).mean() < 6  # of 256 colours
    assert np.abs(frames[0] - frames[-1]).mean() > 40


def test_a_video_of_an_interpolation_goes_there_and_back(folder, tmp_path):
    video = tmp_path / "way.gif"
    flags = ["--interpolate", "3", "8", "--num", "5", "--video", str(video)]
    way = sampled(folder, tmp_path, *flags)
    frames, times = gif_frames(video)
    assert len(frames) == 8 and set(times) == {80}
    for frame, number in zip(frames, [0, 1, 2, 3, 4, 3, 2, 1], strict=True):
        assert frame.shape == (256, 256, 3)
        assert np.abs(frame[::32, ::32] - way[number]).mean() < 6


@pytest.mark.parametrize("size", [(63, 47), (64, 48)])
def test_an_mp4_plays_the_frames(tmp_path, size):
    av = pytest.importorskip("av")
    values = [30, 120, 220]
    frames = [Image.new("RGB", size, (value, value // 2, 255 - value)) for value in values]
    save_video([*frames, frames[0].convert("L")], tmp_path / "x.mp4", hold=True)
    with av.open(str(tmp_path / "x.mp4")) as video:
        assert video.streams.video[0].average_rate == 12
        shown = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
    assert len(shown) == 3 + 18  # the last one stays for a second and a half
    for value, frame in zip(values, shown, strict=False):
        assert frame.shape == (48, 64, 3)  # H.264 has even sides
        assert np.abs(frame - [value, value // 2, 255 - value]).mean() < 3
    assert np.ptp(shown[-1].mean(axis=(0, 1))) < 3


def test_flags_that_contradict_each_other_are_refused(folder, tmp_path, capsys, monkeypatch):
    png, npz = ("--out", str(tmp_path / "x.png")), ("--out", str(tmp_path / "x.npz"))
    (tmp_path / "folder.gif").mkdir()
    gif = str(tmp_path / "x.gif")
    for flags, expected in [
        ((*npz, "--strip"), "a strip is a picture, end it in .png"),
        ((*png, "--moments", "4"), "add --strip"),
        ((*png, "--strip", "--moments", "8"), "--moments 8: from 2 to 7"),
        ((*png, "--strip", "--moments", "1"), "--moments 1: from 2 to 7"),
        ((*png, "--video", "x.webm"), "end it in .gif or .mp4"),
        ((*png, "--video", str(tmp_path / "folder.gif")), "is a folder"),
        ((*png, "--interpolate", "3", "3"), "--interpolate 3 twice: give two seeds"),
        ((*png, "--interpolate", "3", "4", "--num", "1"), "draws both ends, so at least 2"),
        ((*png, "--interpolate", "3", "4", "--seed", "2"), "--seed has no effect"),
        ((*png, "--strip", "--mask.kind", "patch", "--mask.rate", "0.5"), "leave out the mask"),
        (("--out", gif), "videos are written by `maskdm sample --video`"),
    ]:
        assert expected in failure(capsys, folder, *flags)
    monkeypatch.setitem(sys.modules, "av", None)
    mp4 = str(tmp_path / "x.mp4")
    assert "needs PyAV: pip install av, or end it in .gif" in failure(
        capsys, folder, *png, "--video", mp4
    )
    assert [path.name for path in tmp_path.iterdir()] == ["folder.gif"]
