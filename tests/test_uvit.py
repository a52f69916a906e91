from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.models.uvit import UViT, timestep_embedding


def small(**changes) -> UViT:
    torch.manual_seed(0)
    settings = dict(image_size=8, patch_size=2, embed_dim=16, depth=5, num_heads=2)
    return UViT(**{**settings, **changes}).eval()


def inputs(model: UViT, num_visible: int = 7, batch: int = 2):
    torch.manual_seed(1)
    values = model.config.patch_size**2 * model.config.channels
    visible = torch.stack([torch.randperm(model.num_patches)[:num_visible] for _ in range(batch)])
    return torch.randn(batch, num_visible, values), visible, torch.linspace(0.1, 0.9, batch)


@pytest.mark.parametrize(
    ("settings", "millions"),
    [({}, 44.29), ({"image_size": 256, "embed_dim": 768, "num_heads": 12}, 102.42)],
)
def test_the_papers_models_have_the_papers_sizes(settings, millions):
    with torch.device("meta"):
        model = UViT(**settings)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == millions


OPTIONS = {"final_conv": True, "mlp_ratio": 3.0, "qkv_bias": True, "time_mlp": True}


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3, **OPTIONS}])
@pytest.mark.parametrize("num_visible", [7, 16])
def test_counted_flops_equal_those_that_torch_counts(changes, num_visible):
    model = small(**changes)
    patches, visible, t = inputs(model, num_visible, batch=1)
    labels = torch.tensor([1]) if changes else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(patches, visible, t, labels)
    assert model.forward_flops(num_visible) == counter.get_total_flops()


def test_patch_init_changes_the_patch_embedding_alone_to_a_convolutions_default():
    """As Conv2d(3, dim, 4, 4): uniform within 1 / sqrt(48), of a standard deviation of 0.083."""
    settings = dict(image_size=16, patch_size=4, embed_dim=256, depth=3)
    normal, uniform = small(**settings), small(**settings, patch_init="conv")
    bound = 48**-0.5
    embed = uniform.patch_embed
    assert embed.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert bound * 0.99 < embed.weight.abs().max() <= bound
    assert embed.bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert normal.patch_embed.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not normal.patch_embed.bias.any()
    for name, value in uniform.state_dict().items():
        same = torch.equal(value, normal.state_dict()[name])
        assert same != name.startswith("patch_embed"), name
    with pytest.raises(ValueError, match="unknown patch_init 'xavier': normal or conv"):
        small(patch_init="xavier")


def test_a_patch_is_known_by_its_position_not_by_its_place_in_the_sequence():
    model = small()
    patches, visible, t = inputs(model)
    order = torch.randperm(7)
    expected = model(patches, visible, t)[:, order]
    actual = model(patches[:, order], visible[:, order], t)
    torch.testing.assert_close(actual, expected)
    moved = model(patches, (visible + 1) % 16, t)
    assert (moved - model(patches, visible, t)).abs().max() > 1e-4


def test_labels_and_time_change_the_answer():
    model = small(num_classes=3)
    patches, visible, t = inputs(model)
    first = model(patches, visible, t, torch.tensor([0, 1]))
    assert (model(patches, visible, t, torch.tensor([2, 1]))[0] - first[0]).abs().max() > 1e-4
    assert (model(patches, visible, t + 0.05, torch.tensor([0, 1])) - first).abs().max() > 1e-4


def test_labels_are_asked_for_exactly_when_there_are_classes():
    patches, visible, t = inputs(small())
    with pytest.raises(ValueError, match="class-conditional: labels are needed"):
        small(num_classes=3)(patches, visible, t)
    with pytest.raises(ValueError, match="has no classes"):
        small()(patches, visible, t, torch.tensor([0, 0]))


def test_time_is_embedded_cosines_first_with_the_steps_number():
    embedding = timestep_embedding(torch.tensor([0.0, 999.0]), 8)
    assert embedding[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert embedding[1, 1] == pytest.approx(math.cos(999 * 10_000**-0.25), abs=1e-4)
    assert embedding[1, 5] == pytest.approx(math.sin(999 * 10_000**-0.25), abs=1e-4)


def test_activation_checkpointing_gives_the_same_gradients():
    model = small().train()
    patches, visible, t = inputs(model)
    grads = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        model(patches, visible, t).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_the_final_convolution_begins_as_the_identity_and_mixes_neighbours():
    plain, conv = small(), small(final_conv=True)
    conv.load_state_dict(plain.state_dict(), strict=False)
    patches, visible, t = inputs(plain)
    torch.testing.assert_close(conv(patches, visible, t), plain(patches, visible, t))
    torch.nn.init.normal_(conv.output_conv.weight)
    assert (conv(patches, visible, t) - plain(patches, visible, t)).abs().max() > 1e-3


def test_it_is_saved_and_loaded_as_diffusers_models_are(tmp_path):
    model = small(num_classes=2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = UViT.from_pretrained(tmp_path)
    patches, visible, t = inputs(model)
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(
        again(patches, visible, t, labels), model(patches, visible, t, labels), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 4}, "depth 4 is even: use 3 or 5"),
        ({"embed_dim": 18}, "not a multiple of 2 x 2 heads"),
        ({"image_size": 9}, "9x9 is not a multiple of patch_size 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_each_token_learns_its_own_position():
    """The time token has row 0; the patch at grid index i has row i + 1."""
    model = small()
    patches, _, t = inputs(model, num_visible=2, batch=1)
    model(patches, torch.tensor([[0, 5]]), t).square().mean().backward()
    used = model.pos_embed.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == [0, 1, 6]
