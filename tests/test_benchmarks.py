"""The benchmark suite: `make bench-try` runs all of it in tiny sizes; here is a smoke run."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_step_benchmark_measures_and_writes_lines():
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--models", "tiny"]
    command += ["--num", "1", "--batch-size", "2", "--how", "eager", "baseline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(line["how"], line["hidden"]) for line in lines} >= {("eager", 0.9), ("baseline", 0.0)}
    for line in lines:
        assert 0 < line["ideal"] <= 1 and line["ms_per_step"] > 0
        assert line["tflops"] * 1e3 / line["matrix_limit_gflops"] == pytest.approx(
            line["share_of_limit"], abs=0.01
        )


def test_a_failed_part_is_reported_and_the_rest_runs(tmp_path):
    """With a Python that fails at once: all parts are tried, and named."""
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "false"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "failed: environment tests benchmarks profile" in done.stdout


TABLE = """
budget-16-3:
  recipe:
    data: {source: digits, size: 8, channels: 1, held_out: 20}
    model: {patch_size: 2, embed_dim: 16, depth: 3, num_heads: 2}
    diffusion: {schedule: cosine, prediction: x0}
    sampling: {sampler: ddim, steps: 2}
    evaluation: {num: 20, quick_num: 0, num_components: 4}
  stage: {batch_size: 8, ema: {decay: 0.5}}
  flops: 2.0e+8
  variants:
    dense:
    half: {stages: [{mask: {kind: patch, rate: 0.5}, share: 1}, {share: 2}]}
  rounds:
    - {variants: [dense, half], lr: [0.01], seeds: [0]}
    - {variants: {half: [1.0e-9]}, seeds: [0]}  # learns nothing
    - {variants: {dense: [0.01], half: [[0.01, 0.01]]}, seeds: [1, 2]}
