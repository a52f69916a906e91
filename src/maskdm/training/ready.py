"""Making the network ready for a stage: what is recomputed, how many images at a time, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.checkpoint import checkpoint

from maskdm.diffusion.schedule import Schedule
from maskdm.models.build import Backbone
from maskdm.models.compiling import CompiledForward, NotCompiled, wants_compiling
from maskdm.recipe import Recipe, Stage
from maskdm.training.step import Batch, draw_batch


def make_ready(
    network: CompiledForward,
    model: Backbone,
    recipe: Recipe,
    stage: Stage,
    schedule: Schedule,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> int | None:
    """Readies the network for a stage, and says what it did. To be called on every rank.

    Returns:
        Images per device at a time; None = all.

    Raises:
        RuntimeError: not even one image fits in the device's memory.
    """
    if stage.activation_checkpointing:
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    else:
        model.disable_gradient_checkpointing()
    network.run_as_written()
    share = stage.batch_size // accelerator.num_processes
    size = stage.micro_batch_size
    if size == "auto":
        size = None
        if accelerator.device.type != "cpu":  # there nothing says how much fits

            def attempt(num: int) -> None:
                _try_step(model, _example(recipe, stage, schedule, num, accelerator.device))

            size = min(gather_object([largest_that_fits(share, attempt)]))
            say(f"  {size} of {share} images at a time fit in the memory of {accelerator.device}")
    if wants_compiling(recipe.compile, accelerator.device):
        num = min(share, size or share)
        example = _example(recipe, stage, schedule, num, accelerator.device)
        graphs = recipe.compile == "graphs"
        if graphs and (why_not := _no_graphs(accelerator, is_whole=num == share)):
            say(f"  note: no CUDA graphs, since {why_not}")
            graphs = False
        attempt = functools.partial(forward_and_backward, model, example)
        try:
            done = network.compile(example.x0.shape, attempt, graphs)
        except NotCompiled as error:
            say(f"  not compiled, runs as written: {error}")
        else:
            say(
                f"  compiled in {done.seconds:.0f} s"
                + (", with CUDA graphs" if done.cuda_graphs else "")
            )
            if graphs and not done.cuda_graphs:
                say("  note: no CUDA graphs, since the compiler can't have them for this network")
    return size


def _no_graphs(accelerator: Accelerator, is_whole: bool) -> str | None:
    """Why a stage can't replay CUDA graphs; None = it can."""
    if accelerator.device.type != "cuda":
        return f"the device is {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return "they are for one GPU alone"
    if not is_whole:  # the next micro-batch would overwrite this one's gradients
        return "they take a batch as a whole, not in micro-batches"
    return None


def largest_that_fits(share: int, attempt: Callable[[int], None]) -> int:
    """The largest divisor of a share of a batch that can be computed at a time.

    Divisors, so that every part of a batch has the same shape.

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
    """Takes the memory of a step and gives it back; changes nothing."""
    kept = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]  # moments, gradients
    forward_and_backward(model, batch)
    del kept


def forward_and_backward(model: Backbone, batch: Batch) -> None:
    """Asks the network and differentiates its answer, as a step does; changes nothing."""
    answer = model(batch.x0, batch.visible, batch.t, batch.labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(answer.float().square().sum(), parameters, allow_unused=True)


def _example(
    recipe: Recipe, stage: Stage, schedule: Schedule, num: int, device: torch.device
) -> Batch:
    """What the network is given at a time in a stage: its shapes, on the device."""
    images = torch.zeros((num, *recipe.data.shape), dtype=torch.uint8, device=device)
    labels = images.new_zeros(num, dtype=torch.int64) if recipe.model.num_classes else None
    return draw_batch(images, labels, recipe, stage, schedule, step=0)
