"""The settings of a whole run: data, model, diffusion, stages, sampling, evaluation.

A recipe is a YAML file. Each default is written once, here, with its help text; the command line
wins over the file; the resolved whole is saved with the run. Settings only: nothing here touches
an image or a tensor, so this file imports fast.
"""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import Field, model_validator

from maskdm.settings import Settings


class Data(Settings):
    """Where the images come from and how they are prepared."""

    source: str = "digits"
    """A folder or a zip file of images (class folders give labels), or `digits`."""
    size: int = Field(8, gt=0)
    """Side of the square images, in pixels."""
    channels: Literal[1, 3] = 3
    """1 = grey, 3 = RGB; every image is converted."""
    crop: Literal["center", "resize"] = "center"
    """center: resize the shorter side, cut the middle; resize: squeeze the whole image."""
    flip: bool = False
    """Mirror each image left-right with probability 1/2."""
    on_bad: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop the run, or be left out and listed."""


class Model(Settings):
    """The U-ViT (the paper's MaskDM-S is width 512, 8 heads; MaskDM-B 768, 12 heads)."""

    patch_size: int = Field(4, gt=0)
    """Side of a patch, in pixels."""
    embed_dim: int = Field(512, gt=0)
    """Width of the tokens."""
    depth: int = Field(13, ge=1)
    """Number of transformer blocks, an odd number: 13 = 6 in + 1 middle + 6 out."""
    num_heads: int = Field(8, gt=0)
    """Attention heads; they divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP over the width."""
    num_classes: int = Field(0, ge=0)
    """Classes of a conditional model; 0 = unconditional."""
    final_conv: bool = False
    """A 3x3 convolution on the output image (U-ViT has it; the paper drops it)."""

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.depth % 2 == 0:
            raise ValueError(
                f"depth {self.depth} is even, but blocks come as n in + 1 middle + n out: "
                f"use {self.depth - 1} or {self.depth + 1}"
            )
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of 2 x num_heads "
                f"= {2 * self.num_heads}"
            )
        return self


class Diffusion(Settings):
    """The noise, and what the network is asked for."""

    schedule: Literal["linear", "cosine"] = "linear"
    """DDPM noise schedule; the cosine is the stable one under 90 % masking (Appendix C)."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """What the network predicts: the noise, the clean image, or the velocity."""
    weighting: Literal["uniform", "min-snr"] = "uniform"
    """Loss weight over time: 1 (Eqs. 1 and 2), or the signal-to-noise ratio clipped."""
    snr_clip: float = Field(5.0, gt=0)
    """Where min-snr clips the signal-to-noise ratio."""


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
    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Images per optimizer step, over all devices."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Images per device at a time; gradients accumulate to the same step. None = all."""
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

    sampler: Literal["ddim"] = "ddim"
    """The solver."""
    steps: int = Field(50, gt=0)
    """Network evaluations per image; a divisor of the schedule's 1000."""
    eta: float = Field(0.0, ge=0, le=1)
    """DDIM's noise: 0 deterministic, 1 ancestral (the paper's lineage)."""
    clip_x0: bool = True
    """Clip the estimate of the clean image to [-1, 1] and re-derive the noise from it."""
    batch_size: int = Field(64, gt=0)
    """Images at a time per device."""

    @model_validator(mode="after")
    def _consistent(self) -> Sampling:
        if 1000 % self.steps:
            divisors = [n for n in range(1, 1001) if 1000 % n == 0]
            below = max(n for n in divisors if n < self.steps) if self.steps > 1 else 1
            above = min((n for n in divisors if n > self.steps), default=1000)
            raise ValueError(
                f"{self.steps} sampling steps do not divide the schedule's 1000 evenly: "
                f"use {below} or {above}"
            )
        return self


class Evaluation(Settings):
    """How generated images are compared with real ones."""

    features: Literal["pca"] = "pca"
    """pca: the leading principal components of the reference set's pixels."""
    num: int = Field(2000, ge=2)
    """Images to generate."""
    num_components: int = Field(32, gt=0)
    """Principal components kept (features pca)."""
    pixel_max: float = Field(255.0, gt=0)
    """Pixels are scaled to [0, pixel_max] before features pca; sets the distance's unit."""


class Recipe(Settings):
    """A whole run."""

    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    stages: tuple[Stage, ...] = Field(min_length=1)
    """Rows of the training, run in order; weights carry over."""
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    seed: int = Field(0, ge=0)
    """Fixes initial weights, image order, masks, times and noise."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute precision; auto = bf16 where the hardware is good at it, else fp32."""
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
    preview_steps: int = 25
    """Network evaluations for each of them; a divisor of the schedule's 1000."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        size, patch = self.data.size, self.model.patch_size
        if size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            ways_out = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"data.size {size} is not a multiple of model.patch_size {patch}: use {ways_out}"
            )
        Sampling(steps=self.preview_steps)  # the same rules
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ, but they are {', '.join(names)}")
        return self

    def to_yaml(self) -> str:
        """The recipe as YAML text; `load_recipe` of it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)  # escapes: exact