"""


def test_the_quality_laboratory_runs_what_is_missing_and_draws_its_report(tmp_path, monkeypatch):
    table, results = tmp_path / "table.yaml", tmp_path / "results.jsonl"
    table.write_text(TABLE)

    def run(script: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    flags = ["--results", str(results), "--work", str(tmp_path / "work")]
    run("quality.py", str(table), "--only", "budget-16-3_dense", *flags)
    run("quality.py", str(table), *flags)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    keys = [(line["variant"], tuple(line["lr"]), line["seed"]) for line in lines]
    assert sorted(keys) == [
        ("dense", (0.01,), 0),
        ("dense", (0.01,), 1),
        ("dense", (0.01,), 2),
        ("half", (1e-9, 1e-9), 0),
        ("half", (0.01, 0.01), 0),
        ("half", (0.01, 0.01), 1),
        ("half", (0.01, 0.01), 2),
    ]
    for line in lines:
        assert line["flops"] == pytest.approx(2e8, rel=0.05) and line["metrics"]["frechet"]
    assert run("quality.py", str(table), *flags) == ""  # nothing is missing
    pages = {"page.md": ("seeds", "blocks", "batches"), "trials.md": ("variants", "budget-16-3")}
    for file, names in pages.items():
        places = "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names)
        (tmp_path / file).write_text(places)
    run("quality_report.py", "--results", str(results), "--docs", *pages, "--images", ".")
    page, trials = ((tmp_path / file).read_text() for file in pages)
    assert "| budget-16-3 | " in page and "old" not in page
    assert "| dense | 0.01 |" in trials and "old" not in trials
    assert "| budget-16-3 | half | 0.01 |" in trials  # of the fresh seeds
    assert (tmp_path / "masking-rates.png").stat().st_size > 1000
    assert (tmp_path / "masking-losses.png").stat().st_size > 1000
    # Two networks side by side, at equal sides.
    twins = [{**line, "variant": "vit"} for line in lines if line["variant"] == "dense"]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = runpy.run_path(str(ROOT / "benchmarks" / "quality_report.py"), run_name="report")
    table_text = report["seeds_table"]({"one": lines + twins}, "blocks", ("U-ViT", "vit"))
    assert table_text.count("| one") == 1
    assert "| one, whole images |" in table_text and "| 1.00 (" in table_text
    # The same trials in batches of 2, and a single one, of the first seed, in batches of 4.
    stages = {batch: [{**lines[0]["recipe"]["stages"][0], "batch_size": batch}] for batch in (2, 4)}
    small = {
        batch: [
            {**line, "variant": f"dense-batch-{batch}", "recipe": {**line["recipe"], "stages": one}}
            for line in lines
            if line["variant"] == "dense" and (batch == 2 or line["seed"] == 0)
        ]
        for batch, one in stages.items()
    }
    every = lines + small[2] + small[4]
    batches = report["by_batch"](every, "dense")
    assert {batch: [line["seed"] for line in one] for batch, one in batches.items()} == {
        2: [1, 2],
        4: [0],
        8: [1, 2],
    }
    assert [*report["by_batch"](every, "half")] == [8]
    report["draw_batches"]({"budget-64-5": every}, tmp_path / "batches.png")
    assert (tmp_path / "batches.png").stat().st_size > 1000
    report["SIDES"]["batches"] = {", whole, {} and {}": (("dense",), ("dense-batch-2",))}
    table_text = report["seeds_table"]({"one": every}, "batches", ("larger", "smaller"))
    assert "| one, whole, 8 and 2 |" in table_text and "| 1.00 (" in table_text
    report["draw_many_tokens"]({"budget-1024-72": lines}, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 1000
    # FLOPs to equal loss: half way on the logarithms between measurements at 1 and 4 TFLOP.
    dense = [{"seed": seed, "flops": 8e12, "dense_loss": 0.02} for seed in (1, 2)]
    masked = [{"seed": seed, "curve": [[1e12, 0.04], [4e12, 0.01]]} for seed in (2, 1)]
    assert report["saving"](dense, masked)[0] == pytest.approx(4)
    higher = [{**line, "dense_loss": 0.005} for line in dense]  # than no masked run gets to
    assert report["saving"](higher, masked) is None
    alone = {**dense[0], "seed": 9}  # whose masked run has yet to be trained
    assert report["saving"]([*dense, alone], masked) == report["saving"](dense, masked)
    # A trial's settings don't change behind its name.
    table.write_text(TABLE.replace("embed_dim: 16", "embed_dim: 32"))
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), str(table), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode != 0 and "give the variant another name" in done.stderr


def test_rates_are_tried_until_the_best_is_bracketed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    wanted = runpy.run_path(str(ROOT / "benchmarks" / "quality.py"), run_name="lab")["rates_wanted"]
    bracket = {"bracket": [1, 2, 4]}
    assert wanted(bracket, {}) == wanted(bracket, {1: 9.0, 4: 7.0}) == [1, 2, 4]
    assert wanted(bracket, {1: 9.0, 2: 8.0, 4: 7.0}) == [1, 2, 4, 8]
    assert wanted(bracket, {1: 7.0, 2: 8.0, 4: 9.0}) == [1, 2, 4, 0.5]
    assert wanted("best", {}) == wanted("best", {1: 9.0, 2: 8.0, 4: 7.0}) == []
    assert wanted("best", {1: 9.0, 2: 8.0, 4: 7.0, 8: 7.5}) == [4]
    assert wanted([3, [1, 2]], {1: 9.0}) == [3, [1, 2]]


def test_a_trial_waits_for_what_it_begins_from(tmp_path):
    table, results = tmp_path / "table.yaml", tmp_path / "results.jsonl"
    tiny = yaml.safe_load(TABLE)["budget-16-3"] | {"evaluations": 1}
    one = {"lr": [0.01], "seeds": [0]}
    primers = {**tiny, "rounds": [{**one, "variants": ["dense"]}]}
    tuned = {"variants": {"tuned": {"init": "tiny_dense_0.01_2e+08_0"}}}
    tuned |= {"rounds": [{**one, "variants": ["tuned"]}]}
    table.write_text(yaml.safe_dump({"tiny": primers, "then": {**tiny, **tuned}}))
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), str(table)]
    command += ["--results", str(results), "--work", str(tmp_path), "--only", "then", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["experiment"] for line in lines] == ["tiny", "then"]
    assert lines[0]["command"] == "python benchmarks/quality.py benchmarks/table.yaml"


@pytest.mark.slow
def test_peers_are_tuned_with_one_seed_and_repeated_with_fresh_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    peers = importlib.import_module("peers")
    small = {"NUM_SAMPLES": 4, "NUM_STEPS": 1, "SAMPLED_AT_ONCE": 4, "BATCH_SIZE": 2}
    small |= {"RATES": [1e-4, 1e-3], "TUNED_SEEDS": (1, 2)}
    for name, value in small.items():
        monkeypatch.setattr(peers, name, value)
    results = tmp_path / "peers.jsonl"
    command = ["peers.py", "--data", "faces:40", "--minutes", "0.005", "--only", "diffusers"]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(results)])
    assert peers.main() == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    tuning, fresh = lines[:2], lines[2:]
    assert [line["seed"] for line in lines] == [0, 0, 1, 2]
    best = min(tuning, key=lambda line: line["frechet"])["lr"]
    assert [line["lr"] for line in fresh] == [best, best]
    assert all(line["images"] == 2 * line["steps"] > 0 for line in lines)
    table = capsys.readouterr().out
    assert f"| faces:40 | 0.005 | diffusers, rate {best:g} |" in table
    assert peers.main() == 0 and len(results.read_text().splitlines()) == 4  # nothing is missing
