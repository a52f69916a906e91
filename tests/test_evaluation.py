"""`maskdm evaluate`: what is compared, with what, how it continues, and what it records."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import mean_network, tiny_settings
from PIL import Image
from sklearn.datasets import load_digits

import maskdm.evaluation.samples as samples_module
from maskdm.cli import main
from maskdm.evaluation import shards
from maskdm.evaluation.distances import frechet_distance
from maskdm.evaluation.evaluate import evaluate
from maskdm.evaluation.features import available_features, features_of, make_features
from maskdm.evaluation.measure import Measured, over_seeds
from maskdm.evaluation.records import records_file
from maskdm.evaluation.reference import other_reference, own_reference
from maskdm.evaluation.samples import Samples, drawn_samples
from maskdm.export.pipeline import pipeline_of_run, save_pipeline
from maskdm.images.order import training_subset
from maskdm.models.build import build_model
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Data, Evaluation, Recipe
from maskdm.sampling.generate import labels_in_shares
from maskdm.settings import changed
from maskdm.words import figure

DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
CLASSES = load_digits().target
CPU = torch.device("cpu")


@pytest.fixture
def trained(tiny: Recipe) -> TrainedModel:
    torch.manual_seed(0)
    model = build_model(tiny).eval()
    with torch.no_grad():  # as it comes, it predicts zeros
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return TrainedModel(model, tiny.diffusion)


@pytest.fixture
def run(trained: TrainedModel, tiny: Recipe, tmp_path: Path) -> Path:
    """A run's folder with an exported model."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(tiny.to_yaml())
    save_pipeline(pipeline_of_run(trained.model, tiny), folder / "model")
    return folder


def save_folder(pixels: np.ndarray, folder: Path, suffix: str = "png") -> str:
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        squeezed = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(squeezed).save(folder / f"{i:05d}.{suffix}")
    return str(folder)


def record_of(*arguments: object) -> dict:
    """The last record that `maskdm evaluate ...` writes."""
    assert main(["evaluate", *map(str, arguments)]) == 0
    named = [str(a) for a in arguments]
    path = Path(named[named.index("--out") + 1]) if "--out" in named else None
    return json.loads((path or Path(named[0]) / "evaluation.json").read_text())[-1]


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


# Runs


def test_missing_inception_weights_are_reported_before_anything_is_drawn(
    run, tiny, monkeypatch, tmp_path, capsys
):
    """A recipe of the paper's names them; the line has both ways to get them."""
    recipe = changed(tiny, evaluation=changed(tiny.evaluation, features="inception"))
    (run / "recipe.yaml").write_text(recipe.to_yaml())

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    text = failure(capsys, run)
    place = tmp_path / "torch" / "hub" / "checkpoints"
    assert "features inception need weights" in text and f"put it at {place}" in text
    assert "--weights FILE" in text and "evaluation.weights" in text
    assert not (run / "evaluation").exists() and not (run / "evaluation.json").exists()


def test_the_record_has_all_that_the_figures_depend_on(run, tiny):
    record = record_of(run, "--num", 24, "--seed", 3)
    assert set(record["metrics"]) == {"frechet", "sliced", "precision", "recall"}
    for one in record["metrics"].values():
        low, high = one["interval"]
        assert low <= one["value"] <= high
        assert one["library"].split()[0] in ("maskdm", "torch-fidelity")
    assert record["samples"]["num"] == 24 and record["samples"]["seeds"] == [3]
    assert record["samples"]["sampling"]["steps"] == 4
    assert record["samples"]["weights"] == "ema" and record["samples"]["precision"] == "fp32"
    assert record["samples"]["model"] == str(run / "model")
    assert record["reference"]["shape"] == [8, 8, 1] and record["reference"]["num"] == 1797
    assert record["reference"]["crop"] == "center" and record["reference"]["flip"] is False
    assert record["features"]["name"] == "pca" and record["features"]["dim"] == 4
    assert record["recipe"] == tiny.model_dump(mode="json")
    assert record["chance"]["num"] == 24 and record["chance"]["frechet"] > 0
    for name in ("maskdm", "commit", "torch", "device", "date", "generate_sec", "num_ranks"):
        assert name in record


