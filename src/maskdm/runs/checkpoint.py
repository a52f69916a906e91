"""Exact training state on disk: whole or absent, never half.

    RUN/checkpoints/step-00012000/    model.safetensors  ema.safetensors  optimizer.safetensors
                                      progress.json  (counters; sizes and CRC-32 of the files;
                                      written last)
    RUN/checkpoints/latest            one line: the name of the newest checkpoint
    RUN/kept/step-00012000/           ema.safetensors and progress.json alone (`keep_every`)

Random numbers need no saving: order, masks, times and noise of a step depend only on the seed,
the rank and the step. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskdm.files import parsed_json, whole_folder, write_text
from maskdm.runs.find import KEPT, best_line, crc32_of, incompleteness
from maskdm.words import one_line

NARROW = "ema-narrow.safetensors"
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
ModelT = TypeVar("ModelT", bound=nn.Module)


class Plateau(NamedTuple):
    """How a stage with `until: plateau` has ended.

    Attributes:
        stage: its index.
        fewer: steps that it has not taken.
        more: steps that the next one takes instead; below 0 where the forks cost more than that.
        probe_flops: floating-point operations of the forks.
        warmup: its warm-up in steps, which may have been a part of its length.
    """

    stage: int
    fewer: int
    more: int
    probe_flops: int
    warmup: int


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps over all stages.
        stage: index of the current stage.
        stage_step: optimizer steps in it.
        images: images seen, the position in the endless order.
        flops: floating-point operations of all training steps, forward and backward, and of the
            forks of `until: plateau`.
        elapsed_sec: seconds of training, over all resumes.
        tick: (loss, gradient norm) of the steps since the last line of metrics.
        scaler: state of the fp16 loss scaler, empty otherwise.
        probe_flops: of the present stage's forks so far.
        plateaus: how stages with `until: plateau` have ended.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    images: int = 0
    flops: int = 0
    elapsed_sec: float = 0.0
    tick: list[tuple[float, float]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    probe_flops: int = 0
    plateaus: list[Plateau] = field(default_factory=list)


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    narrow: nn.Module | None = None,
    *,
    is_stage_end: bool,
) -> Path:
    """Writes a checkpoint beside its place, renames it into it, then moves `latest` on.

    Args:
        folder: RUN/checkpoints.
        model: the raw model, as trained; `ema` its average, of equal structure.
        optimizer: over the parameters of `model`.
        narrow: a second, narrower average, where there is one.

    Raises:
        OSError: the disk refused (full, say). What was there before is untouched.
    """
    path = folder / f"step-{progress.step:08d}"
    tensors = (model.state_dict(), ema.state_dict(), _optimizer_tensors(optimizer, model))
    files = dict(zip(FILES, tensors, strict=True))
    if narrow is not None:
        files[NARROW] = narrow.state_dict()
    _write(path, files, {**asdict(progress), "is_stage_end": is_stage_end})
    write_text(folder / "latest", path.name + "\n")
    return path


def keep_average(run_dir: Path, progress: Progress, ema: nn.Module) -> Path:
    """Writes an average alone, RUN/kept/step-..., whole or not at all.

    Raises OSError where the disk refuses.
    """
    path = run_dir / KEPT / f"step-{progress.step:08d}"
    _write(path, {"ema.safetensors": ema.state_dict()}, {**asdict(progress), "tick": []})
    return path


def _write(path: Path, files: dict[str, dict[str, Tensor]], counters: dict[str, Any]) -> None:
    """Writes files of tensors, and last the counters with the files' sizes and checksums."""
    with whole_folder(path) as writing:
        for file, content in files.items():
            save_file({name: value.contiguous() for name, value in content.items()}, writing / file)
        sizes = {file: (writing / file).stat().st_size for file in files}
        sums = {file: crc32_of(writing / file) for file in files}
        text = json.dumps({**counters, "files": sizes, "crc32": sums})
        write_text(writing / "progress.json", text)


def load_checkpoint(
    path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Loads a whole checkpoint into model, average and optimizer; returns the counters.

    Raises ValueError where a file is damaged, or of another model.
    """
    progress = read_progress(path)
    load: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "model.safetensors": model.load_state_dict,
        "ema.safetensors": ema.load_state_dict,
        "optimizer.safetensors": lambda tensors: _load_optimizer_tensors(optimizer, model, tensors),
    }
    for file in FILES:
        _load(path / file, load[file])
    return progress


def _load(file: Path, take: Callable[[dict[str, Tensor]], object]) -> None:
    """Reads a checkpoint's file and has it taken. Raises ValueError where that is not possible."""
    try:
        take(load_file(file))
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"checkpoint {file.parent}: {file.name} cannot be loaded ({one_line(error, 120)}): "
            "remove this checkpoint to go on from the one before"
        ) from None


def load_narrow_average(path: Path, ema: ModelT) -> ModelT | None:
    """The second average of a checkpoint, beside the model's average; None where it has none."""
    if not (path / NARROW).is_file():
        return None
    narrow = copy.deepcopy(ema)
    _load(path / NARROW, narrow.load_state_dict)
    return narrow


def read_progress(path: Path) -> Progress:
    """The counters of a whole checkpoint. Raises ValueError where they are damaged."""
    try:
        content = parsed_json((path / "progress.json").read_text("utf-8"))
        content = {"probe_flops": 0, "plateaus": [], **content}  # earlier versions have none
        progress = Progress(**{key: content[key] for key in Progress.__dataclass_fields__})
        progress.tick = [(loss, norm) for loss, norm in progress.tick]
        progress.plateaus = [Plateau(*one) for one in progress.plateaus]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = one_line(error)
        raise ValueError(f"checkpoint {path}: progress.json is damaged: {why}") from None
    return progress


def prune_checkpoints(folder: Path, current: Path, keep: int) -> None:
    """Removes old checkpoints after `current` was saved.

    The last `keep` whole ones, `current` among them, each stage's end and that with the lowest
    held-out loss are kept. Leftovers,
    damaged ones, and any beyond `current` (from steps that were run again) are removed.
    """
    for leftover in [*folder.glob("writing-*"), *folder.glob("removing-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    checkpoints = sorted(folder.glob("step-*"))
    whole = [path for path in checkpoints if path.name <= current.name and not incompleteness(path)]
    ends = [p for p in whole if parsed_json((p / "progress.json").read_text())["is_stage_end"]]
    best = best_line(folder.parent) if (folder.parent / "recipe.yaml").is_file() else None
    kept = {current, *whole[-keep:], *ends}
    kept |= {folder / f"step-{best['step']:08d}"} if best else set()
    for path in set(checkpoints) - kept:
        # Renamed first: a kill in the middle must not leave what looks like a checkpoint.
        removing = path.with_name(f"removing-{path.name}")
        path.rename(removing)
        shutil.rmtree(removing, ignore_errors=True)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as `parameter.key` tensors (key: step, exp_avg, exp_avg_sq; Muon: momentum)."""
    names = _names(optimizer, model)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}.{key}": value
        for index, values in state.items()
        for key, value in values.items()
    }


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters in the optimizer's own order: group by group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def _load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    index = {name: i for i, name in enumerate(_names(optimizer, model))}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = name.rsplit(".", 1)
        if value.shape != (torch.Size() if key == "step" else shapes[parameter]):
            raise RuntimeError(f"{name} has the shape {tuple(value.shape)}")
        # A copy, for the optimizer keeps what it gets: not a part of a file that is soon removed.
        state.setdefault(index[parameter], {})[key] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
