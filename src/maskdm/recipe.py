"""The settings of a whole run: data, model, diffusion, stages, sampling, evaluation.

A recipe is a YAML file. Each default is written once, here, with its help text; the command line
wins over the file; the resolved whole is saved with the run. Settings only: nothing here touches
an image or a tensor, so this file imports fast.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from maskdm.recipe_data import Data as Data
from maskdm.recipe_evaluation import Evaluation as Evaluation
from maskdm.settings import Settings


class Model(Settings):
    """The backbone (the paper's MaskDM-S is a U-ViT of width 512, 8 heads; MaskDM-B 768, 12)."""

    kind: Literal["uvit", "dit", "unet2d"] = "uvit"
    """uvit: the paper's; dit, unet2d: diffusers' DiTTransformer2DModel and UNet2DModel, which
    need the whole grid: hidden patches are blanked, and masks save no compute."""
    patch_size: int = Field(4, gt=0)
    """Side of a patch, in pixels; with unet2d, of what masks hide."""
    embed_dim: int = Field(512, gt=0)
    """Width of the tokens (uvit, dit)."""
    depth: int = Field(13, ge=1)
    """Transformer blocks (uvit, dit); of uvit an odd number: 13 = 6 in + 1 middle + 6 out."""
    num_heads: int = Field(8, gt=0)
    """Attention heads (uvit, dit); they divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP over the width (uvit; dit has 4)."""
    num_classes: int = Field(0, ge=0)
    """Classes of a conditional model; 0 = unconditional."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Chance that training hides an image's class: classifier-free guidance needs it above 0."""
    final_conv: bool = False
    """A 3x3 convolution on the output image (U-ViT has it; the paper drops it; uvit only)."""
    options: dict[str, Any] = {}
    """Arguments of diffusers' class by their names there (dit, unet2d); set in a file."""

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.kind == "uvit" and self.options:
            raise ValueError(f"options are for kind dit or unet2d, not {self.kind}")
        for name in ("final_conv", "mlp_ratio"):
            if self.kind != "uvit" and getattr(self, name) != Model.model_fields[name].default:
                raise ValueError(f"{name} is for kind uvit, not {self.kind}")
        if self.kind == "uvit" and self.depth % 2 == 0:
            raise ValueError(
                f"depth {self.depth} is even, but blocks come as n in + 1 middle + n out: "
                f"use {self.depth - 1} or {self.depth + 1}"
            )
        if self.kind != "unet2d" and self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of 2 x num_heads "
                f"= {2 * self.num_heads}"
            )
        return self


class Diffusion(Settings):
    """The noise, and what the network is asked for."""

    schedule: Literal["linear", "cosine", "vp-sde", "vp-cosine", "flow"] = "linear"
    """Noise over time: DDPM's linear or cosine in 1000 steps (cosine is the stable one under 90 %
    masking, Appendix C), the continuous VP-SDE or VP-cosine, or the straight line of flows."""
    base_size: int | None = Field(None, gt=0)
    """Image size at which the schedule is as written; at others its log-SNR is shifted by
    2 ln(base_size / size), of rectangles 2 ln(base_size / sqrt(height x width)). None = never
    shifted; 64 is usual."""
    prediction: Literal["eps", "x0", "v", "flow"] = "eps"
    """What the network predicts: the noise, the clean image, the velocity, or noise - image."""
    loss_space: Literal["same", "eps", "x0", "v", "flow"] = "same"
    """In which of them the error is measured; same = as predicted."""
    loss_space_clip: float = Field(0.05, gt=0)
    """Least signal and noise scale used in rewriting the error for another loss_space."""
    weighting: Literal["uniform", "min-snr", "p2", "sigmoid"] = "uniform"
    """Loss weight over time: 1 (Eqs. 1 and 2), the signal-to-noise ratio clipped, or less of the
    nearly clean images in one of two ways (p2, sigmoid)."""
    snr_clip: float = Field(5.0, gt=0)
    """Where min-snr clips the signal-to-noise ratio."""
    p2_gamma: float = Field(1.0, ge=0)
    """Exponent of p2's weight (1 + SNR)^-gamma."""
    sigmoid_bias: float = 0.0
    """Log-SNR at which sigmoid's weight is a half."""
    time_sampling: Literal["uniform", "stratified", "logit-normal", "soft-truncation"] = "uniform"
    """How training draws times: evenly, evenly spread over each batch, mostly in the middle, or
    from a random least time up."""
    logit_mean: float = 0.0
    """Mean of logit(t) for logit-normal; above zero = more noise."""
    logit_std: float = Field(1.0, gt=0)
    """Its standard deviation."""

    @model_validator(mode="after")
    def _consistent(self) -> Diffusion:
        if self.weighting in ("min-snr", "p2", "sigmoid") and self.loss_space != "same":
            raise ValueError(
                f"weighting {self.weighting} fixes the weight of the error whatever space it is "
                "written in: use loss_space same, or weighting uniform"
            )
        return self


