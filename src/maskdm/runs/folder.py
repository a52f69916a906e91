"""Claiming a run's folder: its settings are written down, and checked when it is continued."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from maskdm.files import parsed_json, write_text
from maskdm.images.huggingface import PREFIX
from maskdm.images.known import KNOWN
from maskdm.recipe import Recipe
from maskdm.recipe_files import Change, differences, load_recipe
from maskdm.runs.changes import accepted_changes, settled
from maskdm.runs.checkpoint import Progress, read_progress
from maskdm.runs.find import find_checkpoint
from maskdm.words import one_line

CLASSES, STARTS = "classes.json", "environment.json"


@contextlib.contextmanager
def claimed_run_folder(
    run_dir: Path,
    recipe: Recipe,
    resume: str,
    environment: dict[str, Any],
    class_names: list[str] | None = None,
    change: bool = False,
) -> Iterator[None]:
    """Makes RUN with its recipe.yaml, or checks that the run in it can go on with the recipe.

    Inside the block, no other process can claim the folder.

    Args:
        resume: `auto` accepts a folder with a run that the recipe continues; `never` accepts none.
        environment: appended to environment.json, one entry for each start, with the settings that
            have changed since the start before. Its `images_sha256` and `labels_sha256` must be
            those of the start before, unless that saved nothing. Its `lengths` are kept of the
            start with which the run began: the first, or the last before anything was saved.
        class_names: names of the model's classes, kept in classes.json; they must be those of
            the start before.
        change: accept settings that change the weights to come (`accepted_changes`).

    Raises:
        ValueError: the folder cannot be made, is in use, or holds a run that the recipe does not
            continue (the differences are listed), on other images or classes, or any run with
            `never`. Nothing is changed.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot make the folder {run_dir}: {error.strerror}") from None
    with _locked(run_dir):
        starts, path = read_starts(run_dir), run_dir / "recipe.yaml"
        if path.is_file():
            if resume == "never":
                raise ValueError(f"{run_dir} already holds a run: name a new folder with --out")
            progress = progress_of(run_dir)
            if progress is not None or (run_dir / "model").is_dir():
                _refuse_other_images(run_dir, recipe, starts, environment, class_names)
            changes = _changes(run_dir, recipe, progress, change)
            if progress is not None:
                lengths = first_lengths(run_dir)
                environment = {k: v for k, v in environment.items() if k != "lengths"}
                environment |= {} if lengths is None else {"lengths": lengths}
            if not starts and any(one.name == "data.source" for one in changes):
                raise ValueError(
                    f"{run_dir} holds a run on {load_recipe(path).data.source}, not "
                    f"{recipe.data.source}: name a new folder with --out"
                )
            environment = environment | {"changes": [str(one) for one in changes]}
        write_text(path, recipe.to_yaml())
        if class_names is None:
            (run_dir / CLASSES).unlink(missing_ok=True)  # of a start that saved nothing
        else:
            write_text(
                run_dir / CLASSES, json.dumps(class_names, ensure_ascii=False, indent=1) + "\n"
            )
        write_text(run_dir / STARTS, json.dumps([*starts, environment], indent=1) + "\n")
        yield


def _changes(
    run_dir: Path, recipe: Recipe, progress: Progress | None, change: bool
) -> list[Change]:
    """What changes in a run by a recipe. Raises ValueError for what is not possible."""
    old = load_recipe(run_dir / "recipe.yaml")
    if progress is None:  # nothing was saved, so that nothing can be lost
        return differences(old, recipe)
    try:
        return accepted_changes(settled(old, progress), recipe, progress, change)
    except ValueError as error:
        raise ValueError(f"{run_dir} holds {error}") from None


def _refuse_other_images(
    run_dir: Path,
    recipe: Recipe,
    starts: list[dict[str, Any]],
    environment: dict[str, Any],
    class_names: list[str] | None,
) -> None:
    """Raises ValueError where images, labels or class names are not those of the run."""
    changed = []
    if starts and starts[-1]["images_sha256"] != environment["images_sha256"]:
        changed.append("images")
    before = starts[-1].get("labels_sha256") if starts else None
    if before not in (None, environment["labels_sha256"]):
        changed.append("labels")
    if read_class_names(run_dir) not in (None, class_names):
        changed.append("names of the classes")
    if changed:
        raise ValueError(
            f"the {' and '.join(changed)} of {recipe.data.source} are not those that the run in "
            f"{run_dir} began with: bring them back to continue it, or name a new folder with --out"
        )


def own_sources(run_dir: Path) -> list[str]:
    """Where a run's images may be: its source, and that in the folders where it was started.

    A relative source belongs to the folder where the run was started, not to the present one.

    Raises ValueError where recipe.yaml or environment.json is damaged.
    """
    source = load_recipe(run_dir / "recipe.yaml").data.source
    if "://" in source or source.startswith("~"):
        return [source]
    prefix = PREFIX if source.startswith(PREFIX) else ""
    paths = [source.removeprefix(prefix)]
    if source in KNOWN:
        paths = [f"data/{source}{suffix}" for suffix in ("", ".zip", ".tar")]
    folders = [start["cwd"] for start in read_starts(run_dir)[::-1] if "cwd" in start]
    places = [f"{prefix}{Path(folder, path)}" for folder in folders for path in paths]
    return list(dict.fromkeys([source, *places]))


def images_sha256(run_dir: Path) -> str | None:
    """SHA-256 of the prepared images that a run was trained on; None = unknown.

    Raises ValueError where environment.json is damaged.
    """
    starts = read_starts(run_dir)
    return starts[-1].get("images_sha256") if starts else None


def progress_of(run_dir: Path) -> Progress | None:
    """How far the run in a folder has come; None where it has no whole checkpoint."""
    checkpoint = find_checkpoint(run_dir / "checkpoints")
    return None if checkpoint is None else read_progress(checkpoint)


def first_lengths(run_dir: Path) -> dict[str, Any] | None:
    """The lengths that a run's first command gave, before a budget scaled them; None = unknown.

    Raises ValueError where environment.json is damaged.
    """
    lengths = starts[-1].get("lengths") if (starts := read_starts(run_dir)) else None
    return lengths if isinstance(lengths, dict) else None


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of environment.json, one for each start; none without the file.

    Raises ValueError where it is damaged.
    """
    path = run_dir / STARTS
    try:
        starts = parsed_json(path.read_text("utf-8")) if path.is_file() else []
        if not isinstance(starts, list) or not all(isinstance(one, dict) for one in starts):
            raise ValueError("it holds no list of starts")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({one_line(error, 80)}): remove it to go on without the check that "
            "the images are the same"
        ) from None
    return starts


def read_class_names(run_dir: Path) -> list[str] | None:
    """Names of the classes of a run's model; None where it has none, or kept none.

    Raises ValueError where the file is damaged.
    """
    path = run_dir / CLASSES
    if not path.is_file():
        return None
    try:
        names: list[str] = parsed_json(path.read_text("utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("it holds no list of names")
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
