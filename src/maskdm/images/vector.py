"""Vector graphics (SVG) as pixels, by resvg: the extra `svg`."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

HAS_SVG = importlib.util.find_spec("resvg_py") is not None
SIDE = 1024  # pixels of the longer side
SVG_START = (
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>\[]*(\[[^\]]*\]\s*)?>\s*)?"
    rb"(<!--.*?-->\s*)*<svg"
)
OWN_HREF = re.compile(r"\s*(#|data:(?!image/svg))", re.I)  # a nested SVG may show others in turn


def is_svg(content: Path | bytes) -> bool:
    """Whether a file begins as SVG does."""
    content = content.read_bytes() if isinstance(content, Path) else content
    return re.match(SVG_START, content.removeprefix(b"\xef\xbb\xbf"), re.I | re.S) is not None


def rendered(content: Path | bytes) -> Image.Image:
    """Draws vector graphics: RGBA, `SIDE` pixels at the longer side, nothing behind them.

    Raises ValueError where they are damaged, or show another file.
    """
    import resvg_py

    content = content.read_bytes() if isinstance(content, Path) else content
    text = content.decode("utf-8-sig", errors="replace")
    _refuse_foreign(text)
    try:
        png = resvg_py.svg_to_bytes(svg_string=text, width=SIDE, height=SIDE)
    except ValueError as error:
        raise ValueError(f"damaged SVG: {error}") from None
    image = Image.open(io.BytesIO(bytes(png)))
    image.load()
    image.format = "SVG"
    return image


def _refuse_foreign(text: str) -> None:
    """Raises ValueError for an SVG that refers to other files, of which resvg would read pictures.

    Links (`<a href>`) are no matter.
    """
    try:
        elements = list(ElementTree.fromstring(text).iter())
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"damaged SVG: {error}") from None
    for element in elements:
        if str(element.tag).rpartition("}")[2].lower() == "a":
            continue
        for name, value in element.attrib.items():
            if name.rpartition("}")[2].lower() == "href" and not OWN_HREF.match(value):
                raise ValueError(
                    "SVG that shows another file: embed its pixels, or render it to PNG"
                )
