"""Pushing a run to the Hub: what is uploaded, what the card says, what stays here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import tiny_settings
from huggingface_hub import ModelCard
from PIL import Image

import maskdm
from maskdm.cli import main
from maskdm.evaluation.samples import weights_sha256
from maskdm.export.hub import public_name
from maskdm.runs.load import load_model


class StandIn:
    """The Hub's client, which keeps repositories in a folder."""

    root: Path
    public: set[str]
    fails: Exception | None = None

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> str:
        if type(self).fails:
            raise type(self).fails
        assert exist_ok
        if not private and not (self.root / name).exists():
            self.public.add(name)
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return f"https://hub.example/{name}"

    def repo_info(self, name: str) -> Any:
        return type("Info", (), {"private": name not in self.public})

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        target = self.root / repo_id
        for pattern in delete_patterns:
            for old in target.glob(pattern):
                old.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub: what is uploaded there can be downloaded."""
    root = tmp_path / "hub"
    client = type("Client", (StandIn,), {"root": root, "public": set()})
    monkeypatch.setattr(huggingface_hub, "HfApi", client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")

    def download(name: str, allow_patterns: list[str]) -> str:
        return str(root / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return client


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run on class folders, and an evaluation of it; named by absolute paths."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("cat", "dog"):
        (folder / "secret" / "photos" / name).mkdir(parents=True)
        for number in range(6):
            image = Image.new("L", (8, 8), 20 * number)
            image.putpixel((number, 2), 255)
            image.save(folder / "secret" / "photos" / name / f"{number}.png")
    settings = tiny_settings()
    settings["data"]["source"] = str(folder / "secret" / "photos")
    settings["model"]["num_classes"] = 2
    (folder / "tiny.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    run = folder / "run"
    assert main(["train", str(folder / "tiny.yaml"), "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--metrics", "frechet", "memorization"]) == 0
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def pushed(*arguments: str) -> int:
    return main(["push", *map(str, arguments)])


def test_a_pushed_run_is_found_by_its_id_and_draws_the_same(run, hub, capsys):
    assert pushed(run, "someone/pets", "--num", "3") == 0
    out = capsys.readouterr()
    assert "-> https://hub.example/someone/pets" in out.out
    assert "no licence: --license NAME gives it one" in out.err
    theirs, own = maskdm.load("someone/pets"), maskdm.load(str(run))
    assert weights_sha256(theirs.denoiser) == weights_sha256(own.denoiser)
    assert theirs.denoiser.config.class_names == ["cat", "dog"]
    draw = {"seed": 5, "output_type": "np"}
    assert (theirs(2, **draw).images == own(2, **draw).images).all()
    again = ["train", str(run / "recipe.yaml"), "--init", "someone/pets", "--out", str(run / "on")]
    assert main(again) == 0  # and serves as --init


def test_the_card_says_what_the_run_was(run, hub):
    assert pushed(run, "someone/pets", "--license", "cc-by-4.0") == 0
    folder = hub.root / "someone" / "pets"
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data.to_dict()  # the Hub's own reader of metadata
    assert data["license"] == "cc-by-4.0"
    assert data["tags"][0] == "class-conditional-image-generation" and "pipeline_tag" not in data
    assert "masked-pre-training" in data["tags"] and "base_model" not in data
    record = json.loads((run / "evaluation.json").read_text())[-1]
    (figure,) = data["model-index"][0]["results"][0]["metrics"]
    assert figure["type"] == "frechet"
    assert figure["value"] == pytest.approx(record["metrics"]["frechet"]["value"])
    assert figure["args"]["features"] == "pca" and figure["args"]["samples"] == 16
    assert figure["args"]["interval_95"] == pytest.approx(record["metrics"]["frechet"]["interval"])
    progress = json.loads((run / "checkpoints/step-00000011/progress.json").read_text())
    for part in (
        "Classes: cat, dog.",
        "| hide | 50 %, 2x2 blocks | 6 | 8 | 0.001 |",
        f"Images seen: {progress['images']:,}, in 11 steps",
        "Number: 12 images",
        "Frechet distance by chance",
        record["memorization"]["verdict"][1:],
        "`cc-by-4.0`",
    ):
        assert part in text, part
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 4 * 64  # 16 samples in 4 columns


def test_the_card_s_lines_of_python_run(run, hub, monkeypatch):
    assert pushed(run, "someone/pets") == 0
    text = (hub.root / "someone" / "pets" / "README.md").read_text()
    ours, theirs = (part.split("```")[0] for part in text.split("```python\n")[1:])
    names: dict[str, Any] = {}
    exec(ours, names)
    assert len(names["images"]) == 4
    here = str(hub.root / "someone" / "pets")  # diffusers downloads by itself
    names = {}
    exec(theirs.replace("someone/pets", here), names)
    assert weights_sha256(names["pipeline"].unet) == weights_sha256(maskdm.load(run).denoiser)


def test_no_local_path_and_no_training_image_leaves_the_machine(run, hub):
    for name in ("memorization.png", "evaluation.json", "notes about secret.txt"):
        (run / "model" / name).write_text("secret")  # also where these lie beside the weights
    assert pushed(run, "someone/pets") == 0
    files = [path for path in (hub.root / "someone/pets").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert not names & {"environment.json", "evaluation.json", "memorization.png"}
    assert "notes about secret.txt" not in names
    for path in files:
        assert b"secret" not in path.read_bytes(), path
        assert str(run.parent).encode() not in path.read_bytes(), path
    recipe = maskdm.load_recipe(hub.root / "someone/pets/recipe.yaml")
    assert recipe.data.source == "photos"


@pytest.mark.parametrize("kind", ["uvit", "unet2d"])
def test_no_path_of_a_weak_model_or_of_the_network_leaves_the_machine(kind, made, hub, tmp_path):
    secret = tmp_path / "secret"
    settings = maskdm.load_recipe(made / "recipe.yaml").model_dump()
    settings["sampling"]["guidance"] = {"kind": "autoguidance", "weak": str(secret / "weak")}
    if kind == "unet2d":
        options = {"norm_num_groups": 4, "block_out_channels": [8, 8, 8, 8]}
        settings["model"] = {"kind": kind, "patch_size": 4, "num_classes": 2, "options": options}
        settings["data"]["size"] = 16
        settings["sampling"]["guidance"]["weak"] = "primer"
    settings["num_previews"] = 0
    shutil.copytree(made / "model", secret / "weak")
    maskdm.train(maskdm.Recipe(**settings), secret / "run")
    assert pushed(secret / "run", "someone/pets") == 0
    for path in (hub.root / "someone/pets").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
    pipeline = maskdm.load(hub.root / "someone/pets")  # as the card says
    assert len(pipeline(2, seed=0).images) == 2


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("digits", "digits"),
        ("/home/me/photos", "photos"),
        ("~/photos/", "photos"),
        ("/", "images"),
        ("hf:owner/name:train", "hf:owner/name:train"),
        ("hf:/data/sets/mine:train", "hf:mine:train"),
        ("https://me:word@host/a.tar?token=1", "https://host/a.tar"),
    ],
)
def test_names_lose_what_is_of_this_machine(name, public):
    assert public_name(name) == public


def test_a_dry_run_writes_all_and_asks_the_hub_nothing(run, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.delattr(huggingface_hub, "HfApi")
    notes = tmp_path / "notes.md"
    notes.write_text("Twelve dots that I drew.\n")
    out = tmp_path / "upload"
    assert pushed(run, "me/pets", "--dry-run", out, "--notes", notes) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    text = (out / "README.md").read_text()
    assert "Twelve dots that I drew." in text and "no permission" in text
    assert "license" not in ModelCard(text).data.to_dict()
    assert load_model(out).trained.model.num_classes == 2
    assert pushed(run, "me/pets", "--dry-run", out) == 2  # it is not empty any more


def test_metrics_of_other_weights_are_left_out(run, hub, capsys):
    records = json.loads((run / "evaluation.json").read_text())
    records[-1]["samples"]["weights_sha256"] = "0" * 64
    (run / "evaluation.json").write_text(json.dumps(records))
    assert pushed(run, "someone/pets") == 0
    assert "1 evaluation of other weights left out" in capsys.readouterr().err
    text = (hub.root / "someone/pets/README.md").read_text()
    assert "These weights were not measured." in text and "model-index" not in text


def test_a_stage_s_end_is_pushed_as_what_it_is(run, hub):
    assert pushed(f"{run}@hide", "someone/primer") == 0
    text = (hub.root / "someone/primer/README.md").read_text()
    assert "These weights are from step 6 of 11, in the stage hide." in text
    primer = load_model(f"{run}@hide").trained.model
    assert weights_sha256(maskdm.load("someone/primer").denoiser) == weights_sha256(primer)


def test_an_unconditional_model_names_its_task_and_its_base(changed, run, hub):
    recipe = maskdm.load_recipe(run / "recipe.yaml")
    settings = recipe.model_dump()
    settings["model"]["num_classes"] = 0
    settings["stages"] = settings["stages"][1:]
    maskdm.train(maskdm.Recipe(**settings), run.parent / "base")
    assert pushed(run.parent / "base", "someone/base") == 0
    data = ModelCard((hub.root / "someone/base/README.md").read_text()).data
    assert data.pipeline_tag == data.tags[0] == "unconditional-image-generation"
    assert "masked-pre-training" not in data.tags
    maskdm.train(maskdm.Recipe(**{**settings, "init": "someone/base"}), run.parent / "onward")
    assert pushed(run.parent / "onward", "someone/onward") == 0
    data = ModelCard((hub.root / "someone/onward/README.md").read_text()).data
    assert data.base_model == "someone/base"


def test_a_private_push_refuses_a_public_repository(run, hub, capsys):
    assert pushed(run, "someone/pets", "--private") == 0 and not hub.public
    assert pushed(run, "someone/seen") == 0 and hub.public == {"someone/seen"}
    (hub.root / "someone/seen/README.md").write_text("as before")
    assert pushed(run, "someone/seen", "--private") == 2
    assert "exists on the Hub and is public" in capsys.readouterr().err
    assert (hub.root / "someone/seen/README.md").read_text() == "as before"


def test_what_cannot_be_pushed_is_refused_in_one_line(run, hub, monkeypatch, capsys):
    hub.fails = OSError("403 Forbidden")
    assert pushed(run, "someone/pets", "--num", "1") == 2
    assert "someone/pets was not uploaded (403 Forbidden)" in capsys.readouterr().err
    for arguments, text in (
        ((run, "pets"), "is no Hub id: use owner/name"),
        ((run, "some one/pets"), "is no Hub id"),
        ((run, "someone/pets", "--num", "0"), "at least one sample"),
        ((run, "someone/pets", "--notes", run / "nothing.md"), "cannot be read"),
        ((shutil.copytree(run / "model", run.parent / "copy"), "a/b"), "not in a run's folder"),
    ):
        assert pushed(*arguments) == 2
        assert text in " ".join(capsys.readouterr().err.split()), text
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert pushed(run, "someone/pets") == 2
    assert "log in first" in capsys.readouterr().err
