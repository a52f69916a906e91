"""Trained models as diffusers pipelines."""

# No postponed annotations here: diffusers reads a pipeline's signature to know its components.

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from maskdm.export.pixel_pipeline import follow, takes_eta
from maskdm.export.portable import component_of, forget_origin, save_portable
from maskdm.export.schedulers import diffusers_scheduler, refuse_scheduler
from maskdm.families import SAMPLERS
from maskdm.files import whole_folder
from maskdm.images.output import to_pil
from maskdm.models.class_names import class_numbers
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Diffusion, Recipe, Sampling
from maskdm.runs.find import SETTINGS, exported_folder, grouped_index, read_index
from maskdm.runs.load import load_model, load_network
from maskdm.sampling.denoise import Denoise
from maskdm.sampling.generate import Given, Randomness, Solve, generate, to_uint8
from maskdm.settings import changed
from maskdm.tokens import patchify, unpatchify

LAST_TIMESTEP = 999.0  # diffusers' name for t = 1
OUTPUTS = ("pil", "np", "pt")
Hook = Callable[[int, Tensor, Tensor], Tensor]
"""(step, timestep, patches x_t) -> the patches to go on with."""


class MaskDMPipeline(DiffusionPipeline):
    """A trained model with all that sampling needs: denoiser, diffusion, sampling settings.

    Args:
        denoiser: the network, with averaged weights.
        scheduler: one of diffusers' that draws the images; it must have the noise that the model
            was trained on. None = the sampler of the settings draws; `pipeline.scheduler` is then
            the model's noise in diffusers' terms, and a scheduler that is put in its place draws.
        diffusion: schedule, base_size and prediction that it was trained under, as in
            `recipe.Diffusion`; None = the defaults there.
        sampling: default settings, as in `recipe.Sampling`; None = the defaults there.

    Example:
        >>> pipeline = MaskDMPipeline.from_pretrained("runs/digits/model")  # doctest: +SKIP
        >>> images = pipeline(batch_size=16, seed=0).images  # doctest: +SKIP
    """

    model_cpu_offload_seq = "denoiser"
    _optional_components = ["scheduler"]  # noqa: RUF012 (diffusers' own form)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin | None = None,
        diffusion: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
    ):
        super().__init__()
        diffusion, sampling = diffusion or {}, sampling or {}
        own = diffusers_scheduler(
            Diffusion(**diffusion), denoiser.image_shape[:2], Sampling(**sampling).clip_x0
        )
        self.register_modules(denoiser=denoiser, scheduler=scheduler or own)
        self.register_to_config(diffusion=diffusion, sampling=sampling)
        self._own_scheduler = own

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "MaskDMPipeline":
        """The pipeline of an exported folder or a Hub id.

        Args:
            name: the folder, or `owner/name`.
            options: diffusers' `dtype` (or `torch_dtype`) and `variant`; `scheduler` and
                `denoiser` in place of the saved ones.

        Raises:
            ValueError: there is no such model, or another option.
        """
        folder = exported_folder(name)
        if not (folder / SETTINGS).is_file():  # of an earlier version, or with a network of yours
            pipeline: MaskDMPipeline = super().from_pretrained(folder, **options)
            is_other = type(pipeline.scheduler) is not type(pipeline._own_scheduler)
            if not is_other and "scheduler" not in options:
                pipeline.scheduler = pipeline._own_scheduler
            return pipeline
        index = read_index(folder)
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        variant, scheduler = options.pop("variant", None), options.pop("scheduler", None)
        denoiser = options.pop("denoiser", None)
        if options:
            raise ValueError(
                f"{', '.join(options)}: MaskDMPipeline.from_pretrained takes dtype, variant, "
                "scheduler, denoiser; DiffusionPipeline.from_pretrained takes all of diffusers'"
            )
        if denoiser is None:
            denoiser = load_network(folder, index, variant).eval()
            denoiser = denoiser if dtype is None else denoiser.to(dtype)
        if scheduler is None and index.get("is_scheduler_followed", False):
            kind = getattr(diffusers, DiffusionPipeline.load_config(folder)["scheduler"][1])
            scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        pipeline = cls(denoiser, scheduler, index["diffusion"], index["sampling"])
        pipeline.register_to_config(_name_or_path=str(name))
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> "MaskDMPipeline":
        """Another pipeline with the same network.

        Args:
            pipeline: a `MaskDMPipeline`.
            options: other arguments of this class; `dtype` for the network, which both share.

        Raises ValueError for a pipeline of another kind.
        """
        if not isinstance(pipeline, MaskDMPipeline):
            raise ValueError(f"from_pipe needs a MaskDMPipeline, not {type(pipeline).__name__}")
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        parts = {name: pipeline.config[name] for name in ("diffusion", "sampling")}
        made = cls(**{**pipeline.components, **parts, **options})
        if "scheduler" not in options:
            made._own_scheduler = pipeline._own_scheduler
        return made if dtype is None else made.to(dtype)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """diffusers' reading of a model_index.json, also in the form of earlier versions."""
        return super().extract_init_dict(grouped_index(config_dict), **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Writes a folder that diffusers opens without this package.

        Networks of your own (`families.BACKBONES`) need the package to be opened.

        Args:
            save_directory: the folder; files in it are replaced.
            safe_serialization: as safetensors.
            variant: goes into the names of the weights' files: `fp16`.
            max_shard_size: of a file of weights.

        Raises OSError where the disk refuses.
        """
        options: dict[str, Any] = {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
        }
        component, folder = component_of(self.denoiser), Path(save_directory)
        if component is None:
            super().save_pretrained(folder, **options)
            for file in (folder / "model_index.json", *folder.glob("*/config.json")):
                forget_origin(file)
            return
        folder.mkdir(parents=True, exist_ok=True)
        is_followed = self.scheduler is not self._own_scheduler
        parts = (self.trained, self.settings, self.scheduler, is_followed)
        save_portable(folder, component, *parts, **options)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: the networks use weights of layers that they do not call."""
        raise ValueError(
            "MaskDMPipeline cannot be offloaded layer by layer: use enable_model_cpu_offload"
        )

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
        batch_size: int = 1,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        class_labels: Tensor | Sequence[int | str] | int | str | None = None,
        guidance_scale: float | None = None,
        generator: Generator | list[Generator] | None = None,
        eta: float | None = None,
        settings: Sampling | None = None,
        weak: "MaskDMPipeline | None" = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images 0..batch_size-1 of a seed, or images of generators.

        Args:
            batch_size: how many. So many at a time as fit: `settings.batch_size`.
            seed: names the sequence of images; image i depends on it and on i alone. None = 0.
            num_inference_steps: solver steps; None = as the settings say.
            class_labels: the class of all images, or of each: numbers or names. None = 0, 1, 2,
                ... in turn.
            guidance_scale: scale of the settings' guidance, of classifier-free guidance where they
                have none; 1 = no guidance. None = as the settings say.
            generator: of all random numbers, or one for each image; instead of a seed.
            eta: noise of the sampler ddim, or of a scheduler that takes it; None = the settings'.
            settings: sampler, guidance and the rest; None = the saved ones. With a scheduler other
                than the model's own: steps, guidance and clipping.
            weak: the weak model of autoguidance.
            output_type: `pil` for Pillow images of mode L, LA, RGB or RGBA; `np` for float32 0 to
                1, (B, H, W, C), whose last axis is grey, grey and alpha, RGB or RGBA; `pt` for
                the same as a tensor (B, C, H, W) on the network's device.
            return_dict: give an `ImagePipelineOutput`; else a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": x_t}), x_t
                float32 (B, C, H, W), after each step of so many images as are drawn at a time. May
                return other latents.
            callback_on_step_end_tensor_inputs: `latents`, or none.

        Raises:
            ValueError: an unknown output type or class, a seed and a generator, another number of
                generators or labels than images, a scheduler of other noise, or settings that the
                model cannot follow.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"unknown output_type {output_type!r}: known are {', '.join(OUTPUTS)}")
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs: only latents, not {unknown}")
        settings = changed(settings or self.settings, steps=num_inference_steps)
        settings = _with_scale(settings, guidance_scale)
        config, labels = self.denoiser.config, None
        if class_labels is not None:
            labels = class_numbers(config, class_labels, batch_size)
        shown = callback_on_step_end_tensor_inputs
        hook = self._hook(callback_on_step_end, shown) if callback_on_step_end else None
        if self.scheduler is self._own_scheduler:
            settings = changed(settings, eta=eta)
            solve = self._sampler(settings, hook)
        else:
            refuse_scheduler(self.scheduler, self._own_scheduler)
            if eta is None:
                eta = settings.eta if takes_eta(self.scheduler) else 0.0
            solve = self._follower(settings, eta, hook)
        images = generate(
            self.trained,
            settings,
            list(range(batch_size)),
            self._randomness(seed, generator, batch_size),
            labels,
            weak=weak.trained if weak is not None else None,
            solve=solve,
            finish=to_uint8 if output_type == "pil" else _to_unit,
        )
        self.maybe_free_model_hooks()
        result: Any = to_pil(images) if output_type == "pil" else images
        if output_type == "pt":
            result = torch.from_numpy(images).movedim(3, 1).to(self._execution_device)
        return ImagePipelineOutput(result) if return_dict else (result,)

    def _randomness(
        self, seed: int | None, generator: Generator | list[Generator] | None, num: int
    ) -> int | Randomness:
        """Random numbers by seed or generators; noise is drawn as diffusers' pipelines draw it."""
        if generator is None:
            return seed or 0
        if seed is not None:
            raise ValueError("seed and generator: give one of them")
        if isinstance(generator, list) and len(generator) != num:
            raise ValueError(f"{len(generator)} generators for {num} images: give one for each")
        height, width, channels = self.denoiser.image_shape
        noise = randn_tensor(
            (num, channels, height, width), generator, self._execution_device, torch.float32
        )
        each = generator if isinstance(generator, list) else [generator] * num
        return Given(noise.movedim(1, 3), each)

    def _sampler(self, settings: Sampling, hook: Hook | None) -> Solve:
        """The sampler of the settings, with a progress bar and a callback."""
        schedule, run = self.trained.schedule, SAMPLERS[settings.sampler].run

        def solve(
            denoise: Denoise, noise: Tensor, levels: Tensor, generators: list[Generator]
        ) -> Tensor:
            noisiest = -math.inf

            def counted(x: Tensor, log_snr: float) -> Tensor:
                nonlocal noisiest
                if log_snr > noisiest:  # a step may evaluate twice
                    noisiest = log_snr
                    bar.update()
                return denoise(x, log_snr)

            def after_step(step: int, x: Tensor) -> Tensor:
                assert hook is not None
                timestep = torch.tensor(LAST_TIMESTEP * schedule.time_of(levels[step].item()))
                return hook(step, timestep, x)

            more = {} if hook is None else {"after_step": after_step}
            with self.progress_bar(total=len(levels)) as bar:
                patches: Tensor = run(counted, noise, levels, settings, generators, **more)
            return patches

        return solve

    def _follower(self, settings: Sampling, eta: float, hook: Hook | None) -> Solve:
        """The scheduler that was put in place of the model's own."""

        def solve(
            denoise: Denoise, noise: Tensor, levels: Tensor, generators: list[Generator]
        ) -> Tensor:
            def clean(x_t: Tensor, alpha: float, sigma: float, timestep: float) -> Tensor:
                return denoise(x_t / math.hypot(alpha, sigma), 2 * math.log(alpha / sigma))

            def after_step(step: int, timestep: Tensor, x: Tensor) -> Tensor:
                bar.update()
                return x if hook is None else hook(step, timestep, x)

            with self.progress_bar(total=settings.steps) as bar:
                return follow(
                    self.scheduler, clean, noise, settings.steps, generators, eta, after_step
                )

        return solve

    def _hook(self, callback: Callable[..., Any], shown: Sequence[str]) -> Hook:
        """A callback, which sees patches as images."""

        def hook(step: int, timestep: Tensor, x: Tensor) -> Tensor:
            images = unpatchify(x, self.denoiser.patch_size, self.denoiser.grid).movedim(3, 1)
            tensors = {"latents": images} if "latents" in shown else {}
            answer = callback(self, step, timestep, tensors) or {}
            latents: Tensor = answer.get("latents", images)
            return patchify(latents.movedim(1, 3), self.denoiser.patch_size)

        return hook


