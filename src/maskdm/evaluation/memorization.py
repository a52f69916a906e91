"""Whether a model copied its training images: samples against real images it has not seen.

A sample is flagged if it lies nearer to a training image than all but 1 % of the real images do.
Nearness is relative: the distance to the nearest training image over that to the 50th nearest.
By plain distance, pale and smooth samples would be flagged, since they lie near everything.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskdm.evaluation.features import Features
from maskdm.evaluation.measure import Compared
from maskdm.evaluation.neighbours import nearest
from maskdm.evaluation.records import Record
from maskdm.images.joined import Array, SelectedRows
from maskdm.words import counted

MOST = 1000  # samples that are checked, and real images
SHARE = 0.01  # of the real images, which lie below the threshold
MIN_REAL = 99  # images whose lowest hundredth is at least one
MIN_SAMPLES = 100  # with fewer, finding nothing says nothing
NEIGHBOUR = 50  # gives the scale: an image that occurs 49 times still counts as one
SAME_LEVELS = 2.0  # mean difference, of 255, up to which images are equal
ALARM = 0.01  # probability that perfect samples are called copies
FEW_TRAIN = 5000  # images that a model of usual size memorises
NUM_PAIRS = 16  # that are listed


class ImageSet(NamedTuple):
    """Images and their features: uint8 (N, H, W, C) and, without logits, float32 (N, D)."""

    images: Array
    vectors: Array

    def some(self) -> tuple[ImageSet, np.ndarray]:
        """At most 1,000 of the images, a fixed random part, and their indices: int64 (n,).

        Not every tenth one: classes that come in turn would be left out.
        """
        order = np.random.default_rng(3).permutation(len(self.images))
        where = np.sort(order[:MOST])
        return ImageSet(self.images[where], self.vectors[where]), where


class _Near(NamedTuple):
    """The training image nearest to each of n images."""

    train: np.ndarray  # its index, int64 (n,)
    distance: np.ndarray  # relative to that of the 50th nearest, float64 (n,)
    mirrored: np.ndarray  # whether it is nearest to the image's mirror image, bool (n,)
    equal: np.ndarray  # whether the two are equal within two levels a pixel, bool (n,)


def measure_memorization(compared: Compared) -> Record:
    """`check_memorization` among the reference's images that the model was trained on."""
    known, real, features = compared.trained_on, compared.reference, compared.features
    assert known is not None and features is not None  # needs: training
    train, held_out = (
        ImageSet(SelectedRows(real.images, rows), SelectedRows(real.vectors, rows))
        for rows in (known.rows, known.held_out)
    )
    samples = ImageSet(compared.images, compared.vectors)
    return check_memorization(samples, train, held_out, features, known.flip)