def test_the_distance_is_that_of_the_drawn_images_to_all_real_ones(run):
    """By hand: the images as `maskdm sample` draws them, in the same features."""
    record = record_of(run, "--num", 12, "--metrics", "frechet")
    assert main(["sample", str(run), "--num", "12", "--out", str(run / "s.npz")]) == 0
    settings = Evaluation(num_components=4)
    reference = own_reference(Data(source="digits", size=8, channels=1), progress=False)
    features = make_features(settings, reference.store, torch.device("cpu"))
    drawn = features.extract(np.load(run / "s.npz")["arr_0"])
    expected = frechet_distance(drawn, features.extract(DIGITS))
    assert record["metrics"]["frechet"]["value"] == pytest.approx(expected, rel=1e-3)
    assert set(record["metrics"]) == {"frechet"}


def test_the_result_does_not_depend_on_the_batch_size(run):
    one = record_of(run, "--num", 20, "--batch-size", 20)
    (run / "evaluation").rename(run / "first")
    other = record_of(run, "--num", 20, "--batch-size", 3)
    assert len(list((run / "evaluation").glob("samples-*/*.npy"))) == 7
    for name, metric in one["metrics"].items():
        assert other["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-3), name
    assert len(json.loads((run / "evaluation.json").read_text())) == 1  # the same: replaced


def counted(monkeypatch, fail_after: int | None = None) -> list[tuple[int, int]]:
    """Which images are drawn from here on, by seed and number; a kill after so many batches."""
    drawn: list[tuple[int, int]] = []
    generate, batches = samples_module.generate, []

    def counting(trained, sampling, indices, seed, **others):
        if fail_after is not None and len(batches) == fail_after:
            raise KeyboardInterrupt
        batches.append(1)
        drawn.extend((seed, index) for index in indices)
        return generate(trained, sampling, indices, seed, **others)

    monkeypatch.setattr(samples_module, "generate", counting)
    return drawn


def test_a_killed_evaluation_continues_and_draws_each_image_once(run, monkeypatch):
    whole = record_of(run, "--num", 30, "--batch-size", 4)
    (run / "evaluation").rename(run / "first")
    first = counted(monkeypatch, fail_after=3)
    assert main(["evaluate", str(run), "--num", "30", "--batch-size", "4"]) == 1
    monkeypatch.undo()
    (folder,) = (run / "evaluation").glob("samples-*")
    (folder / "00000099-00000100.npy.writing-1").write_bytes(b"half")
    second = counted(monkeypatch)
    again = record_of(run, "--num", 30, "--batch-size", 4)
    assert sorted(first + second) == [(0, i) for i in range(30)]
    assert again["metrics"] == whole["metrics"]


def test_other_weights_draw_other_images(trained, tiny, tmp_path):
    first = drawn_samples(trained, tiny.sampling, 4, 0, tmp_path)
    with torch.no_grad():
        trained.model.head.bias.add_(0.5)
    second = drawn_samples(trained, tiny.sampling, 4, 0, tmp_path)
    assert first.folder != second.folder
    assert not np.array_equal(first.images[:], second.images[:])
    assert first.facts["weights_sha256"] != second.facts["weights_sha256"]


def test_classes_are_as_frequent_as_in_the_real_images(tiny, tmp_path, monkeypatch):
    drawn, draw = [], samples_module.generate

    def watched(trained, sampling, indices, seed, labels, **others):
        drawn.extend([None] * len(indices) if labels is None else labels.tolist())
        return draw(trained, sampling, indices, seed, labels, **others)

    monkeypatch.setattr(samples_module, "generate", watched)
    for num_eights in (27, 9):
        folder, data = tmp_path / f"run-{num_eights}", tmp_path / f"data-{num_eights}"
        for name, digit, num in (("eight", 8, num_eights), ("three", 3, 9)):
            save_folder(DIGITS[digit == CLASSES][:num], data / name)
        recipe = changed(
            tiny,
            data=changed(tiny.data, source=str(data)),
            model=changed(tiny.model, num_classes=2),
        )
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        model = build_model(recipe, ["eight", "three"]).eval()
        save_pipeline(pipeline_of_run(model, recipe), folder / "model")
        drawn.clear()
        record = record_of(folder, "--num", 40)
        if num_eights == 9:
            assert set(drawn) == {None} and "class_counts" not in record["samples"]  # in turn
        else:
            assert abs(drawn.count(0) - 30) <= 1 and drawn.count(0) + drawn.count(1) == 40
            assert record["samples"]["class_counts"] == [27, 9]


def test_classes_in_shares_belong_to_the_images_numbers():
    counts = [500, 0, 30, 470]
    labels = labels_in_shares(counts, range(10_000), seed=3).numpy()
    drawn = np.bincount(labels, minlength=4)
    assert np.abs(drawn - 10 * np.array(counts)).max() <= 3
    assert np.array_equal(labels_in_shares(counts, [7, 5], seed=3), labels[[7, 5]])
    for first in (100, 1000):
        assert abs((labels[:first] == 0).mean() - 0.5) <= 3 / first
    assert not np.array_equal(labels_in_shares(counts, range(100), seed=4), labels[:100])


def test_ranks_share_what_is_missing(tmp_path, monkeypatch):
    """Two ranks, one after the other: together they compute each row once."""
    rows: list[list[int]] = [[], []]
    np.save(tmp_path / "00000003-00000005.npy", np.arange(3, 5))
    missing = shards._missing(tmp_path, 20, 4)
    monkeypatch.setattr(shards, "broadcast_object_list", lambda objects: [missing])
    for rank in (1, 0):
        state = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            is_main_process=rank == 0,
            wait_for_everyone=lambda: None,
        )
        monkeypatch.setattr(shards, "process_state", lambda state=state: state)

        def compute(start: int, stop: int, rank: int = rank) -> np.ndarray:
            rows[rank] += range(start, stop)
            return np.arange(start, stop)

        if rank == 1:  # it can't have all yet
            with pytest.raises(ValueError, match="all nodes must share the disk"):
                shards.in_shards(tmp_path, 20, 4, compute, "counting")
        else:
            joined = shards.in_shards(tmp_path, 20, 4, compute, "counting")
    assert np.array_equal(joined[:], np.arange(20))
    assert sorted(rows[0] + rows[1]) == [0, 1, 2, *range(5, 20)]
    assert rows[0] and rows[1]


