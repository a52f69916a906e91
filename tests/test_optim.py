from __future__ import annotations

import pytest
import torch
from torch import nn

from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.uvit import UViT
from maskdm.recipe import Stage
from maskdm.training.optim import enter_stage, make_optimizer, orthogonalized

MUON = Stage(name="a", batch_size=1, lr=0.02, optimizer="muon", weight_decay=0.1)


def network() -> UViT:
    torch.manual_seed(0)
    return UViT(image_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_singular_values_of_the_orthogonalized_are_near_one():
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    for one in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalized(torch.stack([1e3 * one, one])))
        assert ((values > 0.6) & (values < 1.3)).all()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert (
        u.T @ orthogonalized(matrix[None])[0] @ vh.T
    ).diagonal().min() > 0.6  # the same directions


def test_muon_and_adamw_step_as_those_of_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon since 2.9")
    model, twin = network(), network()
    optimizer = make_optimizer(model, MUON)
    inside = {n: p for n, p in twin.named_parameters() if p.ndim == 2 and "block" in n}
    outside = [p for n, p in twin.named_parameters() if n not in inside]
    settings = {"lr": MUON.lr, "weight_decay": MUON.weight_decay}
    theirs = [
        torch.optim.Muon(inside.values(), adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(outside, betas=MUON.betas, **settings),
    ]
    assert len(inside) == 3 * 4 + 1  # 3 blocks of 4 matrices, and a skip connection's
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(twin, seed)
        for one in (optimizer, *theirs):
            one.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        tolerance = 0.002 if name in inside else 1e-6  # torch's Muon computes in bfloat16
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        assert name not in inside or (a - network().get_parameter(name)).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_that_overflows_changes_nothing(kind):
    """GradScaler only tells a fused optimizer of it, and its first scales overflow by design."""
    model = network()
    optimizer = make_optimizer(model, MUON.model_copy(update={"optimizer": kind}))
    scaler = torch.amp.GradScaler("cpu")
    for seed in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(sum(p.square().sum() for p in model.parameters())).backward()
        if seed == 1:
            for parameter in model.parameters():
                parameter.grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) == (seed == 1)
        assert all(p.isfinite().all() for p in model.parameters())


def test_tables_of_classes_are_no_matrices_for_muon():
    sizes = {"image_size": 8, "patch_size": 2, "channels": 1, "embed_dim": 16, "num_heads": 2}
    model = DiffusersDenoiser("dit", **sizes, depth=2, num_classes=3)
    (matrices, _) = make_optimizer(model, MUON).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    found = [names[id(p)] for p in matrices["params"]]
    tables = [n for n in names.values() if n.endswith("embedding_table.weight")]
    assert tables and not {*tables} & {*found} and any("attn1.to_q" in name for name in found)


def test_a_stage_without_muon_steps_as_adamw():
    model, twin = network(), network()
    stage = Stage(name="a", batch_size=1, lr=0.02)
    optimizer = make_optimizer(model, MUON)
    enter_stage(optimizer, stage)
    settings = {"lr": stage.lr, "betas": stage.betas, "weight_decay": stage.weight_decay}
    theirs = torch.optim.AdamW(twin.parameters(), fused=True, **settings)
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(twin, seed)
        optimizer.step()
        theirs.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
