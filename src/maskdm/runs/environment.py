"""What a process runs on and from: versions, hardware, source commit, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import maskdm
from maskdm.engine import device_name


def environment(device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Versions, hardware, source commit and command of this process, for environment.json."""
    packages = ("torch", "accelerate", "diffusers", "safetensors", "numpy", "pillow")
    return {
        "maskdm": maskdm.__version__,
        "commit": source_commit(),
        "cwd": str(Path.cwd()),  # to which a relative source belongs
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": device_name(device),
        "num_ranks": num_ranks,
        "cpu_threads": torch.get_num_threads(),
    }


def source_commit() -> str | None:
    """Git commit of the checkout that this package runs from, `+changes` if edited, or None."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # installed into someone's repository: none
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
