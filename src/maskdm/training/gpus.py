"""GPUs that are not here: what their data sheets promise, and the least time of a step."""

from __future__ import annotations

from dataclasses import dataclass

from maskdm.choices import named
from maskdm.families import BACKBONES
from maskdm.models.backbone import Backbone
from maskdm.models.build import weightless_model
from maskdm.recipe import Recipe, Stage
from maskdm.sampling.speed import images_at_a_time
from maskdm.training.ready import wants_graph
from maskdm.training.speed import Speed
from maskdm.training.work import stage_work, total_flops


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        title: its name in print.
        peak: FLOPs per second of dense matrix products, in bf16 or fp16, with fp32 sums.
        memory: bytes.
        peak_without_bf16: FLOPs per second in fp32 where it has no bf16 units; None = it has.
    """

    title: str
    peak: float
    memory: float
    peak_without_bf16: float | None = None


# Manufacturer's data sheets; dense, without sparsity.
GPUS: dict[str, Gpu] = {
    "t4": Gpu("T4", 65e12, 16e9, peak_without_bf16=8.1e12),
    "v100": Gpu("V100", 125e12, 32e9, peak_without_bf16=15.7e12),
    "l4": Gpu("L4", 121e12, 24e9),
    "rtx3090": Gpu("RTX 3090", 71e12, 24e9),
    "rtx4090": Gpu("RTX 4090", 165e12, 24e9),
    "rtx5090": Gpu("RTX 5090", 209e12, 32e9),
    "a100": Gpu("A100", 312e12, 80e9),
    "h100": Gpu("H100", 989e12, 80e9),
    "h200": Gpu("H200", 989e12, 141e9),
    "b200": Gpu("B200", 2250e12, 180e9),
}
SHARE = 0.3  # of a peak that training reaches
PAPERS_SHARE = 0.22  # about what the paper's runs reached: 0.20 to 0.23

# Seconds that the host needs to launch the kernels of a step: the least time of a step. Measured
# beside H200s (docs/performance.md): 13 blocks with AdamW take 34.9 ms eagerly and 26.7 compiled,
# of which forward and backward pass have 10.5 + 8.8 (docs/log.md, 2026-11-26); 5 blocks with Muon
# 20 to 23 and 21, or 2.4 as one CUDA graph, whose small kernels follow one another. A faster host
# needs less.
LAUNCH_SEC = {"eager": 7e-3, "compiled": 7e-3, "graphs": 1.5e-3}  # draw, loss, clip, AdamW, average
BLOCK_SEC = {"eager": 2.1e-3, "compiled": 1.5e-3, "graphs": 0.2e-3}  # forward and backward
MUON_SEC = {"eager": 4e-3, "compiled": 4e-3, "graphs": 0.0}
FORWARD_BLOCK_SEC = 0.8e-3  # of drawing
MATRICES_OF_BLOCK = 4  # of a transformer: queries, keys and values; projection; two of the MLP


@dataclass(frozen=True)
class Gpus:
    """GPUs that are not here, as a machine for budgets: they reach a share of their peak.

    Attributes:
        name, num: which, and how many.
        share: of the peak that training reaches where launches don't bound it.
        precision: a recipe's.
        planned: a recipe with all numbers, whose speed `flops_per_sec` is; None = the peak's.

    Raises ValueError for an unknown GPU, no GPUs, and a share that is none.
    """

    name: str
    num: int = 1
    share: float = SHARE
    precision: str = "auto"
    planned: Recipe | None = None

    def __post_init__(self) -> None:
        named(self.name, GPUS, "GPU")
        if self.num < 1:
            raise ValueError(f"--gpus {self.num}: at least one")
        if not 0 < self.share <= 1:
            raise ValueError(
                f"--share {self.share:g}: a part of the GPU's peak, above 0 and at most 1"
            )

    @property
    def has_bf16(self) -> bool:
        """Whether it has units for bf16."""
        return GPUS[self.name].peak_without_bf16 is None

    @property
    def compute(self) -> str:
        """The precision that training computes in: what `engine.choose_precision` decides there."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if self.has_bf16 else "fp32"

    def speed(self, recipe: Recipe, model: Backbone | None = None) -> Speed:
        """FLOPs over those per second, but no less than the launches take.

        Args:
            recipe: with all sizes known.
            model: the recipe's, if at hand; only its sizes matter.
        """
        model = model or weightless_model(recipe)
        each = self._flops_per_sec(self.compute)
        steps = tuple(
            max(work.step_flops / each, launches)
            for work, launches in zip(
                stage_work(recipe, model), self.launches_sec(recipe, model), strict=True
            )
        )
        # A network draws in bf16, or in fp32 (`engine.autocast`), whatever it was trained in.
        drawing = self._flops_per_sec("bf16" if self.has_bf16 else "fp32")
        launches = FORWARD_BLOCK_SEC * num_blocks(recipe, model)
        num = images_at_a_time(model, recipe.sampling) * self.num
        forward = max(model.forward_flops(model.num_patches) / drawing, launches / num)
        return Speed(steps, forward)

    def launches_sec(self, recipe: Recipe, model: Backbone) -> list[float]:
        """Seconds that launches take in a step of each stage; each GPU has its own process."""
        found = []
        for stage, work in zip(recipe.stages, stage_work(recipe, model), strict=True):
            images = -(-stage.batch_size // self.num)
            size = stage.micro_batch_size
            num = -(-images // size) if isinstance(size, int) else 1
            how = self._how(recipe, stage, work.step_flops)
            sec = LAUNCH_SEC[how] + num * num_blocks(recipe, model) * BLOCK_SEC[how]
            found.append(sec + (MUON_SEC[how] if stage.optimizer == "muon" else 0))
        return found

    def _how(self, recipe: Recipe, stage: Stage, step_flops: int) -> str:
        """How a stage's steps are done, as training decides."""
        if recipe.compile == "off":
            return "eager"
        alone = self.num == 1 and stage.until == "steps" and self.compute != "fp16"
        return "graphs" if alone and wants_graph(recipe, step_flops) else "compiled"

    def flops_per_sec(self) -> float:
        """Of all of them: a share of their peak, or what the steps of a planned recipe reach."""
        if self.planned is None:
            return self._flops_per_sec(self.compute)
        recipe = self.planned
        model = weightless_model(recipe)
        pairs = zip(recipe.stages, self.speed(recipe, model).step_sec, strict=True)
        seconds = sum(stage.steps * sec for stage, sec in pairs)
        return total_flops(recipe, stage_work(recipe, model)) / seconds

    def _flops_per_sec(self, precision: str) -> float:
        gpu = GPUS[self.name]
        peak = gpu.peak if precision == "fp16" else gpu.peak_without_bf16 or gpu.peak
        return peak * self.share * self.num


def num_blocks(recipe: Recipe, model: Backbone) -> float:
    """Blocks of a network; of one without blocks, how many have as many matrices."""
    if "depth" in BACKBONES[recipe.model.kind].settings:
        return recipe.model.depth
    return sum(parameter.ndim > 1 for parameter in model.parameters()) / MATRICES_OF_BLOCK
