"""The samples that are evaluated: drawn from a model, each seed once, or images of any origin."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maskdm.engine import choose_precision, process_state
from maskdm.evaluation.features import features_folder
from maskdm.evaluation.shards import in_shards
from maskdm.files import expanded
from maskdm.images.joined import Array
from maskdm.images.open import open_source
from maskdm.images.store import Store, is_store, load_store, open_store
from maskdm.images.survey import survey
from maskdm.models.backbone import Backbone
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Data, Sampling
from maskdm.sampling.generate import generate, labels_in_shares
from maskdm.sampling.speed import compile_for_sampling, images_at_a_time
from maskdm.settings import changed
from maskdm.words import counted, listed

MOST_SHARDS = 100  # files that are open at once, for each seed

FEWEST = 4  # images from which a distance can be computed


@dataclass(frozen=True)
class Samples:
    """Images to be evaluated."""

    images: Array  # uint8 (N, H, W, C)
    folder: Path  # where their features are kept
    facts: dict[str, Any]  # for the record
    notes: tuple[str, ...] = ()  # what a reader of the figures should know


def drawn_samples(
    trained: TrainedModel,
    sampling: Sampling,
    num: int,
    seed: int,
    folder: Path,
    weak: TrainedModel | None = None,
    show: bool = False,
    class_counts: Sequence[int] | None = None,
) -> Samples:
    """Draws images 0..num-1 of a seed, each once, on all ranks, and keeps them.

    It continues after a kill; a larger number later, or other features, draw no image again. To
    be called on every rank.

    Args:
        trained: the model, on the device to use.
        sampling: how they are drawn.
        num: number of images.
        seed: names the sequence of images.
        folder: they are kept in a subfolder named by a hash of all that determines them.
        weak: the weak model of autoguidance.
        show: show the progress.
        class_counts: classes are as frequent as in so many images of each; None = all in turn.

    Raises ValueError as `generate`, and where the folder cannot be written.
    """
    model = trained.model
    precision = choose_precision("auto", model.device)[0]
    how = sampling.model_dump(mode="json", exclude=set(Sampling.HOW_FAST))
    facts: dict[str, Any] = {
        "weights_sha256": weights_sha256(model),
        "sampling": how,
        "precision": precision,
        "weak_sha256": weights_sha256(weak.model) if weak else None,
        "diffusion": trained.diffusion.model_dump(mode="json"),
    }
    if class_counts is not None:
        facts["class_counts"] = [*class_counts]
    key = hashlib.sha256(json.dumps([facts, seed], sort_keys=True).encode()).hexdigest()[:20]
    share = math.ceil(num / process_state().num_processes)

    def draw(start: int, stop: int) -> np.ndarray:
        compile_for_sampling(trained, sampling, weak, share, model.num_patches)  # for all shards
        numbers, counts = list(range(start, stop)), class_counts
        labels = None if counts is None else labels_in_shares(counts, numbers, seed)
        return generate(trained, sampling, numbers, seed, labels=labels, weak=weak)

    at_a_time = images_at_a_time(model, sampling)
    num_shards = max(MOST_SHARDS, 4 * process_state().num_processes)
    size = min(at_a_time * math.ceil(num / (at_a_time * num_shards)), share)
    kept, what = folder / f"samples-{key}", f"drawing {counted(num, 'image')} of seed {seed}"
    return Samples(in_shards(kept, num, size, draw, what, show), kept, facts)


def class_counts(real: Store | None, model: Backbone) -> list[int] | None:
    """Images of each of a model's classes among real ones, for samples that are compared with them.

    None where these have other classes, or as many images of each: all come in turn then.
    """
    if real is None or real.labels is None or not model.num_classes:
        return None
    counts = np.bincount(real.labels, minlength=model.num_classes).tolist()
    is_same = real.manifest.get("class_names") == model.config.class_names
    if not is_same or len(counts) > model.num_classes or len({*counts}) == 1:
        return None
    return counts


def given_samples(name: str, num: int | None, progress: bool) -> Samples:
    """Images of any origin as samples, unchanged: all must have one size.

    Args:
        name: any source of images, or a packed store.
        num: how many, a fixed random part; None = all.
        progress: show a bar.

    Raises ValueError where there is no such source, sizes differ, or there are fewer than `num`,
    or `num` is below 4.
    """
    if num is not None and num < FEWEST:
        raise ValueError(f"--num {num}: a distance needs at least {FEWEST} images")
    path, notes = expanded(name), []
    if is_store(path):
        shape = tuple(load_store(path).manifest["shape"][1:])
        data = Data(source=name, size=shape[:2], channels=shape[2])
    else:
        seen = survey(open_source(name))
        if len(seen.shapes) > 1:
            shapes = listed(f"{w}x{h} with {counted(c, 'channel')}" for h, w, c in seen.shapes)
            raise ValueError(
                f"the images in {name} have different shapes ({shapes}), so they are not samples "
                "of one model: bring them to one with maskdm pack"
            )
        if seen.is_lossy:
            lossy = f"{name} contains JPEG files, whose compression is measured too"
            notes.append(f"{lossy}: save samples as PNG")
        data = Data(source=name, size=seen.shape[:2], channels=seen.shape[2])
        data = changed(data, crop="none", draft=False, on_bad="error")
    store = open_store(data, progress)
    if num is not None and num > len(store):
        raise ValueError(f"--num {num}: {name} has only {counted(len(store), 'image')}")
    images: Array = store.images
    folder = features_folder(store.manifest["sha256"])
    if num is not None and num < len(store):  # the first images of class folders are of one class
        chosen = np.random.default_rng(0).choice(len(store), num, replace=False)
        images, folder = images[np.sort(chosen)], folder.with_name(f"{folder.name}-{num}")
    hashes = {key: store.manifest[key] for key in ("fingerprint", "sha256")}
    return Samples(images, folder, {"source": name, **hashes}, tuple(notes))


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a network's weights with their names, the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        values = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