def test_a_damaged_shard_is_drawn_again(run, monkeypatch):
    whole = record_of(run, "--num", 12, "--batch-size", 4)
    (shard,) = (run / "evaluation").glob("samples-*/00000004-00000008.npy")
    shard.write_bytes(shard.read_bytes()[:-7])
    drawn = counted(monkeypatch)
    assert record_of(run, "--num", 12, "--batch-size", 4)["metrics"] == whole["metrics"]
    assert drawn == [(0, i) for i in range(4, 8)]


def test_more_images_and_other_features_draw_no_image_twice(run, monkeypatch, tmp_path):
    drawn = counted(monkeypatch)
    record_of(run, "--num", 10, "--batch-size", 4)
    record_of(run, "--num", 18, "--batch-size", 4)
    record_of(run, "--num", 12, "--features", mean_network(tmp_path))
    assert sorted(drawn) == [(0, i) for i in range(18)]
    record_of(run, "--num", 4, "--steps", "5")  # other images
    assert len(drawn) == 22
    assert len(json.loads((run / "evaluation.json").read_text())) == 4


def test_what_cannot_work_is_refused_before_an_image_is_drawn(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        "maskdm.evaluation.evaluate.reference_of_run", None
    )  # calling it would raise
    drawn = counted(monkeypatch)
    for flags, message in (
        (("--steps", 1001), "1001"),
        (("--guidance.kind", "classifier-free"), "classifier-free guidance is not available"),
        (("--out", tmp_path), "is a folder: use the name of a file"),
        (("--save-statistics", tmp_path / "s"), "use a file name that ends in .npz"),
    ):
        assert message in failure(capsys, run, *flags)
    assert not drawn


def test_chance_belongs_to_the_frechet_distance(run, capsys):
    record = record_of(run, "--num", 12, "--metrics", "sliced")
    assert record["chance"] is None and not any("Frechet" in note for note in record["notes"])
    assert "by chance" not in capsys.readouterr().out


