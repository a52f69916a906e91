from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import make_schedule
from maskdm.engine import choose_precision
from maskdm.images.order import ImageOrder
from maskdm.images.store import open_store
from maskdm.masks import num_visible
from maskdm.models.build import build_model
from maskdm.recipe import Recipe, Stage
from maskdm.recipe_files import load_recipe
from maskdm.runs import checkpoint as checkpoints
from maskdm.runs.checkpoint import FILES, Progress, prune_checkpoints
from maskdm.runs.find import find_checkpoint
from maskdm.runs.lines import read_lines
from maskdm.training import stop
from maskdm.training.checkups import Checkups
from maskdm.training.ema import make_average, restart_average, update_average
from maskdm.training.optim import learning_rate
from maskdm.training.step import draw_batch
from maskdm.training.tick import NonFiniteLoss
from maskdm.training.trainer import TrainResult, train

TIMING = ("images_per_sec", "data_wait", "elapsed_sec")  # what no two runs share


def quiet(recipe: Recipe, run_dir: Path, **options) -> TrainResult:
    return train(recipe, run_dir, show=False, **options)


def metrics(run_dir: Path) -> list[dict]:
    lines = read_lines(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    return {f"{file}:{k}": v for file in FILES for k, v in load_file(folder / file).items()}


def assert_same_bits(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Interrupted(Exception):
    pass


def train_until(recipe: Recipe, run_dir: Path, step: int, **options) -> None:
    """Trains until a step is done and dies there, as a kill would."""

    def die(self: Checkups, progress: Progress, *others: object) -> None:
        if progress.step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Checkups, "look", die)
        quiet(recipe, run_dir, **options)


def test_both_stages_run_and_leave_what_they_should(tiny, tmp_path):
    result = quiet(tiny, tmp_path)
    assert result.finished
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 11]
    assert [line["stage"] for line in lines] == 3 * ["hide"] + 3 * ["show"]
    assert [line["hidden"] for line in lines] == 3 * [0.5] + 3 * [0.0]
    assert lines[-1]["images"] == 11 * 8
    flops = [3 * build_model(tiny).forward_flops(visible) * 8 for visible in (8, 16)]
    assert lines[2]["flops"] == 6 * flops[0]
    assert lines[-1]["flops"] == 6 * flops[0] + 5 * flops[1]
    assert load_recipe(tmp_path / "recipe.yaml") == tiny
    start = json.loads((tmp_path / "environment.json").read_text())[0]
    assert start["packages"]["torch"] == torch.__version__.split("+")[0]
    # checkpoint_every 3, keep 2: steps 9 and 11 (the last two) and 6 (the first stage's end)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000006", "step-00000009", "step-00000011"]


