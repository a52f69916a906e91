"""Making the network ready for a stage: recomputation, micro-batches, compiling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.checkpoint import checkpoint

from maskdm.diffusion.schedule import Schedule, schedule_of
from maskdm.models.backbone import Backbone
from maskdm.models.compiling import CompiledForward as CompiledForward
from maskdm.models.compiling import NotCompiled, wants_compiling
from maskdm.recipe import Diffusion, Recipe, Stage
from maskdm.training.step import Batch, draw_batch

LAUNCH_BOUND = 5e12  # FLOPs: about what an H200 computes while its host launches a step's kernels


@dataclass(frozen=True)
class Ready:
    """What a stage's steps need besides the network.

    Attributes:
        diffusion: what the stage trains under.
        schedule: its noise over time, for images of the recipe's size.
        micro_batch_size: images per device at a time; None = all.
        recorded: a batch of this device's shapes, where steps are to be replayed as a CUDA graph.
    """

    diffusion: Diffusion
    schedule: Schedule
    micro_batch_size: int | None
    recorded: Batch | None = None


def make_ready(
    network: CompiledForward,
    model: Backbone,
    recipe: Recipe,
    stage: Stage,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> Ready:
    """Readies the network for a stage, and says what it did. To be called on every rank.

    Raises:
        RuntimeError: not even one image fits in the device's memory.
    """
    if stage.activation_checkpointing:
        # Nothing that is recomputed is random, and its generator could not be recorded.
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        model.enable_gradient_checkpointing(again)
    elif model.is_gradient_checkpointing:  # a stage before had it on
        model.disable_gradient_checkpointing()
    network.run_eagerly()
    diffusion = recipe.diffusion_of(stage)
    schedule = schedule_of(diffusion, recipe.data.size)
    share = stage.batch_size // accelerator.num_processes
    size = stage.micro_batch_size
    if size == "auto":
        size = None
        if accelerator.device.type != "cpu":  # a CPU does not say how much fits

            def attempt(num: int) -> None:
                _try_step(model, _example(recipe, stage, schedule, num, accelerator.device))

            size = min(gather_object([largest_that_fits(share, attempt)]))
            say(f"  {size} of {share} images at a time fit in the memory of {accelerator.device}")
    recorded = None
    if wants_compiling(recipe.compile, accelerator.device):
        num = min(share, size or share)
        example = _example(recipe, stage, schedule, num, accelerator.device)
        attempt = functools.partial(forward_and_backward, model, example)
        try:
            say(f"  compiled in {network.compile(example.x0.shape, attempt):.0f} s")
        except NotCompiled as error:
            say(f"  not compiled, runs eagerly: {error}")
        middle = [] if example.middle is None else [example.middle.shape[1]]
        flops = 3 * share * model.forward_flops(example.visible.shape[1], *middle)
        why_no_graph = _why_no_graph(stage, accelerator)
        if recipe.compile == "graphs" and why_no_graph:
            say(f"  note: no CUDA graph, since {why_no_graph}")
        if wants_graph(recipe, flops) and why_no_graph is None:
            recorded = _example(recipe, stage, schedule, share, accelerator.device)
    return Ready(diffusion, schedule, size, recorded)


def wants_graph(recipe: Recipe, step_flops: float) -> bool:
    """Whether a recipe wants steps of so many FLOPs a GPU replayed as a CUDA graph."""
    is_small = step_flops < LAUNCH_BOUND
    return recipe.compile == "graphs" or (recipe.compile == "auto" and is_small)


def _why_no_graph(stage: Stage, accelerator: Accelerator) -> str | None:
    """Why a stage's steps cannot be replayed as a CUDA graph; None = they can."""
    if accelerator.device.type != "cuda":
        return f"the device is {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return "it is for one GPU alone"
    if accelerator.scaler is not None:  # it reads from the device
        return "fp16 has a loss scaler"
    if stage.until != "steps":  # forks would pull compiled kernels away from under it
        return "the stage trains forks"
    return None


def largest_that_fits(share: int, attempt: Callable[[int], None]) -> int:
    """The largest divisor of a share of a batch that fits in memory at a time.

    Divisors, so that every micro-batch has the same shape.

    Args:
        share: images.
        attempt: computes so many; raises what torch raises when memory runs out.

    Raises:
        RuntimeError: not even one image fits.
    """
    for size in (n for n in range(share, 0, -1) if share % n == 0):
        try:
            attempt(size)
            return size
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
    raise RuntimeError(
        "not even one image at a time fits in the device's memory: use activation_checkpointing, "
        "a smaller model, or larger patches"
    )


def _try_step(model: Backbone, batch: Batch) -> None:
    """Allocates the memory of a step and frees it; changes nothing."""
    kept = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]  # moments, gradients
    forward_and_backward(model, batch)
    del kept


def forward_and_backward(model: Backbone, batch: Batch) -> None:
    """Runs the network forward and backward, as a step does; changes nothing."""
    more = [] if batch.middle is None else [batch.middle]
    answer = model(batch.x0, batch.visible, batch.t, batch.labels, *more)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(answer.float().square().sum(), parameters, allow_unused=True)


def _example(
    recipe: Recipe, stage: Stage, schedule: Schedule, num: int, device: torch.device
) -> Batch:
    """A batch of the shapes that the network gets in a stage, on the device."""
    images = torch.zeros((num, *recipe.data.shape), dtype=torch.uint8, device=device)
    labels = images.new_zeros(num, dtype=torch.int64) if recipe.model.classes else None
    return draw_batch(images, labels, recipe, stage, schedule, step=0)