def test_seeds_repeat_the_drawing(run, monkeypatch):
    drawn = counted(monkeypatch)
    record = record_of(
        run, "--num", 12, "--seeds", 3, "--seed", 5, "--metrics", "frechet", "sliced"
    )
    assert sorted(drawn) == [(seed, i) for seed in (5, 6, 7) for i in range(12)]
    values = [one["frechet"] for one in record["per_seed"]]
    alone = record_of(run, "--num", 12, "--seed", 6, "--metrics", "frechet")
    assert values[1] == pytest.approx(alone["metrics"]["frechet"]["value"])
    found = record["metrics"]["frechet"]
    assert found["value"] == pytest.approx(np.mean(values))
    assert found["spread"] == pytest.approx(np.std(values, ddof=1))
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # Student's t of two degrees
    assert found["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert record["samples"]["seeds"] == [5, 6, 7]


def test_the_text_has_the_figures_and_what_they_depend_on(run, capsys):
    record = record_of(run, "--num", 12)
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for part in (
        f"Frechet distance {figure(record['metrics']['frechet']['value'])} 95 %: ",
        "sliced Wasserstein distance ",
        f"12 images from {run / 'model'} (ema), seed 0, 4 steps of ddim",
        "1,797 images from digits, 8x8x1, crop center, not mirrored",
        "pca, 4 values, of pixels from 0 to 255",
        f"written to {run / 'evaluation.json'}",
        f"the images are kept in {run / 'evaluation'}",
    ):
        assert part in words, part
    assert max(len(line) for line in text.splitlines() if str(run) not in line) <= 100


def test_a_reference_prepared_differently_is_refused(run, capsys, tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "large.npz", DIGITS[:6].repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "colour.npz", colour)
    small = save_folder(DIGITS[:6, :4, :4], tmp_path / "small")
    text = failure(capsys, run, "--reference", tmp_path / "large.npz")
    assert "images of 16x16x1 (height, width, channels), but the samples have 8x8x1" in text
    text = failure(capsys, run, "--reference", tmp_path / "colour.npz")
    assert "8x8x3 (height, width, channels), but the samples have 8x8x1" in text
    assert "4x4 pixels, smaller than the samples' 8x8" in failure(capsys, run, "--reference", small)
    source = save_folder(DIGITS[:6], tmp_path / "source")
    packed = str(tmp_path / "packed")
    assert main(["pack", source, packed, "--size", "8", "--channels", "1", "--crop", "resize"]) == 0
    text = failure(capsys, run, "--reference", packed)
    assert "was packed with crop resize, but the samples have crop center" in text
    assert not (run / "evaluation").exists()  # refused before anything was drawn


def test_another_reference_is_prepared_like_the_runs_own_images(run, tmp_path):
    large = save_folder(DIGITS[:20].repeat(3, 1).repeat(3, 2), tmp_path / "large")
    record = record_of(run, "--num", 6, "--reference", large, "--metrics", "frechet")
    assert record["reference"]["shape"] == [8, 8, 1] and record["reference"]["num"] == 20
    assert record["reference"]["source"] == large
    same = record_of(run, "--num", 6, "--reference", "digits", "--metrics", "frechet")
    assert same["reference"]["num"] == 1797


def test_the_record_of_a_stage_or_a_checkpoint_goes_to_its_own_place(run):
    """Not into folders that are replaced, or removed, when training goes on."""
    assert main(["evaluate", str(run / "model"), "--num", "6"]) == 0
    assert json.loads((run / "evaluation.json").read_text())[0]["samples"]["num"] == 6
    assert (run / "evaluation").is_dir()
    assert not (run / "model" / "evaluation.json").exists()
    place = run / "checkpoints" / "step-00000006"
    place.mkdir(parents=True)
    assert records_file(str(place)) == run.resolve() / "evaluation-step-00000006.json"
    assert records_file(f"{run}@hide") == run / "evaluation-hide.json"


def test_another_metric_of_the_same_images_joins_those_before(run):
    first = record_of(run, "--num", 40, "--metrics", "frechet", "recall", "memorization")
    second = record_of(run, "--num", 40, "--metrics", "kid")
    (only,) = json.loads((run / "evaluation.json").read_text())
    assert only == second and {*only["metrics"]} == {"frechet", "recall", "kid"}
    assert only["metrics"]["frechet"] == first["metrics"]["frechet"]
    assert only["memorization"] == first["memorization"] is not None
    assert only["chance"] == first["chance"] is not None
    assert [{*one} for one in only["per_seed"]] == [{"frechet", "recall", "kid"}]


def test_weights_of_a_recipes_features_are_not_those_of_others(run, tiny, capsys):
    own = changed(tiny.evaluation, features="inception", weights="/nowhere/inception.pth")
    (run / "recipe.yaml").write_text(changed(tiny, evaluation=own).to_yaml())
    record = record_of(run, "--num", 12, "--features", "pca", "--metrics", "frechet")
    assert record["features"]["name"] == "pca"
    assert "leave out --weights" in failure(capsys, run, "--features", "pca", "--weights", "x.pth")
    auto = Evaluation(features="auto", weights="/nowhere/inception.pth")
    features, note = available_features(auto, own_reference(tiny.data, False).store, CPU)
    assert features.name == "pca" and "no such file" in note


def test_equal_values_of_three_seeds_are_no_certainty():
    one = Measured(0.0, 0.02, ends=(0.0, 0.06))
    joined = over_seeds([{"precision": one}] * 3)["precision"]
    assert joined.error == pytest.approx(math.hypot(0.02, 0.02, 0.02) / 3)
    far = [{"precision": Measured(value, 0.001)} for value in (0.1, 0.2, 0.3)]
    assert over_seeds(far)["precision"].error == pytest.approx(4.302653 * 0.1 / 3**0.5 / 1.96, 1e-4)


def test_damaged_records_are_not_overwritten(run, capsys):
    (run / "evaluation.json").write_text('{"distance": 1}')
    assert "does not contain a list of evaluations): move it away" in failure(
        capsys, run, "--num", 6
    )
    assert (run / "evaluation.json").read_text() == '{"distance": 1}'


def test_copies_of_training_images_are_found_and_drawn(run, monkeypatch):
    """A model that repeats the images that it was trained on, without those held out."""
    data = Data(**{**Data(source="digits", size=8, channels=1).model_dump(), "held_out": 300})
    recipe = Recipe(**{**tiny_settings(), "data": data.model_dump()})
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    known = training_subset(1797, data)

    def recalling(trained, sampling, indices, seed, **others):
        return DIGITS[known[np.array(indices) * 7]]

    monkeypatch.setattr(samples_module, "generate", recalling)
    record = record_of(run, "--num", 150)
    found = record["memorization"]
    assert found["num_train"] == 1497 and found["calibration"] == "held-out images"
    assert found["exact"] == 150 and found["flagged"] == 1
    assert found["verdict"].startswith("more copies than chance")
    assert "small training sets are memorised" in found["warning"]
    pair = found["pairs"][0]
    np.testing.assert_array_equal(DIGITS[known[pair["sample"] * 7]], DIGITS[known[pair["train"]]])
    with Image.open(run / "memorization.png") as sheet:
        assert sheet.width > 200
    record_of(run, "--num", 150, "--out", run / "mine.json")
    assert (run / "mine-memorization.png").is_file()
    held_out = np.setdiff1d(np.arange(1797), known)
    monkeypatch.setattr(
        samples_module, "generate", lambda t, s, indices, seed, **_: DIGITS[held_out[indices]]
    )
    fresh = record_of(run, "--num", 150, "--seed", 1)["memorization"]
    assert fresh["flagged"] < 0.1 and not fresh["verdict"].startswith("more copies")


def test_copies_are_looked_for_only_among_a_runs_own_images(run, tmp_path, capsys):
    other = save_folder(DIGITS[:30], tmp_path / "other")
    record = record_of(run, "--num", 8, "--reference", other, "--metrics", "frechet")
    assert record["memorization"] is None and not (run / "memorization.png").exists()
    text = failure(capsys, run, "--reference", other, "--metrics", "memorization")
    assert "metric memorization needs the images that the model was trained on" in text


# Images of any origin


def test_images_of_any_origin_are_compared_as_they_are(tmp_path):
    network, out = mean_network(tmp_path), tmp_path / "e.json"
    odd, even = DIGITS[1::2], DIGITS[::2]
    folder = save_folder(odd, tmp_path / "odd")
    np.savez(tmp_path / "even.npz", even)
    record = record_of(
        folder, "--reference", tmp_path / "even.npz", "--features", network, "--out", out
    )
    quarters = [x.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, 4) for x in (odd, even)]
    expected = frechet_distance(*quarters)
    assert record["metrics"]["frechet"]["value"] == pytest.approx(expected, rel=1e-3)
    assert record["samples"]["num"] == 898 and record["samples"]["source"] == folder
    assert record["features"]["dim"] == 4 and len(record["features"]["sha256"]) == 64


