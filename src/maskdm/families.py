"""Every choice that settings name, one table a family, one row a member.

A row holds a member's help and title, what must be known of it before it runs, and the function
that does the work. That function is imported when it is first called, so that this file needs
neither torch nor the rooms where the functions live. To add a member, write its function
and its row: `docs/extending.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from maskdm.choices import Choice, Later, functions_of, known, shown

# Images: how they come to the wanted size.

_prepare = functions_of("images.prepare")
# run: (Pillow image, (height, width)) -> Pillow image of that size.
CROPS: dict[str, Choice] = {
    "auto": Choice("the known set's own, else center"),
    "center": Choice("resize to cover, crop the middle", _prepare("center_crop")),
    "resize": Choice("squeeze the whole image", _prepare("squeeze")),
    "celeba": Choice("128 pixels round the face in CelebA's aligned images", _prepare("celeba")),
    "celeba140": Choice("140 pixels of them", _prepare("celeba140")),
    "none": Choice("already that size", _prepare("exact")),
}
CropName = Annotated[str, known(CROPS, "crop"), shown(CROPS)]


# Masks: which patches of an image a stage hides (Section 3.2, Figure 3a).


@dataclass(frozen=True)
class MaskKind:
    """A way to choose the visible patches.

    Attributes:
        help: what it is, for `--help`.
        title: what is hidden, in a sentence; may hold `{block}`, the side of a block in patches.
        count: (mask, grid) -> number of visible patches for the mask's rate, and every number
            that another rate could give.
        draw: (mask, grid, batch_size, generator) -> visible: int64 (B, V), sorted.
    """

    help: str
    title: str
    count: Callable[..., tuple[int, list[int]]]
    draw: Callable[..., Any]


_masks, _blocks, _square = functions_of("masks"), "{block}x{block} blocks", "all but one square"
MASKS: dict[str, MaskKind] = {
    "none": MaskKind("whole images", "nothing", _masks("count_patches"), _masks("draw_patches")),
    "patch": MaskKind("single patches", "patches", _masks("count_patches"), _masks("draw_patches")),
    "block": MaskKind("squares of patches", _blocks, _masks("count_blocks"), _masks("draw_blocks")),
    "crop": MaskKind(_square, _square, _masks("count_crop"), _masks("draw_crop")),
}
MaskName = Annotated[str, known(MASKS, "kind of mask"), shown(MASKS)]


# Backbones: the networks.


@dataclass(frozen=True)
class BackboneKind:
    """A network.

    Attributes:
        title: its name in print.
        help: what it is, for `--help`.
        network: its class, a diffusers ModelMixin with the face of `models.uvit.UViT`.
        settings: those of `recipe.Model` that its class takes besides patch_size, num_classes
            and label_dropout; `options` is for arguments that have no setting here.
        masks_save_compute: whether hidden patches cost nothing.
        takes_middle: whether patches can pass by the blocks in its middle.
        check: raises ValueError for settings (a `recipe.Model`) that do not fit together.
        takes_rectangles: whether height and width may differ.
        pixels_per_token: for networks that compute on pixels, how many cost as much as a token.
    """

    title: str
    help: str
    network: Callable[..., Any]
    settings: tuple[str, ...] = ()
    masks_save_compute: bool = True
    takes_middle: bool = False
    check: Callable[[Any], None] = lambda model: None
    takes_rectangles: bool = True
    pixels_per_token: int | None = None

    @property
    def network_class(self) -> Any:
        """The class itself."""
        return self.network.target if isinstance(self.network, Later) else self.network


def _check_heads(model: Any, parts: int = 2) -> None:
    """Each head's share of the width divides into so many parts."""
    if model.embed_dim % (parts * model.num_heads):
        raise ValueError(
            f"embed_dim {model.embed_dim} is not a multiple of {parts} x num_heads "
            f"= {parts * model.num_heads}"
        )


def _check_uvit(model: Any) -> None:
    if model.depth % 2 == 0:
        raise ValueError(
            f"depth {model.depth} is even, but blocks come as n in + 1 middle + n out: "
            f"use {model.depth - 1} or {model.depth + 1}"
        )
    _check_heads(model)


BACKBONES: dict[str, BackboneKind] = {
    "uvit": BackboneKind(
        "U-ViT",
        "the paper's",
        Later("models.uvit:UViT"),
        tuple(
            "embed_dim depth num_heads mlp_ratio final_conv qkv_bias time_mlp patch_init".split()
        ),
        takes_middle=True,
        check=_check_uvit,
    ),
    "vit": BackboneKind(
        "ViT",
        "a plain transformer of today's parts: RMSNorm, SwiGLU, rotary positions, modulation",
        Later("models.vit:ViT"),
        ("embed_dim", "depth", "num_heads", "mlp_ratio", "options"),
        takes_middle=True,
        check=functools.partial(_check_heads, parts=4),  # rotations in two dimensions
    ),
    "dit": BackboneKind(
        "DiT",
        "diffusers' DiTTransformer2DModel, on the visible patches alone; square images",
        Later("models.adapters:DiffusersDenoiser"),
        ("kind", "embed_dim", "depth", "num_heads", "options"),
        check=_check_heads,
        takes_rectangles=False,
    ),
    "unet2d": BackboneKind(
        "U-Net",
        "diffusers' UNet2DModel; it needs the whole grid, so hidden patches are blanked and masks "
        "save no compute",
        Later("models.adapters:DiffusersDenoiser"),
        ("kind", "options"),
        masks_save_compute=False,
        pixels_per_token=16,
    ),
}
BackboneName = Annotated[str, known(BACKBONES, "kind of model"), shown(BACKBONES)]


