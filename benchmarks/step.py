"""Training steps: how fast, how near to the device's limit, and what hiding patches saves.

    python benchmarks/step.py [--models S-64 B-256 B-256-16 S-64-vit S-64-muon S-64-middle]
                              [--rates 0 0.5 0.9] [--batch-size 8] [--num 5]
                              [--how eager compiled graphs baseline unet]

A table for people on stderr, one JSON line a row on stdout. A step is draw, forward, backward,
clipping, AdamW and moving average, as `maskdm train` runs it, from images on the device; warm-up
and compilation left out, median of `--num`. `of limit` is matrix-product FLOPs (of visible tokens
only, and Muon's) per second over those of large products on the same device, measured in turn with
it; `ideal` the FLOPs over those of the dense step; `other` the share of the step outside the
network's forward and backward and the optimizer; `spread` from the fastest to the slowest
measurement over the median: where it is large, something else was running.

Two rows are what a user would otherwise do: `baseline`, a plain step that embeds all patches and
then masks by a Boolean, reads the loss each step and keeps the average in a Python loop; `unet`,
diffusers' UNet2DModel at that resolution, whole images.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import make_schedule
from maskdm.engine import make_accelerator
from maskdm.masks import num_visible
from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.build import build_model
from maskdm.models.compiling import CompiledForward
from maskdm.models.uvit import TIME_SCALE, UViT, timestep_embedding
from maskdm.recipe import Data, Diffusion, Mask, Model, Recipe, Stage
from maskdm.tokens import patchify
from maskdm.training.ema import Averages
from maskdm.training.optim import make_optimizer
from maskdm.training.ready import Ready, forward_and_backward
from maskdm.training.step import draw_batch
from maskdm.training.update import Update
from maskdm.training.work import stage_work


@dataclass(frozen=True)
class Size:
    """A model of the paper, or one of another kind: image side, patch side, width, heads.

    Attributes:
        kind: backbone.
        depth: blocks.
        optimizer: of the stage.
        where: of the mask.
    """

    image: int
    patch: int
    width: int
    heads: int
    kind: str = "uvit"
    depth: int = 13
    optimizer: str = "adamw"
    where: str = "input"

    @property
    def recipe_model(self) -> Model:
        """As a recipe has it."""
        sizes = {"patch_size": self.patch, "embed_dim": self.width, "num_heads": self.heads}
        return Model(kind=self.kind, depth=self.depth, **sizes)


SIZES = {
    "S-64": Size(64, 4, 512, 8),
    "B-256": Size(256, 4, 768, 12),
    "B-256-16": Size(256, 16, 768, 12),
    "S-64-vit": Size(64, 4, 512, 8, kind="vit"),
    "S-64-muon": Size(64, 4, 512, 8, optimizer="muon"),
    "S-64-middle": Size(64, 4, 512, 8, where="middle"),
    "photos32": Size(32, 4, 192, 3, depth=5, optimizer="muon"),  # 2.4 M parameters
    "photos32-vit": Size(32, 4, 192, 3, kind="vit", depth=5, optimizer="muon"),
    "tiny": Size(16, 4, 64, 2),  # to try the script itself
}
DIFFUSION = Diffusion()
IMAGES_PER_SEC = {  # targets on an H200: model, hidden
    ("S-64", 0.0): 4_700,
    ("S-64", 0.5): 10_000,
    ("S-64", 0.9): 27_000,
    ("B-256", 0.0): 100,
    ("B-256-16", 0.0): 2_700,
}
OF_DENSE = {8: 0.14, 32: 0.115}  # targets on two cores: S-64, 90 % hidden, by batch


def make_stage(size: Size, rate: float, batch_size: int) -> Stage:
    """A stage that hides so much."""
    mask = Mask(kind="patch" if rate else "none", rate=rate, where=size.where)
    settings = {"optimizer": size.optimizer, "lr": 1e-4, "clip": 1.0}
    return Stage(name="bench", mask=mask, steps=1, batch_size=batch_size, **settings)


def our_step(
    size: Size, rate: float, batch_size: int, how: str, accelerator: Any
) -> tuple[Callable[[int], None], Callable[[int], None], float]:
    """The step as `maskdm train` runs it; its network and optimizer alone; FLOPs for an image."""
    device, stage = accelerator.device, make_stage(size, rate, batch_size)
    recipe = Recipe(data=Data(size=size.image), model=size.recipe_model, stages=(stage,))
    model = build_model(recipe).to(device)
    flops = stage_work(recipe, model)[0].step_flops / batch_size
    averages, optimizer = Averages(model), make_optimizer(model, stage)
    flops += optimizer_flops(model, optimizer) / batch_size
    averages.enter_stage(stage, model, begins=True)
    network = CompiledForward(model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    schedule = make_schedule("cosine")
    shape = (batch_size, size.image, size.image, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    example = draw_batch(images, None, recipe, stage, schedule, 0)
    middle = [] if example.middle is None else [example.middle]
    if how != "eager":
        attempt = functools.partial(forward_and_backward, model, example)
        common.say(f"compiled in {network.compile(example.x0.shape, attempt):.0f} s")
    ready = Ready(DIFFUSION, schedule, None)
    update = Update(accelerator, model, wrapped, optimizer, averages, stage, ready)
    if how == "graphs":
        update.record(draw_batch(images, None, recipe, stage, schedule, 0))

    def step(i: int) -> None:
        update(draw_batch(images, None, recipe, stage, schedule, i), 0)

    def core(i: int) -> None:
        answer = wrapped(example.x0, example.visible, example.t, None, *middle)
        accelerator.backward(answer.float().square().mean())
        optimizer.step()
        optimizer.zero_grad()

    return step, core, flops


def optimizer_flops(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of a step's matrix products: Muon's."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    optimizer.zero_grad()
    return counter.get_total_flops()


def baseline_step(
    size: Size, rate: float, batch_size: int, accelerator: Any
) -> Callable[[int], None]:
    """A straightforward step: all patches embedded, a Boolean mask, a sync, an average by hand."""
    device = accelerator.device
    model = UViT(size.image, size.patch, 3, size.width, size.depth, size.heads).to(device)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.99, 0.99))
    is_bf16 = accelerator.mixed_precision == "bf16"
    visible = num_visible(make_stage(size, rate, batch_size).mask, model.grid)
    shape = (batch_size, size.image, size.image, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    alphas = make_schedule("cosine").alpha(torch.linspace(0, 1, 1000)).to(device)

    def step(i: int) -> None:
        x0 = patchify(images.to(device), size.patch).float() / 127.5 - 1
        index = torch.randint(1000, (batch_size,), device=device)
        alpha = alphas[index][:, None, None]
        noise = torch.randn_like(x0)
        x_t = alpha * x0 + (1 - alpha**2).sqrt() * noise
        mask = torch.ones(batch_size, model.num_patches, dtype=torch.bool)
        for row in mask:  # True = hidden
            row[torch.randperm(model.num_patches)[:visible]] = False
        mask = mask.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            tokens = model.patch_embed(x_t) + model.pos_embed[1:]
            tokens = tokens[~mask].view(batch_size, visible, -1)
            time = timestep_embedding(index / 999 * TIME_SCALE, size.width)
            x = torch.cat([(time + model.pos_embed[0])[:, None].to(tokens.dtype), tokens], dim=1)
            skips = []
            for block in model.in_blocks:
                x = block(x)
                skips.append(x)
            x = model.mid_block(x)
            for block in model.out_blocks:
                x = block(x, skips.pop())
            answer = model.head(model.norm(x[:, 1:]))
            loss = F.mse_loss(answer.float(), noise[~mask].view(batch_size, visible, -1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(0.999).add_(weight, alpha=0.001)
        loss.item()

    return step


def unet_step(
    size: Size, batch_size: int, accelerator: Any
) -> tuple[Callable[[int], None], DiffusersDenoiser]:
    """diffusers' UNet2DModel with its default channels, whole images."""
    device = accelerator.device
    options = {"norm_num_groups": 32, "block_out_channels": [224, 448, 672, 896]}
    model = DiffusersDenoiser("unet2d", size.image, size.patch, options=options).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    values = size.patch**2 * 3
    x0 = torch.rand(batch_size, model.num_patches, values, device=device) * 2 - 1
    positions = torch.arange(model.num_patches, device=device).expand(batch_size, -1)
    schedule = make_schedule("cosine")

    def step(i: int) -> None:
        t = torch.rand(batch_size, device=device)
        noise = torch.randn_like(x0)
        loss = masked_denoising_loss(wrapped, x0, positions, t, noise, schedule, DIFFUSION)
        accelerator.backward(loss.mean())
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def targets(model: str, how: str, rate: float, batch_size: int) -> dict[str, float]:
    """What figures of this row should be: speed and share of the limit at least, others at most."""
    if common.device().type == "cuda":
        wanted = IMAGES_PER_SEC.get((model, rate))
        return {"images_per_sec": wanted} if wanted and how in ("compiled", "graphs") else {}
    if model != "S-64" or how != "eager":
        return {}
    found = {"other": 0.03}
    if rate == 0:
        found["share_of_limit"] = 0.95
    if rate == 0.9 and batch_size in OF_DENSE:
        found["of_dense"] = OF_DENSE[batch_size]
    return found


