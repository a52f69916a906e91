"""The public face: `import maskdm` is cheap, its names are there, and their examples run."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskdm
from maskdm.cli import main
from maskdm.recipe import Recipe
from maskdm.runs.lines import read_lines

API = Path(__file__).parents[1] / "docs" / "api.md"
TIMES = ("images_per_sec", "data_wait", "elapsed_sec")  # no two runs share them


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in maskdm.__all__ if name != "__version__"])
def test_every_name_is_there_with_its_docstring(name):
    assert getattr(maskdm, name).__doc__
    assert f"`{name}" in API.read_text("utf-8")


def test_the_page_lists_no_other_names():
    listed = re.findall(r"^\| `(\w+)", API.read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(set(maskdm.__all__) - {"__version__"})


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'maskdm' has no attribute 'nothing'"):
        _ = maskdm.nothing
    assert set(maskdm.__all__) <= set(dir(maskdm))


def test_importing_costs_no_torch_and_sets_how_threads_wait():
    code = "import maskdm, sys, os; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    assert run_python(code).split() == ["False", "PASSIVE"]
    assert run_python(code, OMP_WAIT_POLICY="ACTIVE").split() == ["False", "ACTIVE"]
    late = "import torch, maskdm, os; print('OMP_WAIT_POLICY' in os.environ)"
    assert run_python(late).strip() == "False"


def test_training_says_where_threads_spin(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    maskdm.train(tiny, tmp_path / "a")
    assert "OMP_WAIT_POLICY" not in capsys.readouterr().out
    monkeypatch.delenv("OMP_WAIT_POLICY")
    maskdm.train(tiny, tmp_path / "b")
    assert capsys.readouterr().out.count("set OMP_WAIT_POLICY=PASSIVE") == 1


@pytest.mark.parametrize("module", ["masks", "tokens", "diffusion.objective", "diffusion.schedule"])
def test_examples_in_docstrings_run(module):
    loaded = importlib.import_module(f"maskdm.{module}")
    names = {"torch": torch, **{name: getattr(maskdm, name) for name in maskdm.__all__}}
    results = doctest.testmod(loaded, extraglobs=names)
    assert results.attempted and not results.failed


def test_python_leaves_the_folder_that_the_command_leaves(tiny, changed, tmp_path):
    recipe = changed(
        data={**tiny.data.model_dump(), "held_out": 50},
        preview_every=4,
        evaluate_every=4,
        evaluation={"num": 16, "num_components": 4, "quick_num": 32},
    )
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.to_yaml())
    command, python = tmp_path / "command", tmp_path / "python"
    assert main(["train", str(file), "--out", str(command)]) == 0
    maskdm.train(file, str(python), show=False)

    def files(run: Path) -> list[str]:
        return sorted(str(path.relative_to(run)) for path in run.rglob("*"))

    assert files(command) == files(python)
    assert {"loss.png", "model/model_index.json", "samples/step-00000004.png"} <= set(files(python))
    for name in ("quality.jsonl", "metrics.jsonl"):
        one, other = (
            [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(run / name)]
            for run in (command, python)
        )
        assert one == other and len(one) >= 3
    for preview in (python / "samples").iterdir():
        pixels = [
            np.asarray(Image.open(run / "samples" / preview.name)) for run in (command, python)
        ]
        assert np.array_equal(*pixels)
    for name in ("recipe.yaml", "model/model_index.json", "model/unet/config.json"):
        assert (command / name).read_bytes() == (python / name).read_bytes()
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert (command / weights).read_bytes() == (python / weights).read_bytes()


def test_recipes_are_taken_by_name_too(tmp_path):
    with pytest.raises(ValueError, match="no recipe 'digit': did you mean digits"):
        maskdm.train("digit", tmp_path / "run")
    assert isinstance(maskdm.load_recipe("digits"), Recipe)
    assert not (tmp_path / "run").exists()
