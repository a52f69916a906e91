"""What a run will cost before it begins: compute, time, memory, disk, and what looks unwise."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from maskdm.choices import named
from maskdm.engine import device_name, make_accelerator, process_state
from maskdm.files import expanded
from maskdm.images.open import open_source
from maskdm.images.order import training_subset
from maskdm.images.store import is_store, open_store
from maskdm.models.backbone import Backbone
from maskdm.models.build import weightless_model
from maskdm.recipe import Recipe, Stage
from maskdm.runs.averages import num_snapshots
from maskdm.settings import changed
from maskdm.training.budget import set_points
from maskdm.training.costs import Costs, costs_of, warnings_of
from maskdm.training.planning import RunOptions, with_numbers
from maskdm.training.speed import Machine, Speed, ThisMachine
from maskdm.training.work import StageWork, stage_work
from maskdm.words import size_text


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        title: its name in print.
        peak: FLOPs per second of dense matrix products, in bf16 (V100, T4: fp16) with fp32 sums.
        memory: bytes.
    """

    title: str
    peak: float
    memory: float


# Manufacturer's data sheets; dense, without sparsity.
GPUS: dict[str, Gpu] = {
    "t4": Gpu("T4", 65e12, 16e9),
    "v100": Gpu("V100", 125e12, 32e9),
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


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds on each device, at most."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: the packed images, the run's checkpoints and model, what evaluate keeps."""

    store: int | None
    checkpoints: int
    model: int
    evaluation: int


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        recipe: with all numbers.
        num_params: of the model.
        num_patches: tokens of a whole image.
        machine: where, in words.
        costs: compute and time.
        memory: of the most expensive stage.
        disk: bytes.
        warnings: what looks unwise, in sentences.
    """

    recipe: Recipe
    num_params: int
    num_patches: int
    machine: str
    costs: Costs
    memory: Memory
    disk: Disk
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON's types: seconds, bytes, FLOPs."""
        facts = asdict(self) | {"recipe": self.recipe.model_dump(mode="json")}
        facts["costs"]["total_seconds"] = self.costs.total_seconds
        facts["memory"]["total"] = self.memory.total
        return facts


def make_plan(
    recipe: Recipe,
    machine: str,
    speed: Speed,
    num_images: int | None,
    num_train: int | None,
    num_devices: int = 1,
    bytes_of_compute: int = 4,
    limit: float | None = None,
) -> Plan:
    """Plans a recipe whose numbers are all known.

    Args:
        recipe: planned.
        machine: in words.
        speed: of the machine.
        num_images, num_train: of the source, and those trained on; None = unknown.
        num_devices: the batch is divided among so many.
        bytes_of_compute: 4 for fp32, 2 for bf16 and fp16.
        limit: bytes of memory of a device, which `micro_batch_size: auto` keeps to; None = unknown.
    """
    model = weightless_model(recipe)
    num_params = sum(p.numel() for p in model.parameters())
    how = (num_devices, bytes_of_compute, limit)
    memories = [memory_of(recipe, stage, model, *how) for stage in recipe.stages]
    costs = costs_of(recipe, model, speed, num_images, num_train)
    pixels = math.prod(recipe.data.shape)
    # Weights, average, two moments; a power average has a narrower one beside it, and snapshots of
    # both in fp16.
    is_power = any(stage.ema.kind == "power" for stage in recipe.stages)
    state = 4 * num_params * (5 if is_power else 4)
    snapshots = 2 * 2 * num_params * sum(num_snapshots(stage) for stage in recipe.stages)
    return Plan(
        recipe,
        num_params,
        model.num_patches,
        machine,
        costs,
        max(memories, key=lambda one: one.total),
        Disk(
            None if num_images is None else num_images * pixels,
            state * (recipe.keep_checkpoints + len(recipe.stages) - 1)
            + 4 * num_params * len(set_points(recipe, recipe.keep_every))
            + snapshots,
            4 * num_params,
            recipe.evaluation.num * pixels,
        ),
        warnings_of(recipe, costs, num_params, num_train),
    )


@dataclass(frozen=True)
class Gpus:
    """GPUs that are not here, as a machine for budgets: they reach a share of their peak.

    Raises ValueError for an unknown GPU, no GPUs, and a share that is none.
    """

    name: str
    num: int = 1
    share: float = SHARE

    def __post_init__(self) -> None:
        named(self.name, GPUS, "GPU")
        if self.num < 1:
            raise ValueError(f"--gpus {self.num}: at least one")
        if not 0 < self.share <= 1:
            raise ValueError(
                f"--share {self.share:g}: a part of the GPU's peak, above 0 and at most 1"
            )

    def speed(self, recipe: Recipe) -> Speed:
        """Its FLOPs over those per second."""
        model = weightless_model(recipe)
        each = self.flops_per_sec()
        steps = tuple(work.step_flops / each for work in stage_work(recipe, model))
        return Speed(steps, model.forward_flops(model.num_patches) / each)

    def flops_per_sec(self) -> float:
        """Of all of them."""
        return GPUS[self.name].peak * self.share * self.num


def planned_run(
    recipe: Recipe,
    options: RunOptions,
    gpu: str | None = None,
    num_gpus: int = 1,
    share: float | None = None,
) -> Plan:
    """Plans a recipe on this machine or, with the name of one of `GPUS`, on those.

    The images are counted, not read; where that is not possible, epochs remain unknown.

    Raises ValueError for an unknown GPU, for what a run in a folder gets on top, and where the
    recipe needs to know its images.
    """
    if options.more:
        raise ValueError("a plan is of a whole run: give the budget in all, without a plus")
    if gpu is None and (num_gpus != 1 or share is not None):
        raise ValueError("--gpus and --share are of GPUs that are not here: add --gpu")
    num_images = count_images(recipe)
    num_train = None if num_images is None else len(training_subset(num_images, recipe.data))
    device = process_state().device
    where: Machine
    limit: float | None = None
    if gpu is None:
        if device.type == "cuda":
            limit = torch.cuda.get_device_properties(device).total_memory
        accelerator, precision, _ = make_accelerator(recipe.precision)
        where, num = (
            ThisMachine(accelerator, lambda text: print(text, file=sys.stderr)),
            accelerator.num_processes,
        )
        machine = f"{num} x {device_name(device)}, {precision}"
    else:
        where, num = Gpus(gpu, num_gpus, SHARE if share is None else share), num_gpus
        precision = "fp32" if recipe.precision == "fp32" else "bf16"
        limit = GPUS[gpu].memory
        machine = f"{num_gpus} x {GPUS[gpu].title} at {100 * where.share:.0f} % of the peak"
    if recipe.model.num_classes == "auto":  # which hardly changes the cost
        recipe = changed(recipe, model=changed(recipe.model, num_classes=0))
    ready = with_numbers(recipe, options, num_images, num_train, where)
    size = 4 if precision == "fp32" else 2
    speed = where.speed(ready)
    plan = make_plan(ready, machine, speed, num_images, num_train, num, size, limit)
    if gpu is not None and plan.memory.total > GPUS[gpu].memory:
        plan.warnings.append(
            f"a step needs {size_text(plan.memory.total)}, but a {GPUS[gpu].title} has "
            f"{size_text(GPUS[gpu].memory)}: set --stages.all.micro-batch-size auto, or also "
            "--stages.all.activation-checkpointing"
        )
    if gpu is not None and precision == "fp32":
        plan.warnings.append("the times are those of bf16: in fp32 they are at least twice as long")
    return plan


def count_images(recipe: Recipe) -> int | None:
    """Number of images of the source, unreadable ones too; None where it is not known."""
    if is_store(expanded(recipe.data.source)):
        return len(open_store(recipe.data, progress=False))
    try:
        return open_source(recipe.data.source).num_images
    except ValueError:
        return None


def memory_of(
    recipe: Recipe,
    stage: Stage,
    model: Backbone,
    num_devices: int = 1,
    bytes_of_compute: int = 4,
    limit: float | None = None,
) -> Memory:
    """The memory of a stage's step on each device.

    Activations are those that autograd keeps between the forward and the backward pass, counted on
    tensors without content, and the largest of them once more for what is computed meanwhile. Where
    blocks are computed anew, one block's are there at a time, and the inputs of all.

    Args:
        limit: bytes, to which `micro_batch_size: auto` keeps if it can; None = unknown.
    """
    num_bytes = 4 * sum(p.numel() for p in model.parameters())
    averages = num_bytes * (2 if stage.ema.kind == "power" else 1)
    (work,) = stage_work(recipe.model_copy(update={"stages": (stage,)}))
    share = math.ceil(stage.batch_size / num_devices)
    size = stage.micro_batch_size if isinstance(stage.micro_batch_size, int) else share
    kept, largest = _saved_bytes(recipe, num := min(size, share), work)
    if stage.activation_checkpointing:
        ends, _ = _saved_bytes(recipe, num, work, recomputed=True)
        kept, largest = ends + (kept - ends) // max(1, recipe.model.depth), 0
    each = (kept + 2 * largest) * bytes_of_compute // 4 / num
    memory = Memory(num_bytes, num_bytes, 2 * num_bytes, averages, round(each * num))
    if stage.micro_batch_size == "auto" and limit is not None:
        sizes = [one for one in range(share, 0, -1) if share % one == 0]
        rest = limit - (memory.total - memory.activations)
        num = next((one for one in sizes if each * one <= rest), 1)
        memory = replace(memory, activations=round(each * num))
    return memory


def _saved_bytes(
    recipe: Recipe, num: int, work: StageWork, recomputed: bool = False
) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass in fp32, and those of the largest tensor.

    Args:
        recomputed: of blocks, their inputs alone.
    """
    saved: dict[int, int] = {}
    model = weightless_model(recipe)
    if recomputed:
        how = {"use_reentrant": False, "preserve_rng_state": False}
        model.enable_gradient_checkpointing(functools.partial(checkpoint, **how))
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        patches = torch.empty(num, work.num_visible, model.patch_size**2 * recipe.data.channels)
        positions = torch.empty(num, work.num_visible, dtype=torch.int64)
        more = [] if work.num_middle is None else [positions[:, : work.num_middle]]
        labels = torch.empty(num, dtype=torch.int64) if model.num_classes else None
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            answer = model(
                patches, positions, torch.empty(num), labels, *more
            )  # keeps the graph alive
        del answer
    return sum(saved.values()), max(saved.values())
