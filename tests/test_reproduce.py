"""The paper's tables and figures, repeated: complete, resumable, each beside its control."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from maskdm.cli import main
from maskdm.models.build import build_model
from maskdm.paper import fig2
from maskdm.paper import reproduce as module
from maskdm.paper.reproduce import Wanted, recipes_of, reproduce, rows_of, targets
from maskdm.paper.scales import SCALES, at_scale
from maskdm.paper.tables import experiments
from maskdm.recipe_files import load_recipe
from maskdm.training.trainer import TrainResult
from maskdm.training.work import stage_work, total_flops


def flops_of(recipe) -> int:
    return total_flops(recipe, stage_work(recipe, build_model(recipe)))


def test_every_experiment_can_be_named_alone_and_with_its_neighbours():
    assert {*experiments()} <= {*targets()}
    assert recipes_of("table1") == list(
        dict.fromkeys(recipes_of("table1a") + recipes_of("table1b") + recipes_of("table1c"))
    )
    # Recipes that begin with another one's primer come after it, also where it is not among them.
    names = recipes_of("fig5b")
    assert names.index("fig5b-vggface2") < names.index("fig5b-10-from-vggface2")
    with pytest.raises(ValueError, match="unknown table or figure 'tabel1': did you mean table1"):
        recipes_of("tabel1")


@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_recipes_become_smaller_alike(scale):
    recipes = {name: load_recipe(name) for name in recipes_of("table1a")}
    smaller = at_scale(recipes, SCALES[scale])
    for name, recipe in smaller.items():
        before = recipes[name]
        assert [stage.mask for stage in recipe.stages] == [stage.mask for stage in before.stages]
        assert recipe.diffusion.schedule == before.diffusion.schedule
        assert recipe.diffusion.prediction == {"smoke": "eps", "small": "x0"}[scale]
        works = [stage_work(one) for one in (before, recipe)]  # on the same grid
        assert [one.num_visible for one in works[0]] == [one.num_visible for one in works[1]]
        kinds = {stage.ema.kind for stage in recipe.stages}
        assert kinds == {{"smoke": "warmup", "small": "power"}[scale]}
    most = max(flops_of(recipe) for recipe in smaller.values())
    assert most == pytest.approx(SCALES[scale].flops, rel=0.05)
    steps = [sum(stage.steps for stage in one["table1-a-patch-50"].stages) / 250_000
             for one in (recipes, smaller)]  # fmt: skip
    assert steps[0] == 1 and steps[1] < 0.01
    assert at_scale(recipes, SCALES["paper"]) == recipes
    other = at_scale({"a": load_recipe("fig5a-ffhq64")}, SCALES[scale], ["one", "two"])
    assert other["a"].data.source == "two"


def test_a_table_is_repeated_and_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    check("table1c", tmp_path, monkeypatch, capsys)
    page = (tmp_path / "table1c" / "README.md").read_text()
    for name, fid in {"table1-a-block2-50": 6.51, "table1-c-block8": 7.43}.items():
        found = json.loads((tmp_path / "table1c" / f"{name}-0" / "evaluation.json").read_text())
        value = found[-1]["metrics"]["frechet"]["value"]
        row = re.search(rf"\| {name} \| {fid} \| \**{value:.4g}\** \| ([\d.e+]+) \| ", page)
        dense = json.loads(
            (tmp_path / "table1c" / "table1-a-patch-50-0-dense" / "evaluation.json").read_text()
        )
        assert row[1] == f"{dense[-1]['metrics']['frechet']['value']:.4g}"
    # Rows that spend as much have one control.
    assert len(list((tmp_path / "table1c").glob("*-dense"))) == 1


@pytest.mark.reproduce
@pytest.mark.parametrize("target", [name for name in experiments() if name != "table1c"])
def test_every_table_and_figure_is_repeated(target, tmp_path, monkeypatch, capsys):
    check(target, tmp_path, monkeypatch, capsys)


def check(target: str, folder: Path, monkeypatch, capsys) -> None:
    """Repeats a target at its smallest; a signal ends the second training, then it goes on."""
    calls, real = [], module.train

    def train(recipe, run_dir, **how):
        calls.append(Path(run_dir).name)
        if len(calls) == 2:
            return TrainResult(False, None, Path("checkpoint"))
        return real(recipe, run_dir, **how)

    monkeypatch.setattr(module, "train", train)
    out = folder / target
    assert main(["reproduce", target, "--out", str(out)]) == 3
    assert "the same command goes on" in capsys.readouterr().out
    trained = sorted((out / calls[0] / "checkpoints").glob("step-*/optimizer.safetensors"))
    written = [path.stat().st_mtime_ns for path in trained]
    assert main(["reproduce", target, "--out", str(out)]) == 0
    assert trained and [path.stat().st_mtime_ns for path in trained] == written  # not anew
    page = (out / "README.md").read_text()
    assert "These figures mean nothing" in page and experiments()[target].title in page
    for name in recipes_of(target):
        assert f"| {name} |" in page
    assert (out / "picture.png").stat().st_size > 5000


@pytest.mark.reproduce
def test_figure_2_is_repeated(tmp_path, monkeypatch, capsys):
    """As the others: a signal ends the second training, then it goes on."""
    calls, real = [], fig2.train

    def train(recipe, run_dir, **how):
        calls.append(Path(run_dir).name)
        if len(calls) == 2:
            return TrainResult(False, None, Path("checkpoint"))
        return real(recipe, run_dir, **how)

    monkeypatch.setattr(fig2, "train", train)
    out = tmp_path / "fig2"
    assert main(["reproduce", "fig2", "--out", str(out)]) == 3
    assert "the same command goes on" in capsys.readouterr().out
    trained = sorted((out / "fig2-0" / "checkpoints").glob("step-*/optimizer.safetensors"))
    written = [path.stat().st_mtime_ns for path in trained]
    assert main(["reproduce", "fig2", "--out", str(out)]) == 0
    assert trained and [path.stat().st_mtime_ns for path in trained] == written
    page = (out / "README.md").read_text()
    assert "These figures mean nothing" in page and fig2.TITLE in page
    found = re.findall(r"\| ([a-zA-Z ,-]+) \| ([\d.e-]+) ", page)
    rows = {name: float(value) for name, value in found}
    assert list(rows) == [fig2.DATA, fig2.PRIMER, fig2.JOINT, fig2.TUNED, fig2.DENSE]
    assert all(rows[fig2.DATA] < value for name, value in rows.items() if name != fig2.DATA)
    assert (out / "picture.png").stat().st_size > 5000
    assert (out / "fig2-0-dense" / "control.json").is_file()


def test_figure_2_measures_points_by_known_distances():
    points, fresh = fig2.roll(300, 0, "data"), fig2.roll(600, 0, "fresh")
    found = fig2.distances(points, fresh)
    for i, value in enumerate((found.x, found.y)):
        assert value == pytest.approx(stats.wasserstein_distance(points[:, i], fresh[:, i]))
    x, y = points[:, 0], fresh[:, 0]  # on a line, scipy's is the root of half the square
    line = fig2.energy_distance(x[:, None], y[:, None])
    assert line == pytest.approx(stats.energy_distance(x, y) ** 2)
    assert fig2.energy_distance(np.zeros((1, 2)), np.array([[3.0, 4.0]])) == 10
    a, b = points[:37], fresh[:23] * 2

    def mean(u: np.ndarray, v: np.ndarray) -> float:
        return np.mean([np.hypot(*(one - other)) for one in u for other in v])

    expected = 2 * mean(a, b) - mean(a, a) - mean(b, b)
    assert fig2.energy_distance(a, b) == pytest.approx(expected, rel=1e-12)
    apart = fig2.energy_distance(points, fresh + [3.0, 0.0])
    assert 0 < found.energy < 0.01 < apart


def test_figure_2_draws_each_pixel_by_itself_where_it_should(monkeypatch):
    """One patch at a time is a sample of p(x) p(y): the network never sees two."""
    seen = []

    def generate(trained, settings, indices, seed, visible, finish):
        seen.append(visible.tolist())
        return torch.full((len(indices), 1, 2, 1), float(len(seen)))

    monkeypatch.setattr(fig2, "generate", generate)
    monkeypatch.setattr(
        fig2, "load_model", lambda name: SimpleNamespace(trained=None, sampling=None)
    )
    assert fig2.points_of("run", 3, 0, [[0], [1]]).tolist() == [[1, 2]] * 3
    assert seen == [[[0]] * 3, [[1]] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "paper"], "fig2 at scale paper: the paper gives no numbers; use small"),
        (["--scale", "smal"], "unknown scale 'smal': did you mean small"),
        (["--flops", "1e9"], "fig2 has its own points and length"),
        (["--only", "fig2"], "fig2 has its own points and length"),
    ],
)
def test_figure_2_refuses_what_it_has_not(tmp_path, capsys, options, message):
    assert main(["reproduce", "fig2", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_rows_of_several_seeds_have_means_and_their_spread(tmp_path):
    wanted = Wanted("table2", "smoke", flops=1e8, seeds=2, with_control=False)
    (row,) = reproduce(wanted, tmp_path)
    assert rows_of(wanted, tmp_path) == [row]
    assert rows_of(replace(wanted, flops=2e8), tmp_path) == []  # those are other trainings
    assert len(row.found) == len(row.runs) == 2 and row.found[0] != row.found[1]
    assert module.number([2e-4, 2.2e-4]) == "0.000210 ± 0.000014" and module.number([]) == ""
    assert not list(tmp_path.glob("*-dense"))


def test_a_page_of_some_recipes_and_of_those_done_before_a_kill(tmp_path, monkeypatch, capsys):
    command = ["reproduce", "table1c", "--out", str(tmp_path), "--flops", "1e9", "--no-control"]
    assert main([*command, "--only", "table1-c-block8"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert re.findall(r"\| (table1\S+) \|", page) == ["table1-c-block8"]
    assert "**Still missing: 3 of 4 recipes.**" in page
    run = load_recipe(tmp_path / "table1-c-block8-0" / "recipe.yaml")
    both = {name: load_recipe(name) for name in recipes_of("table1c")}
    alike = at_scale(both, SCALES["smoke"], flops=1e9)["table1-c-block8"]  # beside the others
    assert [stage.steps for stage in run.stages] == [stage.steps for stage in alike.stages]

    def stop(recipe, run_dir, **how):
        return real(recipe, run_dir, **how) if "patch" in run_dir.name else stopped

    real, stopped = module.train, TrainResult(False, None, Path("checkpoint"))
    monkeypatch.setattr(module, "train", stop)
    assert main(command) == 3
    page = (tmp_path / "README.md").read_text()
    assert "**Still missing: 2 of 4 recipes.**" in page  # what was there before stays
    assert re.findall(r"\| (table1\S+) \|", page) == ["table1-a-patch-50", "table1-c-block8"]
    capsys.readouterr()
    assert main([*command, "--only", "table1-scratch"]) == 2
    assert "unknown recipe of table1c 'table1-scratch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "paper", "--source", "digits"], "--scale paper is as in the paper: leave out"),
        (["--scale", "paper", "--flops", "1e12"], "--scale paper is as in the paper: leave out"),
        (["--flops", "-1"], "--flops -1: above 0"),
    ],
)
def test_what_a_scale_cannot_be_is_refused(tmp_path, capsys, options, message):
    assert main(["reproduce", "table2", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_images_of_a_curve_are_not_kept(tmp_path):
    wanted = Wanted("fig4a", "smoke", flops=1e9, with_control=False, only=("fig4-celeba64",))
    (row,) = reproduce(wanted, tmp_path)
    (run,) = row.runs
    assert len(list((run / "kept").glob("step-*"))) > 4
    assert not [*(run / "evaluation").iterdir()]


def test_a_readme_of_another_project_stays(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# Mine\n")
    assert main(["reproduce", "fig2", "--scale", "smoke", "--out", str(tmp_path)]) == 2
    assert "has a README.md of its own: name a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
