"""Files of JSON lines that a run appends to: metrics.jsonl, quality.jsonl, probes.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskdm.files import parsed_json, write_text

Line = dict[str, Any]
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
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def keep_lines_until(path: Path, step: int) -> None:
    """Rewrites a file without the lines after a step, whole or not at all."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
        write_text(path, "".join(kept))
