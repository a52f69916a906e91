"""What a run tells people and machines: console, progress bar, lines of JSON, environment.json."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import maskdm
from maskdm.engine import device_name
from maskdm.files import write_text

PLAIN_LINE_SEC = 10.0  # without a terminal, a line of progress at most this often


class Monitor:
    """Console and metrics of a run; on ranks other than the first it is silent.

    Args:
        run_dir: the run's folder.
        total_flops: of the whole run; progress and time left are measured in them, since a
            masked step costs a fraction of a dense one.
        active: whether this is the rank that speaks.
        show: whether to print to the console.

    Attributes:
        quality_path: of quality.jsonl.
    """

    def __init__(self, run_dir: Path, total_flops: int, active: bool, show: bool):
        self._path = run_dir / "metrics.jsonl"
        self.quality_path = run_dir / "quality.jsonl"
        self._active = active
        self._show = active and show
        self._total_flops = total_flops
        self._bar: tqdm[Any] | None = None
        self._last_line_sec = 0.0

    def start(self, step: int, flops: int) -> None:
        """Drops lines of steps after `step` (a kill left them) and opens the bar."""
        if self._active:
            keep_lines_until(self._path, step)
            keep_lines_until(self.quality_path, step)
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total_flops,
                initial=flops,
                bar_format="{percentage:3.0f}%|{bar}| {elapsed} < {remaining} {desc}",
                dynamic_ncols=True,
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._show:
            print(text, flush=True)

    def doing(self, text: str) -> None:
        """Shows on the bar, if there is one, what takes a while."""
        if self._bar is not None:
            self._bar.set_description_str(text)

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and shows it. Raises OSError on a full disk."""
        if not self._active:
            return
        _append(self._path, line)
        speed = line["images_per_sec"]
        text = (
            f"{line['stage']} step {line['step']:,}  loss {line['loss']:.4f}  "
            f"{speed:,.{0 if speed >= 10 else 2}f} img/s"
        )
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(line["flops"] - self._bar.n)
        elif self._show and time.monotonic() - self._last_line_sec > PLAIN_LINE_SEC:
            self._last_line_sec = time.monotonic()
            print(f"  {100 * line['flops'] / self._total_flops:3.0f} %  {text}", flush=True)

    def log_quality(self, line: dict[str, Any]) -> None:
        """Appends a line to quality.jsonl. Raises OSError on a full disk."""
        if self._active:
            _append(self.quality_path, line)

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl or quality.jsonl; a last one that a kill cut off is left out."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def keep_lines_until(path: Path, step: int) -> None:
    """Rewrites such a file without the lines after a step, whole or not at all."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(kept))


def environment(device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Versions, hardware, source commit and command of this process, for environment.json."""
    packages = ("torch", "accelerate", "diffusers", "safetensors", "numpy", "pillow")
    return {
        "maskdm": maskdm.__version__,
        "commit": source_commit(),
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


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def flops_text(flops: float) -> str:
    """Floating-point operations with a metric prefix: `3.7 TFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if flops < 1000:
            return f"{flops:.3g} {prefix}FLOP"
        flops /= 1000
    return f"{flops:,.0f} ZFLOP"
