"""Experiment trackers beside the lines of JSON: TensorBoard, Weights & Biases, Trackio, MLflow.

They are Accelerate's. A run keeps its place in them over all resumes, by what RUN/trackers.json
says. A tracker that fails, for want of a network say, is noted once and left out until the run is
started again: metrics.jsonl and quality.jsonl have everything.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from maskdm.families import TRACKERS
from maskdm.files import write_text
from maskdm.recipe import Recipe
from maskdm.runs.lines import Line
from maskdm.words import one_line

PLACES = "trackers.json"  # in a run's folder
PROJECT = "maskdm"
COUNTERS = ("images", "flops", "elapsed_sec")  # what training has cost so far: `progress/images`


@dataclass
class Place:
    """Where a run is in a tracker.

    Attributes:
        run_dir: the run's folder.
        name: of the run, which no other has.
        step: the last one that is kept; later ones, which a kill left behind, are drawn anew.
        known: what the tracker wrote down at an earlier start; empty at the first. It may be added
            to, and is kept.
    """

    run_dir: Path
    name: str
    step: int
    known: dict[str, Any] = field(default_factory=dict)


def refuse_trackers(names: Sequence[str]) -> None:
    """Raises ValueError where the package of a tracker is missing; it says how to install it."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"log_to {name} needs the package {name}: pip install 'maskdm[{name}]'"
            )
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"log_to {name} needs a newer accelerate: pip install 'maskdm[{name}]'"
            )


class Trackers:
    """The trackers of a run; to be made on the rank that reports.

    Args:
        recipe: which ones; its settings are kept in them.
        run_dir: RUN.
        step: the last step that was saved.
        say: is told what fails.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, step: int, say: Callable[[str], None]):
        self._say, self._open = say, dict[str, Any]()
        self._stages = [stage.name for stage in recipe.stages]
        places = _read_places(run_dir / PLACES) if recipe.log_to else {}
        for name in dict.fromkeys(recipe.log_to):
            places.setdefault("id", secrets.token_hex(4))
            known = places.setdefault(name, {})
            place = Place(run_dir, f"{run_dir.resolve().name}-{places['id']}", step, known)
            is_new = not known
            tracker = self._tried(name, TRACKERS[name].open, place)
            if tracker is None:
                continue
            self._open[name] = tracker
            known["name"] = place.name
            if is_new:
                settings = flat(recipe.model_dump(mode="json"))
                self._tried(name, TRACKERS[name].configure, tracker, settings)
        if recipe.log_to:
            write_text(run_dir / PLACES, json.dumps(places, indent=1) + "\n")

    def log(self, group: str, line: Line) -> None:
        """Sends the numbers of a line of metrics.jsonl or quality.jsonl.

        Args:
            group: its name stands before theirs: `train/loss`. What training has cost so far is
                `progress/images` and so on in all lines.
            line: with its `step`.
        """
        values = {
            f"{'progress' if key in COUNTERS else group}/{key}": float(value)
            for key, value in line.items()
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        if line.get("stage") in self._stages:
            values["progress/stage"] = float(self._stages.index(line["stage"]) + 1)
        for name, tracker in list(self._open.items()):
            self._tried(name, tracker.log, values, line["step"])

    def log_picture(self, title: str, picture: Image.Image, step: int) -> None:
        """Sends a picture.

        Args:
            title: of the series that it belongs to.
            picture: RGB.
            step: at which it was drawn.
        """
        for name, tracker in list(self._open.items()):
            self._tried(name, TRACKERS[name].log_picture, tracker, title, picture, step)

    def close(self) -> None:
        """Waits until all is sent, as far as the trackers do."""
        for name, tracker in list(self._open.items()):
            self._tried(name, tracker.finish)
        self._open.clear()

    def _tried(self, name: str, do: Callable[..., Any], *arguments: Any) -> Any:
        """What a tracker answers; None, and no more of it, where it fails."""
        try:
            return do(*arguments)
        except Exception as error:  # a run of days is worth more than its copy elsewhere
            self._open.pop(name, None)
            self._say(
                f"note: tracker {name} failed and is left out until the run is started again "
                f"({one_line(error, 160)}); metrics.jsonl has everything"
            )
            return None


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by dotted names, with values that all trackers take: `stages.0.mask.kind`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{before}{key}"
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


def open_tensorboard(place: Place) -> Any:
    """TensorBoard's files in RUN/tensorboard, beginning anew after the step that was saved."""
    from accelerate.tracking import TensorBoardTracker

    folder = place.run_dir / "tensorboard"
    return _started(
        TensorBoardTracker(place.name, folder, purge_step=place.step + 1 if place.known else None)
    )


def picture_to_tensorboard(tracker: Any, title: str, picture: Image.Image, step: int) -> None:
    """As an image summary."""
    import numpy as np

    tracker.log_images({title: np.asarray(picture)[None]}, step, dataformats="NHWC")


def configure_tensorboard(tracker: Any, settings: dict[str, Any]) -> None:
    """As text: a table of hyperparameters would be a run of its own, in a folder of its own."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    tracker.tracker.add_text("recipe", f"| setting | value |\n|---|---|\n{rows}")


def configure(tracker: Any, settings: dict[str, Any]) -> None:
    """As the run's configuration."""
    tracker.store_init_configuration(settings)


def open_wandb(place: Place) -> Any:
    """A run in the project maskdm, or in that of WANDB_PROJECT; the same one over all resumes."""
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run_id = place.name.rpartition("-")[2]
    how = {"id": run_id, "name": place.name, "resume": "allow", "dir": str(place.run_dir)}
    return _started(WandBTracker(project, **how))


def picture_to_wandb(tracker: Any, title: str, picture: Image.Image, step: int) -> None:
    """As an image."""
    tracker.log_images({title: [picture]}, step)


def open_trackio(place: Place) -> Any:
    """A run in the project maskdm, or in that of TRACKIO_PROJECT; the same one over all resumes."""
    from accelerate.tracking import TrackioTracker

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    how = {"name": place.name, "resume": "allow" if place.known else "never"}
    return _started(TrackioTracker(project, **how))


def picture_to_trackio(tracker: Any, title: str, picture: Image.Image, step: int) -> None:
    """As an image."""
    import trackio

    tracker.log({title: trackio.Image(picture)}, step)


def open_mlflow(place: Place) -> Any:
    """A run in the experiment maskdm, or MLFLOW_EXPERIMENT_NAME; the same one over all resumes."""
    from accelerate.tracking import MLflowTracker

    known = place.known.get("run_id")
    tracker = _started(MLflowTracker(PROJECT, run_id=known, run_name=place.name))
    place.known["run_id"] = tracker.tracker.info.run_id
    return tracker


def picture_to_mlflow(tracker: Any, title: str, picture: Image.Image, step: int) -> None:
    """As an image of the run."""
    import mlflow

    mlflow.log_image(picture, key=title, step=step)


def _started(tracker: Any) -> Any:
    """A tracker that is ready; Accelerate's older ones start when they are made."""
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def _read_places(path: Path) -> dict[str, Any]:
    """What the trackers wrote down before; nothing where that is damaged: they begin anew."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