def test_a_part_of_given_images_is_drawn_at_random(tmp_path):
    """The first of a class folder would be of one class."""
    network, out = mean_network(tmp_path), tmp_path / "e.json"
    dark, bright = np.zeros((40, 8, 8, 1), np.uint8), np.full((40, 8, 8, 1), 200, np.uint8)
    np.savez(tmp_path / "all.npz", np.concatenate([dark, bright]))
    name = tmp_path / "all.npz"
    record = record_of(name, "--reference", name, "--num", 40, "--features", network, "--out", out)
    assert record["samples"]["num"] == 40
    assert record["metrics"]["frechet"]["value"] < 0.1 * 100**2  # one class alone: 4 * 100^2


def test_jpeg_samples_are_noted(tmp_path):
    network, out = mean_network(tmp_path), tmp_path / "e.json"
    folder = save_folder(DIGITS[:30], tmp_path / "jpegs", "jpg")
    record = record_of(folder, "--reference", "digits", "--features", network, "--out", out)
    assert any("JPEG" in note for note in record["notes"])
    png = save_folder(DIGITS[:30], tmp_path / "pngs")
    record = record_of(png, "--reference", "digits", "--features", network, "--out", out)
    assert record["notes"] == []


def test_images_that_are_not_samples_of_one_model_are_refused(tmp_path, capsys):
    folder = save_folder(DIGITS[:5], tmp_path / "mixed")
    Image.new("L", (9, 8)).save(tmp_path / "mixed" / "other.png")
    text = failure(capsys, folder, "--reference", "digits")
    assert "have different shapes (8x8 with 1 channel, 9x8 with 1 channel)" in text
    colour = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    text = failure(capsys, save_folder(colour, tmp_path / "rgb"), "--reference", "digits")
    assert "the reference digits has images of 8x8x1" in text and "samples have 8x8x3" in text
    one = save_folder(DIGITS[:6], tmp_path / "one")
    assert "name the real ones with --reference" in failure(capsys, one)
    text = failure(capsys, one, "--reference", "digits", "--steps", "3")
    assert "flags for sampling have no effect" in text
    for num in (0, 3, -1):
        text = failure(capsys, one, "--reference", "digits", "--num", num)
        assert f"--num {num}: a distance needs at least 4 images" in text
    text = failure(capsys, one, "--reference", "digits", "--num", "7")
    assert "has only 6 images" in text


