"""Files of JSON lines that a run appends to: metrics.jsonl, quality.jsonl, probes.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskdm.files import parsed_json, write_text

Line = dict[str, Any]
NUMBERS = (
    "images flops elapsed_sec loss lr hidden images_per_sec dense_loss dense_loss_train".split()
)
OR_NONE = ("dense_loss", "images_per_sec")
PROBES = "probes.jsonl"  # what forks have shown (`until: plateau`)


def append_line(path: Path, line: Line) -> None:
    """Appends a line. Raises OSError on a full disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[Line]:
    """Reads all lines up to one that a kill or the disk has damaged. No file gives no lines."""
    lines = list[Line]()
    for text in path.read_text("utf-8", "replace").splitlines() if path.is_file() else []:
        try:
            line = parsed_json(text)
        except ValueError:
            break
        if not _is_whole(line):
            break
        lines.append(line)
    return lines


def _is_whole(line: Any) -> bool:
    """Whether a line has a step, and numbers and names where its readers count on them."""
    if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
        return False
    numbers = all(
        isinstance(line[key], (int, float)) or (key in OR_NONE and line[key] is None)
        for key in NUMBERS
        if key in line
    )
    return numbers and isinstance(line.get("stage", ""), str)


def keep_lines_until(path: Path, step: int) -> None:
    """Rewrites a file without the lines after a step, whole or not at all."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
        write_text(path, "".join(kept))
