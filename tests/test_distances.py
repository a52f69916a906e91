"""Distances between sets of vectors, against closed forms and torch-fidelity's own functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from maskdm.evaluation.distances import (
    _share,
    frechet,
    frechet_distance,
    inception_score,
    kid,
    part_distance,
    precision_recall,
    sliced,
)
from maskdm.evaluation.measure import Measured, as_record, over_seeds
from maskdm.evaluation.statistics import (
    Statistics,
    holds_statistics,
    load_statistics,
    save_statistics,
    statistics_of,
)
from maskdm.images.joined import JoinedArrays


def gaussian(num: int, mean, cov, seed: int) -> np.ndarray:
    """A sample with exactly this mean and covariance."""
    x = np.random.default_rng(seed).standard_normal((num, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def normal(num: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((num, dim)) + shift
    return values.astype(np.float32)


def mixed(num: int, dim: int, seed: int) -> np.ndarray:
    """Correlated features of different scales, far from the origin."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((dim, dim)) * np.geomspace(0.1, 10, dim)
    return (generator.standard_normal((num, dim)) @ mix + 50).astype(np.float32)


def test_the_distance_of_two_gaussians_is_the_closed_form():
    a = gaussian(500, [0.0, 0.0, 0.0], np.diag([1.0, 4.0, 9.0]), 0)
    b = gaussian(300, [1.0, 2.0, 0.0], np.diag([4.0, 4.0, 1.0]), 1)
    expected = 1 + 4 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dim", [2, 12, 64])
def test_the_distance_is_torch_fidelitys(dim):
    a, b = mixed(400, dim, 0), mixed(300, dim, 1) + np.float32(0.5)
    theirs = [fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (a, b)]
    expected = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_have_distance_0_and_degenerate_ones_a_finite_one():
    a = np.random.default_rng(0).standard_normal((50, 4))
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    flat = np.ones((10, 4))
    assert frechet_distance(flat, flat + 2) == pytest.approx(16)
    few = np.random.default_rng(0).standard_normal((5, 20))  # fewer vectors than features
    assert 0 < frechet_distance(few, normal(500, 20, 1)) < 100


def test_a_large_mean_costs_no_digits():
    a, b = normal(3000, 3, 0), normal(3000, 3, 1)
    expected = frechet_distance(a, b)
    far = [x.astype(np.float64) + 1e6 for x in (a, b)]
    assert frechet_distance(*far) == pytest.approx(expected, rel=1e-6)


def test_statistics_are_read_in_chunks_and_equal_numpys():
    read = []

    class Watched(JoinedArrays):
        def __getitem__(self, where):
            rows = super().__getitem__(where)
            read.append(len(rows))
            return rows

    whole = mixed(10_000, 5, 0)
    measured = statistics_of(Watched([whole[:3000], whole[3000:3001], whole[3001:]]))
    assert max(read) < 5000
    np.testing.assert_allclose(measured.mean, whole.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(
        measured.cov, np.cov(whole, rowvar=False, dtype=np.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((1, 3)), r"at least 2 vectors of features, got shape \(1, 3\)"),
        (np.zeros(3), "at least 2 vectors"),
        (np.full((4, 3), np.nan), "features contain NaN or infinite values"),
    ],
)
def test_statistics_of_one_vector_or_of_nan_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        statistics_of(features)


def test_features_of_different_length_are_refused():
    different = "of 3 values cannot be compared with features of 4 values"
    with pytest.raises(ValueError, match=different):
        frechet(normal(10, 3, 0), statistics_of(normal(10, 4, 0)))
    with pytest.raises(ValueError, match=different):
        frechet_distance(normal(10, 3, 0), normal(10, 4, 0))


def test_the_kernel_distance_is_torch_fidelitys():
    a, b = normal(500, 12, 0), normal(400, 12, 1, 0.3)
    theirs = kid_features_to_metric(
        torch.from_numpy(a).double(),
        torch.from_numpy(b).double(),
        kid_subset_size=200,
        verbose=False,
    )
    measured = kid(a, b, 200)
    assert measured.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert measured.spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_the_kernel_distance_of_shifted_points_is_the_closed_form():
    """For point masses at 0 and at d the kernel (xy/D + 1)^3 gives (d^2 + 1)^3 - 1 in 1-D."""
    a, b = np.zeros((50, 1), np.float32), np.full((50, 1), 2.0, np.float32)
    assert kid(a, b, 50).value == pytest.approx(1 + (4 + 1) ** 3 - 2)


def test_precision_and_recall_are_torch_fidelitys():
    a, b = normal(300, 6, 0), normal(250, 6, 1, 0.5)
    theirs = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), verbose=False)
    precision, recall = precision_recall(a, b)
    assert precision.value == pytest.approx(theirs["precision"])
    assert recall.value == pytest.approx(theirs["recall"])
    binomial = np.sqrt(theirs["precision"] * (1 - theirs["precision"]) / 300)
    assert precision.error == pytest.approx(binomial, rel=0.05)
    everything, _ = precision_recall(b, b)
    assert everything.value == 1 and everything.error > 0