# Features and statistics


def test_features_rank_damage_as_they_should():
    store = own_reference(Data(source="digits", size=8, channels=1), progress=False).store
    features = make_features(Evaluation(pixel_max=16), store, torch.device("cpu"))
    of = functools.partial(features_of, features=features, folder=None)
    real, noise = of(DIGITS), np.random.default_rng(0).integers(0, 256, DIGITS.shape, np.uint8)
    alike = frechet_distance(of(DIGITS[::2]), of(DIGITS[1::2]))
    one_missing = frechet_distance(of(DIGITS[CLASSES != 4]), real)
    half_missing = frechet_distance(of(DIGITS[CLASSES < 5]), real)
    assert alike < 20 < half_missing < frechet_distance(of(noise), real)
    assert one_missing < half_missing


def test_reference_statistics_are_cached(run, monkeypatch, tmp_path):
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    first = record_of(run, "--num", 8)
    kept = sorted((tmp_path / "cache").glob("images-*/features-*/*.np*"))
    assert [path.name for path in kept] == ["00000000-00001797.npy", "statistics.npz"]
    before = [path.stat().st_mtime_ns for path in kept]
    again = record_of(run, "--num", 8)
    assert again["metrics"] == first["metrics"]
    assert [path.stat().st_mtime_ns for path in kept] == before
    record_of(run, "--num", 8, "--features", mean_network(tmp_path))
    assert len(list((tmp_path / "cache").glob("images-*/features-*"))) == 2


