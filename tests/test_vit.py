from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.models.uvit import UViT
from maskdm.models.vit import ViT

PARTS = [
    {},
    {"modulation": False},
    {"skips": True, "swiglu": False},
    {"rotary": False, "qk_norm": False, "bottleneck": 3},
]


def small(kind=ViT, **changes):
    torch.manual_seed(0)
    settings = dict(image_size=8, patch_size=2, embed_dim=16, depth=5, num_heads=2)
    model = kind(**{**settings, **changes}).eval()
    for parameter in model.parameters():  # zero at the start would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(num_visible: int = 7, batch: int = 2):
    torch.manual_seed(1)
    visible = torch.stack([torch.randperm(16)[:num_visible] for _ in range(batch)])
    return torch.randn(batch, num_visible, 12), visible, torch.linspace(0.1, 0.9, batch)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("classes", [0, 3])
def test_a_patch_is_known_by_its_position_not_by_its_place_in_the_sequence(parts, classes):
    model = small(options=parts, num_classes=classes)
    patches, visible, t = inputs()
    labels = torch.tensor([0, 3]) if classes else None
    answer, order = model(patches, visible, t, labels), torch.randperm(7)
    shuffled = model(patches[:, order], visible[:, order], t, labels)
    torch.testing.assert_close(shuffled, answer[:, order], rtol=1e-4, atol=1e-5)
    assert (model(patches, (visible + 1) % 16, t, labels) - answer).abs().max() > 1e-4
    assert (model(patches, visible, t / 2, labels) - answer).abs().max() > 1e-4
    if classes:
        assert (model(patches, visible, t, labels - labels) - answer).abs().max() > 1e-4


def test_it_begins_without_an_opinion():
    torch.manual_seed(0)
    patches, visible, t = inputs()
    assert (
        ViT(image_size=8, patch_size=2, embed_dim=16, num_heads=2)(patches, visible, t).any() == 0
    )


def test_attention_turns_with_the_distance_of_patches_alone():
    """Moving all patches by one row and one column changes no product of queries and keys."""
    model = small()
    q, k = torch.randn(2, 1, 2, 4, 8)
    at = torch.tensor([[0, 1, 5, 6]])  # of a grid of 4x4; all can move
    from maskdm.models.vit import turned

    def products(positions):
        turns = model._turns(positions, torch.float32)
        return turned(q, turns) @ turned(k, turns).mT

    torch.testing.assert_close(products(at + 5), products(at))
    assert (products(at * 2) - products(at)).abs().max() > 1e-3


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("middle", [None, 5])
def test_counted_flops_equal_those_that_torch_counts(parts, middle):
    model = small(options=parts)
    patches, visible, t = inputs(batch=1)
    some = None if middle is None else torch.arange(middle)[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(patches, visible, t, None, some)
    assert model.forward_flops(7, middle) == counter.get_total_flops()


@pytest.mark.parametrize("options", [{"rotory": True}, {"skip": True, "depth": 3}])
def test_unknown_parts_are_refused(options):
    with pytest.raises(ValueError, match="vit has no .*; known are rotary, qk_norm"):
        ViT(options=options)


@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("kind", [UViT, ViT])
def test_patches_pass_by_the_middle(kind, depth):
    """The dense ends see all patches; what is not in the middle skips the blocks there."""
    model = small(kind, depth=depth)
    patches, visible, t = inputs()
    every = torch.arange(7).expand(2, 7)
    answer = model(patches, visible, t)
    assert torch.equal(model(patches, visible, t, None, every), answer)
    some = torch.tensor([[0, 2, 5], [1, 2, 6]])
    routed = model(patches, visible, t, None, some)
    assert routed.shape == answer.shape
    assert (routed - answer).abs().max() > 1e-3
    # Without its ends' attention, a patch outside the middle knows nothing of the middle's blocks.
    blocks = model.blocks if kind is ViT else [*model.in_blocks, model.mid_block, *model.out_blocks]
    for block in blocks[1:-1]:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    attention = "qkv" if kind is ViT else "attn.qkv"
    for block in (blocks[0], blocks[-1]):
        torch.nn.init.zeros_(block.get_submodule(attention).weight)
    changed = model(patches, visible, t, None, some)
    for parameter in [p for block in blocks[1:-1] for p in block.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    again = model(patches, visible, t, None, some)
    is_inside = F.one_hot(some, 7).sum(1).bool()
    torch.testing.assert_close(again[~is_inside], changed[~is_inside])
    assert (again - changed)[is_inside].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("kind", [UViT, ViT])
def test_patches_pass_by_the_middle_under_autocast(kind):
    """The middle's answers may come in another dtype than what passed by."""
    model = small(kind)
    patches, visible, t = inputs()
    some = torch.tensor([[0, 2, 5], [1, 2, 6]])
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(patches, visible, t, None, some)
    expected = model(patches, visible, t, None, some)
    torch.testing.assert_close(answer.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("parts", PARTS)
def test_blocks_add_in_full_precision_under_autocast(parts):
    """Else each of them rounds the sum of all before it to eight bits."""
    model, sums = small(options=parts), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, answer: sums.append(answer.dtype))
    patches, visible, t = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(patches, visible, t)
    assert {*sums} == {torch.float32}
    torch.testing.assert_close(answer.float(), model(patches, visible, t), rtol=0.1, atol=0.1)
