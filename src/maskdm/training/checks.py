"""What cannot work is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

from maskdm.images.known import KNOWN, locate
from maskdm.images.store import Store
from maskdm.recipe import Recipe


def refuse_run_among_images(source: str, run_dir: Path) -> None:
    """Raises ValueError for a run's folder inside the images: its previews would become some."""
    folder = locate(source) if source in KNOWN else Path(source).expanduser()
    if folder.is_dir() and run_dir.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{run_dir} lies in the image folder {source}, so its previews would become images: "
            "name a folder elsewhere with --out"
        )


def refuse_uneven_batches(recipe: Recipe, num_ranks: int) -> None:
    """Raises ValueError where a global batch does not divide among the ranks."""
    for i, stage in enumerate(recipe.stages):
        if stage.batch_size % num_ranks:
            below = stage.batch_size // num_ranks * num_ranks
            raise ValueError(
                f"stages.{i}.batch_size {stage.batch_size} does not divide among {num_ranks} "
                f"devices: use {f'{below} or ' if below else ''}{below + num_ranks}"
            )


def refuse_unfit_labels(recipe: Recipe, store: Store) -> None:
    """Raises ValueError where the model's classes are not the source's."""
    wanted, names = recipe.model.num_classes, store.manifest["class_names"]
    if wanted and wanted != len(names):
        raise ValueError(
            f"model.num_classes is {wanted}, but {recipe.data.source} has {len(names)} classes: "
            f"use {len(names)}" + ("" if names else " (class folders root/class/x.png give labels)")
        )
