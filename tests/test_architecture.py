"""The shape of the house: data runs one way, and no room outgrows its reader."""

from __future__ import annotations

import ast
from pathlib import Path

import maskdm

ROOMS = (
    "words files settings choices families metrics recipe_data recipe_evaluation recipe_length "
    "recipe recipe_files seeds engine images tokens masks diffusion models runs sampling "
    "evaluation export report training plan paper search app commands cli __main__"
).split()
ROOT = Path(maskdm.__file__).parent
FILES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
MOST_LINES, MOST_IN_A_FUNCTION, MOST_MODULES = 500, 60, 15


def modules_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {name for name in names if place(name).exists()}
            modules |= inner or {str(node.module)}
    return {module for module in modules if module.startswith("maskdm.")}


def place(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path if path.is_dir() else path.with_suffix(".py")


def name_of(path: Path) -> str:
    return ".".join(["maskdm", *path.relative_to(ROOT).with_suffix("").parts])


def test_every_file_has_its_room_and_imports_only_from_its_left():
    assert len(FILES) > 20
    for path in FILES:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert room in ROOMS, f"{path} stands in no known room"
        rooms = {module.split(".")[1] for module in modules_of(path)}
        later = [other for other in rooms if ROOMS.index(other) > ROOMS.index(room)]
        assert not later, f"{path.relative_to(ROOT)} imports from {', '.join(later)}, to its right"


def test_no_files_import_each_other_in_a_circle():
    graph = {name_of(path): modules_of(path) for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_files_and_functions_can_be_read_in_one_go():
    for path in [*FILES, ROOT / "__init__.py"]:
        text = path.read_text("utf-8")
        num_lines = len(text.splitlines())
        assert num_lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (path.name, node.name) != (
                "trainer.py",
                "train",  # the loop, read from top to bottom
            ):
                length = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    length -= node.body[0].end_lineno - node.body[0].lineno + 1
                where = f"{path.relative_to(ROOT)}: {node.name} has {length} lines"
                assert length <= MOST_IN_A_FUNCTION, where


def test_the_loop_leans_on_few():
    modules = modules_of(ROOT / "training" / "trainer.py")
    assert len(modules) <= MOST_MODULES, sorted(modules)


def test_settings_hold_no_members():
    """Names of families stand in their tables, not in Literals."""
    from maskdm import families

    names = {
        name
        for name_of_table, table in vars(families).items()
        if isinstance(table, dict) and name_of_table.isupper()
        for name in table
        if isinstance(name, str)
        and name not in ("none", "auto", "cosine", "constant")  # also plain words
    }
    for path in ROOT.glob("recipe*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal":
                words = {one.value for one in ast.walk(node.slice) if isinstance(one, ast.Constant)}
                assert not words & names, f"{path.name}: {words & names}"
