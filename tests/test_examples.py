from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import maskdm
from maskdm.cli import main
from maskdm.recipe import Mask

PATH = Path(__file__).parent.parent / "examples" / "swiss_roll.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("swiss_roll", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command does: beside other work two take minutes
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def points(example) -> torch.Tensor:
    return example.roll(1000, seed=0, stream="test")


def run(example, folder: Path, seed: int) -> dict:
    """The figures of a run of 15 + 48 steps, and 58 of the control."""
    picture, figures = folder / f"{seed}.png", folder / f"{seed}.json"
    argv = ["--seed", seed, "--scale", 0.01, "--out", picture, "--json", figures]
    example.main([str(argument) for argument in argv])
    with Image.open(picture) as image:
        assert image.width > 3 * image.height and image.convert("L").getextrema() == (0, 255)
    return json.loads(figures.read_text("utf-8"))


def test_swiss_roll_spends_equal_compute_and_measures_every_panel(example, tmp_path, capsys):
    figures = run(example, tmp_path, seed=3)
    spent, control = figures["flops"].values()
    assert control == pytest.approx(spent, rel=0.01)
    rows = figures["distances"]
    assert len(rows) == 5
    assert all(np.isfinite(value) and value > 0 for row in rows.values() for value in row.values())
    assert all(rows["data"]["energy"] < row["energy"] for row in list(rows.values())[1:])
    printed = capsys.readouterr().out
    assert all(f"{name:<28}{row['energy']:>9.5f}" in printed for name, row in rows.items())
    assert run(example, tmp_path, seed=3) == figures
    assert run(example, tmp_path, seed=4)["distances"] != rows


def test_swiss_roll_pre_training_never_sees_two_patches(example, points):
    shown = {}
    for name, mask in {"pre-train": Mask(kind="patch", rate=0.5), "fine-tune": Mask()}.items():
        model, seen = example.make_model(0), []
        model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[1]))
        example.train(model, example.make_stage(name, mask, 3), points, seed=0)
        shown[name] = torch.cat(seen)
    assert shown["pre-train"].shape == (3 * 256, 1)
    assert shown["pre-train"].unique().tolist() == [0, 1]
    assert (shown["fine-tune"] == torch.arange(2)).all() and shown["fine-tune"].shape[1] == 2


def test_swiss_roll_is_learned_better_by_more_steps(example, points):
    model = example.make_model(0)
    before = example.sample(model, 500, 0, [[0, 1]])
    after = example.train(model, example.make_stage("show", Mask(), 200), points, seed=0)
    drawn = example.sample(after, 500, 0, [[0, 1]])
    energies = [example.distances(x, points)["energy"] for x in (before, drawn)]
    assert energies[1] < energies[0] / 5


def test_swiss_roll_marginals_do_not_see_the_other_patch(example):
    model = example.make_model(0)
    with torch.no_grad():  # first weights make next to nothing of the other patch
        for parameter in model.parameters():
            parameter.mul_(5)
    apart, both = (example.sample(model, 20, 0, groups) for groups in ([[0], [1]], [[0, 1]]))
    assert torch.equal(apart[:, :1], example.sample(model, 20, 0, [[0]]))
    assert (apart - both).abs().mean() > 0.01


def test_swiss_roll_lies_in_the_square_and_has_no_repeats(example, points):
    assert points.shape == (1000, 2, 1) and points.dtype == torch.float32
    assert 0.9 < points.abs().max() < 1.2
    assert not torch.equal(points, example.roll(1000, seed=0, stream="other"))
    radius = points[..., 0].norm(dim=1)
    assert 0.25 < radius.min() < 0.4  # the inner end, a third of the outer one's


def test_energy_distance_equals_closed_forms_and_an_independent_sum(example):
    distance = example.energy_distance
    assert distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])) == 10
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(37, 2)), rng.normal(0.5, 2, size=(23, 2))

    def mean(u: np.ndarray, v: np.ndarray) -> float:
        return np.mean([np.hypot(*(x - y)) for x in u for y in v])

    expected = 2 * mean(a, b) - mean(a, a) - mean(b, b)
    sets = torch.from_numpy(a), torch.from_numpy(b)
    for block_size in (5, 37, 1000):  # 5 leaves a smaller block over
        assert distance(*sets, block_size=block_size) == pytest.approx(expected, rel=1e-12)
    assert distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-12)
    line = distance(sets[0][:, :1], sets[1][:, :1])  # scipy's is the root of 2 int (F - G)^2
    assert line == pytest.approx(stats.energy_distance(a[:, 0], b[:, 0]) ** 2, rel=1e-9)


def test_own_loop_learns_and_leaves_a_model_for_the_commands(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("own_loop", PATH.with_name("own_loop.py"))
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
    for node in ast.walk(ast.parse(PATH.with_name("own_loop.py").read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not str(node.module).startswith("maskdm")
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "maskdm":
            names.add(node.attr)
    assert {"draw_visible", "masked_denoising_loss", "MaskDMPipeline"} <= names
    assert names <= {*maskdm.__all__}


def test_few_images_compares_a_primer_with_equal_compute(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("few_images", PATH.with_name("few_images.py"))
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