def test_statistics_survive_a_round_trip_through_the_fields_format(run, tmp_path, capsys):
    network, npz = mean_network(tmp_path), tmp_path / "digits.npz"
    whole = record_of(run, "--num", 9, "--features", network, "--save-statistics", npz)
    with np.load(npz) as arrays:
        assert arrays["mu"].shape == (4,) and arrays["sigma"].shape == (4, 4)
    again = record_of(run, "--num", 9, "--features", network, "--reference", npz)
    assert set(again["metrics"]) == {"frechet"}
    assert again["metrics"]["frechet"]["value"] == pytest.approx(
        whole["metrics"]["frechet"]["value"]
    )
    assert again["reference"]["fingerprint"] == whole["reference"]["fingerprint"]
    text = failure(
        capsys, run, "--num", 9, "--features", network, "--reference", npz, "--metrics", "kid"
    )
    assert "metric kid needs the reference's images, but only their mean" in text
    text = failure(capsys, run, "--num", 9, "--reference", npz)
    assert "features pca are fitted to the reference's images" in text


def test_foreign_statistics_get_a_note_or_are_refused(run, tmp_path, capsys):
    network = mean_network(tmp_path)
    arguments = [run, "--num", 9, "--features", network, "--reference"]
    foreign = tmp_path / "theirs.npz"
    np.savez(foreign, mu=np.full(4, 80.0), sigma=np.eye(4))
    record = record_of(*arguments, foreign)
    assert any("is unknown" in note for note in record["notes"])
    foreign.rename(tmp_path / "theirs-64x64.npz")
    text = failure(capsys, *arguments, tmp_path / "theirs-64x64.npz")
    assert "of images of 64x64 pixels, but the samples have 8x8 (judged by its name" in text
    with_images = {"arr_0": np.zeros((2, 32, 32, 3), np.uint8)}
    np.savez(foreign, mu=np.zeros(4), sigma=np.eye(4), **with_images)
    assert "of images of 32x32 pixels, but" in failure(capsys, *arguments, foreign)
    np.savez(foreign, mu=np.zeros(5), sigma=np.eye(5))
    text = failure(capsys, *arguments, foreign)
    assert "quarters.pt2 have 4 values, but the statistics in" in text


def test_statistics_of_other_features_are_refused(run, tmp_path, capsys):
    npz = tmp_path / "pca.npz"
    record_of(run, "--num", 9, "--save-statistics", npz)
    text = failure(capsys, run, "--features", mean_network(tmp_path), "--reference", npz)
    assert "are of features pca" in text and "not of" in text


def test_few_samples_get_a_caution(trained, tiny, tmp_path):
    reference = own_reference(tiny.data, progress=False)
    draw = functools.partial(drawn_samples, trained, tiny.sampling, 6, 0, tmp_path)
    record = evaluate([draw], (8, 8, 1), reference, Evaluation(num_components=8)).record
    assert any("6 samples do not determine a covariance of 8" in note for note in record["notes"])


def test_a_reference_of_another_shape_is_refused(tiny, tmp_path):
    reference = own_reference(Data(source="digits", size=16, channels=1), progress=False)
    samples = Samples(DIGITS[:9], tmp_path, {})
    with pytest.raises(ValueError, match="images of 8x8x1, but the reference has 16x16x1"):
        evaluate([lambda: samples], (8, 8, 1), reference, Evaluation())


def test_a_reference_with_small_images_in_one_class_is_refused(tmp_path):
    """Class folders follow one another, and the first of them may hold large images alone."""
    for name, side, count in (("a", 16, 90), ("b", 8, 30)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (side, side), i).save(tmp_path / name / f"{i:03}.png")
    with pytest.raises(ValueError, match="has images of 8x8 pixels, smaller than the samples'"):
        other_reference(str(tmp_path), Data(size=16, channels=1), True, False)


def test_metrics_that_are_not_available_are_refused_before_anything_is_drawn(run, capsys):
    text = failure(capsys, run, "--num", 8, "--metrics", "inception-score")
    assert "metric inception_score needs the classes of the Inception network" in text
    assert not (run / "evaluation").exists()
