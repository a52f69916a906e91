"""Trains and measures a search's trials on this machine."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from maskdm.engine import process_state
from maskdm.evaluation.evaluate import evaluate_model
from maskdm.evaluation.quick import QuickLook
from maskdm.files import whole_folder
from maskdm.images.store import Store
from maskdm.metrics import METRICS
from maskdm.recipe import Evaluation, Recipe
from maskdm.runs.find import find_checkpoint
from maskdm.runs.load import load_model
from maskdm.search.forest import Diverged, Stopped
from maskdm.settings import changed
from maskdm.training.tick import NonFiniteLoss
from maskdm.training.trainer import train


class LocalTrainer:
    """See `forest.Trainer`.

    Args:
        recipe: whose images are measured against; its evaluation's `quick_num` samples are drawn
            for each trial.
        store: its images.
    """

    def __init__(self, recipe: Recipe, store: Store):
        self._look = QuickLook(recipe, store, recipe.for_previews)

    def train(self, recipe: Recipe, folder: Path, start: Path | None) -> None:
        """Trains in a folder, from a copy of another run's last checkpoint."""
        checkpoints = folder / "checkpoints"
        if start is not None and find_checkpoint(checkpoints) is None:
            last = find_checkpoint(start / "checkpoints")
            if last is None:
                raise ValueError(
                    f"{start} has no whole checkpoint: remove that folder, and it is trained again"
                )
            with whole_folder(checkpoints / last.name) as writing:
                shutil.copytree(last, writing, dirs_exist_ok=True)
        try:
            result = train(recipe, folder, show=False)
        except NonFiniteLoss as error:
            raise Diverged from error
        except torch.OutOfMemoryError as error:
            warnings.warn(
                "a trial ran out of memory and counts as diverged; in a new search leave out large "
                "--space.batches, or give --stages.all.micro-batch-size auto",
                stacklevel=2,
            )
            raise Diverged from error
        if not result.finished:
            raise Stopped
        for path in checkpoints.glob("step-*"):
            if path != result.checkpoint:
                shutil.rmtree(path)

    def measure(self, recipe: Recipe, folder: Path) -> dict[str, float]:
        """The columns of quality.jsonl that are numbers."""
        loaded = load_model(folder, note=lambda text: None)
        loaded.trained.model.to(process_state().device)
        figures = self._look(loaded.trained)
        return {name: float(value) for name, value in figures.items() if _is_number(value)}

    def distance(self, recipe: Recipe, folder: Path) -> dict[str, dict[str, Any]]:
        """The metrics of the recipe's evaluation, or the Fréchet distance, with intervals."""
        settings: Evaluation = recipe.evaluation
        metrics = settings.metrics
        rows = [METRICS[name] for name in metrics]
        if all(row.higher_is_better or row.is_report for row in rows):  # a distance decides
            metrics = (*metrics, "frechet")
        settings = changed(settings, metrics=metrics)
        loaded = load_model(folder, note=lambda text: None)
        record = evaluate_model(loaded, settings, recipe.sampling).record
        shutil.rmtree(folder / "evaluation", ignore_errors=True)
        return {
            name: {key: one.get(key) for key in ("value", "interval")}
            for name, one in record["metrics"].items()
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
