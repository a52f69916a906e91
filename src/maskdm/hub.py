"""Trained models as diffusers pipeline folders."""

# No postponed annotations here: diffusers reads a pipeline's signature to know its components.

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from safetensors import SafetensorError

from maskdm.diffusion.schedule import NUM_STEPS, log_snr_shift, schedule_of
from maskdm.images.output import to_pil
from maskdm.models.class_names import class_numbers
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Diffusion, Recipe, Sampling
from maskdm.sampling.generate import generate
from maskdm.training.checkpoint import replace_folder, system_error
from maskdm.training.load import diffusion_fields, load_model

DIFFUSION, SAMPLING = Diffusion(), Sampling()  # the defaults


class MaskDMPipeline(DiffusionPipeline):
    """A trained model with all that sampling needs: denoiser, diffusion, sampling settings.

    Args:
        denoiser: the network, with averaged weights.
        scheduler: the same noise in diffusers' terms, for other tools; not used here. None where
            diffusers has no words for it.
        schedule, base_size, prediction: what it was trained under, as in `recipe.Diffusion`.
        sampler, ...: default settings, as in `recipe.Sampling`.
    """

    _optional_components = ["scheduler"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        schedule: str = DIFFUSION.schedule,
        base_size: int | None = DIFFUSION.base_size,
        prediction: str = DIFFUSION.prediction,
        sampler: str = SAMPLING.sampler,
        steps: int = SAMPLING.steps,
        spacing: str = SAMPLING.spacing,
        eta: float = SAMPLING.eta,
        clip_x0: bool = SAMPLING.clip_x0,
        guidance: str = SAMPLING.guidance,
        guidance_scale: float = SAMPLING.guidance_scale,
        guidance_start: float = SAMPLING.guidance_start,
        guidance_end: float = SAMPLING.guidance_end,
        guidance_weak: str = SAMPLING.guidance_weak,
        guidance_rate: float = SAMPLING.guidance_rate,
        batch_size: int | str = SAMPLING.batch_size,
        compile: str = SAMPLING.compile,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        # Scalars, one by one: a pipeline folder's model_index.json holds nothing else.
        self.register_to_config(
            schedule=schedule,
            base_size=base_size,
            prediction=prediction,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            eta=eta,
            clip_x0=clip_x0,
            guidance=guidance,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            guidance_weak=guidance_weak,
            guidance_rate=guidance_rate,
            batch_size=batch_size,
            compile=compile,
        )

    @property
    def trained(self) -> TrainedModel:
        """The network and what it was trained under."""
        return TrainedModel(self.denoiser, diffusion_fields(self.config))

    @property
    def settings(self) -> Sampling:
        """The default sampling settings."""
        return Sampling(**{name: self.config[name] for name in Sampling.model_fields})

    def __call__(
        self,
        num_images: int = 1,
        seed: int = 0,
        num_inference_steps: int | None = None,
        labels: torch.Tensor | str | Sequence[str] | None = None,
        settings: Sampling | None = None,
        weak: "MaskDMPipeline | None" = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draws images 0..num_images-1 of a seed.

        Args:
            num_images: how many.
            seed: names the sequence of images.
            num_inference_steps: solver steps; None = as the settings say.
            labels: classes, int64 (num_images,); or the name of one for all images, or a name
                for each; None = 0, 1, 2, ... in turn.
            settings: sampler, guidance and the rest; None = the saved ones.
            weak: the weak model of autoguidance.
            output_type: `pil` for Pillow images of mode L, LA, RGB or RGBA; `np` for uint8
                (num_images, H, W, C), whose last axis is grey, grey and alpha, RGB or RGBA.

        Raises:
            ValueError: an unknown output type or class, or settings that the model can't follow.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"unknown output_type {output_type!r}: known are pil, np")
        if labels is not None and not isinstance(labels, torch.Tensor):
            labels = class_numbers(self.denoiser.config, labels, num_images)
        settings = settings or self.settings
        if num_inference_steps is not None:
            settings = Sampling(**{**settings.model_dump(), "steps": num_inference_steps})
        images = generate(
            self.trained,
            settings,
            list(range(num_images)),
            seed,
            labels,
            weak=weak.trained if weak is not None else None,
        )
        return ImagePipelineOutput(images if output_type == "np" else to_pil(images))


def make_pipeline(trained: TrainedModel, sampling: Sampling) -> MaskDMPipeline:
    """The pipeline of a trained (averaged) model with default sampling settings."""
    diffusion = trained.diffusion
    return MaskDMPipeline(
        trained.model,
        diffusers_scheduler(diffusion, trained.model.image_shape[:2]),
        schedule=diffusion.schedule,
        base_size=diffusion.base_size,
        prediction=diffusion.prediction,
        **sampling.model_dump(mode="json"),
    )


def pipeline_of_run(model: ModelMixin, recipe: Recipe) -> MaskDMPipeline:
    """The pipeline of a finished run: its averaged model, with its recipe's settings."""
    return make_pipeline(TrainedModel(model, recipe.final_diffusion), recipe.sampling)


def diffusers_scheduler(
    diffusion: Diffusion, image_size: int | Sequence[int]
) -> SchedulerMixin | None:
    """A diffusion in diffusers' terms, or None where diffusers has no words for it.

    Its timestep i is our time t = i / 999 (of flows i / 1000).
    """
    shift = log_snr_shift(diffusion.base_size, image_size)
    if diffusion.schedule == "flow":
        if diffusion.prediction != "flow" or shift:  # shifted, its timesteps are not our times
            return None
        return FlowMatchEulerDiscreteScheduler(NUM_STEPS)
    types = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    if diffusion.prediction not in types:
        return None
    t = torch.arange(NUM_STEPS, dtype=torch.float64) / (NUM_STEPS - 1)
    power = schedule_of(diffusion, image_size).log_snr(t).sigmoid()  # alpha^2
    before = torch.cat([torch.ones(1, dtype=torch.float64), power[:-1]])
    return DDIMScheduler(
        num_train_timesteps=NUM_STEPS,
        trained_betas=(1 - power / before).tolist(),
        prediction_type=types[diffusion.prediction],
        timestep_spacing="trailing",
    )


def save_pipeline(pipeline: MaskDMPipeline, folder: Path) -> None:
    """Writes a pipeline folder, whole or not at all; an older one in its place goes.

    Raises OSError where the disk refuses.
    """
    writing = folder.with_name(f"writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        pipeline.save_pretrained(writing)
    except SafetensorError as error:
        raise system_error(error, writing) from error
    replace_folder(writing, folder)


def load_pipeline(name: str | Path, note: Callable[[str], None] = print) -> MaskDMPipeline:
    """The pipeline of the model that a user names: a run's folder, `RUN@STAGE`, a checkpoint, an
    exported folder, or a Hub id.

    `note` is told which damaged checkpoints were passed over. Raises ValueError where there is
    no model.
    """
    loaded = load_model(name, note)
    return make_pipeline(loaded.trained, loaded.sampling)
