"""A diffusers pipeline for a network on raw pixels: classes, guidance, any noise schedule."""

# No postponed annotations here: diffusers reads a pipeline's signature to know its components.

import copy
import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from maskdm.diffusion.prediction import x0_and_noise_from

LAST_TIMESTEP = 999.0  # of a network, at t = 1
LEAST_SCALE = 4.5e-5  # of signal and noise at the ends of a flow, where one of them would vanish


class PixelPipeline(DiffusionPipeline):
    """Draws images with a network on raw pixels.

    Args:
        scheduler: any of diffusers' schedulers that has the noise of the training; make another
            one by `from_config(pipeline.scheduler.config)`.
        unet, transformer: the network, one of the two: `network(x_t, 999 t, class_labels)`.
        prediction: what it answers: eps, x0, v, or flow (noise - x0).
        clip_x0: clip the estimate of the clean image to [-1, 1].
        num_classes: classes of a conditional network; 0 = unconditional.
        knows_no_class: whether the label num_classes says "no class", which guidance needs.
        id2label: names of the classes by their numbers, as text; None = unknown.
        flow_shift: shift of the time of a flow; None = the noise is no flow's.
        num_inference_steps, guidance_scale: defaults of a call.
        guidance_start, guidance_end: times between which guidance acts; 0 = clean, 1 = noise.
        eta: default of a call, for schedulers that take it.
    """

    model_cpu_offload_seq = "unet->transformer"
    _optional_components = ["unet", "transformer"]  # noqa: RUF012 (diffusers' own form)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: ModelMixin | None = None,
        transformer: ModelMixin | None = None,
        prediction: str = "eps",
        clip_x0: bool = True,
        num_classes: int = 0,
        knows_no_class: bool = False,
        id2label: dict[str, str] | None = None,
        flow_shift: float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        eta: float = 0.0,
    ):
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer)
        self.register_to_config(
            prediction=prediction,
            clip_x0=clip_x0,
            num_classes=num_classes,
            knows_no_class=knows_no_class,
            id2label=id2label,
            flow_shift=flow_shift,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            eta=eta,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | Sequence[int | str] | int | str | None = None,
        guidance_scale: float | None = None,
        generator: Generator | list[Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images.

        Args:
            batch_size: how many.
            class_labels: the class of all images, or of each: numbers or names. None = all classes
                in turn.
            guidance_scale: of classifier-free guidance; 1 = none.
            generator: of all random numbers, or one for each image.
            num_inference_steps: solver steps.
            eta: noise of schedulers that take it, DDIM's for one; None = the training's recipe's.
            output_type: `pil`, `np` (float 0 to 1, B H W C) or `pt` (float 0 to 1, B C H W).
            return_dict: give an `ImagePipelineOutput`; else a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": x_t}) after each
                step; may return other latents.
            callback_on_step_end_tensor_inputs: `latents`, or none.

        Raises:
            ValueError: an unknown output type or class, another number of labels or generators, or
                guidance, eta or a scheduler that the model cannot follow.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"unknown output_type {output_type!r}: known are pil, np, pt")
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1 and not self.config.knows_no_class:
            raise ValueError("guidance needs a model that was trained with and without classes")
        if (self.config.flow_shift is not None) != is_flow(self.scheduler):
            raise ValueError(f"{type(self.scheduler).__name__} has not the noise of this model")
        network = self._network
        size, device = network.config.sample_size, self._execution_device
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images: give each one")
        labels = self._labels(class_labels, batch_size, device)
        noise = randn_tensor(
            (batch_size, network.config.in_channels, *sides), generator, device, torch.float32
        )
        steps = num_inference_steps or self.config.num_inference_steps
        if eta is None:
            eta = self.config.eta if takes_eta(self.scheduler) else 0.0

        def after_step(step: int, timestep: Tensor, x: Tensor) -> Tensor:
            bar.update()
            if callback_on_step_end is None:
                return x
            shown = {"latents": x} if "latents" in callback_on_step_end_tensor_inputs else {}
            changed: Tensor = callback_on_step_end(self, step, timestep, shown).get("latents", x)
            return changed

        with self.progress_bar(total=steps) as bar:
            denoise = self._denoiser(labels, scale)
            x = follow(self.scheduler, denoise, noise, steps, generator, eta, after_step)
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.movedim(1, 3).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    @property
    def _network(self) -> Any:
        return self.unet if self.unet is not None else self.transformer

    def _denoiser(self, labels: Tensor | None, scale: float) -> Callable[..., Tensor]:
        """The clean image, given x_t, its scales of signal and noise, and a scheduler's timestep.

        Guidance (Ho & Salimans 2022, Eq. 6) comes before clipping.
        """
        config, network = self.config, self._network
        none = None if labels is None else torch.full_like(labels, config.num_classes)

        def answer(x_t: Tensor, t: float, labels: Tensor | None) -> Tensor:
            timestep = torch.full((len(x_t),), LAST_TIMESTEP * t, device=x_t.device)
            if labels is None and self.transformer is not None:  # it always has a class
                labels = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
            x_t = x_t.to(network.dtype)
            answers: Tensor = network(x_t, timestep, class_labels=labels, return_dict=False)[0]
            return answers.float()

        def denoise(x_t: Tensor, alpha: float, sigma: float, timestep: float) -> Tensor:
            t = timestep / LAST_TIMESTEP
            if config.flow_shift is not None:  # sigma = shift t / (1 + (shift - 1) t)
                t = sigma / (config.flow_shift - (config.flow_shift - 1) * sigma)
            output = answer(x_t, t, labels)
            if scale != 1 and config.guidance_start <= t <= config.guidance_end:
                weak = answer(x_t, t, none)
                output = weak + scale * (output - weak)
            x0 = x0_and_noise_from(config.prediction, output, x_t, alpha, sigma)[0]
            return x0.clamp(-1, 1) if config.clip_x0 else x0

        return denoise

    def _labels(self, given: Any, num: int, device: torch.device) -> Tensor | None:
        """Classes of images by number or name, all in turn by default: int64 (num,)."""
        num_classes = self.config.num_classes
        if not num_classes:
            if given is not None:
                raise ValueError("this model has no classes: it takes no class_labels")
            return None
        if given is None:
            return torch.arange(num, device=device) % num_classes
        numbers = {name: int(number) for number, name in (self.config.id2label or {}).items()}
        each = [given] * num if isinstance(given, int | str) else list(given)
        if unknown := [one for one in each if isinstance(one, str) and one not in numbers]:
            raise ValueError(
                f"no class {unknown[0]!r}: known are {', '.join(numbers) or 'numbers'}"
            )
        labels = torch.tensor([int(numbers.get(one, one)) for one in each], device=device)
        most = num_classes if self.config.knows_no_class else num_classes - 1
        if len(labels) != num or labels.min() < 0 or labels.max() > most:
            raise ValueError(f"class_labels must be {num} numbers from 0 to {most}, or names")
        return labels

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As any of diffusers' pipelines, with this file beside it, and named in its index."""
        super().save_pretrained(save_directory, *args, **kwargs)
        index = Path(save_directory) / "model_index.json"
        settings = json.loads(index.read_text("utf-8"))
        settings["_class_name"] = ["pixel_pipeline", "PixelPipeline"]
        index.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        shutil.copyfile(__file__, Path(save_directory) / "pixel_pipeline.py")


def takes_eta(scheduler: Any) -> bool:
    """Whether a scheduler adds as much noise as its `eta` says."""
    return "eta" in inspect.signature(scheduler.step).parameters


def follow(
    scheduler: Any,
    denoise: Callable[[Tensor, float, float, float], Tensor],
    noise: Tensor,
    num_steps: int,
    generator: Generator | list[Generator] | None = None,
    eta: float = 0.0,
    after_step: Callable[[int, Tensor, Tensor], Tensor] = lambda step, timestep, x: x,
) -> Tensor:
    """Follows one of diffusers' schedulers from noise to images, of any shape (B, ...).

    Args:
        scheduler: stays as it is; a copy takes the steps.
        denoise: (x_t, alpha, sigma, timestep) -> the clean image; x_t = alpha x0 + sigma noise.
        noise: standard normal, float (B, ...).
        num_steps: solver steps.
        generator: of the noise that some schedulers add, or one for each image.
        eta: how much of it, for schedulers that take it.
        after_step: (number of the step, timestep, x) -> what to go on with.

    Raises:
        ValueError: a scheduler of noise that is neither variance-preserving nor a flow, one
            without eta, or one that cannot take these steps.
    """
    solver, flow = copy.deepcopy(scheduler), is_flow(scheduler)
    if not flow and (not hasattr(solver, "alphas_cumprod") or solver.config.trained_betas is None):
        raise ValueError(
            f"{type(solver).__name__} has not the noise of this model: make it by "
            "from_config(pipeline.scheduler.config), or use another one"
        )
    if not flow:  # exact at both ends of the noise, and known to all
        solver.register_to_config(prediction_type="v_prediction")
    if flow and "sigmas" in inspect.signature(solver.set_timesteps).parameters:
        solver.set_timesteps(sigmas=[1 - step / num_steps for step in range(num_steps)])
    else:
        solver.set_timesteps(num_steps)
    _refuse_inexact(solver, num_steps)
    known = inspect.signature(solver.step).parameters
    if eta and not takes_eta(solver):
        raise ValueError(f"eta is DDIM's noise; {type(solver).__name__} has none: use eta 0")
    if eta:  # in fp32 the root of what its noise leaves would be NaN near pure noise
        solver.alphas_cumprod = solver.alphas_cumprod.double()
    options = {"generator": generator, "eta": eta}
    options = {name: value for name, value in options.items() if name in known}
    x = noise if flow else noise * solver.init_noise_sigma
    for step, timestep in enumerate(solver.timesteps):
        x_t = x if flow else solver.scale_model_input(x, timestep)
        alpha, sigma = scales(solver, timestep.item())
        x0 = denoise(x_t, alpha, sigma, timestep.item())
        eps = (x_t - alpha * x0) / sigma
        answer = (x_t - x0) / sigma if flow else alpha * eps - sigma * x0
        x = solver.step(answer, timestep, x, **options, return_dict=False)[0]
        x = after_step(step, timestep, x)
    if not x.isfinite().all():
        raise ValueError(f"{type(solver).__name__} divides by 0 on this noise: use another one")
    return x


def _refuse_inexact(solver: Any, num_steps: int) -> None:
    """Raises ValueError where a scheduler of diffusers would draw from another distribution.

    Heun's first step in sigma / alpha is too long where it begins at almost pure noise (20,000 on
    the cosine schedule): the mean of the slopes at its two ends says nothing of what is between
    them. DDIM's steps are rounded down to whole timesteps, so that they do not reach the next one.
    """
    name, num_times = type(solver).__name__, solver.config.num_train_timesteps
    stride = num_times // num_steps
    if name == "DDIMScheduler" and num_times / num_steps - stride > 0.05 * stride:
        raise ValueError(
            f"DDIMScheduler in {num_steps} steps leaves out part of the noise: use "
            f"{num_times // (stride + 1)} or {num_times // stride}, or another scheduler"
        )
    if name == "HeunDiscreteScheduler" and solver.sigmas[0] > 1000:
        raise ValueError(
            f"HeunDiscreteScheduler steps in sigma / alpha, which begins at {solver.sigmas[0]:,.0f}"
            " on this noise: its images would be far off, so use another one"
        )


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler goes along the straight line x_t = (1 - sigma) x0 + sigma noise."""
    named = type(scheduler).__name__.startswith("FlowMatch")
    return named or bool(scheduler.config.get("use_flow_sigmas", False))


def scales(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Scales alpha of the signal and sigma of the noise at a timestep, which may be fractional."""
    if is_flow(scheduler):
        sigma = timestep / scheduler.config.num_train_timesteps
        sigma = min(max(sigma, LEAST_SCALE), 1 - LEAST_SCALE)
        return 1 - sigma, sigma
    power = scheduler.alphas_cumprod.double()
    log_snr = power.log() - (-power).log1p()
    before = min(int(timestep), len(log_snr) - 2)
    level = torch.lerp(log_snr[before], log_snr[before + 1], timestep - before)
    return level.sigmoid().sqrt().item(), (-level).sigmoid().sqrt().item()
