"""Draws the pictures of these pages: `python docs/pictures.py [RUN ...]`.

Schedules, weights and masks need no run. Solvers, guidance and inpainting are drawn with a run of
`maskdm train digits --model.num-classes 10 --out RUN`, the poster of faces with one of
`maskdm train faces --out RUN`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_image

from maskdm.diffusion.objective import loss_weight, space_factor
from maskdm.diffusion.schedule import make_schedule
from maskdm.evaluation.distances import frechet_distance
from maskdm.evaluation.features import make_features
from maskdm.families import SAMPLERS, SCHEDULES
from maskdm.images.order import held_out_subset, training_subset
from maskdm.images.output import image_grid
from maskdm.images.prepare import center_crop
from maskdm.images.store import open_store
from maskdm.masks import draw_visible, effective_rate
from maskdm.recipe import Data, Diffusion, Evaluation, Mask, Sampling
from maskdm.runs.load import load_model, load_weak
from maskdm.sampling.generate import generate
from maskdm.sampling.inpaint import inpaint
from maskdm.tokens import patchify, unpatchify

IMAGES = Path(__file__).parent / "images"


def draw_schedules() -> None:
    """Signal and log-SNR over time; the weights of the error in eps over log-SNR."""
    figure, (power, ratio, weight) = _figure(13, 3.8, 3)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for name in SCHEDULES:
        schedule = make_schedule(name)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        style = "--" if name in ("linear", "cosine") else "-"
        power.plot(t, alpha**2 / (alpha**2 + sigma**2), style, label=name)
        ratio.plot(t, schedule.log_snr(t), style, label=name)
    _dress(power, "share of the signal in the power", "t", "alpha² / (alpha² + sigma²)")
    _dress(ratio, "log-SNR", "t", "ln(alpha² / sigma²)")
    ratio.set_ylim(-14, 14)
    schedule = make_schedule("vp-cosine")
    log_snr = schedule.log_snr(t)
    middle = int(log_snr.abs().argmin())
    for kind in ("uniform", "min-snr", "p2", "sigmoid"):
        settings = Diffusion(schedule="vp-cosine", prediction="eps", weighting={"kind": kind})
        values = loss_weight(settings, schedule, t)
        weight.plot(log_snr, values / values[middle], label=kind)
    settings = Diffusion(schedule="vp-cosine", prediction="eps", loss_space="v")
    values = space_factor(settings, schedule, t)
    weight.plot(log_snr, values / values[middle], "--", label="uniform on v")
    _dress(weight, "weight of the error in eps (1 at log-SNR 0)", "log-SNR", "weight")
    weight.set(xlim=(-9, 9), ylim=(1e-3, 1e3), yscale="log")
    figure.savefig(IMAGES / "schedules.png", dpi=90)


def draw_masks() -> None:
    """The paper's masks on a photograph: 64 pixels, patches of 4."""
    photo = Image.fromarray(load_sample_image("flower.jpg")).crop((170, 40, 530, 400))
    pixels = np.asarray(center_crop(photo, (64, 64)))
    masks = [
        ("whole", Mask()),
        ("patch 50 %", Mask(kind="patch", rate=0.5)),
        ("patch 90 %", Mask(kind="patch", rate=0.9)),
        ("block 2x2 50 %", Mask(kind="block", block=2, rate=0.5)),
        ("block 4x4 50 %", Mask(kind="block", block=4, rate=0.5)),
        ("crop 75 %", Mask(kind="crop", rate=0.75)),
    ]
    sheet = Image.new("RGB", (len(masks) * 200 + 8, 230), "white")
    words = ImageDraw.Draw(sheet)
    for i, (name, mask) in enumerate(masks):
        generator = torch.Generator().manual_seed(3)
        visible = draw_visible(mask, (16, 16), 1, generator)
        shown = torch.zeros(1, 256, 1).scatter(1, visible[..., None], 1.0)
        patches = patchify(torch.from_numpy(pixels.copy())[None].float(), 4)
        image = unpatchify(patches * shown + 128 * (1 - shown), 4, (16, 16))[0]
        tile = Image.fromarray(image.byte().numpy()).resize((192, 192), Image.Resampling.NEAREST)
        sheet.paste(tile, (8 + i * 200, 30))
        left = "" if name == "whole" else f": {100 * effective_rate(mask, (16, 16)):.4g} % hidden"
        words.text(
            (10 + i * 200, 8),
            name.split(" ")[0] + (" " + name.split(" ")[1] if "block" in name else "") + left,
            fill="black",
            font_size=15,
        )
    sheet.save(IMAGES / "masks.png")


def draw_solvers(run: str) -> None:
    """Distance of 1,000 samples from the digits by solver and number of evaluations."""
    loaded = load_model(run)
    real = open_store(Data(source="digits", size=8, channels=1))
    settings = Evaluation(features="pca", num_components=32, pixel_max=16)
    features = make_features(settings, real, torch.device("cpu"))
    reference, curves = features.extract(real.images[:]), {}
    for sampler in SAMPLERS:
        points = []
        for steps in (5, 8, 12, 20, 35, 60, 100, 200):
            spacing = "log-snr" if sampler == "euler-maruyama" else "uniform"
            settings = Sampling(sampler=sampler, steps=steps, spacing=spacing, batch_size=1000)
            try:
                images = generate(loaded.trained, settings, list(range(1000)))
            except ValueError:  # Euler-Maruyama refuses so few steps
                continue
            distance = frechet_distance(features.extract(images), reference)
            points.append((2 * steps - 1 if sampler == "heun" else steps, distance))
            print(f"{sampler:16} {steps:4} steps  {distance:7.2f}", flush=True)
        curves[sampler] = points
    plot_solvers(curves)


