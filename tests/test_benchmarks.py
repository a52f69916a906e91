"""The benchmark suite: `make bench-try` runs all of it in tiny sizes; here is a smoke run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