class Mask(Settings):
    """Which patches a stage hides."""

    kind: Literal["patch", "block", "crop", "none"] = "none"
    """patch: single patches; block: squares of patches; crop: all but one square; none."""
    rate: float = Field(0.0, ge=0, lt=1)
    """Fraction of the image that is hidden."""
    block: int = Field(2, gt=0)
    """Side of a block, in patches (kind block)."""

    @model_validator(mode="after")
    def _consistent(self) -> Mask:
        if self.kind == "none" and self.rate:
            raise ValueError(
                f"mask kind none hides nothing, but rate is {self.rate:g}: "
                "use rate 0, or kind patch, block or crop"
            )
        return self


class Stage(Settings):
    """A row of the training: a mask and how long, how fast and on how many images."""

    name: str = Field(min_length=1)
    """Name in logs and plots."""
    mask: Mask = Mask()
    schedule: Literal["linear", "cosine", "vp-sde", "vp-cosine", "flow"] | None = None
    """Noise schedule of this stage; None = the recipe's (Table 2 pre-trains under another)."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Images per optimizer step, over all devices."""
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Images per device at a time; gradients accumulate to the same step. None = all; auto = as
    many as fit in the GPU's memory."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or decay to zero at the stage's end."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    betas: tuple[float, float] = (0.99, 0.99)
    """AdamW's moment decays (the paper's)."""
    weight_decay: float = Field(0.03, ge=0)
    """AdamW's decoupled weight decay (U-ViT's)."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; None = no clipping."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay per step of the moving average; it starts from the stage's first weights."""
    start_from: Literal["raw", "ema"] = "raw"
    """Weights taken over from the stage before: as trained, or averaged."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more compute."""

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} outlasts the stage's {self.steps} steps"
            )
        return self


class Sampling(Settings):
    """How images are drawn from the model (previews, and defaults of `maskdm sample`)."""

    sampler: Literal["ddpm", "ddim", "dpm-solver", "unipc", "heun", "euler-maruyama"] = "ddim"
    """The solver: dpm-solver (++ 2M) and unipc are good in 10 to 25 steps, ddpm and
    euler-maruyama want hundreds."""
    steps: int = Field(50, gt=0)
    """Solver steps per image, each a network evaluation (of heun two)."""
    spacing: Literal["uniform", "log-snr", "karras"] = "uniform"
    """Where the steps lie: evenly in time, evenly in log-SNR, or by Karras et al.'s rho = 7."""
    eta: float = Field(0.0, ge=0, le=1)
    """DDIM's noise: 0 deterministic, 1 ancestral (the paper's lineage)."""
    clip_x0: bool = True
    """Clip the estimate of the clean image to [-1, 1] and re-derive the noise from it."""
    guidance: Literal["none", "classifier-free", "autoguidance", "sparse"] = "none"
    """Away from: images of no class; a weaker model; the same model seeing fewer patches."""
    guidance_scale: float = Field(1.5, ge=0)
    """How far: 1 = as without guidance, 2 = twice as far from the weak answer."""
    guidance_start: float = Field(0.0, ge=0, le=1)
    """Guidance acts at times t from here (0 = clean images)"""
    guidance_end: float = Field(1.0, ge=0, le=1)
    """to here (1 = pure noise)."""
    guidance_weak: str = "primer"
    """Weak model of autoguidance: primer = the run's own before its last stage, or any RUN."""
    guidance_rate: float = Field(0.5, gt=0, lt=1)
    """Fraction of the patches that sparse guidance hides from the weak answer."""
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Images at a time per device; auto = as many as keep it busy, fewer where memory runs out."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network (torch.compile); auto = on a GPU, where there is work for minutes."""

    HOW_FAST: ClassVar[tuple[str, ...]] = ("batch_size", "compile")
    """Settings that change no image, but for rounding."""

    @model_validator(mode="after")
    def _consistent(self) -> Sampling:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is ddim's noise; sampler {self.sampler} has none: use eta 0")
        if self.guidance_start >= self.guidance_end:
            raise ValueError(
                f"guidance_start {self.guidance_start:g} is not below guidance_end "
                f"{self.guidance_end:g}"
            )
        return self


