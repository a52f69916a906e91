"""Classes by name: kept with a model wherever it lies, and asked for by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import as_array, tiny_settings
from PIL import Image

from maskdm.cli import main
from maskdm.export.pipeline import MaskDMPipeline, load
from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.build import build_model
from maskdm.models.class_names import class_number, class_numbers, class_text
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion
from maskdm.runs.load import load_model
from maskdm.sampling.guidance import refuse_weak
from maskdm.training.transfer import transfer_weights

SMALL = {
    "image_size": 8, "patch_size": 2, "channels": 1, "embed_dim": 16, "depth": 3, "num_heads": 2,
}  # fmt: skip


def uvit(names: list[str] | None, num_classes: int = 2) -> UViT:
    return UViT(**SMALL, num_classes=num_classes, class_names=names)


@pytest.fixture
def command(image_folder: Path, tmp_path: Path) -> list[str]:
    """Trains on folders of cats and dogs; RUN is `run`."""
    settings = json.loads(json.dumps(tiny_settings()))
    settings["data"] = {"source": str(image_folder), "size": 8, "channels": 1}
    settings["model"]["num_classes"] = 2
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return ["train", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]


@pytest.fixture
def run(command: list[str], tmp_path: Path) -> Path:
    assert main(command) == 0
    return tmp_path / "run"


def names_of(place: str | Path) -> list[str] | None:
    return load_model(place).trained.model.config.class_names


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_names_stay_with_a_run_its_checkpoints_and_its_export(run, command, tmp_path):
    assert json.loads((run / "classes.json").read_text()) == ["cat", "dog"]
    export = shutil.copytree(run / "model", tmp_path / "elsewhere")
    for place in (run, f"{run}@hide", run / "checkpoints" / "step-00000009", export):
        assert names_of(place) == ["cat", "dog"]
    assert MaskDMPipeline.from_pretrained(export).denoiser.config.class_names == ["cat", "dog"]
    shutil.rmtree(run / "model")  # as if unfinished: the newest checkpoint is taken
    assert load_model(run).location.folder.name == "step-00000011" and names_of(run) == [
        "cat",
        "dog",
    ]
    (run / "classes.json").unlink()  # a run from before names were kept
    assert names_of(run) is None
    assert main(command) == 0  # going on, it learns them
    assert names_of(f"{run}@hide") == ["cat", "dog"]
    (run / "classes.json").write_text("[")
    with pytest.raises(ValueError, match=r"classes.json is damaged .*: remove it"):
        load_model(f"{run}@hide")


def test_a_run_does_not_go_on_when_its_classes_have_other_names(run, command, image_folder, capsys):
    """The pixels and their order are the same, so that nothing else would notice."""
    (image_folder / "cat").rename(image_folder / "cow")
    assert "the names of the classes of" in (text := failure(capsys, *command))
    assert "are not those that the run in" in text and "bring them back" in text
    assert json.loads((run / "classes.json").read_text()) == ["cat", "dog"]


def test_a_run_does_not_go_on_when_its_images_have_other_classes(
    run, command, image_folder, capsys
):
    names = [path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*.[jp]*g")]
    pairs = {name: name.split("/")[0] for name in [*names, "cat/c.PNG"] if "._" not in name}
    pairs["cat/a.png"], pairs["dog/a.jpg"] = "dog", "cat"
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in pairs.items()]
    (image_folder / "metadata.jsonl").write_text("\n".join(lines))
    assert "the labels of" in failure(capsys, *command)
    (image_folder / "metadata.jsonl").unlink()
    assert main(command) == 0


def test_a_model_without_classes_keeps_no_names(command, tmp_path):
    assert main([*command, "--model.num-classes", "0"]) == 0
    assert not (tmp_path / "run" / "classes.json").exists()
    assert names_of(tmp_path / "run") is None and names_of(f"{tmp_path / 'run'}@hide") is None


def test_images_are_asked_for_by_name_or_number(run, tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    masked = [str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]

    def drawn(command: list[str], label: str) -> tuple[np.ndarray, list[int]]:
        out = tmp_path / "out.npz"
        assert main([*command, "--num", "3", "--out", str(out), "--label", label]) == 0
        content = np.load(out)
        return content["arr_0"], content["arr_1"].tolist()

    inpaint = ["inpaint", str(run), *masked, "--resamplings", "1"]
    for command in (["sample", str(run)], inpaint):
        by_name, labels = drawn(command, "dog")
        by_number, same = drawn(command, "1")
        assert labels == same == [1, 1, 1] and np.array_equal(by_name, by_number)
        assert drawn(command, "cat")[1] == [0, 0, 0]
        assert drawn(command, "2")[1] == [2, 2, 2]  # no class
    capsys.readouterr()
    drawn(["sample", str(run)], "dog")
    assert "4 steps of ddim, class dog (number 1)" in capsys.readouterr().out
    for command in (["sample", str(run)], inpaint):
        text = failure(capsys, *command, "--label", "dgo", "--out", str(tmp_path / "x.npz"))
        assert "no class 'dgo': did you mean dog?" in text
        text = failure(capsys, *command, "--label", "3", "--out", str(tmp_path / "x.npz"))
        assert "labels are 3 to 3" in text
        text = failure(capsys, *command, "--label", "-1", "--out", str(tmp_path / "x.npz"))
        assert "labels are -1 to -1" in text


def test_a_pipeline_takes_names(run):
    pipeline = load(run)

    def draw(labels) -> np.ndarray:
        return as_array(pipeline(2, class_labels=labels).images)

    assert np.array_equal(draw("dog"), draw(torch.tensor([1, 1])))
    assert np.array_equal(draw(["dog", "cat"]), draw(torch.tensor([1, 0])))
    assert not np.array_equal(draw("dog"), draw("cat"))
    with pytest.raises(ValueError, match="no class 'cow': known: cat, dog"):
        draw("cow")
    with pytest.raises(ValueError, match="3 classes for 2 images: give one for each"):
        draw(["dog", "cat", "cat"])


def test_a_name_wins_over_a_number():
    config = uvit(["1", "10", "2"], 3).config
    assert [class_number(config, name) for name in ("1", "10", "2", "0", "3")] == [0, 1, 2, 0, 3]
    assert class_text(config, 1) == "10 (number 1)" and class_text(config, 3) == "3"


def test_a_number_is_a_number_whatever_the_classes_are_called():
    config = uvit(["1", "10", "2"], 3).config
    assert class_numbers(config, "1", 2).tolist() == [0, 0]
    assert class_numbers(config, 1, 2).tolist() == [1, 1]
    assert class_numbers(config, torch.tensor(1), 2).tolist() == [1, 1]
    for numbers in (torch.arange(3), np.arange(3), range(3), [0, 1, "2"]):
        assert class_numbers(config, numbers, 3).tolist() == [0, 1, 2]


def test_unknown_classes_are_told_the_known_ones():
    many = [f"class {i}" for i in range(25)]
    with pytest.raises(
        ValueError, match="'zebra': known: class 0, class 1, .*class 19 and 5 more$"
    ):
        class_number(uvit(many, 25).config, "zebra")
    with pytest.raises(ValueError, match="no class 'CAT': did you mean Cat?"):
        class_number(uvit(["Cat", "dog"]).config, "CAT")
    with pytest.raises(ValueError, match="have no names, only numbers from 0 to 1"):
        class_number(uvit(None).config, "cat")
    with pytest.raises(ValueError, match="this model has no classes: it takes no labels"):
        class_number(uvit(None, 0).config, "cat")


def test_names_must_be_one_for_each_class(tiny, changed):
    message = r"class_names are 3 \(a, b, c\), but num_classes is 2: give one name for each class"
    with pytest.raises(ValueError, match=message):
        uvit(["a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        DiffusersDenoiser("dit", **SMALL, num_classes=2, class_names=["a", "b", "c"])
    recipe = changed(model={**tiny.model.model_dump(), "num_classes": 2})
    with pytest.raises(ValueError, match=message):
        build_model(recipe, ["a", "b", "c"])


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_names_change_no_weight_and_are_saved(kind, tiny, changed, tmp_path):
    recipe = changed(model={**tiny.model.model_dump(), "num_classes": 2, "kind": kind})
    named, plain = build_model(recipe, ["ä", "b"]), build_model(recipe)
    assert plain.config.class_names is None
    for one, other in zip(named.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    named.save_pretrained(tmp_path)
    assert type(named).from_pretrained(tmp_path).config.class_names == ["ä", "b"]


def test_numbers_that_come_to_mean_other_classes_are_told():
    lines = transfer_weights(uvit(["cat", "dog"]), uvit(["cat", "cow"]))
    assert "note: class numbers mean others now: 1 dog -> cow" in lines
    for same in (uvit(["cat", "dog"]), uvit(None), uvit(["a", "b", "c"], 3)):
        assert not any("mean" in line for line in transfer_weights(uvit(["cat", "dog"]), same))


def test_a_weak_model_of_other_classes_is_refused():
    strong, weak, unnamed = (
        TrainedModel(uvit(names), Diffusion()) for names in (["cat", "dog"], ["cow", "dog"], None)
    )
    with pytest.raises(ValueError, match="classes are cow, dog, the guided one's cat, dog"):
        refuse_weak(strong, weak)
    refuse_weak(strong, unnamed)
    refuse_weak(strong, strong)


def test_a_name_matches_whether_its_accents_are_composed_or_not():
    composed, apart = "caf\u00e9", "cafe\u0301"
    for known in ([composed, "dog"], [apart, "dog"]):
        config = SimpleNamespace(class_names=known, num_classes=2)
        assert class_number(config, composed) == class_number(config, apart) == 0
    config = SimpleNamespace(class_names=[composed, apart], num_classes=2)  # as they are first
    assert [class_number(config, name) for name in (composed, apart)] == [0, 1]
