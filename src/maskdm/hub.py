"""Trained models as diffusers pipeline folders, and finding the model that a user names."""

# No postponed annotations here: diffusers reads a pipeline's signature to know its components.

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput
from safetensors import SafetensorError
from safetensors.torch import load_file

from maskdm.images.output import to_pil
from maskdm.models.uvit import UViT
from maskdm.recipe import Recipe, Sampling
from maskdm.recipe_files import load_recipe
from maskdm.sampling.generate import generate
from maskdm.sampling.samplers import make_scheduler
from maskdm.training.checkpoint import damage, find_checkpoint, replace_folder, system_error
from maskdm.training.trainer import build_model

DEFAULTS = Sampling()


class MaskDMPipeline(DiffusionPipeline):
    """A trained model with all that sampling needs: denoiser, scheduler, sampling settings.

    Args:
        denoiser: the U-ViT, with averaged weights.
        scheduler: betas and prediction type.
        sampler, steps, eta, clip_x0, batch_size: default settings, as in `recipe.Sampling`.
    """

    def __init__(
        self,
        denoiser: UViT,
        scheduler: DDIMScheduler,
        sampler: str = DEFAULTS.sampler,
        steps: int = DEFAULTS.steps,
        eta: float = DEFAULTS.eta,
        clip_x0: bool = DEFAULTS.clip_x0,
        batch_size: int = DEFAULTS.batch_size,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        # Scalars, one by one: a pipeline folder's model_index.json holds nothing else.
        self.register_to_config(
            sampler=sampler, steps=steps, eta=eta, clip_x0=clip_x0, batch_size=batch_size
        )

    @property
    def settings(self) -> Sampling:
        """The default sampling settings."""
        return Sampling(**{name: self.config[name] for name in Sampling.model_fields})

    def __call__(
        self,
        num_images: int = 1,
        seed: int = 0,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        labels: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draws images 0..num_images-1 of a seed.

        Args:
            num_images: how many.
            seed: names the sequence of images.
            num_inference_steps: network evaluations per image; None = the saved default.
            eta: DDIM's noise; None = the saved default.
            labels: classes, int64 (num_images,); None = 0, 1, 2, ... in turn.
            output_type: `pil`, or `np` for uint8 (num_images, H, W, C).

        Raises:
            ValueError: an unknown output type, or settings out of range.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"unknown output_type {output_type!r}: known are pil, np")
        asked = {"steps": num_inference_steps, "eta": eta}
        changes = {name: value for name, value in asked.items() if value is not None}
        settings = Sampling(**{**self.settings.model_dump(), **changes})
        images = generate(
            self.denoiser, self.scheduler, settings, list(range(num_images)), seed, labels
        )
        return ImagePipelineOutput(images if output_type == "np" else to_pil(images))


def make_pipeline(model: UViT, recipe: Recipe) -> MaskDMPipeline:
    """The pipeline of a recipe's (averaged) model."""
    scheduler = make_scheduler(recipe.diffusion)
    return MaskDMPipeline(model, scheduler, **recipe.sampling.model_dump(mode="json"))


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


def load_pipeline(
    name: str | Path, note: Callable[[str], None] = print
) -> tuple[MaskDMPipeline, str]:
    """Loads the model that a user names: a run's folder, a checkpoint, or an exported folder.

    Returns the pipeline and what it was loaded from, for the record: an unfinished run gives
    its newest checkpoint's averaged weights. `note` is told which damaged ones were passed over.

    Raises ValueError where there is no model.
    """
    path = Path(name)
    for folder in (path, path / "model"):
        if (folder / "model_index.json").is_file():
            return MaskDMPipeline.from_pretrained(str(folder), use_safetensors=True), str(folder)
    checkpoint = path if (path / "progress.json").is_file() else None
    if checkpoint is None and (path / "recipe.yaml").is_file():
        checkpoint = find_checkpoint(path / "checkpoints", note)
        if checkpoint is None:
            raise ValueError(f"{name} has no checkpoint yet: train it a little longer")
    if checkpoint is None:
        raise ValueError(
            f"{name} is no run folder, checkpoint or exported model"
            + ("" if path.exists() else " (it does not exist)")
        )
    if problem := damage(checkpoint):
        raise ValueError(f"checkpoint {checkpoint}: {problem}")
    recipe_path = checkpoint.resolve().parent.parent / "recipe.yaml"
    if not recipe_path.is_file():
        raise ValueError(f"checkpoint {checkpoint} has no run around it: {recipe_path} is missing")
    recipe = load_recipe(recipe_path)
    model = build_model(recipe).eval()
    model.load_state_dict(load_file(checkpoint / "ema.safetensors"))
    return make_pipeline(model, recipe), str(checkpoint)