class Recipe(Settings):
    """A whole run."""

    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    stages: tuple[Stage, ...] = Field(min_length=1)
    """Rows of the training, run in order; weights carry over."""
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    init: str | None = None
    """Start from another model's averaged weights: a run's folder, a checkpoint, an exported
    model or a Hub id. None = from random ones."""
    seed: int = Field(0, ge=0)
    """Fixes initial weights, image order, masks, times and noise."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute precision; auto = bf16 where the hardware is good at it, else fp32."""
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    """Compile the network, once a stage (torch.compile); auto = on a GPU; graphs = also replay
    kernels as a CUDA graph: for steps too small to keep the GPU busy, on one GPU."""
    log_every: int = Field(100, gt=0)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = Field(5000, gt=0)
    """Steps between two checkpoints; each stage's end is always one."""
    keep_checkpoints: int = Field(2, gt=0)
    """Latest checkpoints kept, besides each stage's end."""
    preview_every: int = Field(5000, gt=0)
    """Steps between two preview grids; each stage's end always draws one."""
    num_previews: int = Field(36, ge=0)
    """Images in a preview grid; 0 = no previews."""
    preview_steps: int = Field(25, gt=0)
    """Solver steps for each of them, of DPM-Solver++, without guidance."""
    evaluate_every: int = Field(10_000, ge=0)
    """Steps between two lines of quality.jsonl, each after a checkpoint; each stage's end always
    makes one. 0 = none at all."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        patch = self.model.patch_size
        for side in self.data.shape[:2]:
            if side % patch:
                below, above = side // patch * patch, (side // patch + 1) * patch
                ways_out = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"data.size {side} is not a multiple of model.patch_size {patch}: "
                    f"use {ways_out}"
                )
        if self.model.kind == "dit" and isinstance(self.data.size, tuple):
            raise ValueError(
                f"model.kind dit takes square images only, not {self.data.shape[0]}x"
                f"{self.data.shape[1]}: use uvit or unet2d, or data.size {min(self.data.size)}"
            )
        asked = {self.diffusion_of(stage).schedule: self.preview_steps for stage in self.stages}
        last = self.final_diffusion.schedule
        asked[last] = max(asked[last], self.sampling.steps)
        for schedule, steps in asked.items():
            if steps > 1000 and schedule in ("linear", "cosine"):
                raise ValueError(
                    f"schedule {schedule} has 1000 times, but sampling asks for {steps} steps"
                )
        if self.sampling.guidance == "classifier-free" and not (
            self.model.num_classes and self.model.label_dropout
        ):
            raise ValueError(
                "classifier-free guidance needs model.num_classes and model.label_dropout above "
                "0; autoguidance and sparse need no classes"
            )
        if (
            self.sampling.guidance == "autoguidance"
            and self.sampling.guidance_weak == "primer"
            and len(self.stages) == 1
        ):
            raise ValueError(
                "autoguidance by the primer needs two stages, and there is one: name another "
                "model with sampling.guidance_weak"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ, but they are {', '.join(names)}")
        return self

    def diffusion_of(self, stage: Stage) -> Diffusion:
        """The diffusion that a stage trains under: the recipe's, on the stage's schedule."""
        if stage.schedule is None:
            return self.diffusion
        return Diffusion(**{**self.diffusion.model_dump(), "schedule": stage.schedule})

    @property
    def final_diffusion(self) -> Diffusion:
        """The diffusion of the finished model: the last stage's."""
        return self.diffusion_of(self.stages[-1])

    def to_yaml(self) -> str:
        """The recipe as YAML text; `load_recipe` of it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)  # escapes: exact
