"""Copies of training images are found among samples, and perfect samples are not flagged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import beta, betabinom, hypergeom

from maskdm.evaluation import neighbours
from maskdm.evaluation.features import Features
from maskdm.evaluation.memorization import ImageSet, check_memorization, closest_pairs
from maskdm.evaluation.neighbours import nearest
from maskdm.images.joined import JoinedArrays
from maskdm.images.output import on_grey
from maskdm.report.sheets import pairs_sheet

SHAPE = (6, 8, 1)
DIRECTIONS = np.random.default_rng(99).standard_normal((12, 48))


def extract(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), int(np.prod(images.shape[1:]))) / np.float32(8)


PIXELS = Features("pixels", "", "", extract)


def draw(num: int, seed: int) -> np.ndarray:
    """Images that vary in twelve directions, none of them symmetric: uint8 (num, 6, 8, 1)."""
    latents = np.random.default_rng(seed).standard_normal((num, 12))
    return (128 + 10 * latents @ DIRECTIONS).clip(0, 255).astype(np.uint8).reshape(num, *SHAPE)


def noisy(images: np.ndarray, levels: int) -> np.ndarray:
    noise = np.random.default_rng(1).integers(-levels, levels + 1, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def seen(images: np.ndarray) -> ImageSet:
    return ImageSet(images, PIXELS.vectors(PIXELS.extract(images)))


def check(samples, train, held_out=None, flip=False):
    real = None if held_out is None else seen(held_out)
    return check_memorization(seen(samples), seen(train), real, PIXELS, flip)


TRAIN, REAL = draw(2000, 1), draw(1000, 2)


@pytest.mark.parametrize("block_values", [2**24, 700, 5])
def test_neighbours_are_those_of_brute_force_whatever_the_blocks(block_values, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", block_values)
    monkeypatch.setattr(neighbours, "PAIR_VALUES", 500)
    generator = np.random.default_rng(0)
    base = generator.standard_normal((150, 5)).astype(np.float32)
    queries = generator.standard_normal((70, 5)).astype(np.float32)
    expected = cdist(queries.astype(np.float64), base.astype(np.float64))
    distances, indices = nearest(queries, JoinedArrays([base[:40], base[40:]]), 4)
    assert np.array_equal(indices, expected.argsort(axis=1)[:, :4])
    assert np.allclose(distances, np.sort(expected, axis=1)[:, :4], rtol=1e-12)

    own = np.arange(0, 150, 5)
    among = cdist(base[own].astype(np.float64), base.astype(np.float64))
    among[np.arange(30), own] = np.inf
    distances, indices = nearest(base[own], base, 149, own)
    assert np.array_equal(indices, among.argsort(axis=1)[:, :149])
    assert np.allclose(distances, np.sort(among, axis=1)[:, :149], rtol=1e-12)


def test_near_copies_far_from_the_origin_keep_their_digits(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", 20_000)
    generator = np.random.default_rng(0)
    centres = generator.choice([-30_000, 30_000], 500)[:, None]
    base = (centres + generator.standard_normal((500, 64))).astype(np.float32)
    queries = base[::5].copy()
    queries[:, 0] += 0.25
    distances, indices = nearest(queries, base)
    assert np.array_equal(indices[:, 0], np.arange(0, 500, 5))
    assert np.array_equal(distances[:, 0], abs(queries[:, 0] - base[::5, 0]).astype(np.float64))


def test_the_first_of_equal_vectors_is_the_nearest(monkeypatch):
    base = np.random.default_rng(0).standard_normal((20, 33)).astype(np.float32)
    many = np.concatenate([base] * 6)
    for block_values in (2**24, 33 * 25):
        monkeypatch.setattr(neighbours, "BLOCK_VALUES", block_values)
        _, indices = nearest(base + np.float32(0.001), many, 3)
        assert np.array_equal(indices, np.arange(20)[:, None] + [0, 20, 40])


@pytest.mark.parametrize(
    ("queries", "base", "text"),
    [
        (np.zeros((2, 3)), np.zeros((4, 2)), "are not the same features"),
        (np.full((2, 3), np.nan), np.zeros((4, 3)), "features contain NaN or infinite values"),
        (np.zeros((2, 3)), np.full((4, 3), np.inf), "features contain NaN or infinite values"),
        (
            np.zeros((2, 3)),
            np.zeros((0, 3)),
            "1 neighbours of a vector were requested, but there are 0",
        ),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(queries, base, text):
    with pytest.raises(ValueError, match=text):
        nearest(queries, base)


@pytest.mark.parametrize("held_out", [REAL, None], ids=["held-out", "leave-one-out"])
@pytest.mark.parametrize("flip", [False, True])
def test_about_one_in_a_hundred_independent_draws_is_flagged(held_out, flip):
    record = check(draw(1000, 3), TRAIN, held_out, flip)
    assert record["calibration"] == ("leave-one-out" if held_out is None else "held-out images")
    assert (record["num"], record["num_real"], record["num_train"]) == (1000, 1000, 2000)
    assert record["expected"] == pytest.approx(0.01, rel=0.01)
    least, most = betabinom.interval(0.998, 1000, 10, 991)
    assert least <= 1000 * record["flagged"] <= most
    assert record["ratio"] == pytest.approx(1, abs=0.05)
    assert record["exact"] == 0 and record["verdict"].startswith("nothing unusual: ")


def test_its_figures_follow_from_the_distances():
    record = check(draw(300, 4), TRAIN, REAL)
    vectors = [seen(images).vectors.astype(np.float64) for images in (draw(300, 4), REAL, TRAIN)]
    own, real = (np.sort(cdist(few, vectors[2]), axis=1) for few in vectors[:2])
    own, real = own[:, 0] / own[:, 49], real[:, 0] / real[:, 49]
    below = int((own < np.sort(real)[9]).sum())
    assert record["threshold"] == pytest.approx(np.sort(real)[9])
    assert record["flagged"] == below / 300
    assert record["median"] == pytest.approx(np.median(own))
    assert record["ratio"] == pytest.approx(np.median(own) / np.median(real))
    ends = [beta.ppf(0.025, below, 301 - below), beta.ppf(0.975, below + 1, 300 - below)]
    assert record["flagged_interval"] == pytest.approx(ends)
    # Fewer than `below` samples under the tenth real one: it is among the first below + 9 of all.
    assert record["probability"] == pytest.approx(hypergeom.cdf(9, 1300, 1000, below + 9))
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("held_out", [REAL, None], ids=["held-out", "leave-one-out"])
@pytest.mark.parametrize("levels", [0, 8])
def test_copies_are_found(levels, held_out):
    samples = draw(1000, 3)
    samples[100:150] = noisy(TRAIN[500:550], levels)
    record = check(samples, TRAIN, held_out)
    assert 0.05 <= record["flagged"] <= 0.07
    assert record["exact"] == (50 if levels == 0 else 0)
    assert record["verdict"].startswith("more copies than chance: ")
    assert f"{1000 * record['flagged']:.0f} of 1,000 samples are nearer" in record["verdict"]
    assert ("50 equal one within 2 grey levels" in record["verdict"]) == (levels == 0)
    assert [pair["train"] - pair["sample"] for pair in record["pairs"]] == [400] * 16
    distances = [pair["distance"] for pair in record["pairs"]]
    assert distances == sorted(distances) and distances[-1] < record["threshold"]


def test_mirrored_copies_are_found_where_training_mirrored_images():
    samples = draw(1000, 3)
    samples[100:150] = noisy(TRAIN[500:550], 1)[:, :, ::-1]
    plain, flipped = check(samples, TRAIN, REAL), check(samples, TRAIN, REAL, flip=True)
    assert plain["flagged"] < 0.03 and plain["exact"] == 0
    assert not any(pair["mirrored"] for pair in plain["pairs"])
    assert 0.05 <= flipped["flagged"] <= 0.07 and flipped["exact"] == 50
    assert all(pair["mirrored"] and pair["equal"] for pair in flipped["pairs"])
    assert [pair["train"] - pair["sample"] for pair in flipped["pairs"]] == [400] * 16


def test_one_exact_copy_is_reported_though_one_may_be_chance():
    samples = draw(500, 3)
    samples[77] = TRAIN[11]
    record = check(samples, TRAIN, REAL)
    assert record["exact"] == 1 and record["probability"] > 0.01
    assert record["verdict"].startswith("a few copies: ")
    assert record["verdict"].endswith(", 1 equals one within 2 grey levels")
    closest = {"sample": 77, "train": 11, "distance": 0.0, "mirrored": False, "equal": True}
    assert record["pairs"][0] == closest


def test_pale_samples_are_not_copies():
    pale = np.round((draw(1000, 3).astype(float) - 128) / 2 + 128).astype(np.uint8)
    record = check(pale, TRAIN, REAL)
    distances, real = (nearest(seen(few).vectors, seen(TRAIN).vectors)[0] for few in (pale, REAL))
    assert (distances < np.quantile(real, 0.01)).mean() > 0.05  # although near to everything
    assert record["probability"] > 0.01


def test_duplicated_images_neither_hide_copies_nor_raise_false_alarms():
    train = np.concatenate([TRAIN, TRAIN[:400]])
    record = check(draw(1000, 3), train)
    assert record["duplicates"] == pytest.approx(800 / 2400, abs=0.05)
    assert record["num_real"] == round(1000 * (1 - record["duplicates"]))
    assert record["threshold"] > 0 and record["verdict"].startswith("nothing unusual: ")

    samples = draw(1000, 3)
    samples[:40] = noisy(TRAIN[:40], 8)
    found = check(samples, train)
    assert found["flagged"] >= 0.04 and found["verdict"].startswith("more copies than chance: ")
    held_out = np.concatenate([REAL, TRAIN[:111]])
    record = check(samples, TRAIN, held_out)
    assert record["duplicates"] == pytest.approx(0.1, abs=0.01)
    assert record["calibration"] == "held-out images" and record["threshold"] > 0


def test_copies_of_an_image_that_occurs_forty_times_are_found():
    train = np.concatenate([TRAIN, TRAIN[:1].repeat(39, axis=0)])
    samples = draw(1000, 3)
    samples[:40] = noisy(TRAIN[:1].repeat(40, axis=0), 8)
    record = check(samples, train, REAL)
    assert record["flagged"] >= 0.04
    assert {pair["sample"] for pair in record["pairs"]} <= set(range(40))


def test_without_enough_unseen_images_training_images_take_their_place():
    for held_out in (REAL[:98], TRAIN[:500], REAL[:0]):
        assert check(draw(200, 3), TRAIN, held_out)["calibration"] == "leave-one-out"
    assert check(draw(200, 3), TRAIN, REAL[:99])["calibration"] == "held-out images"


def test_a_thousand_samples_are_spread_over_all_and_keep_their_indices():
    samples = draw(2500, 3)
    samples[2200:] = TRAIN[:300]
    record = check(samples, TRAIN, REAL)
    assert record["num"] == 1000 and 90 < record["exact"] < 150  # 120 expected
    assert all(pair["sample"] - pair["train"] == 2200 for pair in record["pairs"])
    joined = JoinedArrays([samples[:2210], samples[2210:]])
    vectors = JoinedArrays([seen(samples).vectors])
    again = check_memorization(
        ImageSet(joined, vectors), seen(TRAIN), seen(REAL), PIXELS, flip=False
    )
    assert again == record


def test_copies_of_one_class_are_found_where_classes_come_in_turn():
    samples = draw(10_000, 3)
    samples[1::10] = np.concatenate([TRAIN[:500], TRAIN[:500]])
    record = check(samples, TRAIN, REAL)
    assert 70 < record["exact"] < 130  # of 1,000: 100 expected
    assert "more copies than chance" in record["verdict"]


def test_small_training_sets_get_a_warning():
    many = draw(5000, 5)
    assert check(draw(100, 3), many)["warning"] is None
    warning = check(draw(100, 3), many[:4999])["warning"]
    assert warning.startswith("small training sets are memorised (4,999 images)")


@pytest.mark.parametrize("num_train", [1, 2, 3, 5, 60])
@pytest.mark.parametrize("flip", [False, True])
def test_few_images_are_too_few_except_for_their_copies(num_train, flip):
    record = check(draw(10, 3), TRAIN[:num_train], flip=flip)
    assert record["verdict"].startswith("too few ")
    assert (record["threshold"] is None) == (num_train < 3)
    assert len(record["pairs"]) == 10
    copies = check(np.concatenate([TRAIN[:num_train]] * 20), TRAIN[:num_train], flip=flip)
    assert copies["exact"] == copies["num"] == min(1000, 20 * num_train)
    assert "copies" in copies["verdict"] or f"{copies['exact']} equal" in copies["verdict"]


def test_a_training_set_of_one_repeated_image_is_too_few():
    record = check(TRAIN[:1].repeat(200, axis=0), TRAIN[:1].repeat(300, axis=0))
    assert record["duplicates"] == 1 and record["num_real"] == 0 and record["flagged"] is None
    assert record["verdict"].startswith("too few different real images to tell")
    assert record["exact"] == 200


def test_images_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="copies cannot be looked for without samples"):
        check(TRAIN[:0], TRAIN)
    with pytest.raises(ValueError, match="cannot be looked for without training images"):
        check(TRAIN, TRAIN[:0])
    with pytest.raises(ValueError, match=r"samples of shape \(8, 6, 1\) cannot be compared"):
        check(draw(5, 3).transpose(0, 2, 1, 3), TRAIN)
    with pytest.raises(ValueError, match="expected features of 5 samples, got 4"):
        check_memorization(
            ImageSet(TRAIN[:5], seen(TRAIN[:4]).vectors), seen(TRAIN), None, PIXELS, False
        )


@pytest.mark.parametrize("shape", [(32, 32, 3), (16, 24, 1), (24, 16, 2), (300, 600, 4)])
def test_a_sheet_shows_samples_beside_their_training_images(shape):
    train = np.random.default_rng(0).integers(0, 256, (12, *shape), dtype=np.uint8)
    samples = np.concatenate([train[3:6, :, ::-1], 255 - train[:2]])
    record = check(samples, train, flip=True)
    sheet = np.asarray(pairs_sheet(*closest_pairs(samples, train, record), record))
    assert record["pairs"][0]["mirrored"] and record["pairs"][0]["train"] == 3
    known = on_grey(samples[:1])[0].astype(np.float64)
    if max(shape) > 256:  # reduced by 3
        known = known.reshape(shape[0] // 3, 3, shape[1] // 3, 3, 3).mean((1, 3))
    else:
        factor = -(-96 // min(shape[:2]))
        known = known.repeat(factor, 0).repeat(factor, 1)
    height, width = known.shape[:2]
    top = next(i for i in range(200) if (sheet[i, 24:28] != sheet[0, 0]).all())
    left, right = sheet[top:, 24 : 24 + width][:height], sheet[top:, 26 + width :][:height, :width]
    assert abs(left - known).max() <= 1 and abs(right - known).max() <= 1
    assert (sheet[:, 24 + width : 26 + width][top : top + height] == sheet[0, 0]).all()
    red = (sheet[..., 0] > 150) & (sheet[..., 1:] < 30).all(-1)
    assert red[top + height : top + height + 24, 24 : 26 + 2 * width].any()


def test_a_sheet_is_drawn_where_there_is_no_threshold():
    record = check(draw(1, 3), TRAIN[:1])
    sheet = pairs_sheet(*closest_pairs(draw(1, 3), TRAIN[:1], record), record)
    assert sheet.mode == "RGB" and sheet.height > sheet.width / 4
