"""Trained models as diffusers pipeline folders."""

# No postponed annotations here: diffusers reads a pipeline's signature to know its components.

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)

from maskdm.diffusion.schedule import NUM_STEPS, log_snr_shift, schedule_of
from maskdm.files import whole_folder
from maskdm.images.output import to_pil
from maskdm.models.class_names import class_numbers
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Diffusion, Recipe, Sampling
from maskdm.runs.find import grouped_index
from maskdm.runs.load import load_model
from maskdm.sampling.generate import generate
from maskdm.settings import changed


class MaskDMPipeline(DiffusionPipeline):
    """A trained model with all that sampling needs: denoiser, diffusion, sampling settings.

    Args:
        denoiser: the network, with averaged weights.
        scheduler: the same noise in diffusers' terms, for other tools; not used here. None where
            diffusers has no scheduler for it.
        diffusion: schedule, base_size and prediction that it was trained under, as in
            `recipe.Diffusion`; None = the defaults there.
        sampling: default settings, as in `recipe.Sampling`; None = the defaults there.

    Example:
        >>> pipeline = MaskDMPipeline.from_pretrained("runs/digits/model")  # doctest: +SKIP
        >>> images = pipeline(num_images=16, seed=0).images  # doctest: +SKIP
    """

    _optional_components = ["scheduler"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        diffusion: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(diffusion=diffusion or {}, sampling=sampling or {})

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """diffusers' reading of a model_index.json, also in the form of earlier versions."""
        return super().extract_init_dict(grouped_index(config_dict), **kwargs)

    @property
    def trained(self) -> TrainedModel:
        """The network and what it was trained under."""
        return TrainedModel(self.denoiser, Diffusion(**self.config.diffusion))

    @property
    def settings(self) -> Sampling:
        """The default sampling settings."""
        return Sampling(**self.config.sampling)

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
            ValueError: an unknown output type or class, or settings that the model cannot follow.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"unknown output_type {output_type!r}: known are pil, np")
        if labels is not None and not isinstance(labels, torch.Tensor):
            labels = class_numbers(self.denoiser.config, labels, num_images)
        settings = changed(settings or self.settings, steps=num_inference_steps)
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
        diffusion.model_dump(mode="json", include={"schedule", "base_size", "prediction"}),
        sampling.model_dump(mode="json"),
    )


def pipeline_of_run(model: ModelMixin, recipe: Recipe) -> MaskDMPipeline:
    """The pipeline of a finished run: its averaged model, with its recipe's settings."""
    return make_pipeline(TrainedModel(model, recipe.final_diffusion), recipe.sampling)


def diffusers_scheduler(
    diffusion: Diffusion, image_size: int | Sequence[int]
) -> SchedulerMixin | None:
    """A diffusion as diffusers' scheduler; None where diffusers has none for it.

    Its timestep i is our time t = i / 999 (for flows i / 1000).
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
    """Writes a pipeline folder, whole or not at all; an older one in its place is replaced.

    Raises OSError where the disk refuses.
    """
    with whole_folder(folder) as writing:
        pipeline.save_pretrained(writing)


def load(name: str | Path, note: Callable[[str], None] = print) -> MaskDMPipeline:
    """The pipeline of the model that a user names: a run's folder, `RUN@STAGE`, a checkpoint, an
    exported folder, or a Hub id.

    Args:
        name: see `runs.find.find_model`.
        note: is called with a line for each damaged checkpoint that is skipped.

    Raises:
        ValueError: there is no such model.

    Example:
        >>> images = load("runs/digits")(num_images=4).images  # doctest: +SKIP
    """
    loaded = load_model(name, note)
    return make_pipeline(loaded.trained, loaded.sampling)
