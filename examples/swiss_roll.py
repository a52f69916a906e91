"""The paper's Figure 2 on a 2-D Swiss roll: what masked pre-training learns, and what it cannot.

    python examples/swiss_roll.py [--seed 0] [--out swiss-roll.png] [--json results.json]

A point (x, y) is an image of two patches, each a single value. Pre-training hides one of the two,
so all that there is to learn are the marginals p(x) and p(y); fine-tuning then shows both. The
dense control spends the same compute on both from the start. Draws samples of each into a picture
and prints how far they are from the roll. About two minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from sklearn.datasets import make_swiss_roll
from torch import Generator, Tensor, nn

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import make_schedule
from maskdm.diffusion.times import Share, draw_times
from maskdm.masks import draw_visible, num_visible
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Mask, Sampling, Stage
from maskdm.sampling.denoise import x0_denoiser
from maskdm.sampling.samplers import SAMPLERS, sampling_levels
from maskdm.seeds import derive_seed
from maskdm.tokens import gather_patches
from maskdm.training.ema import make_average, update_average
from maskdm.training.optim import learning_rate, make_optimizer

GRID = (1, 2)  # patches: x at position 0, y at position 1
NUM_TRAIN, NUM_SAMPLES = 100_000, 5_000
SIDE = 1.1  # of the pictures: x and y from -SIDE to SIDE

# Which arm of the roll a point belongs to is decided where noise is about as wide as the gap
# between the arms: times around a quarter, rather than evenly spread ones.
DIFFUSION = Diffusion(
    schedule="flow", prediction="flow", time_sampling="logit-normal", logit_mean=-1.0
)
SAMPLING = Sampling(sampler="dpm-solver", steps=50, clip_x0=False)


def roll(num: int, seed: int) -> Tensor:
    """Points of the roll as pairs of patches: float32 (num, 2, 1), in about [-1, 1]."""
    points, _ = make_swiss_roll(num, noise=0.5, random_state=seed % 2**32)
    plane = torch.from_numpy(points[:, [0, 2]]).float()  # without the axis of its width
    return plane[..., None] / 14.14  # the radius of the outer end, 4.5 pi


def make_model(seed: int) -> UViT:
    """A U-ViT of 40,000 weights, initialised from the seed.

    Its grid is square, 2x2; positions 2 and 3 are never shown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "weights"))
        return UViT(image_size=2, patch_size=1, channels=1, embed_dim=32, depth=3, num_heads=1)


def make_stage(name: str, mask: Mask, steps: int) -> Stage:
    """A stage of the training; all have these settings."""
    return Stage(
        name=name,
        mask=mask,
        steps=steps,
        batch_size=256,
        lr=4e-3,
        lr_schedule="cosine",
        warmup_steps=min(100, steps // 2),
        betas=(0.9, 0.99),
        weight_decay=0.0,
        clip=1.0,
        ema_decay=0.995,
    )


def stage_flops(model: UViT, stage: Stage) -> int:
    """Operations of a stage: a step is a forward pass, and twice that backward."""
    count = num_visible(stage.mask, GRID)
    return 3 * model.forward_flops(count) * stage.batch_size * stage.steps


def train(model: UViT, stage: Stage, points: Tensor, seed: int) -> UViT:
    """Trains a model in place on points (N, 2, 1); gives the average of its weights."""
    generator = Generator().manual_seed(derive_seed(seed, stage.name))
    schedule, share = make_schedule(DIFFUSION.schedule), Share(stage.batch_size)
    average, optimizer = make_average(model), make_optimizer(model.parameters(), stage)
    start = time.perf_counter()
    for step in range(stage.steps):
        # Draw points, hide all but the visible patches, draw times and noise.
        drawn = torch.randint(len(points), (stage.batch_size,), generator=generator)
        visible = draw_visible(stage.mask, GRID, stage.batch_size, generator)  # (B, V)
        x0 = gather_patches(points[drawn], visible)  # (B, V, 1)
        t = draw_times(DIFFUSION, schedule, share, generator, generator)
        noise = torch.randn(x0.shape, generator=generator)

        # Follow the gradient of the denoising loss on the visible patches.
        losses = masked_denoising_loss(model, x0, visible, t, noise, schedule, DIFFUSION)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, stage.ema_decay)
    elapsed_sec = time.perf_counter() - start
    print(f"{stage.name:<10} {stage.steps:>6,} steps {elapsed_sec:>6.1f} s", flush=True)
    return average


@torch.no_grad()
def sample(model: UViT, num: int, seed: int, shown: list[list[int]]) -> Tensor:
    """Draws points (num, 2, 1), the patches of each group in `shown` without seeing the other's.

    [[0, 1]] shows the network both patches, [[0], [1]] one at a time: samples of p(x) and p(y).
    """
    noise = torch.randn(num, 2, 1, generator=Generator().manual_seed(derive_seed(seed, "sample")))
    trained = TrainedModel(model, DIFFUSION)
    levels = sampling_levels(trained.schedule, SAMPLING)
    points = torch.empty_like(noise)
    for group in shown:
        denoise = x0_denoiser(trained, torch.tensor(group).expand(num, -1), labels=None)
        points[:, group] = SAMPLERS[SAMPLING.sampler](denoise, noise[:, group], levels, SAMPLING, [])
    return points


def energy_distance(a: Tensor, b: Tensor, block_size: int = 1000) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of points as they are (Székely & Rizzo 2013).

    At least 0, and 0 for equal sets; two finite draws of one distribution measure a little more.

    Args:
        a, b: (N, D) and (M, D).
        block_size: so many rows of distances are in memory at a time.
    """
    a, b = a.double(), b.double()

    def mean_distance(u: Tensor, v: Tensor) -> float:
        # Without matrix products: those cancel digits of small distances.
        sums = [
            torch.cdist(part, v, compute_mode="donot_use_mm_for_euclid_dist").sum()
            for part in u.split(block_size)
        ]
        return float(torch.stack(sums).sum()) / (len(u) * len(v))

    return 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)


def distances(points: Tensor, data: Tensor) -> dict[str, float]:
    """From samples to data, both (N, 2, 1): in the plane, and of the marginals (1-D Wasserstein)."""
    x, y = (wasserstein_distance(points[:, i, 0], data[:, i, 0]) for i in (0, 1))
    energy = energy_distance(points.flatten(1), data.flatten(1))
    return {"energy": energy, "wasserstein_x": float(x), "wasserstein_y": float(y)}