def main() -> None:
    """Measures every model, way and rate that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ways = ["eager", "compiled", "graphs", "baseline", "unet"]
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["S-64"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--how", nargs="+", choices=ways, default=["eager"])
    parser.add_argument("--num", type=int, default=5)
    args = parser.parse_args()
    accelerator, precision, _ = make_accelerator("auto")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    facts = common.facts("step") | {
        "precision": precision,
        "copy_limit_gb_per_sec": round(common.copy_limit() / 1e9, 1),
    }
    common.say(
        f"{facts['device']}, {precision}, copies {facts['copy_limit_gb_per_sec']:,.0f} GB/s\n"
        "model       how      hidden tokens batch   ms/step    img/s  TFLOP/s of limit  of dense "
        "(ideal)  other  spread     GiB  targets"
    )
    for name in args.models:
        for how in args.how:
            rates = args.rates if how != "unet" else [0.0]
            # In turn, but on a GPU, whose memory is watched, one after the other.
            groups = [[rate] for rate in rates] if common.device().type == "cuda" else [rates]
            dense: dict[str, Any] | None = None
            for group in groups:
                rows = measured(
                    SIZES[name], group, args.batch_size, how, accelerator, args.num, dtype
                )
                for row in rows:
                    dense = row if row["hidden"] == 0 else dense
                    row["of_dense"] = ratio(row, dense, "ms_per_step")
                    row["ideal"] = ratio(row, dense, "gflop_per_image")
                    row["targets"] = targets(name, how, row["hidden"], args.batch_size)
                    common.tell({**facts, "model": name, **row})
                    common.say(text_of(name, row))


def ratio(row: dict[str, Any], dense: dict[str, Any] | None, figure: str) -> float | None:
    """A figure over that of the dense step, where there is one."""
    return None if dense is None else round(row[figure] / dense[figure], 4)


def text_of(model: str, row: dict[str, Any]) -> str:
    """A row for people."""
    other = "" if row["other"] is None else f"{100 * row['other']:.1f}%"
    memory = "" if row["peak_mem_gib"] is None else f"{row['peak_mem_gib']:.1f}"
    of_dense = "" if row["of_dense"] is None else f"{row['of_dense']:.3f} ({row['ideal']:.3f})"
    return (
        f"{model:11} {row['how']:8} {100 * row['hidden']:4.3g} % {row['tokens']:6} "
        f"{row['batch_size']:5} {row['ms_per_step']:9,.1f} {row['images_per_sec']:8,.1f} "
        f"{row['tflops']:8.3g} {100 * row['share_of_limit']:7.1f}% {of_dense:>17} "
        f"{other:>6} {100 * row['spread']:6.0f}% {memory:>7}  "
        + ", ".join(f"{name} {value:g}" for name, value in row["targets"].items())
    )


def prepared(
    size: Size, rate: float, batch_size: int, how: str, accelerator: Any
) -> tuple[list[Callable[[int], None]], dict[str, Any], float]:
    """A way of doing a step: the step and perhaps its core; facts; FLOPs for an image."""
    grid = (size.image // size.patch, size.image // size.patch)
    visible = num_visible(make_stage(size, rate, batch_size).mask, grid)
    facts = {"how": how, "hidden": rate, "tokens": visible, "batch_size": batch_size}
    if how == "unet":
        step, network = unet_step(size, batch_size, accelerator)
        return [step], facts, 3 * network.forward_flops(visible)
    if how == "baseline":
        step = baseline_step(size, rate, batch_size, accelerator)
        with torch.device("meta"):
            counted = UViT(size.image, size.patch, 3, size.width, size.depth, size.heads)
        return [step], facts, 3 * counted.forward_flops(visible)
    step, core, flops = our_step(size, rate, batch_size, how, accelerator)
    return [step] if how == "graphs" else [step, core], facts, flops


def measured(
    size: Size,
    rates: list[float],
    batch_size: int,
    how: str,
    accelerator: Any,
    num: int,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """A row for each rate: a model, one way of doing the step."""
    torch.compiler.reset()
    common.reset_peak()
    product, product_flops = common.matrix_product(dtype)
    ways = [prepared(size, rate, batch_size, how, accelerator) for rate in rates]
    of_product, *seconds = common.seconds_of([product, *(s for way in ways for s in way[0])], num)
    memory, rows = common.peak_mem_gib(), []
    for steps, facts, flops in ways:
        own, seconds = seconds[: len(steps)], seconds[len(steps) :]
        step_sec, *core_sec = (statistics.median(one) for one in own)
        rate_of = flops * batch_size / step_sec
        limit = product_flops / statistics.median(of_product)
        rows.append(
            {
                **facts,
                "ms_per_step": round(1000 * step_sec, 3),
                "images_per_sec": round(batch_size / step_sec, 2),
                "gflop_per_image": round(flops / 1e9, 3),
                "tflops": round(rate_of / 1e12, 4),
                "matrix_limit_gflops": round(limit / 1e9, 1),
                "share_of_limit": round(rate_of / limit, 4),
                "spread": round(common.spread(own[0]), 4),
                "other": round(max(0.0, 1 - core_sec[0] / step_sec), 4) if core_sec else None,
                "peak_mem_gib": memory,
            }
        )
    accelerator.free_memory()
    return rows


if __name__ == "__main__":
    main()
