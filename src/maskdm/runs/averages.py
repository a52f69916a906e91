"""Snapshots of power-function averages, and averages of other widths made of them after training.

    RUN/averages/step-00012000.safetensors    two averages of relative widths w and w/2, in fp16

After Karras et al. 2024 (EDM2), Section 3.2 and Appendix C: an average of any width is approximated
by the linear combination of the snapshots whose profile is nearest to it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from maskdm.files import parsed_json, write_whole
from maskdm.models.power_average import gamma_of_width, inner_product
from maskdm.recipe import Stage
from maskdm.runs.find import KEPT
from maskdm.words import listed

NUM_SNAPSHOTS = 16  # of a stage
FOLDER = "averages"


@dataclass(frozen=True)
class Snapshot:
    """A file of averages.

    Attributes:
        path: the file.
        stage: name of the stage.
        step: of the run; `stage_step` of its stage.
        widths: relative widths of its averages.
    """

    path: Path
    stage: str
    step: int
    stage_step: int
    widths: tuple[float, ...]


def is_snapshot_due(stage: Stage, stage_step: int) -> bool:
    """Whether a stage's averages are kept at this step of it: sixteen times, at its end too."""
    if stage.ema.kind != "power":
        return False
    parts = [NUM_SNAPSHOTS * step // stage.steps for step in (stage_step - 1, stage_step)]
    return parts[0] < parts[1]


def num_snapshots(stage: Stage) -> int:
    """How many snapshots a stage leaves."""
    return min(NUM_SNAPSHOTS, stage.steps) if stage.ema.kind == "power" else 0


def save_snapshot(
    run_dir: Path, stage: Stage, step: int, stage_step: int, averages: dict[float, nn.Module]
) -> None:
    """Writes the averages, by their widths. Raises OSError where the disk refuses."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{i}.{name}": value.detach().to("cpu", torch.float16).contiguous()
        for i, average in enumerate(averages.values())
        for name, value in average.named_parameters()
    }
    facts = {"stage": stage.name, "step": step, "stage_step": stage_step, "widths": [*averages]}
    content = save(tensors, {"snapshot": json.dumps(facts)})
    write_whole(folder / f"step-{step:08d}.safetensors", lambda file: file.write(content))


def snapshots_of(run_dir: Path, stage: str, until_step: int) -> list[Snapshot]:
    """The snapshots of a stage up to a step of the run, in order."""
    found = []
    for path in sorted((run_dir / FOLDER).glob("step-*.safetensors")):
        with safe_open(path, "pt") as file:
            facts = parsed_json(file.metadata()["snapshot"])
        if facts["stage"] == stage and facts["step"] <= until_step:
            found.append(Snapshot(path, **{**facts, "widths": tuple(facts["widths"])}))
    return found


def remove_averages_after(run_dir: Path, step: int) -> None:
    """Removes snapshots and kept averages beyond a step, which a kill or a failed attempt left.

    A run that goes on at this step, perhaps of another length, would mix them with its own.
    """
    for path in [*(run_dir / FOLDER).glob("step-*"), *(run_dir / KEPT).glob("step-*")]:
        number = path.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def averaged_weights(
    run_dir: Path, stage: str, step: int, stage_step: int, width: float
) -> dict[str, Tensor]:
    """Weights averaged by a power function of any relative width, at a step of a run: float32.

    Args:
        run_dir: RUN.
        stage: name of the stage that the step is in.
        step: of the run; `stage_step` of the stage, both those of a checkpoint.
        width: below 0.2886.

    Raises ValueError where the run has no snapshots near that step.
    """
    snapshots = snapshots_of(run_dir, stage, step)
    if not snapshots or snapshots[-1].stage_step < 0.9 * stage_step:
        raise ValueError(
            f"{run_dir} has no snapshots of averages of stage {stage} near step {step}: train with "
            "ema.kind power, which keeps them"
        )
    widths = sorted({one for snapshot in snapshots for one in snapshot.widths})
    if not widths[0] * 0.5 <= width < 0.2886:
        raise ValueError(
            f"an average of width {width:g} cannot be made of widths {listed(widths)}: use "
            f"{widths[0] / 2:g} to 0.288"
        )
    profiles = [
        (gamma_of_width(one), float(snapshot.stage_step))
        for snapshot in snapshots
        for one in snapshot.widths
    ]
    shares = iter(combination(profiles, (gamma_of_width(width), float(stage_step))))
    weights: dict[str, Tensor] = {}
    for snapshot in snapshots:
        with safe_open(snapshot.path, "pt") as file:
            for i in range(len(snapshot.widths)):
                share = next(shares)
                for key in file.keys():  # noqa: SIM118 - a file, not a dict
                    number, _, name = key.partition(".")
                    if int(number) == i:
                        term = share * file.get_tensor(key).double()
                        weights[name] = weights[name] + term if name in weights else term
    return {name: value.float() for name, value in weights.items()}


def combination(profiles: list[tuple[float, float]], wanted: tuple[float, float]) -> np.ndarray:
    """The shares of profiles, (exponent, time of its end) each, that come nearest to another.

    Least squares of the profiles as functions of time (Karras et al. 2024, Eq. 138), scaled to
    sum to one: float64 (n,).
    """
    products = np.array([[inner_product(a, b) for b in profiles] for a in profiles])
    targets = np.array([inner_product(a, wanted) for a in profiles])
    shares, *_ = np.linalg.lstsq(products, targets, rcond=1e-12)
    result: np.ndarray = shares / shares.sum()
    return result
