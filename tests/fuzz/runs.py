"""Runs and what belongs to them: made once, then copied and damaged for each case."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from random import Random

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fuzz.child import Case, run_case
from fuzz.damage import SMALL, damaged, strange, strange_json
from maskdm.recipe_files import recipe_names, whole_text

RECIPE = """\
data: {source: images.npz, size: 8, channels: 1, held_out: 8}
model: {patch_size: 2, embed_dim: 16, depth: 3, num_heads: 2, num_classes: auto}
diffusion: {schedule: cosine, prediction: x0, weighting: {kind: min-snr}}
stages:
  - {name: hide, mask: {kind: block, rate: 0.5}, steps: 6, batch_size: 8, lr: 1.0e-3, warmup: 2}
  - {name: show, steps: 5, batch_size: 8, lr: 1.0e-3, warmup: 2, ema: {kind: power, width: 0.1}}
sampling: {steps: 4, batch_size: 8}
evaluation: {num: 8, num_components: 4, quick_num: 8}
log_every: 2
checkpoint_every: 3
preview_every: 100
num_previews: 4
evaluate_every: 3
precision: fp32
"""
STRANGE_LINES = (
    b"? [", b"\xff\n", b"- x\n", b"&a [*a]\n", b"!!python/name:os.system\n", b"a: *b\n", b"\0\n",
)  # fmt: skip
TEXTS = ("recipe.yaml", "environment.json", "metrics.jsonl", "quality.jsonl", "classes.json",
         "evaluation.json")  # fmt: skip


class Quarters(nn.Module):
    """Features of grey images: the means of their quarters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def make_fixtures(folder: Path) -> None:
    """A finished run, an unfinished one, samples, statistics and a network for features."""
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    numbers = np.random.default_rng(0)
    images, labels = numbers.integers(0, 256, (60, 8, 8), np.uint8), numbers.integers(0, 2, 60)
    np.savez(folder / "images.npz", images=images, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Quarters()).save(folder / "quarters.pt")
    commands = [
        ["train", "tiny.yaml", "--out", "run"],
        ["sample", "run", "--num", "40", "--out", "samples.npz"],
        ["evaluate", "run", "--num", "8", "--features", "quarters.pt",
         "--save-statistics", "s.npz"],
        ["evaluate", "run", "--num", "8"],
    ]  # fmt: skip
    case = Case(commands, codes=(0,), writable=(".",))
    made = run_case(case, folder)
    if any("memory" not in problem for problem in made.problems):
        raise RuntimeError(f"what the cases damage could not be made:\n{made.report}")
    unfinished = shutil.copytree(folder / "run", folder / "unfinished")
    shutil.rmtree(unfinished / "model")
    shutil.rmtree(unfinished / "checkpoints" / "step-00000011")
    (unfinished / "checkpoints" / "latest").write_text("step-00000009\n")


def damage_run(run: Path, random: Random) -> None:
    """Damages one file of a run, or a few: mostly those that commands read."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".png")
    files = [path for path in files if "evaluation" not in path.parent.parts]
    texts = [path for path in files if path.name in TEXTS]
    for _ in range(random.choice((1, 1, 2))):
        path = random.choice(texts if random.random() < 0.4 else files)
        if random.random() < 0.05:
            path.unlink(missing_ok=True)
        elif path.is_file() and (content := path.read_bytes()):
            path.write_bytes(_damaged(path, content, random))


def _damaged(path: Path, content: bytes, random: Random) -> bytes:
    if path.name == "recipe.yaml":  # no larger numbers: those would rightly take longer
        return _strange_yaml(content, random, SMALL)
    if path.suffix in (".json", ".jsonl"):
        return strange_json(content, random)
    return damaged(content, random)


def _strange_yaml(content: bytes, random: Random, values: list) -> bytes:
    if random.random() < 0.3:  # digits stay as they are
        lines = content.splitlines(keepends=True)
        number = random.randrange(len(lines))
        line = lines[number]
        others = (b"", b"\t" + line, line * 2, line.replace(b":", b""), *STRANGE_LINES)
        lines[number] = random.choice(others)
        return b"".join(lines)
    try:
        return yaml.safe_dump(strange(yaml.safe_load(content), random, values)).encode()
    except (yaml.YAMLError, UnicodeError, AttributeError):  # damaged already, or cannot be written
        return content.replace(b": ", b":\t", 1)


def damage_checkpoint(run: Path, random: Random, newest: str) -> None:
    """Damages a file of a checkpoint; half of the time its size and checksum are made right."""
    folder = run / "checkpoints" / random.choice((newest, newest, "step-00000006"))
    path = random.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    if path.suffix == ".safetensors" and random.random() < 0.3:
        _strange_tensors(path, random)
    else:
        path.write_bytes(_damaged(path, path.read_bytes(), random))
    progress = folder / "progress.json"
    if path != progress and random.random() < 0.6:
        content = json.loads(progress.read_text())
        content["files"][path.name] = path.stat().st_size
        content["crc32"] = {}
        progress.write_text(json.dumps(content))


def _strange_tensors(path: Path, random: Random) -> None:
    """A tensor is missing, has another shape, type or name, or is NaN or huge."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):  # it is damaged already
        return
    name = random.choice(sorted(tensors))
    value = tensors.pop(name)
    how = random.randrange(8)
    if how < 6:
        tensors[name if how < 5 else "x.y"] = [
            torch.full_like(value, float("nan")),
            torch.full_like(value, 3e38),
            value[None].clone(),
            torch.zeros(0),
            value.to(torch.float64),
            value,
        ][how]
    save_file(tensors, path)


def damage_model(model: Path, random: Random) -> None:
    """Damages a file of an exported model."""
    path = random.choice([path for path in sorted(model.rglob("*")) if path.is_file()])
    if path.suffix == ".safetensors" and random.random() < 0.5:
        _strange_tensors(path, random)
    else:
        path.write_bytes(_damaged(path, path.read_bytes(), random))


def damage_statistics(path: Path, random: Random) -> None:
    """Statistics with damaged bytes, or with strange arrays of their own."""
    if random.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), random))
        return
    with np.load(path) as known:
        arrays = {name: known[name] for name in known.files}
    strange_arrays = (
        np.zeros(0), np.zeros(3), np.zeros((4, 3)), np.full(4, np.nan), np.full((4, 4), np.inf),
        np.full((4, 4), 1e308), -np.eye(4), np.array("x"), np.array(None), np.array([1, None]),
        np.arange(16).reshape(4, 4), np.zeros((4, 4), complex), np.array(["1", "2", "3", "4"]),
        np.array("[]"), np.array("{}"), np.array("3"), np.array("[" * 100_000), np.full(4, 1e200),
        np.zeros(4, "M8[s]"), np.zeros(4, [("a", "f8")]), np.eye(4, dtype=bool), np.eye(4) * 1e-320,
    )  # fmt: skip
    name = random.choice((*arrays, "x"))
    if random.random() < 0.1:
        arrays.pop(name, None)
    else:
        arrays[name] = random.choice(strange_arrays)
    np.savez(path, allow_pickle=True, **arrays)


def strange_recipe(random: Random) -> bytes:
    """A recipe with a strange value or line."""
    name = random.choice((*recipe_names(), "", ""))
    content = (whole_text(name) if name else RECIPE).encode()
    if random.random() < 0.2:
        return damaged(content, random)
    return _strange_yaml(content, random, [*SMALL, 100_000, 2**63, 10**30, 1e308, "9" * 5000])