def test_precision_and_recall_far_from_the_origin():
    a, b = np.random.default_rng(0).standard_normal((2, 400, 32)).astype(np.float32)
    near = [one.value for one in precision_recall(a, b)]
    far = [one.value for one in precision_recall(a + 3000, b + 3000)]
    assert 0.5 < near[0] < 0.9 and np.allclose(far, near, atol=0.02)


def test_precision_and_recall_of_equal_disjoint_and_mode_dropped_sets():
    modes = np.random.default_rng(0).standard_normal((400, 8)) + 20 * np.repeat(
        np.eye(8)[:4], 100, axis=0
    )
    modes = modes.astype(np.float32)
    assert [m.value for m in precision_recall(modes, modes)] == [1, 1]
    assert [m.value for m in precision_recall(modes + 500, modes)] == [0, 0]
    other = np.random.default_rng(1).standard_normal((400, 8)) + 20 * np.repeat(
        np.eye(8)[:4], 100, axis=0
    )
    precision, recall = precision_recall(other[:100].astype(np.float32), modes)  # one of 4 modes
    assert precision.value > 0.5 and recall.value < 0.26


@pytest.mark.parametrize(("share", "num"), [(0, 20), (1, 20), (0.5, 40), (0.95, 40)])
def test_the_interval_of_a_share_lies_in_0_to_1_and_is_wilsons(share, num, monkeypatch):
    """Wilson's ends: the shares p whose distance from the observed one is 1.96 of p's errors."""
    answer = {"precision": share, "recall": share}
    monkeypatch.setattr("torch_fidelity.metric_prc.prc_features_to_metric", lambda *a, **b: answer)
    for one in precision_recall(normal(num, 2, 0), normal(num, 2, 1)):
        low, high = one.interval()
        assert 0 <= low <= one.value <= high <= 1
        for end, is_limit in ((low, share == 0), (high, share == 1)):
            if is_limit:
                assert end == share
            else:
                gap = abs(end - share) / np.sqrt(end * (1 - end) / num)
                assert gap == pytest.approx(1.959964, rel=1e-5)


def test_wilsons_interval_holds_a_share_in_95_of_100_samples():
    generator, covered = np.random.default_rng(0), []
    for true in (0.02, 0.3, 0.97):
        of_one = []
        for count in generator.binomial(100, true, 1000):
            low, high = _share(count / 100, 100).interval()
            of_one.append(low <= true <= high)
        covered.append(np.mean(of_one))
    assert min(covered) > 0.92 and np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_intervals_end_at_the_limits_of_a_metric():
    distance = as_record({"frechet": Measured(0.1, 0.2)})["frechet"]
    assert distance["interval"] == pytest.approx([0, 0.1 + 1.96 * 0.2])
    assert as_record({"kid": Measured(0.1, 0.2)})["kid"]["interval"][0] < 0  # an unbiased one
    seeds = [{"recall": Measured(value)} for value in (0.9, 1.0, 1.0)]  # Student's t reaches 1.11
    low, high = as_record(over_seeds(seeds))["recall"]["interval"]
    assert 0.8 < low < 0.9 and high == 1


def test_precision_of_three_images_is_refused():
    with pytest.raises(ValueError, match="more than 3 samples and real images"):
        precision_recall(normal(3, 4, 0), normal(10, 4, 0))


def test_the_sliced_distance_of_a_shift_is_its_square_like_frechets():
    a = normal(700, 30, 0)
    shift = np.random.default_rng(1).standard_normal(30).astype(np.float32)
    expected = float(np.square(shift).sum())
    measured = sliced(a + shift, a, num_directions=4000)
    assert measured.value == pytest.approx(expected, rel=0.05)  # 4,000 random directions
    assert frechet_distance(a + shift, a) == pytest.approx(expected, rel=1e-4)


def test_the_sliced_distance_in_one_dimension_is_the_wasserstein_distance():
    """For sets of different size, too: both quantile functions are steps."""
    a, b = np.float32([[0.0], [1.0]]), np.float32([[0.0], [0.0], [3.0]])
    # quantiles: a 0 | 0 | 1 | 1 over (0, 1/3, 1/2, 2/3, 1), b 0 | 0 | 0 | 3
    assert sliced(a, b).value == pytest.approx(1 / 6 * 1 + 1 / 3 * 4)
    x, y = normal(60, 1, 0), normal(90, 1, 1, 0.7)
    fine = np.square(np.sort(x[:, 0]).repeat(3) - np.sort(y[:, 0]).repeat(2)).mean()
    assert sliced(x, y).value == pytest.approx(fine, rel=1e-5)


def test_the_sliced_distance_sees_equal_disjoint_and_mode_dropped_sets():
    one, two, three = (normal(400, 8, seed) for seed in (0, 1, 2))
    far = three + np.float32(10) * np.eye(8, dtype=np.float32)[0]
    assert sliced(one, one[::-1].copy()).value == pytest.approx(0, abs=1e-6)
    alike = sliced(one, two).value
    dropped = sliced(one, np.concatenate([two, far])).value
    disjoint = sliced(far, two).value
    assert 20 * alike < dropped < disjoint