def _with_scale(settings: Sampling, scale: float | None) -> Sampling:
    """Settings with another scale of guidance; classifier-free, where they have no guidance."""
    if scale is None:
        return settings
    guidance = settings.guidance
    kind = "classifier-free" if guidance.kind == "none" else guidance.kind
    if scale == 1:
        return changed(settings, guidance=changed(guidance, kind="none"))
    return changed(settings, guidance=changed(guidance, kind=kind, scale=scale))


def _to_unit(images: Tensor) -> Tensor:
    """Pixels from [-1, 1] to [0, 1], clipped: float32 of the same shape."""
    return (images / 2 + 0.5).clamp(0, 1).float()


def make_pipeline(trained: TrainedModel, sampling: Sampling) -> MaskDMPipeline:
    """The pipeline of a trained (averaged) model with default sampling settings."""
    return MaskDMPipeline(
        trained.model,
        None,
        trained.diffusion.model_dump(mode="json", include={"schedule", "base_size", "prediction"}),
        sampling.model_dump(mode="json"),
    )


def pipeline_of_run(model: ModelMixin, recipe: Recipe) -> MaskDMPipeline:
    """The pipeline of a finished run: its averaged model, with its recipe's settings."""
    return make_pipeline(TrainedModel(model, recipe.final_diffusion), recipe.sampling)


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
        >>> images = load("runs/digits")(batch_size=4).images  # doctest: +SKIP
    """
    loaded = load_model(name, note)
    return make_pipeline(loaded.trained, loaded.sampling)
