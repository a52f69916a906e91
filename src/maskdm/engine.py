"""This process's place among its peers, its device, and the one decision about precision.

Hugging Face Accelerate does the work: plain `python`, `accelerate launch`, `torchrun` and SLURM
all end here.
"""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather
from torch import Tensor, nn

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # of ranks that wait while the first one packs or writes files

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
)


def process_state() -> PartialState:
    """Joins the processes of this run, once; gives rank, number of ranks and device.

    Without an accelerator the CPU is requested by name: by default, Accelerate takes each
    process of a `torchrun` without GPUs for a run of its own, all writing the same files.

    Raises ValueError for a kind of parallelism that is not supported.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if state.distributed_type not in SUPPORTED:
        raise ValueError(
            f"{state.distributed_type.value} is not supported: launch with plain data "
            "parallelism (DDP)"
        )
    return state


def make_accelerator(requested_precision: str) -> tuple[Accelerator, str, str]:
    """Accelerate's engine, with the precision that was decided and the reason for it.

    Raises ValueError where the device cannot compute in the requested precision, or the launcher
    is set to accumulate gradients.
    """
    state = process_state()
    precision, reason = choose_precision(requested_precision, state.device)
    if state.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, wherever fp32 is used
    # A process may train one recipe after another, in another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        cpu=state.device.type == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "the launcher is set to accumulate gradients, which would divide them once more: "
            "leave it at 1 and set the stages' micro_batch_size"
        )
    return accelerator, precision, reason


def make_another(accelerator: Accelerator) -> Accelerator:
    """An engine of the same devices and precision, for networks that are tried and thrown away."""
    return Accelerator(
        cpu=accelerator.device.type == "cpu", mixed_precision=accelerator.mixed_precision
    )


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """Decides the compute precision: `fp32`, `bf16` or `fp16`, and says why.

    Weights, optimizer and moving average stay in fp32 in any case.
    Raises ValueError where the device cannot do what was requested.
    """
    if requested == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, and this is {device.type}: use auto")
    if requested != "auto":
        return requested, "as the recipe says"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU computes it natively"
    if device.type == "cuda":
        return "fp32", "this GPU has no bf16 units; precision fp16 is faster, if less stable"
    return "fp32", f"bf16 is not faster on {device.type}"


def autocast(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> contextlib.AbstractContextManager[None]:
    """For running a trained network: bf16 where the hardware is good at it.

    A solver's own arithmetic stays in fp32. Weights of another dtype compute in that one.
    """
    if dtype == torch.float32 and choose_precision("auto", device)[0] == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def device_of(model: nn.Module) -> torch.device:
    """Where a network computes: where its weights are, or where offloading moves them for it."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)  # Accelerate's
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(model.parameters()).device


def device_name(device: torch.device) -> str:
    """A device as a person knows it: the GPU's name, or cpu with its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def from_main(action: Callable[[], T]) -> T:
    """Runs an action on the first rank alone; every rank gets its result.

    A ValueError of the first rank is raised on all, so that none waits. To be called on every rank.
    """
    if process_state().is_main_process:
        try:
            result = action()
        except ValueError as error:
            broadcast_object_list([None, str(error)])
            raise
        broadcast_object_list([result, None])
        return result
    result, refusal = broadcast_object_list([None, None])
    if refusal is not None:
        raise ValueError(refusal)
    return result


def main_first(action: Callable[[], T]) -> T:
    """Runs an action on the first rank, then on the others, which find it done; returns its result.

    Raises a ValueError of the first rank as `from_main` does. To be called on every rank.
    """
    done = list[T]()
    from_main(lambda: done.append(action()))
    return done[0] if done else action()


def on_all_ranks(num: int, compute: Callable[[list[int]], Tensor]) -> Tensor:
    """Computes rows 0..num-1, each rank its share; every rank gets all. To be called on every rank.

    Args:
        num: rows wanted, at least 1.
        compute: returns the rows (n, ...) with the given numbers; the last ranks repeat the last
            row, since shares must have one size.

    Returns:
        (num, ...), on the process's device where there are several.
    """
    state = process_state()
    share = math.ceil(num / state.num_processes)
    start = state.process_index * share
    rows = compute([min(number, num - 1) for number in range(start, start + share)])
    if state.num_processes == 1:
        return rows
    together: Tensor = gather(rows.to(state.device).contiguous())
    return together[:num]


def leave() -> None:
    """Waits until every rank is done, then dissolves the group.

    A rank that just exits can abort peers which still write their last files.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
