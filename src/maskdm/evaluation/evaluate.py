"""Comparing a run's images with real ones, and writing down all that the number depends on."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import maskdm
from maskdm.engine import choose_precision, device_name
from maskdm.evaluation.distances import frechet_distance, half_split_distance
from maskdm.evaluation.features import FEATURES
from maskdm.images.store import Store
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Evaluation, Sampling
from maskdm.sampling.generate import generate_on_all_ranks
from maskdm.training.monitor import source_commit


def evaluate(
    trained: TrainedModel,
    store: Store,
    settings: Evaluation,
    sampling: Sampling,
    seed: int = 0,
    weak: TrainedModel | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Generates images 0..num-1 and measures their distance to the reference set.

    Args:
        trained: the model, on the device to use.
        store: the reference, prepared as the training images were, never flipped.
        settings: features and number of images.
        sampling: how the images are drawn.
        seed: names the sequence of images.
        weak: the weak model of autoguidance.
        show: show a progress bar.

    Returns:
        The content of evaluation.json. `distance` is the Fréchet distance; beside it stands
        `reference_halves`, that of two random halves of the reference (mean of ten splits). The
        halves are smaller sets, which by itself adds to their distance: as many perfect
        samples as the reference has would measure about half of it.

    Raises:
        ValueError: fewer than four reference images, or unlike shapes.
    """
    if len(store) < 4:
        raise ValueError(f"the reference has {len(store)} images: a distance needs at least 4")
    model = trained.model
    shape = model.image_shape
    if store.images.shape[1:] != shape:
        raise ValueError(
            f"the model makes images of {shape}, but the reference has {store.images.shape[1:]}"
        )
    start = time.perf_counter()
    images = generate_on_all_ranks(trained, sampling, settings.num, seed, weak=weak, progress=show)
    generate_sec = time.perf_counter() - start
    features = FEATURES[settings.features](store.images, settings)
    reference = features(store.images)
    return {
        "metric": "frechet distance",
        "distance": frechet_distance(features(images), reference),
        "reference_halves": half_split_distance(reference),
        **settings.model_dump(mode="json"),
        "sampling": sampling.model_dump(mode="json"),
        "seed": seed,
        "weights": "ema",
        "precision": choose_precision("auto", model.device)[0],
        "images_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        "reference": {
            "source": store.manifest["source"],
            "fingerprint": store.manifest["fingerprint"],
            "crop": store.manifest["crop"],
            "shape": list(store.images.shape),
            "flip": False,
        },
        "maskdm": maskdm.__version__,
        "commit": source_commit(),
        "device": device_name(model.device),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "generate_sec": round(generate_sec, 2),
    }
