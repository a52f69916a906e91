"""Other people's networks: behind the same face, in recipes, and in plain Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import as_array
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.export.pipeline import load, pipeline_of_run, save_pipeline
from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.build import build_model
from maskdm.recipe import Sampling
from maskdm.tokens import gather_patches, patchify
from maskdm.training.trainer import train

README = Path(__file__).parents[1] / "README.md"
UNET = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
KINDS = {"dit": {"depth": 2}, "unet2d": {"options": UNET}}
SIZES = {"image_size": 8, "patch_size": 2, "channels": 1, "embed_dim": 16, "num_heads": 2}


def network(kind: str, **changes) -> DiffusersDenoiser:
    model = DiffusersDenoiser(kind, **{**SIZES, **KINDS[kind], **changes}).eval()
    for parameter in model.parameters():  # diffusers starts some layers at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def as_patches(images: torch.Tensor) -> torch.Tensor:
    """(B, 1, 8, 8) as patches of 2x2 pixels: (B, 16, 4)."""
    return patchify(images.movedim(1, 3), 2)


def test_the_unets_answer_is_its_own_where_patches_are_shown():
    """Against diffusers' network called by hand on an image whose hidden patches are zero."""
    model = network("unet2d")
    images, t = torch.zeros(2, 1, 8, 8), torch.tensor([0.2, 0.8])
    visible = torch.tensor([[0, 5, 15], [2, 3, 9]])
    for b in range(2):
        for place in visible[b].tolist():
            row, column = 2 * (place // 4), 2 * (place % 4)
            images[b, 0, row : row + 2, column : column + 2] = torch.randn(2, 2)
    with torch.no_grad():
        expected = as_patches(model.net(images, t * 999).sample)
        actual = model(gather_patches(as_patches(images), visible), visible, t)
    torch.testing.assert_close(actual, gather_patches(expected, visible))


def test_dit_on_all_patches_is_diffusers_own():
    model = network("dit", num_classes=3)
    images, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([1, 3])
    places = torch.arange(16).expand(2, 16)
    with torch.no_grad():
        expected = as_patches(model.net(images, t * 999, class_labels=labels).sample)
        torch.testing.assert_close(model(as_patches(images), places, t, labels), expected)
        order = torch.randperm(16)  # nothing but its position tells a patch where it is
        shuffled = model(as_patches(images)[:, order], places[:, order], t, labels)
        torch.testing.assert_close(shuffled, expected[:, order])


def test_dit_starts_as_adaln_zero_does():
    """The output is 0, and each block is the identity (Peebles & Xie 2022, Section 3.2)."""
    model = DiffusersDenoiser("dit", **SIZES, depth=2)
    x, step, label = torch.randn(2, 5, 16), torch.tensor([0.0, 999.0]), torch.zeros(2).long()
    with torch.no_grad():
        for block in model.net.transformer_blocks:
            assert torch.equal(block(x, timestep=step, class_labels=label), x)
        answer = model(torch.randn(1, 3, 4), torch.tensor([[0, 5, 9]]), torch.rand(1))
    assert torch.equal(answer, torch.zeros(1, 3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_of_operations_is_pytorchs_and_tells_what_masks_save(kind):
    model = network(kind)
    counts = []
    for num in (2, 16):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused: may be uncounted
            model(torch.randn(1, num, 4), torch.arange(num)[None], torch.rand(1))
        assert model.forward_flops(num) == counter.get_total_flops() > 0
        counts.append(model.forward_flops(num))
    if kind == "dit":
        assert counts[0] < counts[1] / 4
    else:
        assert counts[0] == counts[1]


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
    with pytest.raises(ValueError, match="UNet2DModel cannot be made .* for images of 8x8 pixels"):
        network("unet2d", options={**UNET, "block_out_channels": [8]})
    with pytest.raises(ValueError, match=r"it turns \(1, 16, 4\) into \(1, 16, 8\)"):
        network("dit", options={"out_channels": 2})
    with pytest.raises(ValueError, match="UNet2DModel cannot be made .* for images of 6x6 pixels"):
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
    with pytest.raises(ValueError, match="unknown kind of network 'unet': did you mean unet2d"):
        DiffusersDenoiser("unet")
    with pytest.raises(ValueError, match="options is for kind vit or dit or unet2d"):
        changed(model={**tiny.model.model_dump(), "options": {"a": 1}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_trains_saves_and_samples_them(kind, tiny, changed, tmp_path, capsys):
    model = {**tiny.model.model_dump(), "kind": kind, "num_classes": 10, **KINDS[kind]}
    stages = [{**stage.model_dump(), "activation_checkpointing": True} for stage in tiny.stages]
    recipe = changed(model=model, stages=stages)
    result = train(recipe, tmp_path / "run")
    is_noted = "U-Net needs the whole grid: masks save no compute" in capsys.readouterr().out
    assert is_noted == (kind == "unet2d")
    first = build_model(recipe).state_dict()
    last = result.ema.state_dict()
    moved = [key for key in first if not torch.equal(first[key], last[key])]
    assert len(moved) > 0.9 * len(first)
    save_pipeline(pipeline_of_run(result.ema, recipe), tmp_path / "run" / "model")
    for place in ("run", "run@hide"):
        pipeline = load(f"{tmp_path}/{place}")
        settings = Sampling(steps=3, guidance={"kind": "classifier-free"})
        images = as_array(pipeline(2, settings=settings).images)
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
