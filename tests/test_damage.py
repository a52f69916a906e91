"""Damaged files of a run: one clear line each, and the checkpoint before is tried."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskdm.cli import main
from maskdm.recipe_files import load_recipe
from maskdm.runs import find
from maskdm.runs.checkpoint import FILES
from maskdm.runs.find import find_checkpoint, find_model
from maskdm.runs.lines import append_line, read_lines
from maskdm.training.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run with checkpoints at steps 6 (its first stage's end), 9 and 11."""
    from conftest import tiny_settings

    from maskdm.recipe import Recipe

    folder = tmp_path_factory.mktemp("runs") / "run"
    train(Recipe(**tiny_settings()), folder, show=False)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) in (1, 2)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [zeroed, one_bit_flipped])
def test_a_damaged_checkpoint_of_the_right_size_gives_way_to_the_one_before(
    run, capsys, file, damage
):
    newest = run / "checkpoints" / "step-00000011"
    before = {name: value.clone() for name, value in load_file(newest / file).items()}
    damage(newest / file)
    assert main(["train", str(run)]) == 0  # the last steps are trained again
    text = capsys.readouterr().out
    assert f"ignored checkpoint step-00000011: {file} is damaged" in text
    assert "continuing after step-00000009" in text
    again = load_file(newest / file)
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_a_checkpoint_that_the_disk_does_not_give_is_damaged_too(run, monkeypatch):
    newest, read = run / "checkpoints" / "step-00000011", find.crc32_of

    def failing(file: Path) -> int:
        if file.parent == newest:
            raise OSError(errno.EIO, "Input/output error")
        return read(file)

    monkeypatch.setattr(find, "crc32_of", failing)
    assert find_checkpoint(newest.parent).name == "step-00000009"


def test_checkpoints_of_earlier_versions_have_no_checksums_and_load(run):
    for folder in (run / "checkpoints").glob("step-*"):
        progress = json.loads((folder / "progress.json").read_text())
        assert set(progress.pop("crc32")) == set(FILES)
        (folder / "progress.json").write_text(json.dumps(progress))
    newest = run / "checkpoints" / "step-00000011"
    assert find_checkpoint(run / "checkpoints") == newest
    zeroed(newest / "ema.safetensors")  # no longer a safetensors file at all
    assert find_checkpoint(run / "checkpoints").name == "step-00000009"
    zeroed(run / "checkpoints" / "step-00000009" / "progress.json")
    assert find_checkpoint(run / "checkpoints").name == "step-00000006"


def test_a_checkpoint_that_is_named_is_refused_where_it_is_damaged(run, capsys):
    one_bit_flipped(run / "checkpoints" / "step-00000006" / "ema.safetensors")
    for name in (f"{run}@hide", run / "checkpoints" / "step-00000006"):
        text = failure(capsys, "sample", name, "--out", run / "x.npz")
        assert "step-00000006" in text and "ema.safetensors is damaged" in text


def test_a_checkpoint_that_lacks_a_tensor_is_one_line(run, capsys):
    folder = run / "checkpoints" / "step-00000011"
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "model.safetensors")
    progress = json.loads((folder / "progress.json").read_text())
    progress["files"]["model.safetensors"] = (folder / "model.safetensors").stat().st_size
    progress["crc32"] = {}
    (folder / "progress.json").write_text(json.dumps(progress))
    text = failure(capsys, "train", run)
    assert "step-00000011" in text and "model.safetensors" in text


@pytest.mark.parametrize("content", [b"\0" * 14, b"\xff\xfe", b"../elsewhere", b"step-00000099\n"])
def test_a_damaged_latest_is_ignored(run, content):
    (run / "checkpoints" / "latest").write_bytes(content)
    assert find_checkpoint(run / "checkpoints").name == "step-00000011"


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"{}", b'{"files": 3}', b"\xff", b"\0\0"])
def test_a_damaged_progress_is_ignored(run, content):
    (run / "checkpoints" / "step-00000011" / "progress.json").write_bytes(content)
    assert find_checkpoint(run / "checkpoints").name == "step-00000009"


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x80")


DAMAGES = (cut, emptied, not_text, zeroed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_of_a_damaged_environment_says_so_in_one_line(run, capsys, damage):
    append_line(run / "quality.jsonl", {"step": 1, "stage": "show", "images": 1, "sliced": 1.0})
    damage(run / "environment.json")
    for command in (
        ("train", run),
        ("evaluate", run, "--num", 8),
        ("compare", run, "--x", "images", "--out", run / "x.png"),
    ):
        text = failure(capsys, *command)
        assert "environment.json is damaged" in text and "remove it" in text


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["train", "evaluate", "compare"])
def test_a_damaged_recipe_is_one_line(run, capsys, damage, command):
    damage(run / "recipe.yaml")
    flags = ["--x", "images"] if command == "compare" else []
    append_line(run / "quality.jsonl", {"step": 1, "stage": "show", "images": 1, "sliced": 1.0})
    text = failure(capsys, command, run, *flags)
    assert "recipe.yaml" in text


