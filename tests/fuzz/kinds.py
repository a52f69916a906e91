"""The kinds of cases: how each is made, which commands look at it, and what is right."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz import archives, pictures, runs
from fuzz.child import Case
from fuzz.damage import damaged, strange_json

Make = Callable[[Path, Random, bool, Path], Case]


@dataclass(frozen=True)
class Kind:
    """A kind of cases.

    Attributes:
        what: in words.
        make: writes the files of a case into a folder, valid ones or damaged ones, with the folder
            of what was made once (`runs.make_fixtures`); gives the case.
        share: of the cases, relative to the other kinds.
        needs_runs: whether it damages what was made once.
    """

    what: str
    make: Make
    share: int
    needs_runs: bool = False


def reading(source: str, random: Random, pixels: int, is_valid: bool, classes: int = 0) -> Case:
    """A source that the doctor reads, and that is packed: both must agree on what is unreadable."""
    size, channels = random.choice((8, 8, 32, 64, 256)), str(random.choice((1, 2, 3, 3, 4)))
    how = [
        "--size",
        str(size),
        "--channels",
        channels,
        "--crop",
        random.choice(("center", "resize")),
    ]
    bad = ["--on-bad", "error" if is_valid else "skip"]
    commands = [["check", source, *how, *bad, "--json"], ["pack", source, "out/packed", *how, *bad]]
    if random.random() < 0.2:  # the report for people, and the sheet
        commands[1:] = [["check", source, *how, *bad, "--sheet", "out/sheet.png"]]

    def right(folder: Path, outputs: list[str]) -> str | None:
        report = json.loads(outputs[0]) if outputs[0] else {}
        if is_valid:
            seen = report["num_readable"], len(report["classes"])
            return None if seen == (report["num_images"], classes) else f"{seen}, {classes} classes"
        packed = folder / "out" / "packed" / "manifest.json"
        if not packed.is_file():
            return None
        manifest = json.loads(packed.read_text())
        lists = report["unreadable"], manifest["left_out"]
        both = [sorted(name for name, _ in one) for one in lists]
        return None if both[0] == both[1] else f"unreadable: {both[0]} and, packed, {both[1]}"

    codes = (0,) if is_valid else (0, 2)
    return Case(commands, max(pixels, size**2), codes, right=right)


def of_pictures(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    pixels = 0
    for number in range(8):
        suffix, content = pictures.sound_picture(random)
        if not is_valid and (number < 7 or random.random() < 0.5):
            suffix, content = pictures.damaged_picture(random)
        pixels = max(pixels, pictures.declared_pixels(content))
        _write(folder / "in" / f"{number}.{suffix}", content)
    return reading("in", random, pixels, is_valid)


def of_zips(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    files = archives.members(random) if is_valid else archives.strange_members(random)
    content = archives.zipped(files, random, is_strange=not is_valid)
    if not is_valid and random.random() < 0.6:
        content = archives.damaged_zip(content, random)
    _write(folder / "in.zip", content)
    return reading("in.zip", random, _most_pixels(files), is_valid, classes=2)


def of_tars(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    files = archives.members(random) if is_valid else archives.strange_members(random)
    content = archives.tarred(files, random, is_strange=not is_valid)
    if not is_valid and random.random() < 0.6:
        content = archives.damaged_tar(content, random)
    suffix, pack = random.choice(list(archives.PACKED.items()))
    content = pack(content)
    if not is_valid and random.random() < 0.1:
        content = damaged(content, random)
    _write(folder / f"in{suffix}", content)
    return reading(f"in{suffix}", random, _most_pixels(files), is_valid, classes=2)


def of_arrays(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    make = archives.arrays if is_valid else archives.damaged_arrays
    suffix, content, pixels = make(random)
    _write(folder / f"in{suffix}", content)
    return reading(f"in{suffix}", random, pixels, is_valid, 2 if suffix == ".npz" else 0)


def of_labels(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    """Images with a label file, in a folder, a zip or a tar."""
    files = [(name.replace("/", "-"), content) for name, content in archives.members(random)]
    names = [name for name, _ in files]
    labels = [name[:3] for name in names]
    form = random.choice(("metadata.jsonl", "metadata.csv", "dataset.json", ".cls", ".json"))
    if form == "metadata.jsonl":
        pairs = zip(names, labels, strict=True)
        lines = [json.dumps({"file_name": name, "label": label}) + "\n" for name, label in pairs]
        found = [(form, "".join(lines).encode())]
    elif form == "metadata.csv":
        text = io.StringIO()
        csv.writer(text).writerows([("file_name", "label"), *zip(names, labels, strict=True)])
        found = [(form, text.getvalue().encode())]
    elif form == "dataset.json":
        numbered = [[name, int(label == "dog")] for name, label in zip(names, labels, strict=True)]
        found = [(form, json.dumps({"labels": numbered}).encode())]
    else:
        contents = [label if form == ".cls" else json.dumps({"label": label}) for label in labels]
        stems = [name.partition(".")[0] for name in names]
        found = [(stem + form, one.encode()) for stem, one in zip(stems, contents, strict=True)]
    if not is_valid:
        number = random.randrange(len(found))
        name, content = found[number]
        change = damaged if form in ("metadata.csv", ".cls") else strange_json
        found[number] = name, change(content, random)
    pixels, files = _most_pixels(files), sorted(files + found)
    if form in (".cls", ".json"):
        _write(folder / "in.tar", archives.tarred(files, random))
        return reading("in.tar", random, pixels, is_valid, classes=2)
    if random.random() < 0.5:
        _write(folder / "in.zip", archives.zipped(files, random))
        return reading("in.zip", random, pixels, is_valid, classes=2)
    for name, content in files:
        _write(folder / "in" / name, content)
    return reading("in", random, pixels, is_valid, classes=2)


COMMANDS_OF_RUN = (
    ["train", "RUN"],
    ["train", "RUN", "--images", "+40"],
    ["sample", "RUN", "--num", "2", "--out", "out/x.npz"],
    ["sample", "RUN@hide", "--num", "2", "--out", "out/x.png"],
    ["sample", "RUN@best", "--num", "2", "--out", "out/x"],
    ["sample", "RUN", "--ema", "0.15", "--num", "2", "--out", "out/x.npz"],
    ["evaluate", "RUN", "--num", "8"],
    ["compare", "RUN", "RUN"],
    ["compare", "RUN", "--x", "images", "--out", "out/x.png"],
    ["plan", "RUN", "--gpu", "h200"],
)


def of_runs(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    name = random.choice(("run", "run", "unfinished"))
    run = _copied(fixtures, name, folder)
    if not is_valid:
        runs.damage_run(run, random)
    return _looked_at(run, random, is_valid, COMMANDS_OF_RUN)


def of_checkpoints(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    run = _copied(fixtures, "unfinished", folder)
    if not is_valid:
        runs.damage_checkpoint(run, random, "step-00000009")
    return _looked_at(run, random, is_valid, COMMANDS_OF_RUN[:7])


def of_models(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    model = shutil.copytree(fixtures / "run" / "model", folder / "model")
    if not is_valid:
        runs.damage_model(model, random)
    command = ["sample", "model", "--num", "2", "--out", "out/x.npz"]
    return Case([command], codes=(0,) if is_valid else (0, 2))


def of_statistics(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    for name in ("samples.npz", "s.npz", "quarters.pt"):
        shutil.copy(fixtures / name, folder / name)
    if not is_valid:
        runs.damage_statistics(folder / "s.npz", random)
    command = ["evaluate", "samples.npz", "--reference", "s.npz", "--features", "quarters.pt"]
    command += ["--metrics", "frechet", "--out", "out/e.json", "--json"]

    def right(folder: Path, outputs: list[str]) -> str | None:
        if not outputs[0]:
            return None
        distance = json.loads(outputs[0])["metrics"]["frechet"]["value"]
        return None if math.isfinite(distance) and distance >= 0 else f"a distance of {distance}"

    return Case([command], codes=(0,) if is_valid else (0, 2), right=right)


def of_recipes(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    content = runs.RECIPE.encode() if is_valid else runs.strange_recipe(random)
    _write(folder / "in.yaml", content)
    commands = (
        ["plan", "in.yaml", "--gpu", "h200", "--data.source", "digits"],
        ["plan", "in.yaml", "--gpu", "a100", "--data.source", "digits", "--hours", "1"],
        ["check", "digits", "--recipe", "in.yaml", "--size", "8"],
        ["recipes", "in.yaml"],
    )
    codes = (0,) if is_valid else (0, 2)
    return Case([random.choice(commands)], codes=codes)


def of_inpainting(folder: Path, random: Random, is_valid: bool, fixtures: Path) -> Case:
    """A picture and a mask by which a model fills in pixels."""
    shutil.copytree(fixtures / "run" / "model", folder / "model")
    pixels = 0
    for name in ("image", "mask"):
        content = pictures.picture(random, ("PNG", "png", "L", {}))[1]
        if not is_valid:
            content = pictures.damaged_picture(random)[1]
        pixels = max(pixels, pictures.declared_pixels(content))
        _write(folder / f"{name}.png", content)
    command = ["inpaint", "model", "image.png", "--mask", "mask.png", "--num", "1"]
    command += ["--resamplings", "1", "--jump", "1", "--out", "out/x.png"]
    return Case([command], pixels, codes=(0, 2))


KINDS: dict[str, Kind] = {
    "pictures": Kind("pictures of all formats", of_pictures, 8),
    "zips": Kind("zip archives", of_zips, 4),
    "tars": Kind("tar archives", of_tars, 4),
    "arrays": Kind(".npy and .npz arrays", of_arrays, 2),
    "labels": Kind("label files", of_labels, 3),
    "runs": Kind("run folders", of_runs, 5, True),
    "checkpoints": Kind("checkpoints", of_checkpoints, 3, True),
    "models": Kind("exported models", of_models, 2, True),
    "statistics": Kind("statistics", of_statistics, 2, True),
    "recipes": Kind("recipes", of_recipes, 3),
    "inpainting": Kind("pictures and masks to fill in", of_inpainting, 1, True),
}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _most_pixels(files: archives.Members) -> int:
    return max(pictures.declared_pixels(content) for _, content in files)


def _copied(fixtures: Path, name: str, folder: Path) -> Path:
    """A copy of a run, with the images that it has packed."""
    shutil.copytree(fixtures / "cache", folder / "cache")
    shutil.copy(fixtures / "images.npz", folder / "images.npz")
    return Path(shutil.copytree(fixtures / name, folder / "run"))


def _looked_at(run: Path, random: Random, is_valid: bool, commands: tuple[list[str], ...]) -> Case:
    command = [one.replace("RUN", "run") for one in random.choice(commands)]
    single = command[0] == "compare"  # of one run with itself: nothing to compare
    return Case([command], 64, (0,) if is_valid and not single else (0, 1, 2), writable=("run",))
