"""Measuring while training: held-out images, the dense loss, quality.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import mean_network, tiny_settings
from gaussians import Normal, trained
from PIL import Image
from test_training import Interrupted, assert_same_bits

from maskdm.cli import main
from maskdm.diffusion.schedule import make_schedule
from maskdm.evaluation import features, quick
from maskdm.evaluation.dense_loss import dense_loss
from maskdm.evaluation.overfitting import rise_of_loss
from maskdm.evaluation.quick import QuickLook
from maskdm.images.order import held_out_subset, training_subset
from maskdm.images.store import open_store
from maskdm.models.build import build_model
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Data, Recipe, Sampling
from maskdm.report.sheets import preview_sheet
from maskdm.runs.checkpoint import Progress
from maskdm.runs.find import find_model
from maskdm.runs.lines import read_lines
from maskdm.runs.load import load_model
from maskdm.training import trainer
from maskdm.training.checkups import Checkups, quality_parts
from maskdm.training.step import draw_batch
from maskdm.training.trainer import train

PREDICTIONS = ("eps", "x0", "v", "flow")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The tiny recipe on 60 digits, 7 of them held out; measured every 4 steps by 8 images."""
    settings, source = tiny_settings(), tmp_path_factory.mktemp("digits") / "digits.npz"
    digits = open_store(Recipe(**settings).data, progress=False)
    np.savez(source, digits.images[:60], digits.labels[:60])
    settings["data"] |= {"source": str(source), "held_out": 7}
    settings["evaluation"] |= {"quick_num": 8}
    settings |= {"evaluate_every": 4, "num_previews": 0, "preview_steps": 4}
    return Recipe(**settings)


