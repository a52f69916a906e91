"""Other people's networks: behind the same face, in recipes, and in plain Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.hub import load_pipeline, pipeline_of_run, save_pipeline
from maskdm.models.adapters import GridDenoiser
from maskdm.models.attention import attention_kernels
from maskdm.models.build import build_model
from maskdm.recipe import Sampling
from maskdm.training.trainer import train

README = Path(__file__).parents[1] / "README.md"
UNET = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
KINDS = {"dit": {"depth": 2}, "unet2d": {"options": UNET}}
SIZES = {"image_size": 8, "patch_size": 2, "channels": 1, "embed_dim": 16, "num_heads": 2}


def network(kind: str, **changes) -> GridDenoiser:
    model = GridDenoiser(kind, **{**SIZES, **KINDS[kind], **changes}).eval()
    for parameter in model.parameters():  # diffusers starts some layers at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_kernel_of_attention_is_found():
    plain = {**UNET, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    without = network("unet2d", options={**plain, "add_attention": False})
    assert attention_kernels(network("dit")) == ["flash"]
    assert attention_kernels(without) == []
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernels(network("dit", num_classes=3)) == ["math"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_the_networks_own_where_patches_are_shown(kind):
    """Against diffusers' network called by hand on an image whose hidden patches are zero."""
    model = network(kind)
    patches, t = torch.randn(2, 3, 4), torch.tensor([0.2, 0.8])
    visible = torch.tensor([[0, 5, 15], [2, 3, 9]])
    images = torch.zeros(2, 1, 8, 8)
    for b in range(2):
        for v, place in enumerate(visible[b].tolist()):
            row, column = 2 * (place // 4), 2 * (place % 4)
            images[b, 0, row : row + 2, column : column + 2] = patches[b, v].view(2, 2)
    labels = torch.zeros(2, dtype=torch.int64) if kind == "dit" else None
    with torch.no_grad():
        expected = model.net(images, t * 999, class_labels=labels).sample
        actual = model(patches, visible, t)
    for b in range(2):
        for v, place in enumerate(visible[b].tolist()):
            row, column = 2 * (place // 4), 2 * (place % 4)
            answer = expected[b, 0, row : row + 2, column : column + 2].flatten()
            torch.testing.assert_close(actual[b, v], answer)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_save_no_compute_and_the_count_says_so(kind):
    model = network(kind)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused ones may go uncounted
        model(torch.randn(1, 16, 4), torch.arange(16)[None], torch.rand(1))
    assert model.forward_flops(16) == model.forward_flops(2) == counter.get_total_flops() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_the_trainings_to_hide(kind):
    model = network(kind, num_classes=3).train()
    patches, places = torch.randn(1, 16, 4), torch.arange(16)[None]

    def answer(label: int) -> torch.Tensor:
        with torch.no_grad():
            return model(patches, places, torch.tensor([0.5]), torch.tensor([label]))

    answers = [answer(label) for label in (0, 1, 2, 3)]  # 3 = no class
    assert all(not torch.allclose(answers[0], other) for other in answers[1:])
    assert all(torch.equal(answers[0], answer(0)) for _ in range(20))  # no dice in the network
    with pytest.raises(ValueError, match="labels are needed"):
        model(patches, places, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="no classes, but labels were given"):
        network(kind)(patches, places, torch.tensor([0.5]), torch.tensor([0]))


def test_options_that_diffusers_does_not_take_are_refused(changed, tiny):
    with pytest.raises(
        ValueError, match="UNet2DModel takes no blocks; known are .*norm_num_groups"
    ):
        network("unet2d", options={"blocks": 3})
    with pytest.raises(ValueError, match="dropout draws numbers that a resumed run"):
        network("dit", options={"dropout": 0.1})
    with pytest.raises(ValueError, match="UNet2DModel can't be made so for images of 8x8 pixels"):
        network("unet2d", options={**UNET, "block_out_channels": [8]})
    with pytest.raises(ValueError, match=r"it turns \(1, 1, 8, 8\) into \(1, 2, 8, 8\)"):
        network("dit", options={"out_channels": 2})
    with pytest.raises(ValueError, match="UNet2DModel can't be made so for images of 6x6 pixels"):
        network(
            "unet2d",
            image_size=6,
            options={
                **UNET,
                "block_out_channels": [8, 16, 16],
                "down_block_types": ["DownBlock2D"] * 3,
                "up_block_types": ["UpBlock2D"] * 3,
            },
        )
    with pytest.raises(ValueError, match="unknown kind of network 'unet': known are dit, unet2d"):
        GridDenoiser("unet")
    with pytest.raises(ValueError, match="options are for kind dit or unet2d"):
        changed(model={**tiny.model.model_dump(), "options": {"a": 1}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_trains_saves_and_samples_them(kind, tiny, changed, tmp_path, capsys):
    model = {**tiny.model.model_dump(), "kind": kind, "num_classes": 10, **KINDS[kind]}
    stages = [{**stage.model_dump(), "activation_checkpointing": True} for stage in tiny.stages]
    recipe = changed(model=model, stages=stages)
    result = train(recipe, tmp_path / "run")
    name = {"dit": "DiT", "unet2d": "U-Net"}[kind]
    assert f"{name} needs the whole grid, so that masks save no compute" in capsys.readouterr().out
    first = build_model(recipe).state_dict()
    last = result.ema.state_dict()
    moved = [key for key in first if not torch.equal(first[key], last[key])]
    assert len(moved) > 0.9 * len(first)
    save_pipeline(pipeline_of_run(result.ema, recipe), tmp_path / "run" / "model")
    for place in ("run", "run@hide"):
        pipeline = load_pipeline(f"{tmp_path}/{place}")
        settings = Sampling(steps=3, guidance="classifier-free")
        images = pipeline(num_images=2, settings=settings, output_type="np").images
        assert images.shape == (2, 8, 8, 1)


def test_the_readmes_plug_in_example_runs_and_learns():
    """The README's plain-Python block, as it stands: one's own network, optimizer and loop."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.S)
    (example,) = [block for block in blocks if "masked_denoising_loss(" in block]
    assert len([line for line in example.splitlines() if line.strip()]) < 40
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    losses = names["losses"]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