def test_files_have_the_usual_mode(tiny, tmp_path):
    """safetensors makes files that only their owner can read."""
    previous = os.umask(0o027)
    try:
        quiet(tiny, tmp_path / "run")
    finally:
        os.umask(previous)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"model.safetensors", "diffusion_pytorch_model.safetensors"} <= {f.name for f in files}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_the_loss_falls(changed, tmp_path):
    stage = {"steps": 60, "batch_size": 32, "lr": 3e-3, "warmup": 5}
    stages = [{"name": "a", "mask": {"kind": "patch", "rate": 0.5}, **stage}]
    quiet(changed(stages=stages, log_every=10), tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("step", [2, 5, 6, 7, 10])  # before any checkpoint; in both stages
def test_a_killed_and_resumed_run_repeats_an_unbroken_one_bit_for_bit(tiny, tmp_path, step):
    train_until(tiny, tmp_path / "broken", step)
    assert quiet(tiny, tmp_path / "broken").finished
    quiet(tiny, tmp_path / "unbroken")
    assert_same_bits(tmp_path / "broken", tmp_path / "unbroken")


def test_resume_repeats_stratified_times_and_hidden_labels_too(tiny, changed, tmp_path):
    recipe = changed(
        model={**tiny.model.model_dump(), "num_classes": 10},
        diffusion={"schedule": "flow", "prediction": "v", "times": {"kind": "stratified"}},
        data={**tiny.data.model_dump(), "flip": True, "fraction": 0.02},
    )
    train_until(recipe, tmp_path / "broken", 7)
    for name in ("broken", "unbroken"):
        quiet(recipe, tmp_path / name)
    assert_same_bits(tmp_path / "broken", tmp_path / "unbroken")


def test_resume_keeps_each_stages_own_optimizer_settings(tiny, changed, tmp_path):
    stages = [stage.model_dump() for stage in tiny.stages]
    stages[1] |= {"betas": (0.5, 0.8), "weight_decay": 0.5}
    recipe = changed(stages=stages)
    train_until(recipe, tmp_path / "broken", 10)
    for name in ("broken", "unbroken"):
        quiet(recipe, tmp_path / name)
    assert_same_bits(tmp_path / "broken", tmp_path / "unbroken")


@pytest.mark.parametrize("kind", ["uvit", "vit"])
def test_resume_repeats_muon_and_patches_that_pass_by_the_middle(tiny, changed, tmp_path, kind):
    stages = [{**stage.model_dump(), "optimizer": "muon"} for stage in tiny.stages]
    stages[0]["mask"]["where"] = "middle"
    recipe = changed(stages=stages, model={**tiny.model.model_dump(), "kind": kind})
    train_until(recipe, tmp_path / "broken", 5)
    for name in ("broken", "unbroken"):
        quiet(recipe, tmp_path / name)
    assert_same_bits(tmp_path / "broken", tmp_path / "unbroken")
    model = build_model(recipe)
    lines = metrics(tmp_path / "unbroken")
    assert lines[2]["flops"] == 6 * 3 * 8 * model.forward_flops(16, 8)
    assert lines[-1]["flops"] == lines[2]["flops"] + 5 * 3 * 8 * model.forward_flops(16)


def test_a_network_without_a_middle_refuses_to_route(tiny):
    stages = [
        {**tiny.stages[0].model_dump(), "mask": {"kind": "patch", "rate": 0.5, "where": "middle"}}
    ]
    with pytest.raises(ValueError, match="where middle is for model.kind uvit or vit, not dit"):
        Recipe(**{**tiny.model_dump(), "stages": stages, "model": {"kind": "dit", "patch_size": 2}})
    flat = {**tiny.model.model_dump(), "kind": "vit", "depth": 2}
    with pytest.raises(ValueError, match="where middle needs .* model.depth 3 at least, not 2"):
        Recipe(**{**tiny.model_dump(), "stages": stages, "model": flat})


def test_a_later_ctrl_c_acts_as_usual_and_sigterm_may_come_again(monkeypatch):
    monkeypatch.setattr(stop, "SAME_REQUEST_SEC", 0.05)
    with stop.StopRequest() as request:
        assert not request.is_set
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert request.is_set
        time.sleep(0.1)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_saves_and_the_next_call_continues_to_the_same_bits(tiny, tmp_path):
    def press_ctrl_c(self: Checkups, progress: Progress, *others: object) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkups, "look", press_ctrl_c)
        result = quiet(tiny, tmp_path / "broken")
    assert not result.finished and result.checkpoint.name == "step-00000005"
    assert quiet(tiny, tmp_path / "broken").finished
    quiet(tiny, tmp_path / "unbroken")
    assert_same_bits(tmp_path / "broken", tmp_path / "unbroken")


