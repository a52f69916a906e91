"""Images higher than wide or wider than high, from the first step to what a model is used for."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import as_array
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.cli import main
from maskdm.diffusion.schedule import log_snr_shift, schedule_of
from maskdm.evaluation.evaluate import evaluate
from maskdm.evaluation.reference import Reference
from maskdm.evaluation.samples import drawn_samples
from maskdm.export.pipeline import load, pipeline_of_run, save_pipeline
from maskdm.images.store import Store
from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.build import Backbone, build_model
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Evaluation, Recipe, Sampling
from maskdm.sampling.generate import generate
from maskdm.sampling.guidance import refuse_weak
from maskdm.sampling.inpaint import inpaint
from maskdm.tokens import patchify
from maskdm.training.step import backward, draw_batch
from maskdm.training.transfer import transfer_weights

UNET = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
MODELS = [  # channels, settings of the model
    (1, {}),
    (2, {"final_conv": True}),
    (4, {}),
    (2, {"kind": "unet2d", "options": UNET}),
]
HEIGHT, WIDTH = 8, 12


@pytest.fixture
def rectangular(tiny, changed):
    """The tiny recipe for images of 8x12 pixels."""

    def make(channels: int = 1, **model) -> Recipe:
        return changed(
            data={"source": "digits", "size": (HEIGHT, WIDTH), "channels": channels},
            model={**tiny.model.model_dump(), **model},
        )

    return make


def ramp(channels: int) -> np.ndarray:
    """Dark at the upper left, light at the lower right: uint8 (8, 12, C)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    values = (20 + 10 * y + 12 * x).astype(np.uint8)
    return np.repeat(values[..., None], channels, axis=2)


def train(recipe: Recipe, model: Backbone, steps: int) -> list[float]:
    """Steps of the first stage's mask on one image; their losses."""
    accelerator, losses = Accelerator(cpu=True), []
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    images = torch.from_numpy(ramp(recipe.data.channels)).expand(16, -1, -1, -1)
    schedule = schedule_of(recipe.diffusion, recipe.data.size)
    for step in range(steps):
        batch = draw_batch(images, None, recipe, recipe.stages[step % 2], schedule, step)
        losses.append(backward(accelerator, model, batch, schedule, recipe.diffusion, None).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_patches_of_a_rectangle_run_row_by_row():
    y, x = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    image = 10 * (y // 4) + x // 4  # each patch of 4x4 holds its row and column
    patches = patchify(image[None, ..., None], 4)
    assert patches[0, :, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert (patches == patches[..., :1]).all()
    assert UViT(image_size=(8, 12), patch_size=4, embed_dim=16, num_heads=2).grid == (2, 3)


@pytest.mark.parametrize(("channels", "settings"), MODELS)
def test_a_rectangular_model_learns_samples_and_is_exported(
    channels, settings, rectangular, tmp_path
):
    recipe = rectangular(channels, **settings)
    model = build_model(recipe)
    assert model.image_shape == recipe.data.shape == (8, 12, channels)
    losses = train(recipe, model, 80)
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    pipeline = pipeline_of_run(model.eval(), recipe)
    images = as_array(pipeline(4).images)
    assert images.shape == (4, 8, 12, channels)
    expected = ramp(channels)
    assert np.corrcoef(images.mean(0).ravel(), expected.ravel())[0, 1] > 0.9

    save_pipeline(pipeline, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "maskdm.json").read_text())
    assert settings["model"]["image_size"] == [8, 12]
    again = load(tmp_path / "model")
    assert again.denoiser.image_shape == (8, 12, channels)
    assert np.array_equal(as_array(again(4).images), images)
    assert again(1).images[0].size == (12, 8)

    unknown = np.zeros((8, 12), bool)
    unknown[2:6, 6:] = True
    drawn = inpaint(again.trained, Sampling(steps=4), expected, unknown, 2, resamplings=1)
    assert drawn.shape == (2, 8, 12, channels)
    assert (drawn[:, ~unknown] == expected[~unknown]).all()
    some = generate(again.trained, Sampling(steps=2), [0], visible=torch.tensor([[1, 6]]))[0]
    shown = np.zeros((8, 12), bool)
    shown[0:2, 2:4] = shown[2:4, 0:2] = True  # patches 1 and 6 of four rows of six
    assert (some[~shown] == 128).all() and (some[shown] != 128).any()


def test_a_rectangular_model_on_the_command_line(rectangular, tmp_path, capsys):
    recipe = rectangular(3)
    export, out = tmp_path / "export", tmp_path / "s.npz"
    save_pipeline(pipeline_of_run(build_model(recipe).eval(), recipe), export)
    picture = np.zeros((8, 12), np.uint8)
    picture[:4, 6:] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    Image.fromarray(picture.T).save(tmp_path / "turned.png")

    def sample(*flags: str) -> int:
        return main(["sample", str(export), "--num", "2", "--out", str(out), *flags])

    assert sample("--mask-image", str(tmp_path / "mask.png")) == 0
    images = np.load(out)["arr_0"]
    assert images.shape == (2, 8, 12, 3) and (images[:, picture == 0] == 128).all()
    assert sample("--mask.kind", "block", "--mask.rate", "0.5", "--guidance.kind", "sparse") == 0
    assert sample("--mask-image", str(tmp_path / "turned.png")) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "is 12 pixels high and 8 wide, but the model's images are 8 high and 12 wide" in text


def test_rectangles_are_compared_with_rectangles(rectangular, tmp_path):
    recipe = rectangular()
    trained = TrainedModel(build_model(recipe).eval(), recipe.diffusion)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 12, 1), dtype=np.uint8)
    facts = {"source": "", "fingerprint": "", "crop": "none", "sha256": "rectangles"}
    settings = Evaluation(num=4, num_components=2)
    draw = functools.partial(drawn_samples, trained, recipe.sampling, 4, 0, tmp_path)
    real = Reference("", Store(images, None, facts), None)
    record = evaluate([draw], (8, 12, 1), real, settings).record
    assert record["reference"]["shape"] == record["samples"]["shape"] == [8, 12, 1]
    turned = Reference("", Store(images.swapaxes(1, 2), None, facts), None)
    with pytest.raises(ValueError, match="images of 8x12x1, but the reference has 12x8x1"):
        evaluate([draw], (8, 12, 1), turned, settings)


