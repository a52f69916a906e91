"""What a run says about itself before it starts, and at the start of each stage."""

from __future__ import annotations

from accelerate import Accelerator

from maskdm.engine import device_name
from maskdm.images.order import num_held_out, training_subset
from maskdm.images.problems import listed, printable
from maskdm.images.store import Store
from maskdm.masks import Grid
from maskdm.models.attention import attention_kernels
from maskdm.models.build import Backbone
from maskdm.models.uvit import UViT
from maskdm.recipe import Recipe
from maskdm.training.checkpoint import Progress
from maskdm.training.monitor import Monitor, flops_text

MOST_HELD_OUT = 0.25  # of the images may be kept out of training without a word
NAMES = {"uvit": "U-ViT", "dit": "DiT", "unet2d": "U-Net"}


def introduce(
    monitor: Monitor,
    recipe: Recipe,
    store: Store,
    model: Backbone,
    accelerator: Accelerator,
    precision: str,
    total_flops: int,
) -> None:
    """Says what the run trains on, what it trains, where, and how much of it."""
    num, height, width, channels = store.images.shape
    num_used = len(training_subset(num, recipe.data))
    of = "" if num_used == num else f" of {num:,}"
    num_out = num_held_out(num, recipe.data)
    held_out = f", {num_out:,} held out" if num_out else ""
    bad = store.manifest["left_out"]
    left_out = f", {len(bad):,} unreadable left out" if bad else ""
    classes = ""
    if num_classes := len(store.manifest["class_names"]):
        classes = f", {num_classes:,} classes" + ("" if recipe.model.num_classes else " (unused)")
    params = sum(parameter.numel() for parameter in model.parameters())
    monitor.say(
        f"data    {num_used:,}{of} images {height}x{width}x{channels} from {recipe.data.source}"
        f"{classes}{held_out}{left_out}"
    )
    if num_out > MOST_HELD_OUT * num:
        share = 100 * num_out / num
        monitor.say(f"  note: {share:.0f} % of the images are held out: lower data.held_out")
    for note in store.manifest["notes"]:
        monitor.say(f"  note: {printable(note)}")
    if bad:
        monitor.say(f"  left out: {listed(bad, most=3)}")
    name = NAMES[recipe.model.kind]
    monitor.say(f"model   {name}, {params / 1e6:.2f} M parameters, {model.num_patches} patches")
    if not isinstance(model, UViT) and any(stage.mask.rate for stage in recipe.stages):
        monitor.say(f"  note: {name} needs the whole grid, so that masks save no compute")
    num_stages = len(recipe.stages)
    devices = f"{accelerator.num_processes} x {device_name(accelerator.device)}"
    with accelerator.autocast():
        kernels = attention_kernels(model)
    attention = f", {' and '.join(kernels)} attention" if kernels else ""
    monitor.say(f"device  {devices}, {precision}{attention}")
    monitor.say(
        f"plan    {num_stages} stage{'s' * (num_stages > 1)}, {flops_text(total_flops)} in all"
    )


def stage_line(recipe: Recipe, progress: Progress, grid: Grid, hidden: float, flops: int) -> str:
    """What a stage does: its mask, the fraction really hidden, steps and compute."""
    stage, mask = recipe.stages[progress.stage], recipe.stages[progress.stage].mask
    title = f"stage {progress.stage + 1}/{len(recipe.stages)} {stage.name}:"
    if hidden:
        kind = f"{mask.block}x{mask.block} blocks" if mask.kind == "block" else f"{mask.kind} mask"
        asked = "" if abs(hidden - mask.rate) < 5e-4 else f" ({100 * mask.rate:.4g} % asked)"
        what = f"{kind}, {100 * hidden:.4g} % hidden{asked}"
    else:
        what = "whole images"
    work = f"{stage.steps:,} steps of {stage.batch_size} images, {flops_text(flops * stage.steps)}"
    other = f", schedule {stage.schedule}" if stage.schedule else ""
    return f"{title} {what}{other}, {work}"
