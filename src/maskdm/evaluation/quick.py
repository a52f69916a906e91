"""A quick look at a model in training: its dense losses, and figures of a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskdm.engine import main_first, on_all_ranks, process_state
from maskdm.evaluation.dense_loss import NUM_BUCKETS, dense_loss
from maskdm.evaluation.features import Features, features_of, make_features
from maskdm.evaluation.measure import Compared, ModelInTraining, measure, metrics_to_measure
from maskdm.evaluation.reference import ReferenceFeatures
from maskdm.evaluation.samples import class_counts
from maskdm.images.joined import Array, SelectedRows
from maskdm.images.order import held_out_subset, num_held_out, training_subset
from maskdm.images.store import Store
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Evaluation, Recipe, Sampling
from maskdm.sampling.generate import generate_on_all_ranks, labels_in_shares
from maskdm.seeds import derive_seed
from maskdm.settings import changed

MIN_REFERENCE = 20  # real images below which a distance says nothing: only losses are measured
MOST_REFERENCE = 10_000  # real images that samples are compared with
READ = 512  # images read from the store at a time
SEED = 0  # names the samples: the previews are the first of them, but for their classes


def evaluations_of_look(recipe: Recipe, num_images: int) -> int:
    """Network evaluations of a whole image that a look takes, for so many images of the source."""
    losses = NUM_BUCKETS * sum(
        min(recipe.evaluation.losses_in_training, num)
        for num in (
            num_held_out(num_images, recipe.data),
            len(training_subset(num_images, recipe.data)),
        )
    )
    num = recipe.evaluation.num_in_training if num_images >= MIN_REFERENCE else 0
    return losses + num * recipe.preview_steps


class QuickLook:
    """Measures the models of a run, always on the same images, noise and seeds.

    It changes no random number of the training, nor torch's global ones. What is measured: the
    dense loss on images trained on, and all `metrics.qualities` that can be.

    Args:
        recipe: how many images are held out and drawn, and the features for comparing them.
        store: all images of the run's source.
        sampling: how samples are drawn: fast, and possible in every stage.

    To be made on every rank. Raises ValueError where the features are not available.
    """

    def __init__(self, recipe: Recipe, store: Store, sampling: Sampling):
        self._num = recipe.evaluation.num_in_training if len(store) >= MIN_REFERENCE else 0
        self._settings, self._sampling, self._store = recipe.evaluation, sampling, store
        if self._settings.features == "auto":  # inception would take minutes on a CPU
            self._settings = changed(self._settings, features="pca")
        self._labels = store.labels if recipe.model.classes else None
        num = len(store)
        most = recipe.evaluation.losses_in_training
        self._held_out = first_for_losses(held_out_subset(num, recipe.data), num, most)
        self._trained_on = first_for_losses(training_subset(num, recipe.data), num, most)
        self._reference: ReferenceFeatures | None = None  # computed when first needed
        if self._num:
            try:
                self._features = _features(self._settings, store)
            except ValueError as error:
                raise ValueError(
                    f"{error} (needed for the distances measured in training; evaluation.quick_num "
                    "0 leaves them out)"
                ) from None

    def __call__(self, trained: TrainedModel, progress: bool = False) -> dict[str, Any]:
        """Measures a model, for a line of quality.jsonl. To be called on every rank.

        Gives `dense_loss_train`, the dense loss on images trained on; `dense_loss` on held-out
        images, if there are any; `dense_loss_by_time`, the latter (or else the former) by time. On
        the first rank, where samples are drawn: their figures with errors, `sliced` and
        `sliced_error` and so on, `num`, `features`, `features_sha256`.

        Args:
            trained: the model.
            progress: show a bar while samples are drawn.
        """
        by_time = dense_loss(trained, *self._images(self._trained_on), self._sampling)
        line = {"dense_loss_train": float(by_time.mean()), "dense_loss_by_time": by_time.tolist()}
        if len(self._held_out):
            model = ModelInTraining(trained, *self._images(self._held_out), self._sampling)
            figures = _measured(Compared(self._settings, model=model, is_quick=True))
            line |= {name: value for name, value in figures.items() if value is not None}
        if self._num:
            line |= self._of_samples(trained, progress)
        return line

    def _images(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Images and, for a model with classes, their labels."""
        return self._store.images[chosen], None if self._labels is None else self._labels[chosen]

    def _of_samples(self, trained: TrainedModel, progress: bool) -> dict[str, Any]:
        """Figures of a few samples; on ranks other than the first none."""
        counts = class_counts(self._store, trained.model)
        labels = None if counts is None else labels_in_shares(counts, range(self._num), SEED)
        images = generate_on_all_ranks(
            trained, self._sampling, self._num, SEED, labels, progress=progress
        )
        vectors = _vectors(images, self._features)
        if self._reference is None:
            some = self._store.images
            if len(some) > MOST_REFERENCE:
                generator = np.random.default_rng(derive_seed(SEED, "quick-reference"))
                chosen = generator.choice(len(some), MOST_REFERENCE, replace=False)
                some = SelectedRows(some, np.sort(chosen))
            self._reference = ReferenceFeatures(some, _vectors(some, self._features))
        if not process_state().is_main_process:
            return {}
        compared = Compared(
            self._settings, self._features, images, vectors, None, self._reference, is_quick=True
        )
        features = {"features": self._features.name, "features_sha256": self._features.sha256}
        return {**_measured(compared), "num": self._num, **features}


def _measured(compared: Compared) -> dict[str, Any]:
    """Columns of quality.jsonl."""
    columns: dict[str, Any] = {}
    for name, one in measure(compared, metrics_to_measure(compared)).items():
        columns |= {name: one.value, f"{name}_error": one.error}
        columns |= {f"{name}_{key}": value for key, value in one.details.items()}
    return columns


def first_for_losses(subset: np.ndarray, num_images: int, most: int) -> np.ndarray:
    """The first of a subset in a fixed order of all images: int64, at most so many."""
    order = np.random.default_rng(derive_seed(SEED, "quick-losses")).permutation(num_images)
    chosen: np.ndarray = order[np.isin(order, subset)][:most]
    return chosen


def _features(settings: Evaluation, store: Store) -> Features:
    """The features, tried on a few images. Raises ValueError if they are unavailable."""
    device = process_state().device
    with torch.random.fork_rng(devices=[]):  # networks are made with random weights at first
        features = main_first(lambda: make_features(settings, store, device))
    features_of(store.images[:4], features, None)
    return features


def _vectors(images: Array, features: Features) -> np.ndarray:
    """Features of images, a share computed on each rank: float32 (n, D), on every rank."""

    def compute(numbers: Sequence[int]) -> Tensor:
        chunks = (np.array(numbers[i : i + READ]) for i in range(0, len(numbers), READ))
        parts = [features.vectors(features.extract(images[chunk]))[:] for chunk in chunks]
        return torch.from_numpy(np.concatenate(parts))

    vectors: np.ndarray = on_all_ranks(len(images), compute).cpu().numpy()
    return vectors
