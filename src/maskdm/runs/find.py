"""Finding what a user names: a run's folder, one of its stages, a checkpoint, an exported model.

It reads files only, and imports fast.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from maskdm.files import expanded, parsed_json
from maskdm.images.faces import is_faces
from maskdm.images.known import KNOWN
from maskdm.recipe import Recipe, Sampling
from maskdm.recipe_files import load_recipe, migrated
from maskdm.runs.lines import Line, read_lines
from maskdm.words import one_line

SETTINGS = "maskdm.json"  # of an exported model: what this package needs to know of it
# What is fetched of an exported model; `denoiser` is there where diffusers alone cannot open it.
PARTS = ["model_index.json", SETTINGS]
PARTS += [f"{part}/*" for part in ("unet", "transformer", "denoiser", "scheduler")]
HUB_ID = r"[\w.-]+/[\w.-]+"  # owner/name
BEST = "best"
KEPT = "kept"  # RUN/kept/step-...: averages alone, for curves of quality
CONTROL = "control.json"  # in the folder of a control: whose it is
REPORT = "report.html"  # in a run's folder
COUNTERS = ("step", "stage", "stage_step", "images", "flops", "elapsed_sec")  # of progress.json
MOST_COUNTED = 2.0**100  # what no run reaches
CHUNK = 2**24  # bytes read at a time
Note = Callable[[str], None]


@dataclass(frozen=True)
class Location:
    """The place of a model on disk.

    Attributes:
        folder: an exported model (with model_index.json) or a checkpoint (with progress.json).
        run: the run's folder around it, or None if it was copied out of one.
    """

    folder: Path
    run: Path | None

    @property
    def is_exported(self) -> bool:
        """Whether the folder is an exported model; else it is a checkpoint."""
        return (self.folder / "model_index.json").is_file()

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe of the run. Raises ValueError where the model is outside of a run's folder."""
        if self.run is None:
            raise ValueError(f"{self.folder} is not in a run's folder: recipe.yaml is missing")
        return load_recipe(self.run / "recipe.yaml")

    @property
    def sampling(self) -> Sampling:
        """How images are drawn from the model by default."""
        if not self.is_exported:
            return self.recipe.sampling
        return Sampling(**read_index(self.folder)["sampling"])


def is_model(name: str) -> bool:
    """Whether a name is a model's, and not that of images: what is at that place decides.

    What does not exist is taken for images if it can only be that (`digits`, `hf:...`, a URL or a
    pattern).
    """
    path = expanded(name)
    if not path.exists():
        is_set = name in ("digits", *KNOWN) or is_faces(name)
        return not (is_set or any(mark in name for mark in ":*{"))
    marks = ("recipe.yaml", "model_index.json", "model/model_index.json", "progress.json")
    return any((path / mark).is_file() for mark in marks)


def training_of(location: Location) -> dict[str, Any] | None:
    """How far a model was trained: step, stage, images, flops, elapsed_sec; None = unknown."""
    if location.run is None:
        return None
    checkpoint = location.folder
    if location.is_exported:
        newest = find_checkpoint(location.run / "checkpoints")
        if newest is None or _goes_on(location.run):  # an export of the run's former end
            return None
        checkpoint = newest
    progress, stages = read_settings(checkpoint / "progress.json"), location.recipe.stages
    try:
        costs = {name: progress[name] for name in ("step", "images", "flops", "elapsed_sec")}
        return {**costs, "stage": stages[progress["stage"]].name}
    except (LookupError, TypeError) as error:
        why = f"{one_line(error)}, or a stage that the recipe does not have"
        raise ValueError(f"{checkpoint / 'progress.json'} is damaged: it lacks {why}") from None


def find_model(name: str | Path, note: Note = print) -> Location:
    """Finds the model that a user names.

    Args:
        name: a run's folder (its exported model, or the newest checkpoint of an unfinished run),
            `RUN@STAGE` (the checkpoint at that stage's end), a checkpoint, an exported folder,
            or a Hub id `owner/name`, which is downloaded.
        note: is called with a line for each damaged checkpoint that is skipped.

    Raises:
        ValueError: there is no model of that name.
    """
    path = expanded(name)
    if not path.exists() and "@" in str(path):
        run, stage = str(path).rsplit("@", 1)
        return Location(stage_checkpoint(Path(run), stage), Path(run))
    path = exported_folder(name)
    for folder in (path, path / "model"):
        is_former = folder != path and _goes_on(path)
        if (folder / "model_index.json").is_file() and not is_former:
            return Location(folder, _run_around(folder))
    if (path / "progress.json").is_file():
        if problem := damage(path):
            raise ValueError(f"checkpoint {path}: {problem}")
        if _run_around(path) is None:
            raise ValueError(f"checkpoint {path} is not in a run's folder: recipe.yaml is missing")
        return Location(path, _run_around(path))
    if (path / "recipe.yaml").is_file():
        checkpoint = find_checkpoint(path / "checkpoints", note)
        if checkpoint is None:
            raise ValueError(f"{name} has no checkpoint yet: train it a little longer")
        return Location(checkpoint, path)
    raise ValueError(
        f"{name} is not a run's folder, a checkpoint or an exported model"
        + ("" if path.exists() else " (it does not exist)")
    )


