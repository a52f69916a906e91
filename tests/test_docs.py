"""The documentation: links lead somewhere, commands exist, the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import maskdm
from maskdm.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for place in (".", "docs", "benchmarks", "examples", ".github")
    for path in sorted((ROOT / place).glob("*.md"))
]
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]\[]*\]\(([^()\s]+)\)")


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text("utf-8")), re.MULTILINE)
    slugs: list[str] = []
    for heading in headings:
        text = LINK.sub(lambda link: link[0].split("](")[0], heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return set(slugs)


def dead_links(path: Path) -> list[str]:
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", path.read_text("utf-8")))
    dead = []
    for target in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(path):
    assert not dead_links(path)


def test_dead_links_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text(
        "# A heading: `code`, twice\n\n```\n# none\n```\n## A heading: `code`, twice\n"
    )
    page.write_text(
        "[a](other.md#a-heading-code-twice) [b](other.md#a-heading-code-twice-1) [c](other.md#none)"
        " [d](missing.md) `[e](code.md)` [f](#no) ![g](picture.png) [h](https://example.org/x)\n"
    )
    assert dead_links(page) == ["other.md#none", "missing.md", "#no", "picture.png"]


def site():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_site_s_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    def names(entries):
        for entry in entries:
            value = next(iter(entry.values()))
            yield from names(value) if isinstance(value, list) else [value]

    listed = list(names(config["nav"]))
    assert sorted(listed) == sorted([*site().pages().values(), "reference.md"])


def test_the_site_s_links_stay_inside_of_it(tmp_path):
    site().main(tmp_path)
    pages = sorted(tmp_path.glob("*.md"))
    assert len(pages) > 20
    for page in pages:
        for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
            if "://" not in target and not target.startswith("#"):
                assert (tmp_path / target.partition("#")[0]).is_file(), (page.name, target)
    reference = (tmp_path / "reference.md").read_text("utf-8")
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", reference, re.MULTILINE)
    assert {*shown, "__version__"} == set(maskdm.__all__)
    text = (tmp_path / "index.md").read_text("utf-8")
    assert "[docs/runs.md](runs.md)" in text and "](images/faces.png)" in text


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("the extra docs is not installed: `make docs` builds the site")
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    site().main(tmp_path / "build" / "pages")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe:" not in done.stdout + done.stderr
    page = (tmp_path / "build" / "site" / "reference.html").read_text("utf-8")
    assert "draw_visible" in page and "int64" in page


def commands_in(path: Path) -> list[list[str]]:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", path.read_text("utf-8"), re.DOTALL))
    return [
        shlex.split(line, comments=True)[1:]
        for line in blocks.replace("\\\n", " ").splitlines()
        if line.startswith("maskdm ")
    ]


@pytest.mark.parametrize("page", ["tutorial.md", "coming-from.md", "sharing.md", "transfer.md"])
def test_commands_and_flags_of_the_pages_exist(page, capsys):
    helps: dict[str, str] = {}
    for name, *arguments in commands_in(ROOT / "docs" / page):
        assert name in COMMANDS
        if name not in helps:
            recipe = ["digits"] if name in ("train", "plan") else []
            assert main([name, *recipe, "--help-all" if recipe else "--help"]) == 0
            helps[name] = capsys.readouterr().out
        for flag in (one for one in arguments if one.startswith("--")):
            assert f"{flag.replace('.all.', '.0.')} " in helps[name], (name, flag)


def test_the_citation_names_the_paper_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text("utf-8")
    bibtex = readme.split("```bibtex")[1].split("```")[0]
    assert paper["title"] in bibtex and str(paper["year"]) in bibtex
    names = [f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]]
    assert " and ".join(names) in " ".join(bibtex.split())
    assert citation["license"] in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_issue_forms_have_what_the_host_requires():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for form in forms:
        content = yaml.safe_load(form.read_text("utf-8"))
        if form.name != "config.yml":
            assert {"name", "description", "body"} <= set(content)
            assert all({"type", "attributes"} <= set(part) for part in content["body"])
