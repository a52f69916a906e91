"""A cheap look at a model while it trains: dense losses, and distances of a few quick images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskdm.engine import main_first, on_all_ranks, process_state
from maskdm.evaluation.dense_loss import dense_loss
from maskdm.evaluation.distances import kid, sliced
from maskdm.evaluation.features import Features, features_of, make_features
from maskdm.images.joined import Array
from maskdm.images.order import held_out_subset, training_subset
from maskdm.images.store import Store
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Recipe, Sampling
from maskdm.sampling.generate import generate_on_all_ranks
from maskdm.seeds import derive_seed
from maskdm.settings import changed

MOST_IMAGES = 256  # on which a loss is measured
MIN_REFERENCE = 20  # real images below which only losses are measured
MOST_REFERENCE = 10_000  # real images that quick ones are compared with
KID_SUBSET = 200  # vectors in a subset: unbiased whatever it is, and 25 times as fast as 1,000
READ = 512  # of them read from the store at a time
SEED = 0  # names the images drawn: the previews are the first of them


class QuickLook:
    """Measures the models of a run, always by the same images, noise and seeds.

    Nothing that is random here touches the training's numbers, or torch's global ones.

    Args:
        recipe: how many images are held out and drawn, and in what features they are compared.
        store: all images of the run's source.
        sampling: how images are drawn: fast, and possible at every stage.

    Raises:
        ValueError: features that can't be had, or too few real images. To be made on every rank.
    """

    def __init__(self, recipe: Recipe, store: Store, sampling: Sampling):
        # Of a handful of real images there is no distance worth the name.
        self._num = recipe.evaluation.quick_num if len(store) >= MIN_REFERENCE else 0
        self._sampling, self._store = sampling, store
        self._has_classes = recipe.model.num_classes > 0
        num_images = len(store)
        self._held_out = _first(held_out_subset(num_images, recipe.data), num_images)
        self._trained_on = _first(training_subset(num_images, recipe.data), num_images)
        self._reference: np.ndarray | None = None  # features of the real images, once wanted
        if self._num:
            try:
                self._features = _features(recipe, store)
            except ValueError as error:
                raise ValueError(
                    f"{error} (for distances measured while training; evaluation.quick_num 0 "
                    "leaves them out)"
                ) from None

    def __call__(self, trained: TrainedModel) -> dict[str, Any]:
        """Measures a model. To be called on every rank.

        Returns:
            Of a line of quality.jsonl: `dense_loss` (where images are held out),
            `dense_loss_by_time` (of those; else of images trained on), `dense_loss_train`; on
            the first rank, where images are drawn, `sliced`, `kid` (not in `pca`), their errors,
            `num`, `features`, `features_sha256`.
        """
        on_trained = self._loss(trained, self._trained_on)
        measured: dict[str, Any] = {"dense_loss_train": float(on_trained.mean())}
        by_time = on_trained
        if len(self._held_out):
            by_time = self._loss(trained, self._held_out)
            measured["dense_loss"] = float(by_time.mean())
        measured["dense_loss_by_time"] = by_time.tolist()
        if self._num:
            measured |= self._distances(trained)
        return measured

    def _loss(self, trained: TrainedModel, chosen: np.ndarray) -> np.ndarray:
        labels = None
        if self._has_classes:
            assert self._store.labels is not None  # else training was refused
            labels = self._store.labels[chosen]
        return dense_loss(trained, self._store.images[chosen], labels, self._sampling)

    def _distances(self, trained: TrainedModel) -> dict[str, Any]:
        if self._reference is None:
            chosen = np.arange(len(self._store))
            if len(chosen) > MOST_REFERENCE:
                generator = np.random.default_rng(derive_seed(SEED, "quick-reference"))
                chosen = np.sort(generator.choice(len(chosen), MOST_REFERENCE, replace=False))
            self._reference = _vectors(self._store.images, chosen, self._features)
        images = generate_on_all_ranks(trained, self._sampling, self._num, SEED)
        vectors = _vectors(images, np.arange(self._num), self._features)
        if not process_state().is_main_process:
            return {}
        by_slices = sliced(vectors, self._reference)
        measured = {"sliced": by_slices.value, "sliced_error": by_slices.error}
        if self._features.name != "pca":  # KID's kernel is made for features near 1
            by_kernel = kid(vectors, self._reference, KID_SUBSET)
            measured |= {"kid": by_kernel.value, "kid_error": by_kernel.error}
        return {
            **measured,
            "num": self._num,
            "features": self._features.name,
            "features_sha256": self._features.sha256,
        }


def _first(subset: np.ndarray, num_images: int) -> np.ndarray:
    """The first of a subset in a fixed order of all images: int64, at most MOST_IMAGES."""
    order = np.random.default_rng(derive_seed(SEED, "quick-losses")).permutation(num_images)
    chosen: np.ndarray = order[np.isin(order, subset)][:MOST_IMAGES]
    return chosen


def _features(recipe: Recipe, store: Store) -> Features:
    """The recipe's features, tried on a few images. Raises ValueError where they can't be had."""
    device, settings = process_state().device, recipe.evaluation
    if settings.features == "pca":  # as many components as there can be
        most = min(settings.num_components, len(store) - 1, store.images[0].size)
        settings = changed(settings, num_components=most)
    with torch.random.fork_rng(devices=[]):  # networks are made with random weights at first
        features = main_first(lambda: make_features(settings, store, device))
    features_of(store.images[:4], features, None)
    return features


def _vectors(images: Array, chosen: np.ndarray, features: Features) -> np.ndarray:
    """Features of some images, each rank computing its share: float32 (n, D), on every rank."""

    def compute(numbers: list[int]) -> Tensor:
        parts = []
        for start in range(0, len(numbers), READ):
            few = images[chosen[numbers[start : start + READ]]]
            parts.append(np.asarray(features.vectors(features.extract(few))))
        return torch.from_numpy(np.concatenate(parts))

    vectors: np.ndarray = on_all_ranks(len(chosen), compute).cpu().numpy()
    return vectors
