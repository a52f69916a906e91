"""Trackers: they get what the lines of JSON have, over all resumes, and end no training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_settings
from test_training import train_until

from maskdm.cli import main
from maskdm.families import TRACKERS, TrackerKind
from maskdm.images.store import open_store
from maskdm.recipe import Recipe
from maskdm.recipe_files import load_recipe
from maskdm.runs.changes import accepted_changes
from maskdm.runs.checkpoint import Progress
from maskdm.runs.lines import read_lines
from maskdm.training import trackers
from maskdm.training.trackers import PLACES, flat
from maskdm.training.trainer import train


def recipe_for(folder: Path, *names: str) -> Recipe:
    """The tiny recipe on 60 digits, 7 held out, measured by losses alone, with two previews."""
    made = tiny_settings()
    digits = open_store(Recipe(**made).data, progress=False)
    np.savez(folder / "digits.npz", digits.images[:60])
    made["data"] |= {"source": str(folder / "digits.npz"), "held_out": 7}
    made["evaluation"] |= {"quick_num": 0}
    return Recipe(**made | {"evaluate_every": 4, "preview_steps": 2, "log_to": names})


class Fake:
    """A tracker that keeps what it gets, and may fail from some call on."""

    def __init__(self, fails_after: int = 1000):
        self.lines: list[tuple[dict, int]] = []
        self.pictures: list[tuple[str, tuple[int, int], int]] = []
        self.settings: dict = {}
        self.is_closed, self.left = False, fails_after

    def log(self, values, step):
        self.count()
        self.lines.append((values, step))

    def finish(self):
        self.is_closed = True

    def count(self):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no route\nto host")

    def log_picture(self, title, picture, step):
        self.count()
        self.pictures.append((title, picture.size, step))

    @property
    def row(self) -> TrackerKind:
        return TrackerKind(
            "kept in memory",
            lambda place: self,
            lambda tracker, *arguments: tracker.log_picture(*arguments),
            lambda tracker, settings: tracker.settings.update(settings),
        )


def with_fakes(monkeypatch: pytest.MonkeyPatch, **fakes: Fake) -> None:
    monkeypatch.setattr(trackers, "TRACKERS", {name: fake.row for name, fake in fakes.items()})
    monkeypatch.setattr(trackers, "refuse_trackers", lambda names: None)
    from maskdm.training import start

    monkeypatch.setattr(start, "refuse_trackers", lambda names: None)


def test_trackers_get_the_numbers_of_all_lines_previews_and_the_recipe(tmp_path, monkeypatch):
    fake = Fake()
    with_fakes(monkeypatch, wandb=fake)
    recipe = recipe_for(tmp_path, "wandb")
    train(recipe, tmp_path / "run", show=False)
    sent = [(values, step) for values, step in fake.lines if "train/loss" in values]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [step for _, step in sent] == [line["step"] for line in lines] == [2, 4, 6, 8, 10, 11]
    for (values, _), line in zip(sent, lines, strict=True):
        assert values["train/loss"] == line["loss"] and values["train/lr"] == line["lr"]
        assert values["progress/images"] == line["images"]
        assert values["progress/flops"] == line["flops"]
        assert values["progress/stage"] == 1 + (line["stage"] == "show")
    sent = [(values, step) for values, step in fake.lines if "quality/dense_loss" in values]
    quality = read_lines(tmp_path / "run" / "quality.jsonl")
    assert [step for _, step in sent] == [line["step"] for line in quality] == [4, 6, 8, 11]
    assert [values["quality/dense_loss"] for values, _ in sent] == [
        q["dense_loss"] for q in quality
    ]
    assert [(title, step) for title, _, step in fake.pictures] == [
        ("previews", 6),
        ("previews", 11),
    ]
    assert fake.settings["stages.0.mask.kind"] == "block" and fake.settings["init"] == "None"
    assert fake.is_closed


def test_a_tracker_that_fails_is_noted_once_and_ends_no_training(tmp_path, monkeypatch, capsys):
    good, bad = Fake(), Fake(fails_after=2)
    with_fakes(monkeypatch, wandb=bad, mlflow=good)
    assert train(recipe_for(tmp_path, "wandb", "mlflow"), tmp_path / "run").finished
    text = capsys.readouterr().out
    assert text.count("tracker wandb failed and is left out") == 1
    assert "no route to host); metrics.jsonl has everything" in text
    assert len(bad.lines) == 2 and len(good.lines) == 10
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 6


def test_a_tracker_that_does_not_open_is_tried_again_at_the_next_start(
    tmp_path, monkeypatch, capsys
):
    recipe, run = recipe_for(tmp_path, "wandb"), tmp_path / "run"

    def refuses(place):
        raise OSError("no network")

    fake = Fake()
    with_fakes(monkeypatch, wandb=fake)
    closed = TrackerKind("", refuses, refuses, refuses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "TRACKERS", {"wandb": closed})
        train_until(recipe, run, 6)
    train(recipe, run)
    assert [step for values, step in fake.lines if "train/loss" in values] == [8, 10, 11]
    assert fake.settings["seed"] == 0  # the recipe is sent where it has not been


def test_trackers_may_change_at_any_time_and_are_checked_before_training(tmp_path, capsys):
    recipe = recipe_for(tmp_path, "tensorboard")
    other = Recipe(**recipe.model_dump() | {"log_to": ()})
    progress = Progress(step=3, stage_step=3)
    assert [one.name for one in accepted_changes(recipe, other, progress, False)] == ["log_to"]
    with pytest.raises(ValueError, match="log_to.*unknown tracker 'tensorbord': did you mean"):
        Recipe(**recipe.model_dump() | {"log_to": "tensorbord"})


def test_names_may_stand_with_commas_in_files_and_flags(tmp_path, monkeypatch):
    made = recipe_for(tmp_path).model_dump()
    assert Recipe(**made | {"log_to": "tensorboard, wandb"}).log_to == ("tensorboard", "wandb")
    recipe = Recipe(**made | {"log_to": ["mlflow"]})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml").log_to == ("mlflow",)
    fakes = {"trackio": Fake(), "wandb": Fake()}
    with_fakes(monkeypatch, **fakes)
    for flags in (["--log-to", "trackio,wandb"], ["--log-to", "trackio", "wandb"]):
        run = tmp_path / str(len(flags))
        assert main(["train", str(tmp_path / "r.yaml"), "--out", str(run), *flags]) == 0
        assert load_recipe(run / "recipe.yaml").log_to == ("trackio", "wandb")
    assert all(len(fake.lines) == 20 for fake in fakes.values())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_its_install_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    (tmp_path / "r.yaml").write_text(recipe_for(tmp_path, name).to_yaml())
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert f"pip install 'maskdm[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_each_tracker_has_its_extra():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    for name in TRACKERS:
        assert f'\n{name} = [\n    "{name}>=' in project


def test_settings_are_flat_and_of_plain_types():
    settings = flat({"a": None, "b": [{"c": 1}, {"c": (1, 2)}], "d": {"e": True}})
    assert settings == {"a": "None", "b.0.c": 1, "b.1.c": "(1, 2)", "d.e": True}


# The real ones, where they are installed


def test_tensorboards_files_hold_one_run_over_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'maskdm[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, run = recipe_for(tmp_path, "tensorboard"), tmp_path / "run"
    train_until(recipe, run, 10)  # which is sent; saved at 9
    train(recipe, run, show=False)
    (folder,) = (run / "tensorboard").iterdir()
    assert folder.name == f"run-{json.loads((run / PLACES).read_text())['id']}"
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = read_lines(run / "metrics.jsonl")
    for name, key in (("train/loss", "loss"), ("progress/flops", "flops")):
        seen = events.Scalars(name)
        expected = {line["step"]: line[key] for line in lines}
        steps = [one.step for one in seen if one.step in expected]
        assert sorted(set(steps)) == [2, 4, 6, 8, 10, 11]
        for one in seen:
            if one.step in expected:
                assert one.value == pytest.approx(expected[one.step], rel=1e-6)
    losses = [one.step for one in events.Scalars("train/loss")]
    assert losses == [2, 4, 6, 8, 10, 11]  # none twice
    quality = {line["step"]: line["dense_loss"] for line in read_lines(run / "quality.jsonl")}
    dense = {one.step: one.value for one in events.Scalars("quality/dense_loss")}
    assert dense == pytest.approx(quality, rel=1e-6)
    assert [one.step for one in events.Images("previews")] == [11]  # none before the kill
    (text,) = events.Tensors("recipe/text_summary")
    assert b"stages.0.mask.rate | 0.5" in text.tensor_proto.string_val[0]


def test_trackios_run_goes_on_when_it_is_continued(tmp_path):
    pytest.importorskip("trackio", reason="pip install 'maskdm[trackio]'")
    code = (
        "import sys, json\n"
        "from maskdm.cli import main\n"
        "assert main(['train', sys.argv[1], '--out', sys.argv[2], *sys.argv[3:]]) == 0\n"
        "import trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "names = [run.name for run in trackio.Api().runs('maskdm')]\n"
        "found = {name: SQLiteStorage.get_logs('maskdm', name) for name in names}\n"
        "print('FOUND' + json.dumps(found, default=str))\n"
    )
    (tmp_path / "r.yaml").write_text(recipe_for(tmp_path, "trackio").to_yaml())
    run = tmp_path / "run"
    train_until(recipe_for(tmp_path), run, 7)  # without a tracker
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    for flags in ([], ["--stages.1.steps", "8"]):
        command = [sys.executable, "-c", code, str(tmp_path / "r.yaml"), str(run), *flags]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        assert "failed and is left out" not in answer.stdout, answer.stdout
    found = json.loads(answer.stdout.split("FOUND")[1].splitlines()[0])
    (logs,) = found.values()
    losses = {one["step"]: one["train/loss"] for one in logs if "train/loss" in one}
    expected = {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl")}
    assert losses == pytest.approx({step: expected[step] for step in (8, 10, 11, 12, 14)})
    assert [one["step"] for one in logs if "previews" in one] == [6, 11, 14]
    assert all("progress/images" in one for one in logs if "train/loss" in one)


def test_mlflows_run_goes_on_when_it_is_continued(tmp_path):
    pytest.importorskip("mlflow", reason="pip install 'maskdm[mlflow]'")
    code = (
        "import sys, json\n"
        "from maskdm.cli import main\n"
        "assert main(['train', sys.argv[1], '--out', sys.argv[2], *sys.argv[3:]]) == 0\n"
        "import mlflow\n"
        "client = mlflow.MlflowClient()\n"
        "(experiment,) = [one for one in client.search_experiments() if one.name == 'maskdm']\n"
        "(run,) = client.search_runs([experiment.experiment_id])\n"
        "losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "
        "'train/loss')]\n"
        "pictures = [file.path for file in client.list_artifacts(run.info.run_id, 'images')]\n"
        "print('FOUND' + json.dumps([losses, run.data.params, pictures]))\n"
    )
    (tmp_path / "r.yaml").write_text(recipe_for(tmp_path, "mlflow").to_yaml())
    run = tmp_path / "run"
    train_until(recipe_for(tmp_path), run, 7)  # without a tracker
    places = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    for flags in ([], ["--stages.1.steps", "8"]):
        command = [sys.executable, "-c", code, str(tmp_path / "r.yaml"), str(run), *flags]
        answer = subprocess.run(
            command, env={**os.environ, **places}, capture_output=True, text=True, cwd=tmp_path
        )
        assert answer.returncode == 0, answer.stderr
        assert "failed and is left out" not in answer.stdout, answer.stdout
    losses, settings, pictures = json.loads(answer.stdout.split("FOUND")[1].splitlines()[0])
    expected = {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl")}
    assert dict(losses) == pytest.approx({step: expected[step] for step in (8, 10, 11, 12, 14)})
    assert settings["stages.0.mask.kind"] == "block"
    steps = {int(part.split("+")[2]) for part in pictures}  # images/previews+step+11+...
    assert steps == {6, 11, 14}
