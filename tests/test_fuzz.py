"""A few cases of the fuzz run (`make fuzz`), of those kinds that need no trained run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import maskdm


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through /proc")
def test_the_first_cases_of_the_fuzz_run_are_clean(tmp_path):
    """In a process of its own: it forks, and must not hold what other tests have imported."""
    places = [str(Path(maskdm.__file__).parents[1]), str(Path(__file__).parent)]
    command = [sys.executable, "-m", "fuzz", "--cases", "24", "--workers", "1"]
    command += ["--only", "pictures,zips,tars,arrays,labels,recipes", "--keep", str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 0, 24 cases" in done.stdout
