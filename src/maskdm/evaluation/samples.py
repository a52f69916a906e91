"""The images that are judged: drawn from a model, every seed once, or anyone's."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from maskdm.engine import choose_precision, process_state
from maskdm.evaluation.pieces import in_pieces
from maskdm.images.joined import Array
from maskdm.images.open import open_source
from maskdm.images.store import cache_dir, is_store, load_store, open_store
from maskdm.images.survey import survey
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Data, Sampling
from maskdm.sampling.generate import generate, prepare_to_draw
from maskdm.sampling.speed import images_at_a_time

MOST_PIECES = 100  # files that are held open at once, for each seed


@dataclass(frozen=True)
class Samples:
    """Images to be judged.

    Attributes:
        images: uint8 (N, H, W, C).
        folder: where their features are kept.
        facts: for the record.
        notes: what a reader of the figures should know.
    """

    images: Array
    folder: Path
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


def drawn_samples(
    trained: TrainedModel,
    sampling: Sampling,
    num: int,
    seed: int,
    folder: Path,
    weak: TrainedModel | None = None,
    show: bool = False,
) -> Samples:
    """Images 0..num-1 of a seed, each drawn once, on all ranks, and kept.

    A killed drawing continues; more images later, or other features, draw no image again. To be
    called on every rank.

    Args:
        trained: the model, on the device to use.
        sampling: how they are drawn.
        num, seed: which.
        folder: they go into a folder in it, named by a hash of all that determines them.
        weak: the weak model of autoguidance.
        show: show the progress.

    Raises ValueError as `generate`, and where the folder can't be written.
    """
    model = trained.model
    precision = choose_precision("auto", model.device)[0]
    how = sampling.model_dump(mode="json", exclude=set(Sampling.HOW_FAST))
    facts = {
        "weights_sha256": weights_sha256(model),
        "sampling": how,
        "precision": precision,
        "weak_sha256": weights_sha256(weak.model) if weak else None,
        "diffusion": trained.diffusion.model_dump(mode="json"),
    }
    key = hashlib.sha256(json.dumps([facts, seed], sort_keys=True).encode()).hexdigest()[:20]
    share = math.ceil(num / process_state().num_processes)

    def draw(start: int, stop: int) -> np.ndarray:
        prepare_to_draw(trained, sampling, weak, share, model.num_patches)  # for all pieces
        return generate(trained, sampling, list(range(start, stop)), seed, weak=weak)

    at_a_time = images_at_a_time(model, sampling)
    num_pieces = max(MOST_PIECES, 4 * process_state().num_processes)
    images = in_pieces(
        folder / f"samples-{key}",
        num,
        min(at_a_time * math.ceil(num / (at_a_time * num_pieces)), share),
        draw,
        f"drawing {num:,} images of seed {seed}",
        show,
    )
    return Samples(images, folder / f"samples-{key}", facts)


def given_samples(name: str, num: int | None, progress: bool) -> Samples:
    """Images of any origin, taken as they are: all must have one size.

    Args:
        name: any source of images, or a packed store.
        num: only so many, a fixed random part; None = all.
        progress: show a bar.

    Raises:
        ValueError: no such source, other sizes among them, fewer than `num`.
    """
    path, notes = Path(name).expanduser(), []
    if is_store(path):
        shape = tuple(load_store(path).manifest["shape"][1:])
        data = Data(source=name, size=shape[:2], channels=shape[2])
    else:
        seen = survey(open_source(name))
        if len(seen.shapes) > 1:
            told = ", ".join(f"{w}x{h} with {c} channels" for h, w, c in seen.shapes)
            raise ValueError(
                f"the images in {name} are of different shapes ({told}): samples of one model have "
                "one; pack them first (maskdm pack) if they are none"
            )
        if seen.is_lossy:
            notes.append(
                f"{name} has JPEG files: their compression is measured too; save samples as PNG"
            )
        height, width, channels = seen.shape
        data = Data(
            source=name,
            size=(height, width),
            channels=channels,
            crop="none",
            draft=False,
            on_bad="error",
        )
    store = open_store(data, progress)
    if num is not None and num > len(store):
        raise ValueError(f"--num {num}: {name} has {len(store):,} images")
    images: Array = store.images
    folder = cache_dir() / f"images-{store.manifest['sha256'][:20]}"
    if num is not None and num < len(store):  # in class folders the first would be of one class
        chosen = np.random.default_rng(0).choice(len(store), num, replace=False)
        images, folder = images[np.sort(chosen)], folder.with_name(f"{folder.name}-{num}")
    facts = {
        "source": name,
        "fingerprint": store.manifest["fingerprint"],
        "sha256": store.manifest["sha256"],
    }
    return Samples(images, folder, facts, tuple(notes))


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a network's weights by name, hexadecimal; the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        values = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
