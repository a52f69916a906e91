"""The optimizer, the learning rate over a stage, clipping."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maskdm.recipe import Stage
from maskdm.recipe_length import steps_of

MOMENTUM = 0.95  # Muon's
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # coefficients that rise steeply at 0


class MuonAdamW(torch.optim.AdamW):
    """AdamW (Section 4.1; decoupled weight decay), or Muon for the matrices of groups that say so.

    Muon (Jordan et al. 2024) follows the momentum's nearest orthogonal matrix. Its steps are as
    large as AdamW's (Liu et al. 2025, Section 2.2), so that both share learning rate and weight
    decay. Where no group has `muon` it is torch's AdamW.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Changes all parameters that have gradients, none where the loss scaler found overflow."""
        # It tells a fused AdamW so, in place of leaving the step out.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Follows Muon for matrices, all of one shape at once: small ones are quick to multiply."""
        alike = defaultdict[torch.Size, list[Tensor]](list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape].append(matrix)
        for shape, matrices in alike.items():
            gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
            momenta = [self._momentum(matrix) for matrix in matrices]
            torch._foreach_add_([self.state[matrix]["step"] for matrix in matrices], 1)
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
            size = 0.2 * math.sqrt(max(shape)) * group["lr"]  # a tensor in CUDA graphs
            updates = (orthogonalized(torch.stack(ahead)) * -size).unbind()
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, updates)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum" not in state:  # AdamW wants a step of all parameters that have a state
            step = torch.zeros((), device=matrix.device)
            state |= {"step": step, "momentum": torch.zeros_like(matrix)}
        momentum: Tensor = state["momentum"]
        return momentum


def orthogonalized(matrices: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrices, by five steps of Newton and Schulz.

    Args:
        matrices: (N, A, B).

    Returns:
        (N, A, B): their singular values come near 1, within about 0.3.
    """
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if is_wide else matrices.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if is_wide else x.mT


def make_optimizer(model: nn.Module, stage: Stage) -> MuonAdamW:
    """A fresh optimizer with the stage's settings.

    Its groups are the matrices of the network's blocks, which Muon is for, and all else; tables of
    embeddings, of which a batch uses a few rows, are no matrices.
    """
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "block" in name and id(parameter) not in tables
        (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": params, "is_matrices": params is matrices, "muon": False}
        for params in (matrices, others)
        if params
    ]
    optimizer = MuonAdamW(groups, lr=stage.lr, fused=True)
    enter_stage(optimizer, stage)
    return optimizer


def enter_stage(optimizer: torch.optim.Optimizer, stage: Stage) -> None:
    """Gives an optimizer the stage's settings; clearing its moments is left to the caller.

    Moments of matrices that another optimizer left, which a run may change on request, are dropped.
    A run has one optimizer: the engine keeps every one that it prepared, and its loss scaler
    would unscale the gradients once for each.
    """
    for group in optimizer.param_groups:
        group.update(lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay)
        group["muon"] = stage.optimizer == "muon" and group["is_matrices"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and ("momentum" in state) != group["muon"]:
                del optimizer.state[parameter]


def learning_rate(stage: Stage, stage_step: int) -> float:
    """Learning rate of a stage's step, counted from 0: a pure function, so resume is exact.

    Linear warm-up reaches `lr` at step `stage.warmup_steps`; then constant, or a cosine that would
    reach zero at step `steps`. Each of the stage's restarts begins this anew, up to the next.
    """
    starts = [0, *stage.restarts, stage.steps]
    segment = max(i for i, start in enumerate(starts[:-1]) if start <= stage_step)
    step, steps = stage_step - starts[segment], starts[segment + 1] - starts[segment]
    warmup_steps = (
        min(stage.warmup_steps, steps)
        if isinstance(stage.warmup, int)
        else steps_of(stage.warmup, steps)
    )
    if step < warmup_steps:
        share = (step + 1) / (warmup_steps + 1)
        return stage.warmup_from + (stage.lr - stage.warmup_from) * share
    if stage.lr_schedule == "constant":
        return stage.lr
    elapsed = (step - warmup_steps) / (steps - warmup_steps)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * elapsed))


def clip_gradients(accelerator: Accelerator, model: nn.Module, clip: float | None) -> Tensor:
    """Clips the gradient to a norm, None = not at all; returns its norm before, on the device."""
    if clip is not None:
        norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), clip)
        return norm.detach()
    accelerator.unscale_gradients()
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
