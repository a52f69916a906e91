from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits

from maskdm.evaluation.distances import frechet_distance, half_split_distance
from maskdm.evaluation.evaluate import evaluate
from maskdm.evaluation.features import FEATURES
from maskdm.images.store import open_store
from maskdm.models.build import build_model
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Data, Evaluation, Sampling


def gaussian(num: int, mean, cov, seed: int) -> np.ndarray:
    """A sample whose mean and covariance are exactly as asked."""
    x = np.random.default_rng(seed).standard_normal((num, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def test_the_distance_of_two_gaussians_is_the_closed_form():
    a = gaussian(500, [0.0, 0.0, 0.0], np.diag([1.0, 4.0, 9.0]), 0)
    b = gaussian(300, [1.0, 2.0, 0.0], np.diag([4.0, 4.0, 1.0]), 1)
    expected = 1 + 4 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_distance_equals_that_by_the_matrix_square_root():
    generator = np.random.default_rng(0)
    a = generator.standard_normal((400, 12)) @ generator.standard_normal((12, 12))
    b = generator.standard_normal((300, 12)) @ generator.standard_normal((12, 12)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_have_no_distance_and_degenerate_ones_a_finite():
    a = np.random.default_rng(0).standard_normal((50, 4))
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    flat = np.zeros((5, 4))
    expected = np.square(a.mean(0)).sum() + a.var(0, ddof=1).sum()
    assert frechet_distance(a, flat) == pytest.approx(expected)
    assert frechet_distance(np.arange(6.0)[:, None], np.arange(6.0)[:, None] + 2) == pytest.approx(
        4
    )


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(5, 3\)"):
        frechet_distance(np.zeros((5, 4)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="at least 2 vectors"):
        frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))


@pytest.mark.parametrize("name", FEATURES)
def test_features_rank_damage_as_they_should(name):
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    features = FEATURES[name](images, Evaluation(pixel_max=16))
    real = features(images)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    halves = half_split_distance(real)
    one_class_missing = frechet_distance(features(images[digits.target != 4]), real)
    half_missing = frechet_distance(features(images[digits.target < 5]), real)
    assert halves < 20 < half_missing < frechet_distance(features(noise), real)
    assert one_class_missing < half_missing


def test_principal_components_keep_the_pixels_distances():
    """With all components, features are a rotation: lengths survive, in the stated unit."""
    images = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 1), dtype=np.uint8)
    features = FEATURES["pca"](images, Evaluation(num_components=16, pixel_max=1.0))
    pixels = images.reshape(100, 16) / 255
    expected = np.linalg.norm(pixels[0] - pixels[1])
    x = features(images)
    assert x.dtype == np.float64 and x.shape == (100, 16)
    assert np.linalg.norm(x[0] - x[1]) == pytest.approx(expected, rel=1e-4)


def test_more_components_than_there_are_is_refused():
    images = np.zeros((5, 2, 2, 1), np.uint8)
    with pytest.raises(ValueError, match="num_components 5 is more than 5 images of 4 values"):
        FEATURES["pca"](images, Evaluation(num_components=5))


def test_the_record_says_what_was_compared(tiny):
    model = TrainedModel(build_model(tiny).eval(), tiny.diffusion)
    store = open_store(tiny.data, progress=False)
    record = evaluate(model, store, tiny.evaluation, tiny.sampling, 7, show=False)
    again = evaluate(model, store, tiny.evaluation, tiny.sampling, 7, show=False)
    other = evaluate(model, store, tiny.evaluation, tiny.sampling, 8, show=False)
    assert record["distance"] == again["distance"] != other["distance"]
    assert record["images_sha256"] == again["images_sha256"] != other["images_sha256"]
    record = json.loads(json.dumps(record))
    assert record["num"] == 16 and record["num_components"] == 4 and record["seed"] == 7
    assert record["sampling"]["steps"] == 4
    assert record["reference"]["fingerprint"] == store.manifest["fingerprint"]
    assert record["reference"]["shape"] == [1797, 8, 8, 1]
    assert record["reference_halves"] > 0


def test_a_reference_of_another_shape_is_refused(tiny):
    model = TrainedModel(build_model(tiny).eval(), tiny.diffusion)
    store = open_store(Data(source="digits", size=16, channels=1), progress=False)
    with pytest.raises(ValueError, match=r"images of \(8, 8, 1\), but the reference has \(16, 16"):
        evaluate(model, store, tiny.evaluation, Sampling())