@pytest.fixture(scope="module")
def unbroken(measured: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    run(measured, folder)
    return folder


def run(recipe: Recipe, run_dir: Path) -> None:
    """Trains, without the export at the end, which takes half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkups, "finish", lambda *arguments: None)
        train(recipe, run_dir, show=False)


def quality(run_dir: Path) -> list[dict]:
    lines = read_lines(run_dir / "quality.jsonl")
    return [{k: v for k, v in line.items() if k != "elapsed_sec"} for line in lines]


# Images kept out of training


def test_held_out_images_are_the_same_for_any_part_and_never_in_it():
    def parts(**settings) -> tuple[set[int], set[int]]:
        data = Data(**{"held_out": 50, **settings})
        return set(training_subset(1000, data)), set(held_out_subset(1000, data))

    everything, held_out = parts()
    assert len(held_out) == 50 and everything == set(range(1000)) - held_out
    for settings in ({"fraction": 0.97}, {"fraction": 0.1}, {"limit": 20}, {"limit": 960}):
        part, others = parts(**settings)
        assert others == held_out and part <= everything
    assert len(parts(fraction=0.97)[0]) == 950 and len(parts(fraction=0.1)[0]) == 100
    assert parts(limit=20)[0] <= parts(fraction=0.1)[0] <= parts(fraction=0.5)[0]
    assert parts(held_out=60)[1] > held_out
    assert parts(subset_seed=1)[1] != held_out
    indices = held_out_subset(1000, Data(held_out=50))
    assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()


def test_a_part_may_be_held_out_of_sets_of_any_size():
    for num, expected in ((1000, 20), (30, 1), (20, 0), (7, 0)):
        chosen = held_out_subset(num, Data(held_out=0.02))
        assert len(chosen) == expected
        assert len(training_subset(num, Data(held_out=0.02))) == num - expected
    with pytest.raises(
        ValueError, match="held_out: expected a number of images or a part .*not 1.5"
    ):
        Data(held_out=1.5)


def test_small_sets_are_measured_as_far_as_they_go(measured, tmp_path):
    """The packaged recipes must train on a handful of images too."""
    evaluation = {**measured.evaluation.model_dump(), "num_components": 32}
    for num, has_distance in ((25, True), (19, False)):
        np.savez(tmp_path / f"{num}.npz", np.random.default_rng(0).integers(
            0, 256, (num, 8, 8, 1), dtype=np.uint8
        ))  # fmt: skip
        data = {**measured.data.model_dump(), "source": str(tmp_path / f"{num}.npz")}
        recipe = Recipe(**{**measured.model_dump(), "data": data, "evaluation": evaluation})
        run(recipe, tmp_path / str(num))
        for line in read_lines(tmp_path / str(num) / "quality.jsonl"):
            assert ("sliced" in line) == has_distance and line["dense_loss"] > 0


def test_where_nothing_is_held_out_parts_are_as_they_were():
    assert held_out_subset(1000, Data()).tolist() == []
    for settings in ({}, {"fraction": 0.1}, {"limit": 10}):
        plain = training_subset(1000, Data(**settings))
        if settings:  # small parts don't reach the end of the order, where images are held out
            assert np.array_equal(plain, training_subset(1000, Data(**settings, held_out=100)))
        else:
            assert np.array_equal(plain, np.arange(1000))


def test_at_least_one_image_is_left_to_train_on(changed, tiny, tmp_path):
    assert len(training_subset(10, Data(held_out=9))) == 1
    recipe = changed(data={**tiny.data.model_dump(), "held_out": 1797})
    with pytest.raises(ValueError, match="held_out 1797 leaves none of 1797 images.*use 1796 or"):
        train(recipe, tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


def test_held_out_images_are_never_trained_on_and_the_run_says_so(
    measured, tmp_path, monkeypatch, capsys
):
    data = {**measured.data.model_dump(), "held_out": 53}
    recipe = Recipe(**{**measured.model_dump(), "data": data})
    images = np.asarray(open_store(recipe.data, progress=False).images)
    seen: set[bytes] = set()

    def watched(images, *arguments):
        seen.update(image.numpy().tobytes() for image in images)
        return draw_batch(images, *arguments)

    monkeypatch.setattr(trainer, "draw_batch", watched)
    recipe = Recipe(**{**recipe.model_dump(), "evaluate_every": 0})
    train(recipe, tmp_path / "run")
    assert seen == {image.tobytes() for image in images[training_subset(60, recipe.data)]}
    assert len(seen) == 7
    text = capsys.readouterr().out
    assert "7 of 60 images" in text and ", 53 held out" in text
    assert "note: 88 % of the images are held out: lower data.held_out" in text


# The dense loss


class Narrow(Normal):
    """Normal values that stay between black and white."""

    mean, std = 0.1, 0.2


def by(num: int) -> Sampling:
    """So many images at a time."""
    return Sampling(batch_size=num)


def normal_images(num: int, size: int = 16) -> np.ndarray:
    values = np.random.default_rng(0).normal(Narrow.mean, Narrow.std, (num, size, size, 1))
    return np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("schedule", ["cosine", "vp-sde", "flow"])
def test_the_best_denoiser_of_normal_images_loses_its_posterior_variance(schedule):
    """The oracle: min(SNR, 1) s^2 sigma^2 / (alpha^2 s^2 + sigma^2), averaged over each bucket."""
    model = trained(Narrow, 16, schedule=schedule, prediction="v", weighting={"kind": "p2"})
    losses = dense_loss(model, normal_images(64), None, by(64))
    t = (torch.arange(10_000).double() + 0.5) / 10_000
    noise_to_signal = (-make_schedule(schedule).log_snr(t)).exp()
    variance = Narrow.std**2 * noise_to_signal / (Narrow.std**2 + noise_to_signal)
    expected = (variance / noise_to_signal.clamp(min=1)).view(10, 1000).mean(1)
    np.testing.assert_allclose(losses, expected, rtol=0.05, atol=2e-5)


def test_the_dense_loss_is_the_same_whatever_was_predicted_and_weighed():
    images, losses = normal_images(20, 4), []
    for prediction in PREDICTIONS:
        for more in ({}, {"weighting": {"kind": "sigmoid"}}, {"loss_space": "x0"}):
            model = trained(Narrow, 4, schedule="cosine", prediction=prediction, **more)
            losses.append(dense_loss(model, images, None, by(20)))
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=2e-3)


def test_the_dense_loss_depends_on_images_and_weights_alone(tiny):
    model = TrainedModel(build_model(tiny).eval(), tiny.diffusion)
    images = np.asarray(open_store(tiny.data, progress=False).images[:30])
    torch.manual_seed(1)
    whole = dense_loss(model, images, None, by(30))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert np.array_equal(whole, dense_loss(model, images, None, by(30)))
    assert torch.equal(torch.get_rng_state(), state)
    for batch_size in (1, 7):
        np.testing.assert_allclose(
            dense_loss(model, images, None, by(batch_size)), whole, rtol=1e-5
        )
    assert whole.shape == (10,) and whole.dtype == np.float64
    assert not np.allclose(dense_loss(model, images[1:], None, by(30)), whole, rtol=1e-5)


def test_the_dense_loss_sees_every_time_once_all_patches_and_other_noise_each_time(tiny):
    model = build_model(tiny).eval()
    noised, times, seen = [], [], []

    def watch(module, arguments):
        noised.append(arguments[0].flatten(1))
        times.append(arguments[2])
        seen.append(arguments[1])

    model.register_forward_pre_hook(watch)
    dense_loss(
        TrainedModel(model, tiny.diffusion), np.zeros((100, 8, 8, 1), np.uint8), None, by(40)
    )
    indices = (torch.cat(times).sort().values * 999).round()
    assert torch.equal(indices, torch.arange(1000.0))  # ten times for each of a hundred images
    assert all(torch.equal(positions, torch.arange(16).expand_as(positions)) for positions in seen)
    schedule, t = make_schedule("cosine"), torch.cat(times)[:, None]
    noise = (torch.cat(noised) + schedule.alpha(t)) / schedule.sigma(t)  # (1000, 64); x0 is -1
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    alike = noise @ noise.T / 64 - torch.eye(1000) * noise.square().mean(1)
    assert alike.abs().max() < 0.8


# In training


def test_set_points_leave_lines_of_all_that_was_measured(unbroken):
    lines = read_lines(unbroken / "quality.jsonl")
    assert [(line["step"], line["stage"]) for line in lines] == [
        (4, "hide"), (6, "hide"), (8, "show"), (11, "show"),
    ]  # fmt: skip
    by_step = {line["step"]: line for line in read_lines(unbroken / "metrics.jsonl")}
    for line in lines:
        for name in ("images", "flops", "elapsed_sec", "hidden"):
            assert line[name] == by_step[line["step"]][name], name
        assert len(line["dense_loss_by_time"]) == 10
        assert line["dense_loss"] == pytest.approx(np.mean(line["dense_loss_by_time"]))
        assert line["dense_loss"] == pytest.approx(line["dense_loss_train"], rel=0.5)
        assert line["sliced"] > 0 and "kid" not in line  # not of pixels
        assert line["num"] == 8 and line["features"] == "pca"
        assert line["dense_loss_num"] == 7
        assert len(line["features_sha256"]) == 64
    # Checkpoints are at set points too (4, 8), the last two of all and stages' ends are kept.
    names = sorted(path.name[-2:] for path in (unbroken / "checkpoints").glob("step-*"))
    # So is the one that was best when the last one was saved, just before it was measured.
    best = min(quality(unbroken)[:-1], key=lambda line: line["dense_loss"])["step"]
    assert names == sorted({"06", "09", "11", f"{best:02d}"})


def test_in_a_networks_features_the_kernel_distance_is_measured_too(measured, tmp_path):
    evaluation = {**measured.evaluation.model_dump(), "features": mean_network(tmp_path)}
    run(Recipe(**{**measured.model_dump(), "evaluation": evaluation}), tmp_path / "run")
    for line in read_lines(tmp_path / "run" / "quality.jsonl"):
        assert line["kid_error"] > 0 and line["features"].endswith("quarters.pt2")


def test_measuring_changes_no_bit_of_the_training(measured, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(measured, tmp_path / "measured")
    assert torch.equal(torch.rand(3), expected)
    run(Recipe(**{**measured.model_dump(), "evaluate_every": 0}), tmp_path / "plain")
    assert_same_bits(tmp_path / "measured", tmp_path / "plain")
    assert not (tmp_path / "plain" / "quality.jsonl").exists()


def test_making_networks_leaves_the_callers_random_numbers_alone(measured, tmp_path, monkeypatch):
    def make_features(*arguments):
        torch.rand(5)  # as networks do, whose weights are loaded afterwards
        return features.make_features(*arguments)

    monkeypatch.setattr(quick, "make_features", make_features)
    state = torch.get_rng_state()
    QuickLook(measured, open_store(measured.data, progress=False), measured.for_previews)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("step", [3, 4, 5, 6, 10])  # before and after lines; in both stages
def test_a_resumed_run_measures_what_an_unbroken_one_does(measured, unbroken, tmp_path, step):
    broken, look = tmp_path / "broken", Checkups.look

    def look_and_die(self: Checkups, progress: Progress, *others: object) -> None:
        look(self, progress, *others)
        if progress.step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Checkups, "look", look_and_die)
        run(measured, broken)
    with (broken / "quality.jsonl").open("a") as file:  # of steps after the last checkpoint
        file.write(json.dumps({"step": step + 1, "stage": "lost"}) + '\n{"step": ')
    run(measured, broken)
    assert quality(broken) == quality(unbroken)
    assert_same_bits(broken, unbroken)


@pytest.mark.parametrize("num_before", [0, 1, 2, 3])  # mid-stage and at the end, in both stages
def test_a_kill_between_saving_and_measuring_is_caught_up(measured, unbroken, tmp_path, num_before):
    calls: list[int] = []
    look = QuickLook.__call__

    def measure_or_die(self: QuickLook, model: TrainedModel, progress: bool) -> dict:
        if len(calls) == num_before:
            raise Interrupted
        calls.append(1)
        return look(self, model)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(QuickLook, "__call__", measure_or_die)
        run(measured, tmp_path / "broken")
    assert quality(tmp_path / "broken") == quality(unbroken)[:num_before]
    saved = (tmp_path / "broken" / "checkpoints" / "latest").read_text().strip()
    assert saved == f"step-{(4, 6, 8, 11)[num_before]:08d}"  # before it was measured
    run(measured, tmp_path / "broken")
    assert quality(tmp_path / "broken") == quality(unbroken)
    assert_same_bits(tmp_path / "broken", unbroken)
    before = (tmp_path / "broken" / "quality.jsonl").read_bytes()
    run(measured, tmp_path / "broken")  # finished: nothing is measured twice
    assert (tmp_path / "broken" / "quality.jsonl").read_bytes() == before


def test_only_losses_are_measured_where_no_images_are_drawn(measured, changed, tmp_path):
    recipe = Recipe(
        **{
            **measured.model_dump(),
            "data": {**measured.data.model_dump(), "held_out": 0},
            "evaluation": {"quick_num": 0, "num_components": 64},  # no features are needed
            "evaluate_every": 100,
        }
    )
    run(recipe, tmp_path / "losses")
    first, last = quality(tmp_path / "losses")  # the stages' ends
    assert (first["step"], last["step"]) == (6, 11)
    assert "sliced" not in last and "num" not in last and "dense_loss" not in last
    assert last["dense_loss_train"] == pytest.approx(np.mean(last["dense_loss_by_time"]))
    assert last["dense_loss_train"] < first["dense_loss_train"]
    never = Recipe(**{**recipe.model_dump(), "evaluate_every": 0})
    run(never, tmp_path / "never")
    assert not (tmp_path / "never" / "quality.jsonl").exists()


def test_the_network_gets_the_images_classes(measured, tmp_path):
    recipe = Recipe(
        **{**measured.model_dump(), "model": {**measured.model.model_dump(), "num_classes": 10}}
    )
    store, labels = open_store(recipe.data, progress=False), []
    model = build_model(recipe, store.manifest["class_names"]).eval()
    look = QuickLook(recipe, store, recipe.for_previews)
    model.register_forward_pre_hook(lambda module, arguments: labels.append(arguments[3]))
    look(TrainedModel(model, recipe.diffusion))
    held_out = store.labels[held_out_subset(60, recipe.data)]
    after = 10 * 7  # ten buckets of seven batches, of the 53 images trained on
    assert sorted(labels[after].tolist()) == sorted(held_out.tolist())
    # Samples are drawn with the classes of the 60 images, of which there are not six each.
    num, steps = recipe.evaluation.num_in_training, recipe.for_previews.steps
    drawn = torch.cat(labels[-steps * -(-num // recipe.for_previews.batch_size) :])
    shares = np.bincount(store.labels) / 60
    assert np.abs(np.bincount(drawn, minlength=10) / steps - num * shares).max() <= 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_unavailable_features_are_refused_before_anything_is_written(measured, tmp_path):
    def refusal(**changes) -> str:
        recipe = Recipe(**{**measured.model_dump(), **changes})
        with pytest.raises(ValueError) as caught:
            run(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    missing = str(tmp_path / "nowhere.pt")
    text = refusal(evaluation={"features": "inception", "weights": missing})
    assert f"{missing}: no such file" in text
    assert "evaluation.quick_num 0 leaves them out" in text
    network = tmp_path / "three.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 1))).save(network)
    assert "does not accept uint8 1x8x8" in refusal(evaluation={"features": str(network)})


def test_too_few_quick_images_are_refused():
    with pytest.raises(ValueError, match="quick_num: 3 images are too few.*use 0, or 4 or more"):
        Recipe(**{**tiny_settings(), "evaluation": {"quick_num": 3}})


# What people see


def test_the_command_measures_reports_it_and_writes_it_below_the_preview(tmp_path, capsys):
    settings = {**tiny_settings(), "evaluate_every": 100, "num_previews": 9}
    settings["evaluation"] = {"num_components": 4, "quick_num": 8}
    settings["data"] = {**settings["data"], "held_out": 5}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "tiny.yaml"), "--out", str(run)]) == 0
    text = capsys.readouterr().out
    lines = quality(run)
    assert [line["step"] for line in lines] == [6, 11]
    for line in lines:
        assert text.count(f"  step {line['step']}: {', '.join(quality_parts(line))}; took 0:") == 1
    last = run / "samples" / "step-00000011.png"
    with Image.open(last) as image:
        content = np.asarray(image)
    assert (content[:4] == 232).all() and (content[4 + 3 * 68 - 4 : 4 + 3 * 68] == 232).all()
    assert (content[4:68, 4:68].std() > 0) and (content[4 + 3 * 68 :] < 60).any()  # tile, text
    before = last.read_bytes()
    last.unlink()
    assert main(["train", str(tmp_path / "tiny.yaml"), "--out", str(run)]) == 0
    assert last.read_bytes() == before  # with what had been measured before


@pytest.mark.parametrize("channels", [1, 3])
def test_previews_are_shown_pixel_by_pixel_with_texts_below(channels):
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, channels), dtype=np.uint8)
    plain = preview_sheet(images, "a", [])
    assert plain.width == 4 + 2 * 68
    for i, (top, left) in enumerate([(4, 4), (4, 72), (72, 4), (72, 72)]):
        tile = np.asarray(plain)[top : top + 64, left : left + 64]
        assert np.array_equal(tile, np.broadcast_to(images[i], tile.shape))
    wrapped = preview_sheet(images, "a", ["b" * 10, "c" * 10])
    assert wrapped.width == plain.width and wrapped.height > plain.height
    assert preview_sheet(images, "a", ["d" * 100]).width > plain.width


def test_figures_have_two_digits_of_their_errors():
    measured = {
        "dense_loss_train": 0.0489, "dense_loss": 0.05037, "sliced": 9.321, "sliced_error": 1.23,
        "kid": 1234.5, "kid_error": 56.7,
    }  # fmt: skip
    assert quality_parts(measured) == [
        "sliced 9.3 +- 1.2", "KID 1,234 +- 57", "dense loss 0.05037 (train 0.0489)",
    ]  # fmt: skip
    few = {"dense_loss_train": 0.0489, "sliced": 9.321, "sliced_error": None}
    assert quality_parts(few) == ["sliced 9.321", "dense loss 0.0489 on training images"]


def line_of(step: int, held_out: float, train: float, stage: str = "show") -> dict:
    return {"step": step, "stage": stage, "dense_loss": held_out, "dense_loss_train": train}


def test_a_held_out_loss_that_rises_while_training_gains_is_pointed_out():
    gaining = [line_of(5, 0.5, 0.5), line_of(10, 0.4, 0.39)]
    assert rise_of_loss(gaining) is None and rise_of_loss(gaining[:1]) is None
    text = rise_of_loss([*gaining, line_of(15, 0.42, 0.3)])
    assert text is not None and "from 0.4 at step 10 to 0.42" in text and "memorise" in text
    assert rise_of_loss([*gaining, line_of(15, 0.42, 0.41)]) is None
    assert rise_of_loss([*gaining, line_of(15, 0.404, 0.3)]) is None  # within the noise
    assert rise_of_loss([*gaining, line_of(15, 0.6, 0.3, "next")]) is None  # not comparable


def test_best_names_the_average_with_the_lowest_held_out_loss_and_keeps_it(
    measured, tmp_path, monkeypatch
):
    """Each measurement is made to say what is wanted; the middle one is the lowest."""
    wanted = iter([0.5, 0.3, 0.4, 0.45, 0.46, 0.47, 0.48])

    def measure(self: QuickLook, model: TrainedModel, progress: bool) -> dict:
        return {"dense_loss": next(wanted), "dense_loss_train": 0.1}

    monkeypatch.setattr(QuickLook, "__call__", measure)
    run_dir = tmp_path / "run"
    train(measured.model_copy(update={"keep_checkpoints": 1}), run_dir, show=False)
    lines = read_lines(run_dir / "quality.jsonl")
    best = find_model(f"{run_dir}@best").folder
    assert best.name == f"step-{lines[1]['step']:08d}"
    assert load_model(f"{run_dir}@best").location.folder == best
    with (run_dir / "quality.jsonl").open("a") as file:  # killed before its checkpoint was there
        file.write(json.dumps({**lines[1], "step": 10_000, "dense_loss": 0.1}) + "\n")
        file.write(json.dumps({"dense_loss": 0.1}) + "\n")  # damaged
    assert find_model(f"{run_dir}@best").folder == best


def test_best_needs_images_that_were_held_out(tiny, tmp_path):
    train(tiny, tmp_path / "run", show=False)
    with pytest.raises(ValueError, match="no held-out loss that would name the best"):
        find_model(f"{tmp_path / 'run'}@best")
