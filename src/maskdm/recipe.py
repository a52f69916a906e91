"""The settings of a whole run: data, model, diffusion, stages, sampling, evaluation.

A recipe is a YAML file. Each default is written once, here, with its help text; the command line
wins over the file; the resolved whole is saved with the run. Settings only: nothing here touches
an image or a tensor, so this file imports fast. What a setting can name is in `families.py`.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, ClassVar, Literal

import tyro
import yaml
from pydantic import Field, field_validator, model_validator

from maskdm import families
from maskdm.choices import choice, helped
from maskdm.families import BACKBONES, MASKS, SAMPLERS, SCHEDULES
from maskdm.recipe_data import Data as Data
from maskdm.recipe_evaluation import Evaluation as Evaluation
from maskdm.recipe_length import Budget as Budget
from maskdm.recipe_length import SomeSteps, Steps, steps_of
from maskdm.settings import Settings, changed


class Model(Settings):
    """The backbone (the paper's MaskDM-S is a U-ViT of width 512, 8 heads; MaskDM-B 768, 12)."""

    kind: families.BackboneName = choice("uvit", BACKBONES, "The network.")
    patch_size: int = Field(4, gt=0)
    """Side of a patch, in pixels; for unet2d the side of what masks hide."""
    size: families.SizeName | None = Field(
        None,
        description=helped(
            "Sets embed_dim, depth and num_heads, and multiplies the stages' lr by 96 / embed_dim.",
            families.SIZES,
        ),
    )
    embed_dim: int = Field(512, gt=0, le=2**16)
    """Width of the tokens (uvit, vit, dit)."""
    depth: int = Field(13, ge=1, le=1000)
    """Transformer blocks (uvit, vit, dit); for uvit an odd number: 13 = 6 in + 1 middle + 6 out."""
    num_heads: int = Field(8, gt=0)
    """Attention heads (uvit, vit, dit); they divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLP over the width (uvit, vit; dit has 4)."""
    num_classes: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Classes of a conditional model; 0 = unconditional; auto = as many as the images have."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Chance that training hides an image's class: classifier-free guidance needs it above 0."""
    final_conv: bool = False
    """A 3x3 convolution on the output image (U-ViT has it; the paper drops it; uvit only)."""
    patch_init: Literal["normal", "conv"] = "normal"
    """Initial weights of the patch embedding (uvit): normal = as all others, 0.02; conv =
    PyTorch's default, with a standard deviation of 0.083 at patch 4, as in the authors' code."""
    qkv_bias: bool = False
    """Biases in the attention's queries, keys and values (an option of U-ViT's; uvit only)."""
    time_mlp: bool = False
    """Two layers on the time's embedding (an option of U-ViT's; uvit only)."""
    options: dict[str, Any] = {}
    """Parts of vit, or arguments of the class of dit and unet2d, by their names there; set in a
    file."""

    @property
    def classes(self) -> int:
        """`num_classes` of a planned recipe."""
        assert self.num_classes != "auto"
        return self.num_classes

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        kind = BACKBONES[self.kind]
        special = "final_conv qkv_bias time_mlp patch_init mlp_ratio options".split()
        fields = Model.model_fields.items()
        given = [name for name, field in fields if getattr(self, name) != field.default]
        if self.size and (own := [name for name in families.SIZED if name in given]):
            it = "it" if len(own) == 1 else "them"
            raise ValueError(
                f"size {self.size} sets {' and '.join(own)}: use --model.size None with {it}, or "
                "a size by name"
            )
        for name in special:
            if name in given and name not in kind.settings:
                takers = [one for one, row in BACKBONES.items() if name in row.settings]
                raise ValueError(f"{name} is for kind {' or '.join(takers)}, not {self.kind}")
        kind.check(self)
        return self


class Weighting(Settings):
    """The weight of the loss over time."""

    kind: families.WeightingName = choice("uniform", families.WEIGHTINGS, "The weight.")
    snr_clip: float = Field(5.0, gt=0)
    """Where min-snr clips the signal-to-noise ratio."""
    gamma: float = Field(1.0, ge=0)
    """Exponent of p2's weight (1 + SNR)^-gamma."""
    bias: float = 0.0
    """Log-SNR at which sigmoid's weight is a half."""


class Times(Settings):
    """The times that training draws."""

    kind: families.TimesName = choice("uniform", families.TIMES, "How they are drawn.")
    mean: float = 0.0
    """Mean of logit(t) for logit-normal; above zero = more noise."""
    std: float = Field(1.0, gt=0)
    """Standard deviation of logit(t) for logit-normal."""


class Diffusion(Settings):
    """The noise, and what the network predicts."""

    schedule: families.ScheduleName = choice("linear", SCHEDULES, "Noise over time.")
    base_size: int | None = Field(None, gt=0)
    """Image size at which the schedule is used unchanged; at others its log-SNR is shifted by
    2 ln(base_size / size), for rectangles 2 ln(base_size / sqrt(height x width)). None = never
    shifted; 64 is usual."""
    prediction: families.PredictionName = choice(
        "eps", families.PREDICTIONS, "What the network predicts."
    )
    loss_space: families.SpaceName = "same"
    """The prediction in which the error is measured; same = as predicted."""
    loss_space_clip: float = Field(0.05, gt=0)
    """Least signal and noise scale used in rewriting the error for another loss_space."""
    weighting: Weighting = Weighting()
    times: Times = Times()

    @model_validator(mode="after")
    def _consistent(self) -> Diffusion:
        if self.weighting.kind != "uniform" and self.loss_space != "same":
            raise ValueError(
                f"weighting {self.weighting.kind} fixes the weight of the error in any space: "
                "use loss_space same, or weighting uniform"
            )
        return self


class Mask(Settings):
    """Which patches a stage hides."""

    kind: families.MaskName = choice("none", MASKS, "What is hidden.")
    rate: float = Field(0.0, ge=0, lt=1)
    """Fraction of the image that is hidden."""
    block: int = Field(2, gt=0)
    """Side of a block, in patches (kind block)."""
    where: Literal["input", "middle"] = "input"
    """input = the network does not see what is hidden (the paper); middle = it sees and denoises
    all, but hidden patches pass by its blocks in the middle (uvit, vit)."""
    rounding: Literal["nearest", "floor"] = "nearest"
    """How the number of hidden patches or blocks, or the side of a crop, becomes whole; floor as in
    the authors' code."""

    @model_validator(mode="after")
    def _consistent(self) -> Mask:
        if self.kind == "none" and self.rate:
            kinds = [name for name in MASKS if name != "none"]
            raise ValueError(
                f"mask kind none hides nothing, but rate is {self.rate:g}: use rate 0, or kind "
                f"{', '.join(kinds[:-1])} or {kinds[-1]}"
            )
        return self


class Average(Settings):
    """The moving average of the weights, from which images are drawn."""

    kind: families.AverageName = choice("constant", families.AVERAGES, "How it weighs steps.")
    decay: float = Field(0.999, ge=0, lt=1)
    """Decay per step (constant), or its limit (warmup)."""
    width: float = Field(0.1, gt=0, lt=0.2886)
    """Relative width of a power average: 0.1 = as wide as a tenth of the stage so far, at any
    length of the stage."""


class Stage(Settings):
    """A row of the training: a mask and how long, how fast and on how many images."""

    name: str = Field(min_length=1)
    """Name in logs and plots."""
    mask: Mask = Mask()
    schedule: families.ScheduleName | None = None
    """Noise schedule of this stage; None = the recipe's (Table 2 pre-trains under another)."""
    flip: bool | None = None
    """Whether this stage mirrors images; None = as data.flip says."""
    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 = as many as its share of the budget allows."""
    share: float = Field(1.0, gt=0)
    """Where steps is 0: the stage's part of the budget, in FLOPs, relative to the other stages'."""
    until: Literal["steps", "plateau"] = "steps"
    """plateau = `steps` is the most that a masked stage takes: it ends where short forks show that
    the next stage gains more for the same FLOPs; what is saved goes to the next stage."""
    probe_flops: int = Field(0, ge=0)
    """FLOPs that such forks have taken; written at the stage's end."""
    batch_size: int = Field(gt=0)
    """Images per optimizer step, over all devices."""
    smallest_batch: Annotated[int, Field(gt=0)] | None = None
    """How far a budget of fewer than 1,000 steps may halve batch_size; None = not at all."""
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Images per device at a time; gradients accumulate to the same step. None = all; auto = as
    many as fit in the GPU's memory."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or decay to zero at the stage's end."""
    warmup: Steps = 0
    """Steps over which the learning rate rises linearly, or a part of the stage: 2%."""
    warmup_from: float = Field(0.0, ge=0)
    """Learning rate at which the warm-up starts."""
    restarts: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Steps of the stage at which the learning rate begins anew, with its warm-up; written where a
    run whose rate had decayed is extended."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices of the network's blocks, AdamW for all else."""
    betas: tuple[float, float] = (0.99, 0.99)
    """AdamW's moment decays (the paper's)."""
    weight_decay: float = Field(0.03, ge=0)
    """AdamW's decoupled weight decay (U-ViT's)."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; None = no clipping."""
    ema: Average = Average()
    start_from: Literal["raw", "ema"] = "raw"
    """Weights taken over from the stage before: as trained, or averaged."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more compute."""

    @property
    def warmup_steps(self) -> int:
        """The warm-up in steps."""
        return steps_of(self.warmup, self.steps)

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        if self.warmup_from > self.lr:
            raise ValueError(f"warmup_from {self.warmup_from:g} is above lr {self.lr:g}")
        if 0 < self.steps < self.warmup_steps:
            raise ValueError(
                f"warmup {self.warmup} outlasts the stage's {self.steps} steps: use fewer, or a "
                "part of them such as 10%"
            )
        # Not as sets: a stage of a tiny model may have billions of steps.
        inner = itertools.pairwise((0, *self.restarts, self.steps))
        if self.restarts and any(one >= later for one, later in inner):
            raise ValueError(
                f"restarts {self.restarts} must increase and lie within the stage's {self.steps} "
                "steps"
            )
        return self


class Guidance(Settings):
    """Guidance: away from what a weaker model would draw."""

    kind: families.GuidanceName = choice("none", families.GUIDANCE, "The weaker model.")
    scale: float = Field(1.5, ge=0)
    """How far: 1 = as without guidance, 2 = twice as far from the weak answer."""
    start: float = Field(0.0, ge=0, le=1)
    """First time at which guidance acts; 0 = clean images."""
    end: float = Field(1.0, ge=0, le=1)
    """Last time at which guidance acts; 1 = pure noise."""
    weak: str = "primer"
    """Weak model of autoguidance: primer = the run's own before its last stage, or any RUN."""
    rate: float = Field(0.5, gt=0, lt=1)
    """Fraction of the patches that sparse guidance hides from the weak answer."""

    @model_validator(mode="after")
    def _consistent(self) -> Guidance:
        if self.start >= self.end:
            raise ValueError(f"start {self.start:g} is not below end {self.end:g}")
        return self


class Sampling(Settings):
    """How images are drawn from the model (previews, and defaults of `maskdm sample`)."""

    sampler: families.SamplerName = choice("ddim", SAMPLERS, "The solver.")
    steps: int = Field(50, gt=0)
    """Solver steps per image, each a network evaluation (two for heun)."""
    spacing: families.SpacingName = choice("uniform", families.SPACINGS, "Where the steps lie.")
    eta: float = Field(0.0, ge=0, le=1)
    """DDIM's noise: 0 deterministic, 1 ancestral (the paper's lineage)."""
    clip_x0: bool = True
    """Clip the estimate of the clean image to [-1, 1] and re-derive the noise from it."""
    guidance: Guidance = Guidance()
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Images at a time per device; auto = as many as keep it busy, fewer where memory runs out."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network (torch.compile); auto = on a GPU, where there is work for minutes."""

    HOW_FAST: ClassVar[tuple[str, ...]] = ("batch_size", "compile")
    """Settings that change no image, except for rounding."""

    @model_validator(mode="after")
    def _consistent(self) -> Sampling:
        if self.eta and not SAMPLERS[self.sampler].takes_eta:
            raise ValueError(f"eta is ddim's noise; sampler {self.sampler} has none: use eta 0")
        return self

    def for_inpainting(self) -> Sampling:
        """Its defaults for inpainting: even steps in log-SNR, and not too many."""
        steps = min(self.steps, 100)
        return changed(self, sampler="ddpm", eta=0.0, spacing="log-snr", steps=steps)


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
    """Start from another model's weights: a run's folder, a checkpoint, an exported model or a
    Hub id. None = from random ones."""
    init_weights: Literal["ema", "raw"] = "ema"
    """Weights that init starts from: ema = averaged, raw = as trained (not in exported models)."""
    seed: int = Field(0, ge=0)
    """Fixes initial weights, image order, masks, times and noise."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute precision; auto = bf16 where the hardware is good at it, else fp32."""
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    """Compile the network, once a stage (torch.compile); on one GPU also replay steps, each as one
    CUDA graph. auto = compile on a GPU, replay small steps; on = replay none; graphs = all."""
    budget: Annotated[Budget, tyro.conf.Suppress] = Budget()
    """What the run may cost, where stages have no steps: they divide it by their shares. On the
    command line all stages are scaled to it: --hours, --minutes, --flops, --images, --epochs."""
    log_every: SomeSteps = 100
    """Steps between two lines of metrics.jsonl, or a part of the run: 1%."""
    checkpoint_every: SomeSteps = 5000
    """Steps between two checkpoints, or a part of the run; each stage's end is always one."""
    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes after which a checkpoint is saved in any case."""
    keep_checkpoints: int = Field(2, gt=0)
    """Latest checkpoints kept, besides each stage's end."""
    keep_every: Steps = 0
    """Steps between two averages that are kept for a curve of quality (`evaluate RUN --curve`), or
    a part of the run; each stage's end is kept, too. 0 = none."""
    preview_every: SomeSteps = 5000
    """Steps between two preview grids, or a part of the run; each stage's end always draws one."""
    num_previews: int = Field(36, ge=0)
    """Images in a preview grid; 0 = no previews."""
    preview_steps: int = Field(25, gt=0)
    """Solver steps for each of them, by DPM-Solver++, without guidance."""
    evaluate_every: Steps = 10_000
    """Steps between two lines of quality.jsonl, each after a checkpoint, or a part of the run; each
    stage's end always makes one. 0 = none at all."""
    log_to: tuple[families.TrackerName, ...] = Field(
        (),
        description=helped(
            "Trackers that get all figures and previews too, beside metrics.jsonl; one or several, "
            "with commas or spaces between.",
            families.TRACKERS,
        ),
    )

    @field_validator("log_to", mode="before")
    @classmethod
    def _with_commas(cls, names: object) -> object:
        words = [names] if isinstance(names, str) else names
        if not isinstance(words, (list, tuple)) or not all(isinstance(one, str) for one in words):
            return names
        return [name.strip() for one in words for name in one.split(",") if name.strip()]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def is_planned(self) -> bool:
        """Whether all stages have steps, so that no budget has to be divided."""
        return all(stage.steps for stage in self.stages)

    def every(self, interval: int | str) -> int:
        """An interval in steps; a part is one of the whole run."""
        return steps_of(interval, self.num_steps)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._check_sizes()
        self._check_sampling_steps()
        self._check_guidance()
        self._check_middle()
        self._check_plateaus()
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ, but they are {', '.join(names)}")
        if not (self.is_planned or self.budget.is_set):
            number = next(i for i, stage in enumerate(self.stages) if not stage.steps)
            raise ValueError(f"stages.{number}.steps is needed where the run has no budget")
        return self

    def _check_sizes(self) -> None:
        patch = self.model.patch_size
        for side in self.data.shape[:2]:
            if side % patch:
                below, above = side // patch * patch, (side // patch + 1) * patch
                ways_out = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"data.size {side} is not a multiple of model.patch_size {patch}: "
                    f"use {ways_out}"
                )
        if isinstance(self.data.size, tuple) and not BACKBONES[self.model.kind].takes_rectangles:
            others = [name for name, row in BACKBONES.items() if row.takes_rectangles]
            raise ValueError(
                f"model.kind {self.model.kind} takes square images only, not "
                f"{self.data.shape[0]}x{self.data.shape[1]}: use {' or '.join(others)}, or "
                f"data.size {min(self.data.size)}"
            )

    def _check_sampling_steps(self) -> None:
        wanted = {self.diffusion_of(stage).schedule: self.preview_steps for stage in self.stages}
        last = self.final_diffusion.schedule
        wanted[last] = max(wanted[last], self.sampling.steps)
        for schedule, steps in wanted.items():
            num_times = SCHEDULES[schedule].num_times
            if num_times is not None and steps > num_times:
                raise ValueError(
                    f"schedule {schedule} has {num_times} times, but sampling wants {steps} steps"
                )

    def _check_middle(self) -> None:
        kinds = [name for name, row in BACKBONES.items() if row.takes_middle]
        for i, stage in enumerate(self.stages):
            if stage.mask.where == "middle" and self.model.kind not in kinds:
                raise ValueError(
                    f"stages.{i}.mask.where middle is for model.kind {' or '.join(kinds)}, not "
                    f"{self.model.kind}"
                )
            if stage.mask.where == "middle" and self.model.depth < 3:
                raise ValueError(
                    f"stages.{i}.mask.where middle needs a block before the middle and one after "
                    f"it, so model.depth 3 at least, not {self.model.depth}"
                )

    def _check_plateaus(self) -> None:
        for i, stage in enumerate(self.stages):
            if stage.until == "steps":
                continue
            why = None
            if i + 1 == len(self.stages):
                why = "compares a stage with the next, and this is the last"
            elif not stage.mask.rate:
                why = "is for stages with a mask"
            elif stage.lr_schedule != "constant":
                why = "needs lr_schedule constant: a decay has to know where the stage ends"
            elif not self.data.held_out:
                why = "needs held-out images: set data.held_out, for example to 0.05"
            if why:
                raise ValueError(f"stages.{i}.until plateau {why}; until steps needs nothing")

    def _check_guidance(self) -> None:
        guidance = self.sampling.guidance
        if guidance.kind == "classifier-free" and not (
            self.model.num_classes and self.model.label_dropout
        ):
            raise ValueError(
                "classifier-free guidance needs model.num_classes and model.label_dropout above "
                "0; autoguidance and sparse need no classes"
            )
        if guidance.kind == "autoguidance" and guidance.weak == "primer" and len(self.stages) == 1:
            raise ValueError(
                "autoguidance by the primer needs two stages, and there is one: name another "
                "model with sampling.guidance.weak"
            )

    def flips(self, stage: Stage) -> bool:
        """Whether a stage mirrors images, each with probability 1/2."""
        return self.data.flip if stage.flip is None else stage.flip

    def diffusion_of(self, stage: Stage) -> Diffusion:
        """The diffusion that a stage trains under: the recipe's, on the stage's schedule."""
        return changed(self.diffusion, schedule=stage.schedule)

    @property
    def final_diffusion(self) -> Diffusion:
        """The diffusion of the finished model: the last stage's."""
        return self.diffusion_of(self.stages[-1])

    @property
    def for_previews(self) -> Sampling:
        """How previews are drawn: fast, and possible at every stage (no guidance by a primer)."""
        return Sampling(
            sampler="dpm-solver",
            steps=self.preview_steps,
            clip_x0=self.sampling.clip_x0,
            batch_size=self.sampling.batch_size,
            compile=self.sampling.compile,
        )

    def to_yaml(self) -> str:
        """The recipe as YAML text; `load_recipe` of it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)  # escapes: exact
