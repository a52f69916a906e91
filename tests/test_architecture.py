"""Data runs one way: a file imports only from rooms to its left (and the settings)."""

from __future__ import annotations

import ast
from pathlib import Path

import maskdm

ROOMS = (
    "settings recipe_data recipe_evaluation recipe recipe_files seeds files engine images tokens "
    "masks diffusion models training sampling evaluation hub report commands cli __main__"
).split()
ROOT = Path(maskdm.__file__).parent


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "maskdm" and len(parts) > 1 else None


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {room for module in modules if (room := room_of(module)) in ROOMS}
    return rooms


def test_every_file_has_its_room_and_imports_only_from_its_left():
    files = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert len(files) > 20
    for path in files:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert room in ROOMS, f"{path} stands in no known room"
        later = [other for other in imported_rooms(path) if ROOMS.index(other) > ROOMS.index(room)]
        assert not later, f"{path.relative_to(ROOT)} imports from {', '.join(later)}, to its right"


def test_no_file_has_outgrown_its_room():
    for path in ROOT.rglob("*.py"):
        num_lines = len(path.read_text("utf-8").splitlines())
        assert num_lines <= 350, f"{path.relative_to(ROOT)} has {num_lines} lines"
