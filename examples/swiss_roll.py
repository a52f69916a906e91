"""The paper's Figure 2 on a 2-D Swiss roll: what masked pre-training learns, and what it cannot.

    python examples/swiss_roll.py [--seed 0] [--out swiss-roll.png] [--json results.json]

A point (x, y) is an image of two patches, each a single value. Pre-training hides one of the two,
so only the marginals p(x) and p(y) can be learned; fine-tuning then shows both. The dense control
spends the same compute on both patches from the start. Each model is sampled, measured and drawn.

The primer is sampled in two ways: one patch at a time, as it was trained, which gives p(x) p(y);
and both at once, as in Figure 2, which no step of its training showed it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]
from sklearn.datasets import make_swiss_roll
from torch import Generator, Tensor, nn

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import make_schedule
from maskdm.diffusion.times import Share, draw_times
from maskdm.families import SAMPLERS
from maskdm.masks import draw_visible, num_visible
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Mask, Sampling, Stage
from maskdm.sampling.denoise import x0_denoiser
from maskdm.sampling.samplers import sampling_levels
from maskdm.seeds import derive_seed
from maskdm.tokens import gather_patches
from maskdm.training.ema import make_average, update_average
from maskdm.training.optim import learning_rate, make_optimizer

GRID = (1, 2)  # rows, columns of patches: x at position 0, y at position 1
NUM_TRAIN, NUM_FRESH, NUM_SAMPLES = 100_000, 20_000, 5_000

# A point settles on one of the roll's arms while the noise is nearly as wide as the gap between
# them, at times around 0.25, so training draws these most often.
TIMES = {"times": {"kind": "logit-normal", "mean": -1.0}}
DIFFUSION = Diffusion(schedule="flow", prediction="flow", **TIMES)
SAMPLING = Sampling(sampler="dpm-solver", steps=50, clip_x0=False)


def roll(num: int, seed: int, stream: str) -> Tensor:
    """Points of the roll as pairs of patches: float32 (num, 2, 1), in about [-1, 1]."""
    points, _ = make_swiss_roll(num, noise=0.5, random_state=derive_seed(seed, stream) % 2**32)
    plane = torch.from_numpy(points[:, [0, 2]]).float()  # without the axis of the roll's width
    return plane[..., None] / (4.5 * torch.pi)  # the radius of the outer end


def make_model(seed: int) -> UViT:
    """A U-ViT of 40,000 weights. Its grid is 2x2; positions 2 and 3 are never shown."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "weights"))
        return UViT(image_size=2, patch_size=1, channels=1, embed_dim=32, depth=3, num_heads=1)


