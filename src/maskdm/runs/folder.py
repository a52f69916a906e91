"""Claiming a run's folder: its settings are written down, and checked when it is continued."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from maskdm.files import write_text
from maskdm.recipe import Recipe
from maskdm.recipe_files import differences, load_recipe

CLASSES = "classes.json"


@contextlib.contextmanager
def claimed_run_folder(
    run_dir: Path,
    recipe: Recipe,
    resume: str,
    environment: dict[str, Any],
    class_names: list[str] | None = None,
) -> Iterator[None]:
    """Makes RUN with its recipe.yaml, or checks that the run in it has an equal recipe.

    Inside the block, no other process can claim the folder.

    Args:
        resume: `auto` accepts a folder with a run of an equal recipe; `never` accepts none.
        environment: appended to environment.json, one entry for each start. Its
            `images_sha256` and `labels_sha256` must be those of the start before.
        class_names: names of the model's classes, kept in classes.json; they must be those of
            the start before.

    Raises:
        ValueError: the folder cannot be made, is in use, or holds a run of another recipe (its
            differences are listed), on other images or classes, or any run with `never`.
            Nothing is changed.
    """
    path = run_dir / "recipe.yaml"
    starts_path = run_dir / "environment.json"
    starts = json.loads(starts_path.read_text("utf-8")) if starts_path.is_file() else []
    if path.is_file():
        if resume == "never":
            raise ValueError(f"{run_dir} already holds a run: name a new folder with --out")
        if changed := differences(load_recipe(path), recipe):
            raise ValueError(
                f"{run_dir} holds a run of another recipe ({'; '.join(changed)}): "
                "give the same settings to continue it, or name a new folder with --out"
            )
        changed_data = []
        if starts and starts[-1]["images_sha256"] != environment["images_sha256"]:
            changed_data.append("images")
        before = starts[-1].get("labels_sha256") if starts else None
        if before not in (None, environment["labels_sha256"]):
            changed_data.append("labels")
        if read_class_names(run_dir) not in (None, class_names):
            changed_data.append("names of the classes")
        if changed_data:
            raise ValueError(
                f"the {' and '.join(changed_data)} of {recipe.data.source} have changed since the "
                f"run in {run_dir} began: bring them back to continue it, or name a new folder "
                "with --out"
            )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot make the folder {run_dir}: {error.strerror}") from None
    with _locked(run_dir):
        if not path.is_file():
            write_text(path, recipe.to_yaml())
        if class_names is not None:
            write_text(
                run_dir / CLASSES, json.dumps(class_names, ensure_ascii=False, indent=1) + "\n"
            )
        write_text(starts_path, json.dumps([*starts, environment], indent=1) + "\n")
        yield


def read_class_names(run_dir: Path) -> list[str] | None:
    """Names of the classes of a run's model; None where it has none, or kept none.

    Raises ValueError where the file is damaged.
    """
    path = run_dir / CLASSES
    if not path.is_file():
        return None
    try:
        names: list[str] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from None
    return names


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Holds RUN/.lock, which the system releases however the process ends."""
    lock = FileLock(run_dir / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is training in {run_dir}: wait for it, or name a new folder"
        ) from None
    except OSError:  # a file system without locks: go on as if alone
        warnings.warn(f"{run_dir} cannot be locked: start only one run in it", stacklevel=3)
    try:
        yield
    finally:
        lock.release()