def closest_pairs(samples: Array, train: Array, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The images of a record's pairs: samples, and the training images nearest to them.

    uint8 (n, H, W, C) both. Where a sample's mirror image was compared, the training image is
    mirrored.

    Args:
        samples: all samples, uint8 (N, H, W, C).
        train: all training images, uint8 (M, H, W, C).
        record: what `check_memorization` gave for these.
    """
    columns = ([pair[name] for pair in record["pairs"]] for name in ("sample", "train", "mirrored"))
    drawn, near, mirrored = map(np.array, columns)
    images = train[near]
    return samples[drawn], np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def check_memorization(
    samples: ImageSet, train: ImageSet, held_out: ImageSet | None, features: Features, flip: bool
) -> Record:
    """Compares samples with training images, and tells whether more are copies than by chance.

    Args:
        samples: generated; a random part of more than 1,000.
        train: all training images.
        held_out: real images that were not trained on; a random part of more than 1,000. None,
            or fewer than 99 = training images take their place, each compared with the others.
        features: those of the vectors.
        flip: whether training mirrored images: then an image is as near as the nearer of itself
            and its mirror image.

    Returns:
        num                samples checked
        num_train          training images
        calibration        `held-out images` or `leave-one-out`: which are the real ones
        num_real           real images from which the threshold follows
        duplicates         share of the real ones left out since they equal a training image
        neighbour          the rank whose distance is 1: 50, in small sets half their number
        threshold          below which 1 % of the real images' distances lie; null without any
        flagged            share of samples below it
        flagged_interval   95 % interval of that share by Clopper and Pearson
        expected           the share for perfect samples: rank of the threshold / (num_real + 1)
        probability        that perfect samples give as many or more; too low in leave-one-out on
                           fewer than about 1,000 images, whose distances come in pairs
        exact              samples that equal a training image within 2 levels on average
        median, median_real, ratio    of samples, of real images, first over second
        verdict            a sentence
        warning            a sentence, or null
        pairs              the 16 closest, closest first: sample, train (indices), distance,
                           mirrored (the sample's mirror image was compared), equal

    Raises ValueError for no samples or training images, images of different shapes, and features
    of other images, NaN or infinite.
    """
    _refuse(samples, train, held_out)
    few, where = samples.some()
    own = _near(few, train, features, flip)
    calibration, real, duplicates = _real(train, held_out, features, flip)
    num_train = len(train.images)
    record: Record = {
        "num": len(where),
        "num_train": num_train,
        "calibration": calibration,
        "num_real": len(real),
        "duplicates": duplicates,
        "neighbour": _scale_rank(num_train),
        **_compared(own.distance, real),
        "exact": int(own.equal.sum()),
    }
    record["verdict"] = _verdict(record)
    small = f"small training sets are memorised ({counted(num_train, 'image')})"
    record["warning"] = f"{small}: look at the closest pairs" if num_train < FEW_TRAIN else None
    columns = {"sample": where, **own._asdict()}
    closest = np.argsort(own.distance, kind="stable")[:NUM_PAIRS]
    record["pairs"] = [{name: one[i].item() for name, one in columns.items()} for i in closest]
    return record


def _refuse(samples: ImageSet, train: ImageSet, held_out: ImageSet | None) -> None:
    kinds = {"samples": samples, "training images": train}
    if held_out is not None and len(held_out.images):
        kinds["held-out images"] = held_out
    for name, (images, vectors) in kinds.items():
        if not len(images):
            raise ValueError(f"copies cannot be looked for without {name}")
        if len(vectors) != len(images):
            raise ValueError(f"expected features of {len(images)} {name}, got {len(vectors)}")
        if images.shape[1:] != train.images.shape[1:]:
            raise ValueError(
                f"{name} of shape {images.shape[1:]} cannot be compared with training images of "
                f"shape {train.images.shape[1:]}: prepare them in the same way"
            )


def _scale_rank(num_train: int) -> int:
    return max(1, min(NEIGHBOUR, num_train // 2))


def _near(
    few: ImageSet, train: ImageSet, features: Features, flip: bool, own: np.ndarray | None = None
) -> _Near:
    """The training image nearest to each image, other than that with the index in `own`."""
    near = _near_as_is(few, train, own)
    if not flip:
        return near
    turned = np.ascontiguousarray(few.images[:][:, :, ::-1])
    other = _near_as_is(ImageSet(turned, features.vectors(features.extract(turned))), train, own)
    nearer = other.distance < near.distance
    chosen = [np.where(nearer, b, a) for a, b in zip(near, other, strict=True)]
    return _Near(*chosen)._replace(mirrored=nearer)


def _near_as_is(few: ImageSet, train: ImageSet, own: np.ndarray | None) -> _Near:
    distances, indices = nearest(few.vectors, train.vectors, _scale_rank(len(train.images)), own)
    first, scale = distances[:, 0], distances[:, -1]
    # Where a training image occurs more than 50 times, a copy of it has distance 0 on any scale.
    relative = np.divide(first, scale, out=np.zeros_like(first), where=first > 0)
    pairs = zip(few.images[:], indices[:, 0], strict=True)
    gaps = [np.abs(one.astype(np.int16) - train.images[int(i)]).mean() for one, i in pairs]
    return _Near(indices[:, 0], relative, np.zeros(len(gaps), bool), np.array(gaps) <= SAME_LEVELS)


def _real(
    train: ImageSet, held_out: ImageSet | None, features: Features, flip: bool
) -> tuple[str, np.ndarray, float]:
    """Which real images are used, their distances, and the share left out as duplicates.

    An image that occurs twice in the training set would make equal images look usual.
    """
    if held_out is not None and len(held_out.images) >= MIN_REAL:
        near = _near(held_out.some()[0], train, features, flip)
        if (~near.equal).sum() >= MIN_REAL:
            return "held-out images", near.distance[~near.equal], float(near.equal.mean())
    if len(train.images) < 3:  # there are no two others
        return "leave-one-out", np.empty(0), 0.0
    few, where = train.some()
    near = _near(few, train, features, flip, own=where)
    return "leave-one-out", near.distance[~near.equal], float(near.equal.mean())


def _compared(samples: np.ndarray, real: np.ndarray) -> Record:
    """Compares two sets of distances, float64 (n,) and (N,): figures of the record.

    The threshold is the k-th smallest of the N real ones. The number of n perfect samples (as
    good as real images) below it follows a beta-binomial law for any distribution of distances:
    a share k / (N + 1) on average.
    """
    from scipy.stats import betabinom, binomtest

    num, median = len(samples), float(np.median(samples))
    if not len(real):
        nothing = "threshold flagged flagged_interval expected probability median_real ratio"
        return {"median": median, **dict.fromkeys(nothing.split())}
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
    verb = "equals" if exact == 1 else "equal"
    same = f", {exact:,} {verb} one within {SAME_LEVELS:.0f} grey levels" if exact else ""
    if record["threshold"] is None:
        trained_on = counted(record["num_train"], "training image")
        return f"too few different real images to tell: {trained_on}{same}"
    below, usual = round(record["flagged"] * num), 100 * (1 - record["expected"])
    fact = (
        f"{below:,} of {num:,} samples {'is' if below == 1 else 'are'} nearer to a training image "
        f"than {usual:.3g} % of real images ({record['expected'] * num:.2g} expected){same}"
    )
    if record["probability"] < ALARM:
        return f"more copies than chance: {fact}"
    if exact and not record["duplicates"]:
        return f"a few copies: {fact}"
    if num < MIN_SAMPLES or record["num_real"] < MIN_REAL:
        needed = f"at least {MIN_SAMPLES} samples and {MIN_REAL} real images are needed"
        return f"too few images to tell: {fact}; {needed}"
    return f"nothing unusual: {fact}"