def _goes_on(run: Path) -> bool:
    """Whether a run is not at its end, so that its exported model is that of a former one."""
    newest = max((path.name for path in run.glob("checkpoints/step-*")), default=None)
    if newest is None or not (run / "recipe.yaml").is_file():
        return False
    return newest < _at(run, load_recipe(run / "recipe.yaml").num_steps).name


def stage_checkpoint(run: Path, stage: str) -> Path:
    """The checkpoint at the end of a run's stage; `best`: that with the lowest held-out loss.

    Raises ValueError where the run has no stage of that name, or has not reached its end.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}@{stage}: {run} is not a run's folder (it has no recipe.yaml)")
    stages = load_recipe(run / "recipe.yaml").stages
    names = [known.name for known in stages]
    if stage in names:
        step = sum(known.steps for known in stages[: names.index(stage) + 1])
    elif stage == BEST:
        best = best_line(run)
        if best is None:
            raise ValueError(
                f"{run} has no held-out loss that would name the best: set data.held_out and "
                "evaluate_every"
            )
        step = best["step"]
    else:
        raise ValueError(
            f"{run} has no stage {stage!r}: its stages are {', '.join(names)}; {BEST} is the "
            "average with the lowest held-out loss"
        )
    checkpoint = _at(run, step)
    if problem := damage(checkpoint):
        ended = "" if checkpoint.exists() else f": the run has not reached the end of {stage}"
        raise ValueError(f"checkpoint {checkpoint}: {problem}{ended}")
    return checkpoint


def _at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def best_line(run: Path) -> Line | None:
    """The line of quality.jsonl with the lowest loss on held-out images; None where there is none.

    Only lines of stages under the last one's noise schedule are comparable. Lines without a
    checkpoint, as a killed run may have written last, do not count.
    """
    recipe = load_recipe(run / "recipe.yaml")
    last = recipe.final_diffusion.schedule
    stages = {one.name for one in recipe.stages if recipe.diffusion_of(one).schedule == last}
    lines = read_lines(run / "quality.jsonl")
    known = [
        line
        for line in lines
        if line.get("dense_loss")
        and line.get("stage") in stages
        and _at(run, line["step"]).is_dir()
    ]
    return min(known, key=lambda line: line["dense_loss"], default=None)


def find_checkpoint(folder: Path, note: Note = lambda text: None) -> Path | None:
    """The newest whole checkpoint below RUN/checkpoints, or None; notes what it skips."""
    if not folder.is_dir():
        return None
    for leftover in [*folder.glob("writing-*"), *folder.glob("removing-*")]:
        note(f"ignored {leftover.name}: a checkpoint that was never finished")
    latest = folder / "latest"
    named = latest.read_bytes().strip() if latest.is_file() else b""
    newest_first = sorted((p.name for p in folder.glob("step-*")), reverse=True)
    newest_first.sort(key=lambda name: name.encode() != named)  # the one that is named comes first
    for name in newest_first:
        if problem := damage(folder / name):
            note(f"ignored checkpoint {name}: {problem}")
        else:
            return folder / name
    return None


def kept_averages(run: Path) -> list[Path]:
    """The whole folders of RUN/kept, by their steps, none beyond the newest checkpoint.

    Averages beyond it are of steps that a continued run takes anew.
    """
    newest = find_checkpoint(run / "checkpoints")
    paths = sorted((run / KEPT).glob("step-*"))
    return [
        path for path in paths if not damage(path) and (newest is None or path.name <= newest.name)
    ]


def incompleteness(path: Path) -> str:
    """What a checkpoint folder lacks, by the sizes of its files; empty if nothing."""
    counters = _counters(path)
    if counters is None:
        return "it is incomplete (no readable progress.json)"
    for file, size in counters["files"].items():
        actual = (path / file).stat().st_size if (path / file).is_file() else 0
        if actual != size:
            return f"{file} has {actual} of {size} bytes"
    return ""


def damage(path: Path) -> str:
    """What is wrong with a checkpoint folder, whose files are read for it; empty if it is whole.

    Checkpoints of earlier versions have no checksums: of their files only the headers are tried.
    """
    if problem := incompleteness(path):
        return problem
    counters = _counters(path)
    assert counters is not None
    sums = counters.get("crc32") or {}
    for file in counters["files"]:
        if not _is_sound(path / file, sums.get(file), (path / file).stat().st_mtime_ns):
            return f"{file} is damaged, though it has its size"
    return ""


def crc32_of(file: Path) -> int:
    """CRC-32 of a file, which finds damage by a disk or a power cut at 2 GB/s."""
    result = 0
    with file.open("rb") as stream:
        while part := stream.read(CHUNK):
            result = zlib.crc32(part, result)
    return result


@functools.lru_cache(maxsize=1024)  # a command looks for its checkpoint more than once
def _is_sound(file: Path, crc32: int | None, changed_ns: int) -> bool:
    try:
        if crc32 is not None:
            return crc32_of(file) == crc32
        with safe_open(file, "np"):
            return True
    except (SafetensorError, OSError):
        return False


def _counters(path: Path) -> dict[str, Any] | None:
    """What progress.json of a checkpoint holds; None where it is missing or damaged."""
    try:
        counters = parsed_json((path / "progress.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(counters, dict):
        return None
    files, sums = counters.get("files"), counters.get("crc32", {})
    is_whole = isinstance(files, dict) and isinstance(sums, dict)
    numbers = [counters[name] for name in COUNTERS if name in counters]
    return counters if is_whole and all(map(_is_count, numbers)) else None


def _is_count(value: Any) -> bool:
    """Whether a value is a number from 0 on, and finite."""
    return type(value) in (int, float) and 0 <= value < MOST_COUNTED


def read_settings(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ValueError where it is damaged or missing."""
    try:
        content = parsed_json(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from None
    return content


def read_index(folder: Path) -> dict[str, Any]:
    """The settings of an exported model: `diffusion`, `sampling`, and perhaps `model`.

    They are in maskdm.json, or in the model_index.json of an earlier version and of models that
    diffusers alone cannot open; there the network's own folder has those of the model.

    Raises ValueError where it is not valid JSON, or of another kind of pipeline.
    """
    own = folder / SETTINGS
    file = own if own.is_file() else folder / "model_index.json"
    index = read_settings(file)
    if file == own:
        wanted = ("diffusion", "model", "sampling")
        if missing := [name for name in wanted if not isinstance(index.get(name), dict)]:
            raise ValueError(f"{file} is damaged: it lacks the settings {', '.join(missing)}")
        return index
    if index.get("_class_name") != "MaskDMPipeline":
        raise ValueError(f"{folder} holds another kind of pipeline: {index.get('_class_name')}")
    return grouped_index(index)


def grouped_index(index: dict[str, Any]) -> dict[str, Any]:
    """A model_index.json with its settings in two groups, diffusion and sampling.

    An earlier version wrote them one by one; today's form is left as it is.
    """
    if "sampling" in index or "sampler" not in index:
        return index
    diffusion = {name: index[name] for name in ("schedule", "base_size", "prediction")}
    sampling = {
        name: value
        for name, value in index.items()
        if name in Sampling.model_fields or name.startswith("guidance")
    }
    kept = {name: index[name] for name in index if name not in {**diffusion, **sampling}}
    return {**kept, **migrated({"diffusion": diffusion, "sampling": sampling})}


def _run_around(folder: Path) -> Path | None:
    """The run's folder around RUN/model, RUN/checkpoints/step-... or RUN/kept/step-...; or None."""
    place = folder.resolve()
    if place.name == "model":
        around = place.parent
    elif place.parent.name in ("checkpoints", KEPT):
        around = place.parent.parent
    else:
        return None
    return around if (around / "recipe.yaml").is_file() else None


def exported_folder(name: str | Path) -> Path:
    """The folder of an exported model, fetched where it is a Hub id.

    Raises ValueError where it could not be fetched.
    """
    path = expanded(name)
    is_id = not path.exists() and re.fullmatch(HUB_ID, str(name))
    return _download(str(name)) if is_id else path


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=PARTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name} is not a folder, and could not be fetched from the Hub ({one_line(error, 90)})"
        ) from None
