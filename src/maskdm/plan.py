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

from maskdm.engine import device_name, make_accelerator, process_state
from maskdm.families import MODEL_SIZES
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
from maskdm.training.gpus import GPUS, SHARE, Gpus
from maskdm.training.planning import RunOptions, with_numbers
from maskdm.training.speed import Speed, ThisMachine
from maskdm.training.work import StageWork, stage_work
from maskdm.words import size_text


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
    if recipe.model.num_classes == "auto":  # which hardly changes the cost
        recipe = changed(recipe, model=changed(recipe.model, num_classes=0))
    if gpu is not None:
        gpus = Gpus(gpu, num_gpus, SHARE if share is None else share, recipe.precision)
        return _plan_for(gpus, recipe, options, num_images, num_train)
    device = process_state().device
    limit = None
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory
    accelerator, precision, _ = make_accelerator(recipe.precision)
    where = ThisMachine(accelerator, lambda text: print(text, file=sys.stderr))
    num = accelerator.num_processes
    machine = f"{num} x {device_name(device)}, {precision}"
    ready = with_numbers(recipe, options, num_images, num_train, where)
    size = 4 if precision == "fp32" else 2
    return make_plan(ready, machine, where.speed(ready), num_images, num_train, num, size, limit)


def _plan_for(
    gpus: Gpus,
    recipe: Recipe,
    options: RunOptions,
    num_images: int | None,
    num_train: int | None,
) -> Plan:
    """Plans a recipe on GPUs that are not here."""
    ready, is_smaller = _with_numbers(recipe, options, num_images, num_train, gpus)
    gpu, size = GPUS[gpus.name], 4 if gpus.compute == "fp32" else 2
    machine = f"{gpus.num} x {gpu.title}, {gpus.compute}, at {100 * gpus.share:.0f} % of the peak"
    speed = gpus.speed(ready)
    counts = (num_images, num_train, gpus.num)
    plan = make_plan(ready, machine, speed, *counts, size, gpu.memory)
    plan.warnings.extend(_launch_warnings(gpus, ready, speed, is_smaller))
    if plan.memory.total > gpu.memory:
        plan.warnings.append(
            f"a step needs {size_text(plan.memory.total)}, but a {gpu.title} has "
            f"{size_text(gpu.memory)}: set --stages.all.micro-batch-size auto, or also "
            "--stages.all.activation-checkpointing"
        )
    if gpus.has_bf16 and gpus.compute == "fp32":
        plan.warnings.append("the times are those of bf16: in fp32 they are at least twice as long")
    if not gpus.has_bf16 and recipe.precision in ("auto", "bf16"):
        plan.warnings.append(
            f"a {gpu.title} has no bf16 units, so the times of precision {recipe.precision} are "
            "those of fp32: --precision fp16 is faster, if less stable"
        )
    return plan


def _with_numbers(
    recipe: Recipe,
    options: RunOptions,
    num_images: int | None,
    num_train: int | None,
    gpus: Gpus,
) -> tuple[Recipe, bool]:
    """`with_numbers`, with a model that the steps of a budget in hours can teach.

    A smaller model reaches fewer FLOPs per second where launches bound its steps, so the largest
    that fits at its own speed is found from above.

    Returns:
        The recipe, and whether launches made its model smaller.
    """
    counts = (num_images, num_train)
    if recipe.model.size != "auto":
        return with_numbers(recipe, options, *counts, gpus), False
    own, before = replace(options, control="none"), None  # a control has its recipe's model
    first = planned = with_numbers(recipe, own, *counts, gpus)
    while planned.model != before:
        before, gpus = planned.model, replace(gpus, planned=planned)
        planned = with_numbers(recipe, own, *counts, gpus)
    return with_numbers(recipe, options, *counts, gpus), planned.model != first.model


def _launch_warnings(gpus: Gpus, recipe: Recipe, speed: Speed, is_smaller: bool) -> list[str]:
    """Whether launches bound the time of steps, and the size of the model."""
    model, found = weightless_model(recipe), []
    launches = gpus.launches_sec(recipe, model)
    rows = [
        (stage, sec)
        for stage, sec, least in zip(recipe.stages, speed.step_sec, launches, strict=True)
        if sec == least
    ]
    if rows:
        names = ", ".join(dict.fromkeys(stage.name for stage, _ in rows))
        better = next(
            (
                f" or --compile {way}"
                for way in ("auto", "graphs")
                if sum(gpus.launches_sec(changed(recipe, compile=way), model)) < sum(launches)
            ),
            "",
        )
        found.append(
            f"steps are bound by launches in {names}: the kernels of a step take about "
            f"{1000 * max(sec for _, sec in rows):.2g} ms to launch (measured with an H200), and "
            f"less to compute: a larger batch{better} uses the GPU better"
        )
    if is_smaller:
        width = recipe.model.embed_dim
        size = next(name for name, row in MODEL_SIZES.items() if row.embed_dim == width)
        found.append(
            "the size of the model allows for launches; `maskdm train` on such a GPU does not, and "
            f"may choose a larger one: add --model.size {size}"
        )
    return found


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