@dataclass(frozen=True)
class ModelSize:
    """Width, depth and heads of a transformer.

    Attributes:
        help: what it is for, for `--help`.
        num_params: of a U-ViT of that size, roughly; a ViT has 1.4 to 1.5 times as many, but those
            more modulate its blocks, once an image, and cost next to nothing.
    """

    help: str
    embed_dim: int
    depth: int
    num_heads: int
    num_params: float


MODEL_SIZES: dict[str, ModelSize] = {
    "tiny": ModelSize(
        "0.6 M parameters as a U-ViT, 0.9 M as a ViT, for minutes on a CPU", 96, 5, 4, 0.61e6
    ),
    "mini": ModelSize("2.3 M or 3.4 M", 160, 7, 5, 2.3e6),
    "small": ModelSize("7.6 M or 11 M", 256, 9, 8, 7.6e6),
    "medium": ModelSize("21 M or 30 M", 384, 11, 6, 21e6),
    "maskdm-s": ModelSize("44 M, the paper's smaller one, or 62 M", 512, 13, 8, 44e6),
    "maskdm-b": ModelSize("102 M, the paper's larger one, or 143 M", 768, 13, 12, 102e6),
}
SIZED = ("embed_dim", "depth", "num_heads")  # the settings that a size sets
SIZES = {
    "auto": Choice("the largest that images and budget can teach"),
    **{name: Choice(row.help) for name, row in MODEL_SIZES.items()},
}
SizeName = Annotated[str, known(SIZES, "model size"), shown(SIZES)]


# Diffusion: noise over time, what the network predicts, what its error weighs, times drawn.


@dataclass(frozen=True)
class ScheduleKind:
    """Noise over time.

    Attributes:
        help: what it is, for `--help`.
        make: (shift of the log-SNR) -> `diffusion.schedule.Schedule`.
        num_times: how many times it has; None = all of [0, 1].
    """

    help: str
    make: Callable[[float], Any]
    num_times: int | None = None


_schedule = functions_of("diffusion.schedule")
SCHEDULES: dict[str, ScheduleKind] = {
    "linear": ScheduleKind("DDPM's, 1000 steps", _schedule("linear"), 1000),
    "cosine": ScheduleKind("stable under 90 % masking (Appendix C)", _schedule("cosine"), 1000),
    "vp-sde": ScheduleKind("linear in continuous time", _schedule("VPSDE")),
    "vp-cosine": ScheduleKind("cosine in continuous time", _schedule("VPCosine")),
    "flow": ScheduleKind("the straight line of flow matching", _schedule("Flow")),
}
ScheduleName = Annotated[str, known(SCHEDULES, "schedule"), shown(SCHEDULES)]

PREDICTIONS: dict[str, Choice] = {
    "eps": Choice("the noise"),
    "x0": Choice("the clean image"),
    "v": Choice("the velocity alpha noise - sigma x0"),
    "flow": Choice("the velocity noise - x0"),
}
PredictionName = Annotated[str, known(PREDICTIONS, "prediction"), shown(PREDICTIONS)]
_SPACES = {"same": Choice("as predicted"), **PREDICTIONS}
SpaceName = Annotated[str, known(_SPACES, "loss space"), shown(_SPACES)]

# run: (weighting, schedule, t, log_snr) -> weight of the squared error in x0, float (B,).
WEIGHTINGS: dict[str, Choice] = {
    "uniform": Choice("1 in the loss space (Eqs. 1 and 2)"),
    "min-snr": Choice("the signal-to-noise ratio, clipped", Later("diffusion.objective:min_snr")),
    "p2": Choice("(1 + SNR)^-gamma of the noise", Later("diffusion.objective:p2")),
    "sigmoid": Choice("a sigmoid of the log-SNR", Later("diffusion.objective:sigmoid")),
}
WeightingName = Annotated[str, known(WEIGHTINGS, "weighting"), shown(WEIGHTINGS)]

# run: (times, schedule, share, own, shared) -> places in the range of times, float32 (B,).
TIMES: dict[str, Choice] = {
    "uniform": Choice("evenly", Later("diffusion.times:uniform")),
    "stratified": Choice("evenly spread over each batch", Later("diffusion.times:stratified")),
    "logit-normal": Choice("mostly in the middle", Later("diffusion.times:logit_normal")),
    "soft-truncation": Choice("above a random one", Later("diffusion.times:soft_truncation")),
}
TimesName = Annotated[str, known(TIMES, "way to draw times"), shown(TIMES)]


# Training: the moving average of the weights.

