"""Writes the pages of the documentation site, from which `make docs` builds it.

They are the Markdown files of the repository, with their links made to fit, and a page of the
public names' docstrings. Anything that would be a dead link there raises ValueError.

    python docs/site.py build/pages
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {  # pages that are not in docs/
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
# Code, which may hold brackets that are no link, or a link: mark of an image, words, target.
CODE_OR_LINK = re.compile(
    r"^```.*?^```|(?P<mark>!?)\[(?P<words>[^\]\[]*)\]\((?P<target>[^()\s]+)\)|`[^`\n]+`",
    re.DOTALL | re.MULTILINE,
)


def pages() -> dict[Path, str]:
    """The Markdown files of the site, and their names there."""
    own = {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    return own | {ROOT / name: page for name, page in OTHERS.items()}


def site_text(path: Path) -> str:
    """A file's Markdown for the site. Raises ValueError for a link to what does not exist."""
    return CODE_OR_LINK.sub(lambda found: _link(found, path), path.read_text("utf-8"))


def _link(found: re.Match[str], path: Path) -> str:
    mark, words, target = found["mark"], found["words"], found["target"]
    if target is None or "://" in target or target.startswith(("#", "mailto:")):
        return found[0]
    name, _, anchor = target.partition("#")
    place = (path.parent / name).resolve()
    if not place.exists():
        raise ValueError(f"{path.relative_to(ROOT)} links to {target}, which does not exist")
    if page := pages().get(place):
        return f"{mark}[{words}]({page}{'#' + anchor if anchor else ''})"
    if mark:
        return f"![{words}]({place.relative_to(ROOT / 'docs').as_posix()})"
    shown = os.path.relpath(place, ROOT).replace(os.sep, "/")
    return words if shown in words else f"{words} (`{shown}` in the repository)"


def reference_text() -> str:
    """The page of docstrings: a heading, then each public name, in their order."""
    sys.path.insert(0, str(ROOT / "src"))
    import maskdm

    places = [f"maskdm.{module}.{name}" for name, module in maskdm._PLACES.items()]
    lines = ["# Python: the docstrings of the public names", ""]
    lines += ["`import maskdm` gives each of these; [the list](api.md) says when to use which.", ""]
    return "\n".join([*lines, *(f"::: {place}\n" for place in places)])


def main(folder: Path) -> None:
    """Writes the pages into a folder, in place of what it held."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", folder / "images")
    for path, name in pages().items():
        (folder / name).write_text(site_text(path), "utf-8")
    (folder / "reference.md").write_text(reference_text(), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