def test_the_inception_score_is_torch_fidelitys_and_has_its_extremes():
    logits = normal(200, 7, 0)
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    measured = inception_score(logits)
    assert measured.value == pytest.approx(theirs["inception_score_mean"])
    assert measured.spread == pytest.approx(theirs["inception_score_std"])
    assert inception_score(np.zeros((50, 7), np.float32)).value == pytest.approx(1)
    sure = 100 * np.eye(5, dtype=np.float32)[np.random.default_rng(0).integers(5, size=5000)]
    assert inception_score(sure).value == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("metric", ["frechet", "kid", "sliced"])
def test_errors_are_the_deviation_over_other_samples(metric):
    """For sets that differ by more than chance; near chance, errors are too large."""
    reference = normal(3000, 6, 0)
    measures = {
        "frechet": lambda x: frechet(x, statistics_of(reference), 40),
        "kid": lambda x: kid(x, reference, 150),
        "sliced": lambda x: sliced(x, reference, 40),
    }
    measured = [measures[metric](normal(300, 6, seed, 0.6)) for seed in range(1, 31)]
    spread = np.std([one.value for one in measured], ddof=1)
    error = np.mean([one.error for one in measured])
    assert 0.7 * spread < error < 1.5 * spread
    one = measured[0]
    assert one.interval() == pytest.approx(
        (one.value - 1.96 * one.error, one.value + 1.96 * one.error)
    )


def test_the_frechet_distances_error_depends_on_the_covariance():
    """For sets that differ in spread alone, the means are equal."""
    reference = statistics_of(normal(3000, 4, 0))
    measured = [frechet(1.6 * normal(300, 4, seed), reference, 40) for seed in range(1, 31)]
    spread = np.std([one.value for one in measured], ddof=1)
    assert 0.7 * spread < np.mean([one.error for one in measured]) < 1.5 * spread


def test_chance_is_the_distance_of_disjoint_parts():
    one = normal(2000, 4, 0)
    expected = np.mean([
        frechet_distance(normal(500, 4, 2 * i + 1), normal(500, 4, 2 * i + 2)) for i in range(20)
    ])  # fmt: skip
    assert part_distance(one, 500) == pytest.approx(expected, rel=0.3)
    assert part_distance(one, 5000) < part_distance(one, 100)  # at most half of it


def test_statistics_survive_a_round_trip(tmp_path):
    kept = statistics_of(mixed(50, 4, 0), {"shape": [8, 8, 1]})
    save_statistics(kept, tmp_path / "new" / "s.npz")
    read = load_statistics(tmp_path / "new" / "s.npz")
    np.testing.assert_array_equal(read.mean, kept.mean)
    np.testing.assert_array_equal(read.cov, kept.cov)
    assert read.facts == {"shape": [8, 8, 1]}
    with np.load(tmp_path / "new" / "s.npz") as arrays:  # as other tools read it
        np.testing.assert_array_equal(arrays["mu"], kept.mean)
        np.testing.assert_array_equal(arrays["sigma"], kept.cov)


def _compressed_by(path, method):
    """Statistics whose zip claims a compression that nobody knows."""
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    content = bytearray(path.read_bytes())
    for start, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        place = content.find(start)
        while place >= 0:
            content[place + offset] = method
            place = content.find(start, place + 4)
    path.write_bytes(content)


def test_an_archive_with_a_damaged_directory_holds_no_statistics(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    assert holds_statistics(path)
    path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"PK\1\0"))
    assert not holds_statistics(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda p: np.savez(p, mu=np.zeros(3), sigma=np.eye(4)),
            r"mu \(3,\) and sigma \(4",
        ),
        (lambda p: p.write_bytes(b"no zip"), "cannot be read"),
        (lambda p: np.savez(p, mu=[0, np.nan], sigma=np.eye(2)), "NaN or infinite"),
        (lambda p: np.savez(p, mu=[0, 0], sigma=np.full((2, 2), np.inf)), "NaN or infinite"),
        (lambda p: np.savez(p, mu=[0, 0], sigma=[[1, 0.5], [0, 1]]), "not symmetric"),
        (lambda p: np.savez(p, mu=[0, 0], sigma=-np.eye(2)), "negative variances"),
        (lambda p: np.savez(p, mu=[0, 1j], sigma=np.eye(2)), "complex128, not numbers"),
        (lambda p: np.savez(p, mu=["0", "1"], sigma=np.eye(2)), "not numbers"),
        (lambda p: np.savez(p, mu=[0, 0], sigma=np.eye(2), maskdm="[1]"), "no settings"),
        (lambda p: _compressed_by(p, 99), "cannot be read"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, write, message):
    path = tmp_path / "s.npz"
    write(path)
    with pytest.raises(ValueError, match=message):
        load_statistics(path)


def test_the_distance_from_a_gaussian_needs_its_mean_and_covariance_alone():
    a, b = Statistics(np.zeros(2), np.eye(2)), normal(4000, 2, 0)
    assert frechet(b, a, 0).value == pytest.approx(0, abs=0.01)
    assert frechet(b, a, 0).error is None and frechet(b, a, 0).interval() is None
