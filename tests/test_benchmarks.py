"""The script for machines with a GPU runs through, in its dry form, on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_gpu_script_runs_through_and_leaves_its_results(tmp_path):
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    out = tmp_path / "out"
    told = "".join(path.read_text()[-2000:] for path in out.glob("*.txt"))
    assert done.returncode == 0, done.stdout + told
    lines = [json.loads(line) for line in (out / "benchmarks.jsonl").read_text().splitlines()]
    assert {line["benchmark"] for line in lines} == {"step", "sampling", "data", "evaluation"}
    steps = [line for line in lines if line["benchmark"] == "step"]
    assert {(line["how"], line["hidden"]) for line in steps} >= {("eager", 0.9), ("baseline", 0.0)}
    for line in steps:
        assert 0 < line["ideal"] <= 1 and line["ms_per_step"] > 0
        assert line["tflops"] * 1e3 / line["matrix_limit_gflops"] == pytest.approx(
            line["share_of_limit"], abs=0.01
        )
    assert "ms a step under the profiler" in (out / "profile.txt").read_text()
    assert not (out / "cache").exists()


@pytest.mark.slow
def test_a_failed_part_is_told_and_the_rest_runs(tmp_path):
    """With a Python that fails at once: all parts are tried, and named."""
    environment = {**os.environ, "DRY_RUN": "1", "PYTHON": "false"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "failed: environment tests benchmarks profile" in done.stdout


@pytest.mark.slow
def test_what_the_time_limit_cuts_off_is_told(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--try", "--limit-sec", "0.01"]
    command += ["--out", str(tmp_path / "lines.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("cut off by the time")]
    assert len(told) == 4 and "step.py" in told[0] and "evaluation.py" in told[3]
    assert (tmp_path / "lines.jsonl").read_text() == ""