def plot_solvers(curves: dict[str, list[tuple[int, float]]]) -> None:
    """Plots distance against evaluations, a line for each sampler."""
    figure, (axes,) = _figure(7, 4, 1)
    for sampler, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=sampler)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks([5, 10, 20, 50, 100, 200, 400], ["5", "10", "20", "50", "100", "200", "400"])
    axes.set_yticks([10, 15, 20, 30, 40], ["10", "15", "20", "30", "40"])
    axes.minorticks_off()
    _dress(
        axes, "class-conditional digits, 1,000 samples", "network evaluations", "Frechet distance"
    )
    figure.savefig(IMAGES / "solvers.png", dpi=110)


def draw_guidance(run: str) -> None:
    """Images from the same noise and classes under each kind of guidance."""
    loaded = load_model(run)
    kinds = [
        ("no guidance", {}),
        ("classifier-free 3", {"guidance": {"kind": "classifier-free", "scale": 3.0}}),
        ("autoguidance 1.3", {"guidance": {"kind": "autoguidance", "scale": 1.3}}),
        ("sparse 1.5", {"guidance": {"kind": "sparse", "scale": 1.5}}),
    ]
    weak = load_weak(loaded.location, "primer").trained
    titled = []
    for name, changes in kinds:
        settings = Sampling(**{"steps": 50, **changes})
        images = generate(loaded.trained, settings, list(range(20)), seed=1, weak=weak)
        titled.append((name, image_grid(images, 48)))
    _row(titled).save(IMAGES / "guidance.png")


def draw_inpainting(run: str) -> None:
    """Six digits with their right half hidden, each filled four times."""
    loaded = load_model(run)
    digits = np.round(load_digits().images[[3, 5, 8, 17, 20, 29]] * (255 / 16)).astype(np.uint8)
    unknown = np.zeros((8, 8), bool)
    unknown[:, 4:] = True
    settings = Sampling(steps=60, spacing="log-snr")
    rows = []
    for number, digit in zip([3, 5, 8, 7, 0, 9], digits[..., None], strict=True):
        label = torch.full((4,), number)
        filled = inpaint(loaded.trained, settings, digit, unknown, 4, labels=label)
        hole = np.where(unknown[..., None], np.uint8(128), digit)
        rows.append(np.concatenate([digit[None], hole[None], filled]))
    columns = np.stack(rows, axis=1)  # (6 kinds, 6 digits, 8, 8, 1)
    names = ["real", "given", "drawn", "", "", ""]
    tiles = [Image.new("L", (48, 6 * 52), "white") for _ in names]
    for tile, images in zip(tiles, columns, strict=True):
        for i, image in enumerate(images[..., 0]):
            enlarged = Image.fromarray(image).resize((48, 48), Image.Resampling.NEAREST)
            tile.paste(enlarged, (0, i * 52))
    _row(list(zip(names, tiles, strict=True))).save(IMAGES / "inpainting.png")


def draw_faces(run: str) -> None:
    """The demo on one picture: data, primer, samples, nearest training faces, inpainted halves."""
    loaded, primer = load_model(run), load_model(f"{run}@pre-train")
    recipe = loaded.location.recipe
    store = open_store(recipe.data, progress=False)
    num, size = len(store), store.images.shape[1]
    train = store.images[training_subset(num, recipe.data)]
    samples = generate(loaded.trained, loaded.sampling, list(range(24)))
    apart = ((train[None].astype(float) - samples[:, None]) ** 2).sum(axis=(2, 3, 4))
    unknown = np.zeros((size, size), bool)
    unknown[:, size // 2 :] = True
    held_out = store.images[held_out_subset(num, recipe.data)][:8]
    settings = Sampling(sampler="ddpm", steps=50, spacing="log-snr")
    halves = [inpaint(loaded.trained, settings, one, unknown, 1)[0] for one in held_out]
    given = np.where(unknown[:, :, None], np.uint8(128), held_out)
    titled = [
        ("the data", train[:24]),
        ("the primer", generate(primer.trained, loaded.sampling, list(range(24)))),
        ("samples", samples),
        ("nearest training faces", train[apart.argmin(axis=1)]),
        ("halves filled in", np.concatenate([held_out, given, np.stack(halves)])),
    ]
    tiles = []
    for name, images in titled:
        grid = images.reshape(6, 4, size, size, 3)
        if "half" in name:  # three columns: whole, given, filled
            grid = images.reshape(3, 8, size, size, 3).transpose(1, 0, 2, 3, 4)[:6]
        rows, columns = grid.shape[:2]
        pixels = grid.transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        scale = 48 // size
        tiles.append(
            (name, tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST))
        )
    _row(tiles).save(IMAGES / "faces.png")


def _figure(width: float, height: float, num: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(figure.subplots(1, num)))


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _row(titled: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures side by side, each with its title above."""
    gap, top = 10, 26
    width = sum(image.width + gap for _, image in titled) + gap
    sheet = Image.new("RGB", (width, max(image.height for _, image in titled) + top + gap), "white")
    left = gap
    for name, image in titled:
        ImageDraw.Draw(sheet).text((left, 6), name, fill="black", font_size=15)
        sheet.paste(image, (left, top))
        left += image.width + gap
    return sheet


if __name__ == "__main__":
    draw_schedules()
    draw_masks()
    for run in sys.argv[1:]:
        if load_model(run).location.recipe.data.source.startswith("faces"):
            draw_faces(run)
            continue
        draw_guidance(run)
        draw_inpainting(run)
        draw_solvers(run)
