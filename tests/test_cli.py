from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import tiny_settings
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from maskdm.cli import COMMANDS, main
from maskdm.recipe_files import load_recipe, recipe_names

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tiny_settings()))))
    return str(path)


@pytest.fixture
def run(recipe_file: str, tmp_path: Path) -> Path:
    assert main(["train", recipe_file, "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must exit with 2, and gives its error text, boxes unwrapped."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.replace("│", " ").split())


def test_a_run_leaves_previews_plot_model_and_the_next_command(run, capsys):
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "step-00000006.png",
        "step-00000011.png",
    ]
    height, width, _ = pixels_of(run / "samples" / "step-00000011.png").shape
    assert 2 * 64 < width < height  # two by two images, a caption below
    assert pixels_of(run / "loss.png").shape[:2] == (540, 960)
    assert (run / "model" / "model_index.json").is_file()
    assert main(["train", str(run / "recipe.yaml"), "--out", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"maskdm sample {run}" in text and "finished with step-00000011" in text


def test_flags_win_over_the_file(recipe_file, tmp_path):
    flags = "--stages.0.mask.kind patch --stages.0.mask.rate 0.7 --stages.1.steps 3 --data.flip"
    assert main(["train", recipe_file, "--out", str(tmp_path / "run"), *flags.split()]) == 0
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe.stages[0].mask.kind == "patch" and recipe.stages[0].mask.rate == 0.7
    assert recipe.stages[1].steps == 3 and recipe.data.flip
    assert recipe.stages[1].batch_size == 8


def test_without_a_terminal_each_stages_last_step_is_printed(recipe_file, tmp_path, capsys):
    assert main(["train", recipe_file, "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "hide step 6/6  loss" in text and "100 %  show step 5/5  loss" in text


def test_an_average_too_long_for_its_stage_is_pointed_out(recipe_file, tmp_path, capsys):
    flags = ["--stages.1.ema.decay", "0.1"]
    assert main(["train", recipe_file, "--out", str(tmp_path / "run"), *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("keeps 99 % of the first weights over 6 steps") == 1
    assert "try --stages.0.ema.decay 0.5," in text
    flags += ["--stages.0.ema.decay", "0.5"]
    assert main(["train", recipe_file, "--out", str(tmp_path / "other"), *flags]) == 0
    assert "ema.decay" not in capsys.readouterr().out


def test_samples_come_as_grid_array_or_folder(run, tmp_path, capsys):
    array, grid, folder = tmp_path / "s.npz", tmp_path / "g.png", tmp_path / "images"
    for out in (array, grid, folder):
        options = ["--num", "5", "--seed", "1", "--steps", "2", "--out", str(out)]
        assert main(["sample", str(run), *options]) == 0
    images = np.load(array)["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 1)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    assert np.array_equal(pixels_of(files[3]), images[3, ..., 0])
    assert pixels_of(grid).shape == (2 * 66 + 2, 3 * 66 + 2)
    assert "5 images from" in capsys.readouterr().out


def test_conditional_samples_carry_their_labels(recipe_file, tmp_path):
    run = str(tmp_path / "run")
    assert main(["train", recipe_file, "--out", run, "--model.num-classes", "10"]) == 0
    assert main(["sample", run, "--num", "12", "--out", str(tmp_path / "s.npz")]) == 0
    assert np.load(tmp_path / "s.npz")["arr_1"].tolist() == [*range(10), 0, 1]


def test_evaluation_is_written_and_printed(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--features", "pca", "--num", "12", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "evaluation.json").read_text())[-1]
    assert printed["samples"]["num"] == 12
    assert printed["samples"]["model"] == str(run / "model")
    assert printed["training"]["step"] == 11 and printed["training"]["stage"] == "show"
    assert main(["evaluate", str(run), "--num", "12"]) == 0
    text = capsys.readouterr().out
    assert "Frechet distance" in text and "ema, step 11" in " ".join(text.split())
    # The next command: train the control; when it lies beside the run, compare with it.
    assert text.splitlines()[-1] == f"next      maskdm train {run} --control dense"
    control = run.with_name(f"{run.name}-dense")
    shutil.copytree(run, control)
    (control / "control.json").write_text(json.dumps({"of": run.name}))
    assert main(["evaluate", str(control), "--num", "12"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next      maskdm compare {control}"
    assert main(["compare", str(run)]) == 0
    assert "next" not in capsys.readouterr().out  # no quality was measured in training
    for one in (run, control):
        (one / "quality.jsonl").write_text("{}\n")
    assert main(["compare", str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next      maskdm compare {control} {run} --x flops"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_the_heavy_libraries(command):
    code = (
        "import sys; from maskdm.cli import main; "
        f"assert main(['--help']) == 0 and main(['{command}', '--help']) == 0; "
        "heavy = {'torch', 'diffusers', 'accelerate', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: maskdm {command}" in done.stdout
    assert all(name in done.stdout.split("usage")[1] for name in COMMANDS)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_short_help_fits_a_screen_and_names_what_beginners_need(command, capsys):
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60 and all(len(line) <= 80 for line in lines)
    text = " ".join(lines)
    for flag in ("--hours", "--data.source", "--stages.all.lr", "--help-all"):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        ("train digits --lr 1e-3", "--lr: use --stages.all.lr"),
        ("train digits --batch_size=4", "--batch_size: use --stages.all.batch-size"),
        ("plan digits --data.size 100000", "data.size: 100,000 pixels are more than 8,192"),
        ("train digits --resolution 64", "--resolution: use --data.size"),
        ("train digits --output_dir x", "--output_dir: use --out"),
        ("train --config x.yaml", "--config: use the file as the first argument"),
        ("sample run --num-inference-steps 5", "use --steps"),
        ("train digits --num-inference-steps 5", "use --sampling.steps"),
        ("train digits --guidance-scale 5", "--sampling.guidance.scale, with --sampling.guidance"),
        ("pack digits out --image-size 64", "use --size"),
        ("check digits --resolution 64", "use --size"),
    ],
)
def test_other_tools_names_of_settings_get_a_pointer(arguments, instead, capsys):
    assert instead in failure(capsys, *arguments.split())


def test_warnings_of_the_package_are_a_line(tmp_path):
    (tmp_path / "digits").mkdir()
    command = [sys.executable, "-m", "maskdm", "check", "digits", "--size", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    text = "maskdm: note: data.source digits is the set of that name, not the folder here: ./digits"
    assert done.stderr.splitlines() == [f"{text} is that"]


def test_help_shows_a_recipes_own_stages(capsys):
    assert main(["train", "celebahq256", "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--stages.2.mask.rate" in text and "Fraction of the image" in text
    assert "(default: 0.9)" in text


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    words = capsys.readouterr().out.split()
    assert set(recipe_names()) <= set(words)
    assert main(["recipes", "digits"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["source"] == "digits"


def test_control_characters_of_a_recipe_do_not_reach_the_terminal(tmp_path, capsys):
    text = "# caf\u00e9\x85\n#\tdigits\nstages: [{name: a, steps: 1, batch_size: 1, lr: 1}]\n"
    (tmp_path / "in.yaml").write_bytes(text.encode())
    assert main(["recipes", str(tmp_path / "in.yaml")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# caf\u00e9\\x85\n#\tdigits\n")
    assert yaml.safe_load(shown) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian digits", "unknown command 'trian': did you mean train"),
        ("train", "the recipe comes first: maskdm train RECIPE --out RUN"),
        ("train --data.source digits celeba64 --out r", "the recipe comes first"),
        ("train digits --out x --stages.0.mask.rate x", "stages.0.mask.rate"),
        ("train digts --out x", "no recipe 'digts': did you mean digits"),
        ("train digits --out x --stages.0.mask.rat 1", "--stages.0.mask.rate"),
        (
            "train digits --out x --stages.0.mask.rate 1.5 --seed -1",
            "maskdm: stages.0.mask.rate: input should be less than 1, not 1.5; seed: input should",
        ),
        ("train digits --out x --stages.0.mask.rate 0.001", "the nearest possible are"),
        ("train digits --out x --model.patch-size 3", "use 6 or 9"),
        ("train digits --out x --sampling.sampler euler-maruyama", "is unstable on this schedule"),
        ("train digits --out x --init nowhere", "nowhere is not a run's folder"),
        ("train digits --out x --data.source nowhere", "nowhere does not exist"),
        (
            "sample nowhere --out x.png",
            "nowhere is not a run's folder, a checkpoint or",
        ),
        ("sample --out x.png nowhere", "the model comes first: maskdm sample RUN"),
        ("evaluate nowhere", "nowhere is not a run's folder"),
        ("recipes nothing", "no recipe 'nothing'"),
    ],
)
def test_mistakes_exit_with_2_and_a_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *arguments.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--out x.jpg", "end it in .png"),
        ("--out x.png --num 0", "at least one"),
        ("--out x.png --steps 1001", "1001 sampling steps, but the schedule has 1000 times"),
        ("--out x.png --sampler heun --eta 1", "sampler heun has none"),
        ("--out x.png --label 1", "has no classes: it takes no labels"),
        ("--out x.png --guidance.kind classifier-free", "the model has no classes"),
        ("--out x.png --mask.kind patch --mask.rate 0.99", "the nearest possible are"),
        ("--out x.png --mask.kind patch", "hides nothing at rate 0"),
        ("--out x.png --mask-image nothing.png", "nothing.png cannot be read as an image"),
        ("--out x.png --guidance.kind autoguidance --guidance.weak nothing", "does not exist"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(run, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert message in failure(capsys, "sample", "run", *flags.split())
    assert not list(run.parent.glob("x.*"))


def test_samplers_guidance_and_marginals_are_flags(run, tmp_path, capsys):
    def sample(name: str, flags: str = "", model: str = str(run)) -> np.ndarray:
        out = str(tmp_path / f"{name}.npz")
        assert main(["sample", model, "--num", "4", "--out", out, *flags.split()]) == 0
        return np.load(out)["arr_0"]

    plain = sample("plain")
    assert not np.array_equal(plain, sample("solver", "--sampler dpm-solver --steps 6"))
    assert "6 steps of dpm-solver" in capsys.readouterr().out
    for flags in (
        "--guidance.kind sparse",
        f"--guidance.kind autoguidance --guidance.weak {run}@hide",
    ):
        assert not np.array_equal(plain, sample("guided", f"{flags} --guidance.scale 3"))
    by_name = sample("primer", "--guidance.kind autoguidance --guidance.scale 3")
    assert np.array_equal(by_name, np.load(tmp_path / "guided.npz")["arr_0"])
    assert not np.array_equal(plain, sample("stage", model=f"{run}@hide"))
    hidden = sample("marginal", "--mask.kind block --mask.rate 0.75") == 128
    assert "4 of 16 patches each (" in capsys.readouterr().out
    assert hidden.reshape(4, -1).mean(axis=1) == pytest.approx([0.75] * 4, abs=0.05)
    picture = np.zeros((8, 8), np.uint8)
    picture[2:6, 2:6] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    inner = sample("inner", f"--mask-image {tmp_path / 'mask.png'}")
    assert (inner[:, picture == 0] == 128).all() and inner[:, 2:6, 2:6].std() > 0


def test_a_model_is_sampled_as_its_recipe_says_unless_told_otherwise(recipe_file, tmp_path):
    run = str(tmp_path / "run")
    flags = "--sampling.sampler unipc --sampling.guidance.kind sparse --sampling.steps 3"
    assert main(["train", recipe_file, "--out", run, *flags.split()]) == 0
    for name, more in (
        ("as-told", ""),
        ("again", flags.replace("sampling.", "")),
        ("other", "--steps 4"),
    ):
        out = str(tmp_path / f"{name}.npz")
        assert main(["sample", run, "--num", "2", "--out", out, *more.split()]) == 0
    first, again, other = (
        np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("as-told", "again", "other")
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_inpainting_keeps_what_the_mask_leaves_black(run, tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, pixels in (("image", image), ("mask", mask), ("small", mask[:4])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    names = [str(tmp_path / f"{name}.png") for name in ("image", "mask", "small", "nothing")]

    def inpaint(out: str, *more: str) -> None:
        command = ["inpaint", str(run), names[0], "--mask", names[1], "--num", "3", "--out", out]
        assert main([*command, "--resamplings", "2", *more]) == 0

    inpaint(str(tmp_path / "a.npz"))
    results = np.load(tmp_path / "a.npz")["arr_0"][..., 0]
    assert (results[:, :, :4] == image[:, :4]).all()
    assert len({part.tobytes() for part in results[:, :, 4:]}) == 3
    text = capsys.readouterr().out
    assert "50 % of the pixels drawn" in text and "2 times 4 steps of ddpm" in text
    inpaint(str(tmp_path / "b.png"), "--guidance.kind", "sparse")
    sheet = pixels_of(tmp_path / "b.png")  # the image with its hole, then three results
    assert sheet.shape == (2 * 66 + 2, 2 * 66 + 2)
    assert (sheet[2:66, 34:66] == 128).all() and sheet[2, 2] == image[0, 0]
    for flags, message in (
        ((names[0], "--mask", names[2]), "the mask is 8x4 pixels, but the image 8x8"),
        ((names[3], "--mask", names[1]), "nothing.png cannot be read as an image"),
        ((names[0], "--mask", names[1], "--sampler", "heun"), "inpainting uses ddpm"),
        ((names[0], "--mask", names[1], "--jump", "0"), "--jump 0: at least 1"),
    ):
        assert message in failure(capsys, "inpaint", str(run), *flags, "--out", str(tmp_path / "c"))


def test_classes_are_asked_for_by_number(recipe_file, tmp_path):
    run, out = str(tmp_path / "run"), tmp_path / "a.npz"
    assert main(["train", recipe_file, "--out", run, "--model.num-classes", "10"]) == 0
    guided = ["--guidance.kind", "classifier-free"]
    for flags, labels in (([], [0, 1, 2]), (["--label", "7"], [7] * 3), (guided, [0, 1, 2])):
        assert main(["sample", run, "--num", "3", "--out", str(out), *flags]) == 0
        assert np.load(out)["arr_1"].tolist() == labels
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    command = ["inpaint", run, str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    for flags, labels in (([], [10] * 4), (["--label", "7"], [7] * 4)):  # 10 = no class
        assert main([*command, "--resamplings", "1", "--out", str(out), *flags]) == 0
        assert np.load(out)["arr_1"].tolist() == labels


def test_bad_images_and_folders_exit_with_2(image_folder, recipe_file, run, tmp_path, capsys):
    def train_on(source: Path, *more: str) -> str:
        return failure(
            capsys, "train", recipe_file, "--out", str(tmp_path / "new"), "--data.source",
            str(source), *more
        )  # fmt: skip

    (image_folder / "cat" / "b.png").write_bytes(b"no image")
    error = train_on(image_folder)
    assert "at least 1 of 6 images cannot be read: cat/b.png (not an image)" in error
    among = ("train", recipe_file, "--data.source", str(image_folder), "--out")
    for out in (image_folder, image_folder / "runs" / "a"):
        assert "lies in the image folder" in failure(capsys, *among, str(out))
        assert not (out / "recipe.yaml").exists()
    (tmp_path / "empty").mkdir()
    assert "it is empty" in train_on(tmp_path / "empty")
    assert "has 10 classes: use 10" in train_on(Path("digits"), "--model.num-classes", "2")
    assert not (tmp_path / "new").exists()

    other = failure(capsys, "train", recipe_file, "--out", str(run), "--seed", "1")
    assert "another recipe (seed: 0 -> 1)" in other
    full = failure(capsys, "sample", str(run), "--out", str(run))
    assert "exists and is not an empty folder" in full


def test_a_full_disk_exits_with_1_and_one_line(recipe_file, tmp_path, monkeypatch, capsys):
    from maskdm.runs import checkpoint

    def no_space(tensors, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    assert main(["train", recipe_file, "--out", str(tmp_path / "run")]) == 1
    assert "maskdm: the disk is full" in capsys.readouterr().err


def test_a_finished_model_replaces_an_older_one_whole_or_not_at_all(run, recipe_file, monkeypatch):
    from safetensors import SafetensorError

    from maskdm.export.pipeline import MaskDMPipeline

    def half(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "model_index.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    before = {path: path.read_bytes() for path in (run / "model").rglob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(MaskDMPipeline, "save_pretrained", half)
        assert main(["train", recipe_file, "--out", str(run)]) == 1
    assert before == {path: path.read_bytes() for path in (run / "model").rglob("*.*")}
    (run / "model" / "model_index.json").write_text("damaged")
    assert main(["train", recipe_file, "--out", str(run)]) == 0
    assert main(["sample", str(run), "--num", "1", "--out", str(run / "one.png")]) == 0


def test_a_missing_preview_of_a_stages_end_is_drawn_again(run, recipe_file):
    last = run / "samples" / "step-00000011.png"
    content = last.read_bytes()
    last.unlink()
    assert main(["train", recipe_file, "--out", str(run)]) == 0
    assert last.read_bytes() == content


def test_a_run_folder_that_cannot_be_made_is_refused(recipe_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        text = failure(capsys, "train", recipe_file, "--out", str(tmp_path / out))
        assert f"{tmp_path / out} cannot be written" in text


def test_a_run_in_use_is_refused(run, recipe_file, capsys):
    with FileLock(run / ".lock"):
        text = failure(capsys, "train", recipe_file, "--out", str(run))
        assert "another process is training in" in text


def test_evaluation_takes_a_checkpoint_or_the_model_folder(run):
    for name, file, step in (
        ("checkpoints/step-00000006", "evaluation-step-00000006.json", 6),
        ("model", "evaluation.json", 11),
    ):
        assert main(["evaluate", str(run / name), "--num", "12"]) == 0
        (record,) = json.loads((run / file).read_text())
        assert record["training"]["step"] == step


def test_an_exported_model_is_compared_with_a_reference(run, tmp_path, capsys, monkeypatch):
    (run / "model").rename(tmp_path / "export")
    (tmp_path / "recipe.yaml").write_text("seed: 1")  # someone else's
    monkeypatch.chdir(tmp_path)
    assert "name the real images with --reference" in failure(capsys, "evaluate", "export")
    assert main(["evaluate", "export", "--reference", "digits", "--num", "12"]) == 0
    (record,) = json.loads((tmp_path / "export" / "evaluation.json").read_text())
    assert record["training"] is None and record["recipe"] is None
    assert record["reference"]["source"] == "digits"
    text = failure(capsys, "sample", "export", "--out", "a.npz", "--guidance.kind", "autoguidance")
    assert "name a weak model with --guidance.weak" in text
    assert main(["evaluate", f"{run}@hide", "--num", "12"]) == 0
    assert (run / "evaluation-hide.json").is_file()
    (tmp_path / "export" / "unet" / "config.json").write_text("{")
    assert "is damaged" in failure(capsys, "sample", "export", "--out", "a.npz")
    (tmp_path / "export" / "maskdm.json").unlink()  # the index is another pipeline's, too
    (tmp_path / "export" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    assert "holds another kind of pipeline: DDPM" in failure(
        capsys, "sample", "export", "--out", "a.npz"
    )


def test_a_photo_and_its_mask_are_turned_as_their_exif_says(tmp_path):
    from maskdm.recipe import Data
    from maskdm.sampling.inpaint import read_image_and_mask

    upright = np.zeros((12, 8), np.uint8)
    upright[:6] = 200  # light above
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right: stored lying on its left side
    lying = np.rot90(upright, 1)
    Image.fromarray(lying).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    Image.fromarray(upright).save(tmp_path / "mask.png")
    data = Data(size=8, channels=1, crop="resize")
    image, unknown = read_image_and_mask(tmp_path / "photo.jpg", tmp_path / "mask.png", data)
    assert unknown[:3].all() and not unknown[5:].any()
    assert (image[:3] > 150).all() and (image[5:] < 50).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "16 bits", "key colour"])
def test_white_strokes_on_a_transparent_layer_are_a_mask(kind, run, tmp_path, capsys):
    """A quarter is white and opaque; below the transparent rest the pixels are white, too."""
    strokes = np.zeros((8, 8), np.uint8)
    strokes[4:, 4:] = 255
    white, more = np.full_like(strokes, 255), {}
    if kind == "RGBA":
        picture = Image.fromarray(np.dstack([white, white, white, strokes]))
    elif kind == "LA":
        picture = Image.fromarray(np.dstack([white, strokes]))
    elif kind == "palette":  # colours 0 and 1 are both white, the first is transparent
        picture = Image.frombytes("P", (8, 8), (strokes // 255).tobytes())
        picture.putpalette([255] * 6)
        more = {"transparency": 0}
    elif kind == "16 bits":  # no alpha: dark grey, which has more than 255 levels here
        picture = Image.fromarray(np.where(strokes, 65535, 9000).astype(np.uint16))
    else:
        picture = Image.fromarray(np.where(strokes, 255, 254).astype(np.uint8))
        more = {"transparency": 254}
    picture.save(tmp_path / "mask.png", **more)
    Image.fromarray(white).save(tmp_path / "image.png")
    out = ["--out", str(tmp_path / "a.npz"), "--num", "1", "--steps", "2"]
    command = ["inpaint", str(run), str(tmp_path / "image.png"), "--resamplings", "1"]
    assert main([*command, "--mask", str(tmp_path / "mask.png"), *out]) == 0
    assert "25 % of the pixels drawn" in capsys.readouterr().out
    assert main(["sample", str(run), "--mask-image", str(tmp_path / "mask.png"), *out]) == 0
    drawn = np.load(tmp_path / "a.npz")["arr_0"][0, ..., 0]
    assert (drawn[:4] == 128).all() and (drawn[:, :4] == 128).all()
    assert not (drawn[4:, 4:] == 128).all()


def test_a_defect_of_ours_keeps_its_traceback(recipe_file, tmp_path, monkeypatch):
    from maskdm.training import start

    monkeypatch.setattr(start, "open_store", lambda *a, **k: int("a defect"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["train", recipe_file, "--out", str(tmp_path / "run")])


# Dies, or is interrupted, at a chosen moment: where the next file of a checkpoint would be written
# (`files` of them are there), or a step is done.
AT_A_MOMENT = """
import os, signal, sys
from maskdm.cli import main
from maskdm.runs import checkpoint
from maskdm.training.checkups import Checkups

number, files, step = getattr(signal, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
save_file, look, written = checkpoint.save_file, Checkups.look, []

def save(tensors, path):
    written.append(path)
    if len(written) == files:
        os.kill(os.getpid(), number)
    save_file(tensors, path)

def done(self, progress, *others):
    if progress.step == step:
        for _ in range(2):  # a launcher passes on what its processes have got, too
            os.kill(os.getpid(), number)
    look(self, progress, *others)

checkpoint.save_file, Checkups.look = save, done
sys.exit(main(sys.argv[4:]))
"""


def run_until(signal_name: str, *arguments: str, files: int = 0, step: int = 0):
    command = [sys.executable, "-c", AT_A_MOMENT, signal_name, str(files), str(step), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_run_that_continues_to_the_same_bits(recipe_file, tmp_path):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    command = ["train", recipe_file, "--checkpoint-every", "2", "--preview-every", "4", "--out"]
    # Between two checkpoints of stage one; while the second file of one of stage two is written.
    for moment in ({"step": 3}, {"files": 3 * 2 + 2}):
        assert run_until("SIGKILL", *command, str(broken), **moment).returncode == -9
    assert list((broken / "checkpoints").glob("writing-*"))
    for out in (broken, unbroken):
        assert main([*command, str(out)]) == 0
    name = (unbroken / "checkpoints" / "latest").read_text().strip()
    for file in ("model", "ema", "optimizer"):
        one, other = (
            load_file(out / "checkpoints" / name / f"{file}.safetensors")
            for out in (broken, unbroken)
        )
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in other)
    losses = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (broken, unbroken)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_save_and_exit_with_3(number, recipe_file, tmp_path):
    run = tmp_path / "run"
    done = run_until(number, "train", recipe_file, "--out", str(run), step=4)
    assert done.returncode == 3, done.stderr
    step = int(re.search(r"stopped after saving .*step-(\d+)", done.stdout)[1])
    progress = run / "checkpoints" / f"step-{step:08d}" / "progress.json"
    assert json.loads(progress.read_text())["step"] == step == 5


@pytest.mark.slow
def test_under_nohup_a_hangup_is_ignored(recipe_file, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the child inherits it
    try:
        done = run_until("SIGHUP", "train", recipe_file, "--out", str(tmp_path / "run"), step=4)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.returncode == 0 and "stopped" not in done.stdout


def maskdm(*arguments: str, **how: Any) -> subprocess.Popen[bytes]:
    code = "import sys; from maskdm.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], **how)


@pytest.mark.slow
def test_training_goes_on_when_the_reader_of_its_output_leaves(recipe_file, tmp_path):
    out = tmp_path / "run"
    read, write = os.pipe()
    os.close(read)
    process = maskdm("train", recipe_file, "--out", str(out), stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0 and "Traceback" not in errors and "BrokenPipe" not in errors
    assert (out / "model" / "model_index.json").is_file()


@pytest.mark.slow
def test_a_closed_terminal_saves(recipe_file, tmp_path):
    out, (terminal, inner) = tmp_path / "run", os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    flags = ["--stages.0.steps", "1000000", "--checkpoint-every", "1000000"]
    take = functools.partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0)  # closing it sends SIGHUP
    process = maskdm(
        *("train", recipe_file, "--out", str(out), *flags),
        **dict.fromkeys(("stdin", "stdout", "stderr"), inner),
        start_new_session=True,
        preexec_fn=take,
    )
    os.close(inner)
    text = b""
    try:
        while b"%|" not in text or b"loss" not in text:  # the bar moves
            assert select.select([terminal], [], [], 120)[0], text
            text += os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait(timeout=120) == 3
    finally:
        process.kill()
    assert (out / "checkpoints" / "latest").is_file()


@pytest.mark.slow
def test_the_readmes_commands_run(tmp_path, monkeypatch, capsys):
    """Every `maskdm` line of the README, the demo's training cut to a few steps."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text("utf-8"), flags=re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.split("#")[0] for line in text.splitlines() if line.startswith("maskdm ")]
    short = "--stages.0.steps 3 --stages.0.warmup 1".split()
    short += "--sampling.steps 2 --sampling.sampler ddim --evaluation.quick-num 4".split()
    second = "--stages.1.steps 3 --stages.1.warmup 1".split()
    images = tmp_path / "photos"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 40, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{i}.png")
    np.savez("theirs.npz", pixels[:8, :16, :16])
    small = "--data.size 16 --model.size None --model.embed-dim 16 --model.num-heads 2".split()
    small += "--model.depth 3 --num-previews 1 --stages.all.batch-size 2".split()
    assert any(line.startswith("maskdm train") for line in lines)
    for line in lines:
        arguments = shlex.split(line)[1:]
        # No network for weights, no hours for 50,000 images.
        light = {"inception": "pca", "dinov2": "pca", "50000": "8"}
        arguments = [light.get(argument, argument) for argument in arguments]
        while budget := {"--hours", "--minutes"} & {*arguments}:  # steps take their place
            where = arguments.index(budget.pop())
            del arguments[where : where + 2]
        if arguments[0] == "train":
            own = Path(arguments[1]) / "recipe.yaml"
            if own.is_file():  # a run that is extended, or its control
                assert main([*arguments, *(["--images", "+8"] if len(arguments) == 2 else [])]) == 0
                continue
            stages = len(load_recipe(arguments[1]).stages)
            arguments += short + (second if stages > 1 else [])
            arguments += small if "digits" not in arguments[1] else []
        assert main(arguments) == 0, line
        assert capsys.readouterr().out, line