def test_calling_again_on_a_finished_run_changes_nothing(tiny, tmp_path):
    first = quiet(tiny, tmp_path)
    before = state(tmp_path)
    again = quiet(tiny, tmp_path)
    assert again.finished and again.checkpoint == first.checkpoint
    assert all(torch.equal(before[name], value) for name, value in state(tmp_path).items())
    for one, other in zip(first.ema.parameters(), again.ema.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_equals_plain_torch_with_the_same_random_numbers(tiny, tmp_path):
    """The whole loop against a few lines that share only the draws and the loss."""
    quiet(tiny, tmp_path)
    store = open_store(tiny.data, progress=False)
    order, schedule = ImageOrder(len(store), tiny.seed), make_schedule("cosine")
    model, step, images_seen, losses = build_model(tiny), 0, 0, []
    for stage in tiny.stages:
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=stage.betas, weight_decay=stage.weight_decay
        )
        ema = {name: value.clone() for name, value in model.state_dict().items()}
        for i in range(stage.steps):
            images = torch.from_numpy(store.images[order.indices(images_seen, 8)])
            b = draw_batch(images, None, tiny, stage, schedule, step)
            loss = masked_denoising_loss(
                model, b.x0, b.visible, b.t, b.noise, schedule, tiny.diffusion
            )
            losses.append(loss.mean().item())
            optimizer.zero_grad()
            loss.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (i + 1) / 3)
            optimizer.step()
            for name, value in model.state_dict().items():
                ema[name] = stage.ema.decay * ema[name] + (1 - stage.ema.decay) * value
            step, images_seen = step + 1, images_seen + 8
    ticks = [losses[i : i + 2] for i in range(0, len(losses), 2)]  # log_every 2
    logged = [line["loss"] for line in metrics(tmp_path)]
    np.testing.assert_allclose(logged, [np.mean(tick) for tick in ticks], rtol=1e-4)
    actual = state(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(actual[f"model.safetensors:{name}"], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            actual[f"ema.safetensors:{name}"], ema[name], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_micro_batches_add_up_to_the_same_step(tiny, changed, tmp_path, micro_batch_size):
    def run(name: str, **changes) -> dict[str, torch.Tensor]:
        stages = [{**stage.model_dump(), **changes} for stage in tiny.stages]
        quiet(changed(stages=stages), tmp_path / name)
        return state(tmp_path / name)

    whole, parts = run("whole"), run("parts", micro_batch_size=micro_batch_size)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5)


def test_without_clipping_the_norm_is_told_and_the_gradient_left_alone(tiny, changed, tmp_path):
    lines = {}
    for clip in (None, 1e9, 1e-3):
        stages = [{**stage.model_dump(), "clip": clip} for stage in tiny.stages]
        quiet(changed(stages=stages, log_every=1), tmp_path / str(clip))
        told = metrics(tmp_path / str(clip))
        lines[clip] = [(line["loss"], line["grad_norm"]) for line in told]
    assert lines[None] == lines[1e9] != lines[1e-3]
    assert lines[None][0][1] == lines[1e-3][0][1] > 1e-3  # before clipping


def test_a_mask_of_rate_zero_is_the_unmasked_step(tiny, changed, tmp_path):
    for kind in ("none", "block"):
        stages = [{**tiny.stages[1].model_dump(), "mask": {"kind": kind, "rate": 0.0}}]
        quiet(changed(stages=stages), tmp_path / kind)
    none, block = state(tmp_path / "none"), state(tmp_path / "block")
    assert all(torch.equal(none[name], block[name]) for name in none)


def test_hidden_pixels_change_nothing_at_the_visible_patches(tiny):
    model, schedule = build_model(tiny), make_schedule("cosine")
    images = torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8)

    def outcome(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        b = draw_batch(images, None, tiny, tiny.stages[0], schedule, step=0)
        x_t = schedule.alpha(b.t)[:, None, None] * b.x0 + b.noise
        return b.visible, model(x_t, b.visible, b.t), b.x0

    visible, output, x0 = outcome(images)
    shown = torch.zeros(4, 16).scatter(1, visible, 1.0).bool()
    mask = shown.view(4, 4, 1, 4, 1).expand(4, 4, 2, 4, 2).reshape(4, 8, 8, 1)
    _, other_output, other_x0 = outcome(torch.where(mask, images, 255 - images))
    assert torch.equal(output, other_output) and torch.equal(x0, other_x0)
    assert not torch.equal(outcome(255 - images)[2], x0)


def test_a_batch_holds_the_visible_pixels_from_minus_one_to_one(tiny):
    images = torch.arange(256, dtype=torch.uint8).view(4, 8, 8, 1)
    b = draw_batch(images, None, tiny, tiny.stages[0], make_schedule("cosine"), step=0)
    first = b.visible[3, 0]
    pixels = images[3, 2 * (first // 4) :, 2 * (first % 4) :][:2, :2].flatten()
    torch.testing.assert_close(b.x0[3, 0], pixels * (2 / 255) - 1)
    assert b.noise.shape == b.x0.shape == (4, 8, 4) and b.t.shape == (4,)


def test_mirroring_turns_about_half_of_the_images(tiny, changed):
    images = torch.arange(8, dtype=torch.uint8).view(1, 1, 8, 1).expand(200, 8, 8, 1)
    recipe = changed(data={**tiny.data.model_dump(), "flip": True})
    batch = draw_batch(images, None, recipe, tiny.stages[1], make_schedule("cosine"), step=0)
    mirrored = batch.x0[:, 0, 0] > batch.x0[:, 0, 1]
    assert 70 < mirrored.sum() < 130


def test_the_average_follows_its_recursion_exactly():
    weight = torch.nn.Linear(1, 1, bias=False).double()
    average = make_average(weight)
    with torch.no_grad():
        weight.weight.fill_(1.0)
        restart_average(average, weight)
        for value in (2.0, 3.0):
            weight.weight.fill_(value)
            update_average(average, weight, decay=0.9)
    assert average.weight.item() == pytest.approx(0.81 * 1 + 0.1 * (0.9 * 2 + 3), abs=1e-12)


def test_a_stage_starts_from_raw_or_averaged_weights(tiny, changed, tmp_path):
    first = tiny.stages[0].model_dump()
    finals = {}
    for start_from in ("raw", "ema"):
        second = {**tiny.stages[1].model_dump(), "start_from": start_from, "ema": {"decay": 0.0}}
        second |= {"steps": 1, "warmup": 0, "lr": 1e-12, "weight_decay": 0.0}
        quiet(changed(stages=[first, second]), tmp_path / start_from)
        end = tmp_path / start_from / "checkpoints" / "step-00000006"
        source = {"raw": "model.safetensors", "ema": "ema.safetensors"}[start_from]
        finals[start_from] = state(tmp_path / start_from)
        for name, value in load_file(end / source).items():
            torch.testing.assert_close(finals[start_from][f"model.safetensors:{name}"], value)
    name = "model.safetensors:head.weight"
    assert not torch.allclose(finals["raw"][name], finals["ema"][name])


def test_the_learning_rate_warms_up_then_stays_or_decays():
    settings = dict(name="a", batch_size=1, lr=0.5, steps=100, warmup=9)
    constant, cosine = Stage(**settings), Stage(**settings, lr_schedule="cosine")
    for stage in (constant, cosine):
        rates = [learning_rate(stage, step) for step in range(10)]
        np.testing.assert_allclose(rates, 0.05 * np.arange(1, 11))
    assert learning_rate(constant, 99) == 0.5
    assert learning_rate(cosine, 9 + 91 // 2) == pytest.approx(0.25, abs=0.01)
    assert 0 < learning_rate(cosine, 99) < 0.001


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tiny, changed, tmp_path):
    stages = [stage.model_dump() for stage in tiny.stages]
    stages[1] |= {"lr": 1e30, "warmup": 0, "clip": None}
    recipe = changed(stages=stages, log_every=1)
    with pytest.raises(NonFiniteLoss, match=r"at step \d+; .*step-00000006; try a lower lr.*clip"):
        quiet(recipe, tmp_path)
    saved = state(tmp_path)
    assert all(value.isfinite().all() for value in saved.values())
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path))


def test_a_run_of_another_recipe_is_refused_and_left_alone(tiny, changed, tmp_path):
    quiet(tiny, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"another recipe \(seed: 0 -> 7\)"):
        quiet(changed(seed=7), tmp_path)
    with pytest.raises(ValueError, match="already holds a run: name a new folder"):
        quiet(tiny, tmp_path, resume="never")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_is_not_continued_on_other_images(tiny, changed, tmp_path, image_folder):
    recipe = changed(data={"source": str(image_folder), "size": 8, "channels": 1})
    train_until(recipe, tmp_path / "run", 5)
    (image_folder / "cat" / "b.png").unlink()
    with pytest.raises(ValueError, match="are not those that the run"):
        quiet(recipe, tmp_path / "run")


def test_what_cannot_work_is_refused_before_anything_is_written(tiny, changed, tmp_path):
    stages = [
        {**stage.model_dump(), "mask": {"kind": "patch", "rate": 0.99}} for stage in tiny.stages
    ]
    model = {**tiny.model.model_dump(), "num_classes": 3}
    for recipe, message in [
        (changed(stages=stages), "nearest possible"),
        (changed(data={**tiny.data.model_dump(), "source": "nowhere"}), "does not exist"),
        (changed(model=model), "num_classes is 3, but digits has 10 classes: use 10"),
        (changed(precision="fp16"), "fp16 needs a CUDA device"),
    ]:
        with pytest.raises(ValueError, match=message):
            quiet(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_half_written_checkpoints_are_passed_over_with_a_note(tiny, tmp_path):
    quiet(tiny, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "writing-step-00000099").mkdir()
    cut = folder / "step-00000011" / "ema.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (folder / "step-00000009" / "progress.json").unlink()
    notes: list[str] = []
    assert find_checkpoint(folder, notes.append) == folder / "step-00000006"
    assert [note.split(":")[0] for note in notes] == [
        "ignored writing-step-00000099",
        "ignored checkpoint step-00000011",
        "ignored checkpoint step-00000009",
    ]
    assert quiet(tiny, tmp_path).finished
    quiet(tiny, tmp_path / "unbroken")
    assert_same_bits(tmp_path, tmp_path / "unbroken")
    assert not list(folder.glob("writing-*"))


def test_a_run_without_a_readable_checkpoint_is_left_alone(tiny, tmp_path):
    """Beginning anew would take from it all that could be brought back."""
    quiet(tiny, tmp_path)
    for file in tmp_path.glob("checkpoints/step-*/optimizer.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"can be read \(step-00000011: optimizer.safetensors has"):
        quiet(tiny, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_pruning_never_takes_the_checkpoint_that_was_just_saved(tiny, tmp_path):
    quiet(tiny, tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000009", folder / "step-00000007")
    (folder / "step-00000009" / "model.safetensors").write_bytes(b"")  # damaged
    prune_checkpoints(folder, folder / "step-00000007", keep=1)  # and step 11 is beyond it
    names = sorted(path.name for path in folder.glob("step-*"))
    assert names == ["step-00000006", "step-00000007"]


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    tiny, tmp_path, monkeypatch, file
):
    real, latest = checkpoints.save_file, tmp_path / "checkpoints" / "latest"

    def save_file(tensors, path):
        if latest.is_file() and path.name == file:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        quiet(tiny, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").glob("*step-*")] == ["step-00000003"]
    assert latest.read_text() == "step-00000003\n"
    monkeypatch.undo()
    quiet(tiny, tmp_path)
    quiet(tiny, tmp_path / "unbroken")
    assert_same_bits(tmp_path, tmp_path / "unbroken")


def test_a_class_conditional_model_trains_with_the_folders_labels(tiny, changed, tmp_path):
    recipe = changed(model={**tiny.model.model_dump(), "num_classes": 10})
    assert quiet(recipe, tmp_path).finished
    before = build_model(recipe).label_embed.weight
    assert not torch.equal(state(tmp_path)["model.safetensors:label_embed.weight"], before)


def test_the_seed_changes_the_run(tiny, changed, tmp_path):
    quiet(tiny, tmp_path / "a")
    quiet(changed(seed=1), tmp_path / "b")
    assert metrics(tmp_path / "a")[0]["loss"] != metrics(tmp_path / "b")[0]["loss"]


def test_training_leaves_the_callers_random_numbers_alone(tiny, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quiet(tiny, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_precision_is_decided_with_a_reason():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == ("fp32", "bf16 is not faster on cpu")
    assert choose_precision("bf16", cpu)[0] == "bf16"


@pytest.mark.gpu
def test_a_gpu_trains_in_bf16_and_resumes(changed, tmp_path):
    recipe = changed(precision="auto")
    assert choose_precision("auto", torch.device("cuda"))[0] in ("bf16", "fp32")
    assert quiet(recipe, tmp_path).finished
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path))
    assert num_visible(recipe.stages[0].mask, (4, 4)) == 8
