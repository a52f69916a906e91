"""What a planned recipe costs: images, tokens, compute, and the time that they take."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator

from maskdm.families import GUIDANCE, SAMPLERS
from maskdm.images.order import num_held_out, training_subset
from maskdm.images.store import Store
from maskdm.models.backbone import Backbone
from maskdm.recipe import Recipe, Stage
from maskdm.training.budget import MANY_IMAGES, besides
from maskdm.training.ema import share_of_first
from maskdm.training.plateau import probing_flops
from maskdm.training.speed import Speed, known_speed
from maskdm.training.work import stage_work, total_flops
from maskdm.words import counted

MANY_EPOCHS, FEW_IMAGES = 1000, 20_000  # beyond which, and below which, copies are to be expected
MOST_KEPT = 0.1  # part of a stage's first weights that an average may keep without a warning
WELL_KEPT = 0.01  # what a decay should keep that the warning proposes


@dataclass(frozen=True)
class StageCost:
    """What a stage of training costs.

    Attributes:
        name: of the stage.
        hidden: the fraction of the patches that is really hidden.
        steps, images: optimizer steps; images seen.
        epochs: passes over the training images; None = their number is unknown.
        tokens: visible patches seen.
        flops: floating-point operations.
        seconds: of training on the machine in question; None = unknown.
    """

    name: str
    hidden: float
    steps: int
    images: int
    epochs: float | None
    tokens: int
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class Costs:
    """What a run costs, and what its model costs afterwards.

    Attributes:
        stages: of training.
        flops: of all of them.
        probing_flops: the most that forks of `until: plateau` take; they are among these.
        seconds: of training; None = unknown.
        preview_flops, measuring_flops: of all previews, and of all measurements, in the run.
        preview_seconds, measuring_seconds: their time; None = unknown.
        image_flops, image_seconds: of an image that is drawn as the recipe samples.
        evaluate_flops, evaluate_seconds: of drawing the images of `maskdm evaluate`.
    """

    stages: tuple[StageCost, ...]
    flops: int
    probing_flops: int
    seconds: float | None
    preview_flops: int
    measuring_flops: int
    preview_seconds: float | None
    measuring_seconds: float | None
    image_flops: int
    image_seconds: float | None
    evaluate_flops: int
    evaluate_seconds: float | None

    @property
    def total_seconds(self) -> float | None:
        """Of the whole run, with previews and measuring; None = unknown."""
        parts = (self.seconds, self.preview_seconds, self.measuring_seconds)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def costs_of(
    recipe: Recipe,
    model: Backbone,
    speed: Speed | None = None,
    num_images: int | None = None,
    num_train: int | None = None,
) -> Costs:
    """The costs of a planned recipe.

    Args:
        model: the recipe's; only its sizes matter.
        speed: of the machine in question; None = times are unknown.
        num_images, num_train: of the source, and those trained on; None = unknown.
    """
    works = stage_work(recipe, model)
    stages = []
    for i, (stage, work) in enumerate(zip(recipe.stages, works, strict=True)):
        images = stage.steps * stage.batch_size
        stages.append(
            StageCost(
                stage.name,
                work.hidden,
                stage.steps,
                images,
                None if num_train is None else images / num_train,
                images * work.num_visible,
                stage.steps * work.step_flops + stage.probe_flops,
                None if speed is None else stage.steps * speed.step_sec[i],
            )
        )
    one = model.forward_flops(model.num_patches)  # a network evaluation of a whole image
    sec = None if speed is None else speed.forward_sec
    apart = besides(recipe, num_images or MANY_IMAGES)
    sampling = recipe.sampling
    each = sampling.steps * SAMPLERS[sampling.sampler].evaluations
    each *= GUIDANCE[sampling.guidance.kind].evaluations
    each *= 2 if GUIDANCE[sampling.guidance.kind].needs_model else 1
    drawn = each * recipe.evaluation.num

    def time(evaluations: int) -> float | None:
        return None if sec is None else evaluations * sec

    return Costs(
        tuple(stages),
        total_flops(recipe, works),
        probing_flops(recipe, num_images or MANY_IMAGES),
        None if speed is None else math.fsum(stage.seconds or 0 for stage in stages),
        apart.previews * one,
        apart.measuring * one,
        time(apart.previews),
        time(apart.measuring),
        each * one,
        time(each),
        drawn * one,
        time(drawn),
    )


def plan_of(
    recipe: Recipe, model: Backbone, store: Store, accelerator: Accelerator
) -> dict[str, Any]:
    """What a run is expected to cost, for plan.json; times where they were measured before.

    Args:
        recipe: planned.
        model: the recipe's; only its sizes matter.
        store: all images of its source.
        accelerator: of this machine.
    """
    num, data = len(store), recipe.data
    num_train = len(training_subset(num, data))
    costs = costs_of(recipe, model, known_speed(recipe, accelerator), num, num_train)
    num_params = sum(p.numel() for p in model.parameters())
    return {
        "num_params": num_params,
        "num_patches": model.num_patches,
        "num_images": num,
        "num_train": num_train,
        "num_held_out": num_held_out(num, data),
        "num_classes": len(store.manifest["class_names"]),
        "stages": [asdict(stage) for stage in costs.stages],
        "flops": costs.flops,
        "seconds": costs.seconds,
        "warnings": warnings_of(recipe, costs, num_params, num_train),
    }


def warnings_of(recipe: Recipe, costs: Costs, num_params: int, num_train: int | None) -> list[str]:
    """What looks unwise about a planned recipe."""
    found = []
    epochs = sum(stage.epochs or 0 for stage in costs.stages)
    if num_train is not None and epochs > MANY_EPOCHS and num_train < FEW_IMAGES:
        found.append(
            f"{num_train:,} images and a network of {num_params / 1e6:.3g} M parameters: each "
            f"image is seen {epochs:,.0f} times, so expect copies of them; use more images, a "
            "smaller network or a smaller budget"
        )
    for i, stage in enumerate(recipe.stages):
        if num_train is not None and stage.batch_size > num_train:
            found.append(
                f"stage {stage.name}: a batch of {counted(stage.batch_size, 'image')} is more than "
                f"the {num_train:,} that there are: try --stages.{i}.batch-size {num_train}"
            )
        if (kept := share_of_first(stage)) > MOST_KEPT:
            found.append(
                f"stage {stage.name}: its average, ema.decay {stage.ema.decay:g}, keeps "
                f"{100 * kept:.0f} % of the first weights over {stage.steps:,} steps: try "
                f"--stages.{i}.ema.decay {well_kept_decay(stage):g}, or --stages.{i}.ema.kind power"
            )
    return found


def well_kept_decay(stage: Stage) -> float:
    """A decay that keeps a hundredth of a stage's first weights."""
    return 1 - float(f"{1 - WELL_KEPT ** (1 / stage.steps):.1g}")