# run: (ema: recipe.Average, update) -> decay of the update with that number, counted from 1.
AVERAGES: dict[str, Choice] = {
    "constant": Choice("one decay", Later("training.ema:constant_decay")),
    "warmup": Choice(
        "a copy at first, then a decay that rises to its limit (the paper's code)",
        Later("training.ema:warmup_decay"),
    ),
    "power": Choice("a part of the stage's length, by width", Later("training.ema:power_decay")),
}
AverageName = Annotated[str, known(AVERAGES, "kind of average"), shown(AVERAGES)]


# Training: where its figures are sent, besides the run's own files.


@dataclass(frozen=True)
class TrackerKind:
    """An experiment tracker, whose package has its name; an extra of that name installs it."""

    help: str  # what it is, for `--help`
    open: Callable[..., Any]  # (place: `training.trackers.Place`) -> one of Accelerate's trackers
    log_picture: Callable[..., Any]  # (tracker, title, picture, step) sends an RGB image
    configure: Callable[..., Any]  # (tracker, settings) sends the recipe, a flat dict


def _tracker(name: str, help: str, configure: str = "configure") -> TrackerKind:
    named = (f"open_{name}", f"picture_to_{name}", configure)
    return TrackerKind(help, *map(functions_of("training.trackers"), named))


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": _tracker("tensorboard", "files in RUN/tensorboard", "configure_tensorboard"),
    "wandb": _tracker("wandb", "Weights & Biases"),
    "trackio": _tracker("trackio", "a dashboard on this machine"),
    "mlflow": _tracker("mlflow", "MLflow"),
}
TrackerName = Annotated[str, known(TRACKERS, "tracker"), shown(TRACKERS)]


# Sampling: solvers, spacing of their steps, guidance.


@dataclass(frozen=True)
class SamplerKind:
    """A solver.

    Attributes:
        help: what it is, for `--help`.
        run: (denoise, noise, levels, settings, generators) -> patches; see `sampling.samplers`.
        evaluations: of the network, a step.
        takes_eta: whether the setting eta means something to it.
        t_end: last time of spacings `log-snr` and `karras` on schedules in continuous time.
        refuse: (levels) raises ValueError where it cannot take these steps.
    """

    help: str
    run: Callable[..., Any]
    evaluations: int = 1
    takes_eta: bool = False
    t_end: float = 1e-3
    refuse: Callable[[Any], None] | None = None


_solver = functions_of("sampling.samplers")
_unstable = _solver("refuse_unstable")
SAMPLERS: dict[str, SamplerKind] = {
    "ddpm": SamplerKind("ancestral, hundreds of steps", _solver("ddpm")),
    "ddim": SamplerKind("deterministic, or noisy by eta", _solver("ddim"), takes_eta=True),
    "dpm-solver": SamplerKind("DPM-Solver++ 2M, 10 to 25 steps", _solver("dpm_solver")),
    "dpm-solver-eps": SamplerKind(
        "DPM-Solver 3M in the noise, as first published; to t 1e-4 with spacing log-snr",
        _solver("dpm_solver_eps"),
        t_end=1e-4,
    ),
    "unipc": SamplerKind("UniPC, 10 to 25 steps", _solver("unipc")),
    "heun": SamplerKind("two evaluations a step", _solver("heun"), evaluations=2),
    "euler-maruyama": SamplerKind(
        "the reverse SDE, hundreds of steps", _solver("euler_maruyama"), refuse=_unstable
    ),
}
SamplerName = Annotated[str, known(SAMPLERS, "sampler"), shown(SAMPLERS)]

SPACINGS: dict[str, Choice] = {
    "uniform": Choice("evenly in time"),
    "log-snr": Choice("evenly in log-SNR"),
    "karras": Choice("by Karras et al.'s rho = 7"),
}
SpacingName = Annotated[str, known(SPACINGS, "spacing"), shown(SPACINGS)]


@dataclass(frozen=True)
class GuidanceKind:
    """A weaker denoiser to move away from.

    Attributes:
        help: what it is, for `--help`.
        weak: (`sampling.guidance.Wanted`) -> the weak denoiser.
        refuse: (trained, weak) raises ValueError where a model cannot be guided so.
        needs_model: whether it needs a second model.
        evaluations: of the network itself, for each of the unguided one.
    """

    help: str
    weak: Callable[..., Any] | None = None
    refuse: Callable[..., None] | None = None
    needs_model: bool = False
    evaluations: int = 1


_weak = functions_of("sampling.guidance")
GUIDANCE: dict[str, GuidanceKind] = {
    "none": GuidanceKind("no guidance"),
    "classifier-free": GuidanceKind(
        "away from images of no class",
        _weak("without_class"),
        _weak("refuse_without_class"),
        evaluations=2,
    ),
    "autoguidance": GuidanceKind(
        "away from a weaker model", _weak("by_weak_model"), _weak("refuse_weak"), needs_model=True
    ),
    "sparse": GuidanceKind(
        "away from the same model seeing fewer patches", _weak("sparse"), evaluations=2
    ),
}
GuidanceName = Annotated[str, known(GUIDANCE, "kind of guidance"), shown(GUIDANCE)]