def test_a_recipe_that_is_cut_off_is_not_taken_for_a_shorter_one(run):
    """Cut at any place in a line, it would often be a valid recipe with other settings."""
    path = run / "recipe.yaml"
    whole = path.read_bytes()
    for end in range(1, len(whole), 7):
        path.write_bytes(whole[:end])
        if not whole[:end].endswith(b"\n"):
            with pytest.raises(ValueError, match=r"recipe\.yaml"):
                load_recipe(path)
    own = run.parent / "own.yaml"  # a recipe that is no run's may lack the last line's end
    own.write_bytes(whole.rstrip())
    assert load_recipe(own).seed == 0


@pytest.mark.parametrize(
    "content", [b"", b"[", b'{"a": 1}', b"[1]", b"\xff", b"\0\0", b'"metrics"']
)
def test_damaged_classes_and_evaluations_are_one_line(run, capsys, content):
    (run / "evaluation.json").write_bytes(content)
    text = failure(capsys, "evaluate", run, "--num", 8)
    assert "evaluation.json cannot be read" in text and "move it away" in text
    (run / "classes.json").write_bytes(content)
    text = failure(capsys, "train", run)
    assert "classes.json is damaged" in text and "remove it" in text


@pytest.mark.parametrize(
    "end",
    ['{"step": 3, "st', "\0\0\0\0", "17", "null", '{"loss": 1}', '{"step": 3, "loss": "1"}',
     '{"step": "3"}', '{"step": 3, "stage": 1}'],
)  # fmt: skip
def test_lines_before_a_damaged_one_are_read(tmp_path, end):
    path = tmp_path / "quality.jsonl"
    for step in (1, 2):
        append_line(path, {"step": step})
    with path.open("ab") as file:
        file.write(end.encode())
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    assert [line["step"] for line in read_lines(path)] == [1, 2]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["maskdm.json", "unet/config.json"])
def test_a_damaged_exported_model_is_one_line(run, capsys, damage, file):
    damage(run / "model" / file)
    text = failure(capsys, "sample", run, "--out", run / "x.npz")
    assert "damaged" in text and str(run / "model") in text


def test_json_of_another_kind_in_an_exported_model_is_one_line(run, capsys):
    (run / "model" / "maskdm.json").write_text("[]")
    text = failure(capsys, "sample", run, "--out", run / "x.npz")
    assert "maskdm.json is damaged" in text
    with pytest.raises(ValueError, match="damaged"):
        find_model(run).sampling  # noqa: B018 (a property)
    (run / "model" / "maskdm.json").write_text('{"sampling": "x", "model": {}, "diffusion": {}}')
    assert "it lacks the settings sampling" in failure(
        capsys, "sample", run, "--out", run / "x.npz"
    )


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "file", ["environment.json", "classes.json", "evaluation.json", "quality.jsonl", "recipe.yaml",
             "model/maskdm.json", "model/unet/config.json"],
)  # fmt: skip
def test_json_that_is_nested_too_deeply_is_damage_too(run, capsys, file):
    (run / file).write_bytes(DEEP)
    if file == "quality.jsonl":
        assert read_lines(run / file) == []
        return
    if file.startswith("model"):
        arguments = ("sample", run, "--out", run / "x.npz")
    else:
        arguments = ("train" if file == "classes.json" else "evaluate", run)
    text = failure(capsys, *arguments)
    assert Path(file).name in text or f"the model in {run / 'model'} is damaged" in text
    assert text.startswith("maskdm: ")


@pytest.mark.parametrize("name", ["step", "stage", "images", "elapsed_sec", "crc32"])
@pytest.mark.parametrize("value", ["x", None, [], -1, 1e308])
def test_a_checkpoint_with_impossible_counters_is_ignored(run, name, value):
    path = run / "checkpoints" / "step-00000011" / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert find_checkpoint(run / "checkpoints").name == "step-00000009"


def test_an_exported_model_with_a_tensor_of_another_shape_is_one_line(run, capsys):
    path = run / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][None].clone()}, path)
    text = failure(capsys, "sample", run, "--out", run / "x.npz")
    assert f"the model in {run / 'model'} is damaged" in text and name in text


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_an_empty_tensor_is_one_line(run, capsys, file):
    folder = run / "checkpoints" / "step-00000011"
    tensors = load_file(folder / file)
    name = next(name for name in tensors if not name.endswith(".step"))
    save_file({**tensors, name: torch.empty(0)}, folder / file)
    progress = json.loads((folder / "progress.json").read_text())
    progress["files"][file] = (folder / file).stat().st_size
    del progress["crc32"]  # as written by hand, or by an earlier version
    (folder / "progress.json").write_text(json.dumps(progress))
    text = failure(capsys, "train", run)
    assert f"{file} cannot be loaded" in text and "remove this checkpoint" in text
