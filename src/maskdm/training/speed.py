"""How fast this machine trains and draws: measured in seconds, and remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from maskdm.engine import choose_precision, device_name, from_main, make_another
from maskdm.files import parsed_json, write_text
from maskdm.images.store import cache_dir
from maskdm.models.build import build_model
from maskdm.models.compiling import CompiledForward
from maskdm.recipe import Recipe, Stage
from maskdm.sampling.speed import seconds_of_answer, seconds_of_call
from maskdm.training.ema import Averages
from maskdm.training.optim import make_optimizer
from maskdm.training.step import draw_batch
from maskdm.training.update import make_update

LEAST_SEC = 2.0  # of measuring a stage
HOW = 3  # which way of measuring: what an earlier one found is measured anew


@dataclass(frozen=True)
class Speed:
    """What a recipe's work takes on this machine.

    Attributes:
        step_sec: seconds of an optimizer step of each stage.
        forward_sec: seconds of the network's answer for one whole image, when all devices draw
            many.
    """

    step_sec: tuple[float, ...]
    forward_sec: float


class Machine(Protocol):
    """What a budget in hours is spent on."""

    def speed(self, recipe: Recipe) -> Speed:
        """The speed of a recipe whose sizes are all known. To be called on every rank."""

    def flops_per_sec(self) -> float:
        """Roughly what training reaches on all devices, before a model is known."""


@dataclass(frozen=True)
class ThisMachine:
    """The machine that this process runs on.

    Attributes:
        accelerator: its devices.
        say: is told before seconds are spent.
    """

    accelerator: Accelerator
    say: Callable[[str], None] = print

    def speed(self, recipe: Recipe) -> Speed:
        """See `measure_speed`."""
        return measure_speed(recipe, self.accelerator, self.say)

    def flops_per_sec(self) -> float:
        """Half of what its matrix products reach."""
        (flops,) = broadcast_object_list([device_flops(self.accelerator.device)])
        return float(flops) * self.accelerator.num_processes


def measure_speed(
    recipe: Recipe, accelerator: Accelerator, say: Callable[[str], None] = print
) -> Speed:
    """Measures a recipe's speed, or reads what was measured before. To be called on every rank.

    Real steps on random images: below ten seconds a stage, besides compiling. What changes no
    speed (learning rates, the number of steps) may change without a new measurement.

    Args:
        recipe: with all sizes known; numbers of steps don't matter.
        accelerator: device and precision.
        say: is told before seconds are spent.
    """
    known = [known_speed(recipe, accelerator)] if accelerator.is_main_process else []
    (speed,) = gather_object(known)
    if speed is not None:
        found: Speed = speed
        return found
    say("measuring the speed of this machine (a few seconds a stage)")
    steps = [_step_sec(recipe, stage, accelerator) for stage in recipe.stages]
    model = build_model(recipe).to(accelerator.device).eval()
    measured = [steps, seconds_of_answer(model, recipe.sampling)]
    every = gather_object([measured])  # the slowest rank sets the pace
    step_sec = tuple(max(one[0][i] for one in every) for i in range(len(steps)))
    found = Speed(step_sec, max(one[1] for one in every) / accelerator.num_processes)
    if accelerator.is_main_process:
        file = _file(recipe, accelerator)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(found)))
    return found


def known_speed(recipe: Recipe, accelerator: Accelerator) -> Speed | None:
    """A recipe's speed where it was measured on this machine before; else None."""
    known = _read(_file(recipe, accelerator))
    return None if known is None else Speed(tuple(known["step_sec"]), known["forward_sec"])


def device_flops(device: torch.device) -> float:
    """FLOPs per second that training may reach on a device, roughly: half of its matrix products'.

    In the dtype that training would choose; measured in a second.
    """
    dtype = torch.bfloat16 if choose_precision("auto", device)[0] == "bf16" else torch.float32
    side = 1024 if device.type == "cpu" else 8192
    a = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds_of_call(lambda number: a @ a, device, 0.3) / 2


def _file(recipe: Recipe, accelerator: Accelerator) -> Path:
    return cache_dir() / "speed" / f"{_key(recipe, accelerator)}.json"


def _key(recipe: Recipe, accelerator: Accelerator) -> str:
    """Names what the speed depends on."""
    stages = [
        stage.model_dump(
            mode="json",
            include={
                "mask",
                "optimizer",
                "batch_size",
                "micro_batch_size",
                "activation_checkpointing",
                "until",
            },
        )
        for stage in recipe.stages
    ]
    facts: list[Any] = [
        HOW,
        device_name(accelerator.device),
        accelerator.num_processes,
        accelerator.mixed_precision,
        torch.get_num_threads(),
        torch.__version__,
        recipe.compile,
        recipe.data.shape,
        recipe.model.model_dump(mode="json"),
        stages,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _read(file: Path) -> dict[str, Any] | None:
    """A measurement of before; None where there is none."""
    try:
        content: dict[str, Any] = parsed_json(file.read_text("utf-8"))
        return content if set(content) == {"step_sec", "forward_sec"} else None
    except (OSError, ValueError):
        return None


def _step_sec(recipe: Recipe, stage: Stage, accelerator: Accelerator) -> float:
    """Seconds of a training step: batch, gradients and their exchange, optimizer and average."""
    device, num_ranks = accelerator.device, accelerator.num_processes
    engine = make_another(accelerator)  # which keeps what it prepares
    model = build_model(recipe).to(device)
    averages, optimizer = Averages(model), make_optimizer(model, stage)
    averages.enter_stage(stage, model, begins=True)
    network = CompiledForward(model)
    wrapped, stepper = engine.prepare(model, optimizer)  # its precision, its exchange
    parts = (engine, model, wrapped, stepper, averages)
    update = make_update(network, parts, recipe, stage, lambda text: None)
    share = stage.batch_size // num_ranks
    generator = torch.Generator().manual_seed(0)
    shape = (share, *recipe.data.shape)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)
    labels = torch.zeros(share, dtype=torch.int64, device=device) if recipe.model.classes else None

    def step(number: int) -> None:
        update(draw_batch(images, labels, recipe, stage, update.ready.schedule, number), 0)

    return seconds_of_call(step, device, LEAST_SEC, lambda num: from_main(lambda: num))
