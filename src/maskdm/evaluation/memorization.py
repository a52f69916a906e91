"""Whether a model copied its training images: samples against real images it has not seen.

A sample is suspect where it lies nearer to a training image than all but 1 % of real images do.
Nearness is relative: the distance to the nearest training image over that to the 50th nearest.
A plain distance calls pale and smooth samples copies, since these lie near everything.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskdm.evaluation.features import Features
from maskdm.evaluation.neighbours import nearest
from maskdm.evaluation.records import Record
from maskdm.images.joined import Array

MOST = 1000  # samples looked at, and real images
SHARE = 0.01  # of the real images lie below the threshold
MIN_REAL = 99  # images whose lowest hundredth is at least one
MIN_SAMPLES = 100  # where nothing is found, fewer tell nothing
NEIGHBOUR = 50  # gives the scale: images that are there 49 times still count as one
SAME_LEVELS = 2.0  # mean difference, of 255, of images that are called equal
ALARM = 0.01  # probability that perfect samples are called copies
FEW_TRAIN = 5000  # images that a model of usual size learns by heart
NUM_PAIRS = 16  # on the sheet


class ImageSet(NamedTuple):
    """Images and their features.

    Attributes:
        images: uint8 (N, H, W, C).
        vectors: float32 (N, D), without logits.
    """

    images: Array
    vectors: Array


class _Near(NamedTuple):
    """Of each image, the training image nearest to it.

    Attributes:
        distance: relative to the 50th nearest, float64 (n,).
        train: its index, int64 (n,).
        mirrored: whether it is the image's mirror image that lies there, bool (n,).
        equal: whether it is the same but for two levels a pixel, bool (n,).
    """

    distance: np.ndarray
    train: np.ndarray
    mirrored: np.ndarray
    equal: np.ndarray


def check_memorization(
    samples: ImageSet, train: ImageSet, held_out: ImageSet | None, features: Features, flip: bool
) -> Record:
    """Looks among training images for the sources of samples.

    Args:
        samples: generated; of more than 1,000 an even spread.
        train: all training images.
        held_out: real images that were not trained on; of more than 1,000 an even spread. None,
            or fewer than 99 = training images take their place, each compared with the others.
        features: whose vectors they are.
        flip: whether training mirrored images: then an image is as near as the nearer of itself
            and its mirror image.

    Returns:
        num                samples looked at
        num_train          training images
        calibration        `held-out images` or `leave-one-out`: which are the real ones
        num_real           real images the threshold comes from
        duplicates         share of the real ones left out since they equal a training image
        neighbour          the rank whose distance is 1: 50, in small sets half their number
        threshold          below which 1 % of the real images' distances lie; null without any
        flagged            share of samples below it, and
        flagged_interval   of that share, 95 % by Clopper and Pearson
        expected           what perfect samples would give: rank of the threshold / (num_real + 1)
        probability        that perfect samples give so many or more; in leave-one-out on less
                           than about 1,000 images, whose distances come in pairs, it is too low
        exact              samples that equal a training image but for 2 levels on average
        median, median_real, ratio    of samples, of real images, first over second
        verdict            a sentence
        warning            a sentence, or null
        pairs              the 16 closest, closest first: sample, train (indices), distance,
                           mirrored (the sample's mirror image is meant), equal

    Raises:
        ValueError: no samples or no training images, images of unlike shape, or features that
            are of other images or no numbers.
    """
    _refuse(samples, train, held_out)
    where = _spread(len(samples.images))
    own = _near(_part(samples, where), train, features, flip)
    calibration, real, duplicates = _real(train, held_out, features, flip)
    record: Record = {
        "num": len(where),
        "num_train": len(train.images),
        "calibration": calibration,
        "num_real": len(real),
        "duplicates": duplicates,
        "neighbour": _scale_rank(len(train.images)),
        **_compared(own.distance, real),
        "exact": int(own.equal.sum()),
    }
    record["verdict"] = _verdict(record)
    few = f"small sets are memorised ({len(train.images):,} images): look at the closest pairs"
    record["warning"] = few if len(train.images) < FEW_TRAIN else None
    record["pairs"] = [
        {
            "sample": int(where[i]),
            "train": int(own.train[i]),
            "distance": float(own.distance[i]),
            "mirrored": bool(own.mirrored[i]),
            "equal": bool(own.equal[i]),
        }
        for i in np.argsort(own.distance, kind="stable")[:NUM_PAIRS]
    ]
    return record


def _refuse(samples: ImageSet, train: ImageSet, held_out: ImageSet | None) -> None:
    kinds = {"samples": samples, "training images": train}
    if held_out is not None and len(held_out.images):
        kinds["held-out images"] = held_out
    for name, some in kinds.items():
        if not len(some.images):
            raise ValueError(f"there are no {name}: name some")
        if len(some.vectors) != len(some.images):
            raise ValueError(f"{len(some.vectors)} features don't fit {len(some.images)} {name}")
        if some.images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"{name} of {some.images.shape[1:]} can't be compared with training images of "
                f"{train.images.shape[1:]}: prepare them alike"
            )


def _spread(num: int) -> np.ndarray:
    """Indices of at most 1,000 images, evenly spread: int64 (n,)."""
    count = min(num, MOST)
    return np.arange(count) * num // max(1, count)


def _part(images: ImageSet, where: np.ndarray) -> ImageSet:
    return ImageSet(images.images[where], images.vectors[where])


def _scale_rank(num_train: int) -> int:
    return max(1, min(NEIGHBOUR, num_train // 2))


def _near(
    images: ImageSet, train: ImageSet, features: Features, flip: bool, own: np.ndarray | None = None
) -> _Near:
    """Looks for each image's nearest training image; `own` are indices that don't count."""
    pixels = np.asarray(images.images)
    near = _near_as_is(pixels, images.vectors, train, own)
    if not flip:
        return near
    turned = np.ascontiguousarray(pixels[:, :, ::-1])
    vectors = features.vectors(features.extract(turned))
    other = _near_as_is(turned, vectors, train, own)
    nearer = other.distance < near.distance
    chosen = [np.where(nearer, b, a) for a, b in zip(near, other, strict=True)]
    return _Near(*chosen)._replace(mirrored=nearer)


def _near_as_is(
    pixels: np.ndarray, vectors: Array, train: ImageSet, own: np.ndarray | None
) -> _Near:
    distances, indices = nearest(vectors, train.vectors, _scale_rank(len(train.images)), own)
    first, scale = distances[:, 0], distances[:, -1]
    # Where a training image is there more than 50 times, a copy of it is 0 away on any scale.
    relative = np.divide(first, scale, out=np.zeros_like(first), where=first > 0)
    equal = np.empty(len(pixels), bool)
    for i, index in enumerate(indices[:, 0]):
        gap = np.abs(pixels[i].astype(np.int16) - train.images[int(index)])
        equal[i] = gap.mean() <= SAME_LEVELS
    return _Near(relative, indices[:, 0], np.zeros(len(pixels), bool), equal)


def _real(
    train: ImageSet, held_out: ImageSet | None, features: Features, flip: bool
) -> tuple[str, np.ndarray, float]:
    """How real images were had, their distances, and the share left out as duplicates.

    An image that is in the training set twice would tell that equal images are no copies.
    """
    if held_out is not None and len(held_out.images) >= MIN_REAL:
        few = _part(held_out, _spread(len(held_out.images)))
        near = _near(few, train, features, flip)
        if (~near.equal).sum() >= MIN_REAL:
            return "held-out images", near.distance[~near.equal], float(near.equal.mean())
    if len(train.images) < 3:  # no nearest and second nearest other
        return "leave-one-out", np.empty(0), 0.0
    where = _spread(len(train.images))
    near = _near(_part(train, where), train, features, flip, own=where)
    return "leave-one-out", near.distance[~near.equal], float(near.equal.mean())


def _compared(samples: np.ndarray, real: np.ndarray) -> Record:
    """Two sets of distances, float64 (n,) and (N,): the figures of the record.

    The threshold is the k-th smallest of the N real ones. Of n perfect samples, which are as
    good as real ones, so many fall below it as a beta-binomial law says, whatever the
    distribution of distances: k / (N + 1) on average.
    """
    from scipy.stats import betabinom, binomtest

    num, median = len(samples), float(np.median(samples))
    if not len(real):
        nothing = "threshold flagged flagged_interval expected probability".split()
        nothing += ["median_real", "ratio"]
        return {"median": median, **dict.fromkeys(nothing)}
    rank = max(1, round(SHARE * (len(real) + 1)))
    threshold = float(np.sort(real)[rank - 1])
    below = int((samples < threshold).sum())
    law = betabinom(num, rank, len(real) + 1 - rank)
    interval = binomtest(below, num).proportion_ci(0.95, "exact")
    median_real = float(np.median(real))
    return {
        "threshold": threshold,
        "flagged": below / num,
        "flagged_interval": [float(interval.low), float(interval.high)],
        "expected": rank / (len(real) + 1),
        "probability": float(law.pmf(np.arange(below, num + 1)).sum()),  # sf loses digits
        "median": median,
        "median_real": median_real,
        "ratio": median / median_real if median_real > 0 else None,
    }


def _verdict(record: Record) -> str:
    """What the figures say: copies, too few images, or nothing."""
    num, exact = record["num"], record["exact"]
    same = f", {exact:,} equal one but for {SAME_LEVELS:.0f} grey levels" if exact else ""
    if record["threshold"] is None:
        return f"too few different real images to tell: {record['num_train']:,} trained on{same}"
    below = round(record["flagged"] * num)
    few = f"{below:,} of {num:,} samples {'is' if below == 1 else 'are'} nearer to a training image"
    usual = f"than {100 * (1 - record['expected']):.3g} % of real images"
    fact = f"{few} {usual} ({record['expected'] * num:.2g} expected){same}"
    if record["probability"] < ALARM:
        return f"more copies than chance: {fact}"
    if exact and not record["duplicates"]:
        return f"a few copies: {fact}"
    if num < MIN_SAMPLES or record["num_real"] < MIN_REAL:
        return f"too few images to tell: {fact}; it takes {MIN_SAMPLES} samples and real images"
    return f"nothing unusual: {fact}"