def test_a_unet_answers_for_the_patches_of_a_rectangle():
    model = DiffusersDenoiser(
        "unet2d", image_size=(8, 12), patch_size=4, channels=2, options=UNET
    ).eval()
    images = torch.randn(1, 8, 12, 2)
    with torch.no_grad():
        whole = model.net(images.movedim(3, 1), torch.tensor([0.5 * 999])).sample.movedim(1, 3)
        patches = patchify(images, 4)
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # fused attention may go uncounted
            answer = model(patches, torch.arange(6)[None], torch.tensor([0.5]))
    torch.testing.assert_close(answer[0, 4], whole[0, 4:8, 4:8].flatten())
    assert model.forward_flops(6) == counter.get_total_flops()


def test_dit_takes_squares_only(rectangular):
    with pytest.raises(ValueError, match="dit takes square images only, not 8x12"):
        DiffusersDenoiser("dit", image_size=[8, 12], patch_size=2)
    with pytest.raises(ValueError, match="kind dit takes square images only, not 8x12: .*size 8"):
        rectangular(kind="dit")
    same = DiffusersDenoiser("dit", (8, 8), 2, embed_dim=16, num_heads=2, depth=1)
    assert same.image_shape == (8, 8, 3)


def test_sizes_that_are_none_are_refused():
    for size in (0, [8, 8, 8], (8, -8), [], (8, 1.5)):
        with pytest.raises(ValueError, match="must be a number of pixels above 0, or height and"):
            UViT(image_size=size)
    with pytest.raises(ValueError, match="image of 8x10 is not a multiple of patch_size 4"):
        UViT(image_size=(8, 10))


def test_a_schedules_shift_goes_by_the_area():
    assert log_snr_shift(64, 256) == log_snr_shift(64, [256, 256]) == 2 * math.log(64 / 256)
    assert log_snr_shift(64, (128, 512)) == log_snr_shift(64, 256)
    assert log_snr_shift(64, (8, 12)) == pytest.approx(math.log(64**2 / (8 * 12)))
    assert log_snr_shift(None, (8, 12)) == 0


def test_forward_flops_of_the_convolution_are_those_of_the_area():
    def flops(size) -> int:
        settings = {"image_size": size, "patch_size": 4, "channels": 2}
        small = {"embed_dim": 16, "num_heads": 2, "depth": 3}
        with_it = UViT(**settings, **small, final_conv=True).forward_flops(4)
        return with_it - UViT(**settings, **small).forward_flops(4)

    assert flops((8, 12)) == 2 * 9 * 2**2 * 8 * 12 and flops(8) == 2 * 9 * 2**2 * 8 * 8


def grid_of_positions(model: UViT) -> torch.Tensor:
    return model.pos_embed.detach()[1:, 0].view(model.grid)


@pytest.mark.parametrize("size", [(8, 16), (16, 12), (12, 8)])
def test_positions_are_interpolated_between_rectangles(size):
    """A ramp along the rows, and one along the columns, stay what they are."""
    small = {"patch_size": 2, "channels": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
    for axis in (0, 1):
        source, target = UViT(image_size=(8, 12), **small), UViT(image_size=size, **small)
        steps = torch.arange(source.grid[axis], dtype=torch.float32)
        values = steps[:, None] if axis == 0 else steps
        with torch.no_grad():
            source.pos_embed[1:] = values.expand(source.grid).flatten()[:, None]
        lines = transfer_weights(source, target)
        rows, columns = target.grid
        assert f"positions interpolated from 4x6 to {rows}x{columns}" in lines
        moved = grid_of_positions(target)
        assert (moved.diff(dim=axis) > 0).all()
        assert moved.diff(dim=1 - axis).abs().max() < 1e-4


def test_a_weak_model_must_have_the_same_rectangle(rectangular):
    recipe = rectangular()
    strong = TrainedModel(build_model(recipe), recipe.diffusion)
    small = {"patch_size": 2, "channels": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
    refuse_weak(strong, TrainedModel(UViT(image_size=[8, 12], **small), recipe.diffusion))
    turned = TrainedModel(UViT(image_size=(12, 8), **small), recipe.diffusion)
    with pytest.raises(ValueError, match=r"image_shape \(12, 8, 1\), the guided one \(8, 12, 1\)"):
        refuse_weak(strong, turned)


def test_a_squares_config_keeps_its_one_side_and_older_ones_load(tiny, tmp_path: Path):
    model = build_model(tiny)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["image_size"] == 8
    older = {key: value for key, value in config.items() if key != "class_names"}
    file.write_text(json.dumps(older))
    again = UViT.from_pretrained(tmp_path)
    assert again.image_shape == (8, 8, 1)
    assert torch.equal(again.pos_embed, model.pos_embed)