def make_stage(name: str, mask: Mask, steps: int) -> Stage:
    """A stage of training; stages differ only in mask and length."""
    rates: dict[str, Any] = {"lr": 4e-3, "lr_schedule": "cosine", "ema": {"decay": 0.995}}
    rates |= {"warmup": min(100, steps // 2), "betas": (0.9, 0.99)}
    return Stage(name=name, mask=mask, steps=steps, batch_size=256, **rates)


def stage_flops(model: UViT, stage: Stage) -> int:
    """Floating-point operations of a stage; a backward pass costs two forward passes."""
    return 3 * model.forward_flops(num_visible(stage.mask, GRID)) * stage.batch_size * stage.steps


def train(model: UViT, stage: Stage, points: Tensor, seed: int) -> UViT:
    """Trains a model in place on points (N, 2, 1); returns the average of its weights."""
    print(f"{stage.name}: {stage.steps:,} steps", flush=True)
    generator = Generator().manual_seed(derive_seed(seed, stage.name))
    schedule, share = make_schedule(DIFFUSION.schedule), Share(stage.batch_size)
    average, optimizer = make_average(model), make_optimizer(model, stage)
    for step in range(stage.steps):
        # Draw points, keep their visible patches, draw times and noise.
        drawn = torch.randint(len(points), (stage.batch_size,), generator=generator)
        visible = draw_visible(stage.mask, GRID, stage.batch_size, generator)  # (B, V)
        x0 = gather_patches(points[drawn], visible)  # (B, V, 1)
        t = draw_times(DIFFUSION.times, schedule, share, generator, generator)
        noise = torch.randn(x0.shape, generator=generator)

        # Follow the gradient of the denoising loss on the visible patches.
        losses = masked_denoising_loss(model, x0, visible, t, noise, schedule, DIFFUSION)
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimizer.step()
        update_average(average, model, stage.ema.decay)
    return average


@torch.no_grad()
def sample(model: UViT, num: int, seed: int, groups: list[list[int]]) -> Tensor:
    """Samples points (num, 2, 1); the network sees one group of patches at a time.

    [[0, 1]] samples both together, [[0], [1]] each from its own marginal.
    """
    noise = torch.randn(num, 2, 1, generator=Generator().manual_seed(derive_seed(seed, "sample")))
    trained = TrainedModel(model, DIFFUSION)
    levels = sampling_levels(trained.schedule, SAMPLING)
    solve, parts = SAMPLERS[SAMPLING.sampler].run, []
    for group in groups:
        denoise = x0_denoiser(trained, torch.tensor(group).expand(num, -1), labels=None)
        parts.append(solve(denoise, noise[:, group], levels, SAMPLING, []))
    return torch.cat(parts, dim=1)


def energy_distance(a: Tensor, b: Tensor, block_size: int = 100) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs of two sets of points, (N, D) and (M, D).

    0 for equal sets, otherwise above 0. Holds `block_size` rows of the distance table at a time.
    """

    def mean_distance(u: Tensor, v: Tensor) -> float:
        exact = "donot_use_mm_for_euclid_dist"  # matrix products lose small distances to rounding
        blocks = u.double().split(block_size)
        total = sum(torch.cdist(x, v.double(), compute_mode=exact).sum().item() for x in blocks)
        return total / (len(u) * len(v))

    return 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)


def distances(points: Tensor, data: Tensor) -> dict[str, float]:
    """Energy distance of points (N, 2, 1) from data (M, 2, 1); Wasserstein distances of x and y."""
    x, y = (float(wasserstein_distance(points[:, i, 0], data[:, i, 0])) for i in (0, 1))
    return {"energy": energy_distance(points[..., 0], data[..., 0]), "W1 x": x, "W1 y": y}


def plot(panels: dict[str, Tensor], rows: dict[str, dict[str, float]], path: Path) -> None:
    """Plots densities of points (N, 2, 1) side by side, in the same colours."""
    figure = Figure(figsize=(3 * len(panels), 3.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axes, (name, points) in zip(all_axes, panels.items(), strict=True):
        colours = {"cmap": "magma", "norm": PowerNorm(0.5, 0, len(points) / 300, clip=True)}
        axes.hist2d(*points[..., 0].T.numpy(), bins=90, range=[[-1.2, 1.2]] * 2, **colours)
        axes.set_title(f"{name}\nenergy distance {rows[name]['energy']:.4f}", fontsize=10)
        axes.set(aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    """Trains, samples, measures and draws; `argv` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("swiss-roll.png"), help="the picture")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps and samples")
    args = parser.parse_args(argv)
    seed, num = args.seed, round(args.scale * NUM_SAMPLES)
    points = roll(NUM_TRAIN, seed, "train")

    # Pre-train with one of the two patches hidden, then fine-tune with both shown.
    pre_train = make_stage("pre-train", Mask(kind="patch", rate=0.5), round(args.scale * 1500))
    fine_tune = make_stage("fine-tune", Mask(), round(args.scale * 4800))
    model = make_model(seed)
    primer = train(model, pre_train, points, seed)
    fine_tuned = train(model, fine_tune, points, seed)

    # Spend the same compute on both patches from the same first weights.
    spent = stage_flops(model, pre_train) + stage_flops(model, fine_tune)
    control_steps = round(spent / stage_flops(model, fine_tune) * fine_tune.steps)
    control = make_stage("dense control", Mask(), control_steps)
    dense = train(make_model(seed), control, points, seed)

    # Draw the same number of points from each, from the same noise; measure against fresh data.
    panels = {
        "data": roll(num, seed, "data"),
        "primer, one patch at a time": sample(primer, num, seed, [[0], [1]]),
        "primer, both at once": sample(primer, num, seed, [[0, 1]]),
        "fine-tuned": sample(fine_tuned, num, seed, [[0, 1]]),
        "dense control": sample(dense, num, seed, [[0, 1]]),
    }
    fresh = roll(round(args.scale * NUM_FRESH), seed, "fresh")
    rows = {name: distances(drawn, fresh) for name, drawn in panels.items()}
    flops = {"pre-train + fine-tune": spent, "dense control": stage_flops(model, control)}
    print(*(f"{name}: {count / 1e9:.1f} GFLOP" for name, count in flops.items()), sep=", ")
    print(f"{'':<28}" + "".join(f"{name:>9}" for name in rows["data"]))
    for name, row in rows.items():
        print(f"{name:<28}" + "".join(f"{value:>9.5f}" for value in row.values()))
    plot(panels, rows, args.out)
    if args.json:
        facts = {"seed": seed, "scale": args.scale, "flops": flops, "distances": rows}
        args.json.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)  # a second thread makes steps this small slower
    main()
