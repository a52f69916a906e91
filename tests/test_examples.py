from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskdm
from maskdm.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command does: beside other work two take minutes
    yield
    torch.set_num_threads(num_threads)


def test_own_loop_learns_and_leaves_a_model_for_the_commands(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    own_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_loop)
    losses = own_loop.main(["--out", str(tmp_path), "--scale", "0.1"])
    assert [len(losses[name]) for name in losses] == [30, 50]
    first, last = losses["pre-training"][:5], losses["fine-tuning"][-5:]
    assert sum(last) < sum(first) / 2
    printed = capsys.readouterr().out
    assert "8 of 16 patches" in printed and "16 of 16 patches" in printed
    with Image.open(tmp_path / "samples.png") as page:
        assert page.size == (10 * 66 + 2, 6 * 66 + 2)
        assert page.getextrema()[0] == 0 and page.getextrema()[1] > 240
    arguments = ["--num", "3", "--steps", "4", "--label", "7", "--out", str(tmp_path / "x.npz")]
    assert main(["sample", str(tmp_path / "model"), *arguments]) == 0
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, 8, 8, 1)


def test_own_loop_uses_public_names_only():
    names = set()
    for node in ast.walk(ast.parse((EXAMPLES / "own_loop.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not str(node.module).startswith("maskdm")
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "maskdm":
            names.add(node.attr)
    assert {"draw_visible", "masked_denoising_loss", "MaskDMPipeline"} <= names
    assert names <= {*maskdm.__all__}


def test_few_images_compares_a_primer_with_equal_compute(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("few_images", EXAMPLES / "few_images.py")
    few_images = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(few_images)
    few_images.MEASURED_EVERY = "100%"
    losses = few_images.main(["--out", str(tmp_path), "--scale", "0.04"])
    last = {name: curve[max(curve)] for name, curve in losses.items()}
    assert last["from-primer"] < last["fresh"]  # 20 steps that began somewhere
    assert max(losses["fresh"]) == 10 < max(losses["fresh-longer"]) < 30
    flops = {name: few_images.flops_of(tmp_path / name) for name in (*losses, "primer")}
    spent = flops["primer"] + flops["from-primer"]
    assert flops["fresh-longer"] == pytest.approx(spent, abs=flops["fresh"] / 10)
    assert "lowest held-out loss" in capsys.readouterr().out
    with Image.open(tmp_path / "samples.png") as page:
        assert page.size == (4 * 8 * 34 + 3 * 16, 6 * 34) and page.getextrema() == (0, 255)
    seen, few = (np.load(tmp_path / f"{name}.npy") for name in ("others", "few"))
    assert len(few) == 533 and not {one.tobytes() for one in few} & {one.tobytes() for one in seen}
