"""Cartoon faces drawn by code: a colourful set that needs no download, with known attributes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from maskdm.images.source import Item, Source, part_of
from maskdm.seeds import derive_seed

NUM_IMAGES, SIDE = 4096, 64  # by default
FINER = 4  # drawn so many times larger, then averaged: smooth edges
BOLD_BELOW = 32  # pixels a side: smaller faces have larger eyes and mouths, as icons do
VERSION = 1  # part of the fingerprint: raise it when the same number would give another face

SKINS = ((255, 219, 172), (241, 194, 125), (198, 134, 66), (141, 85, 36), (92, 58, 33))
HAIRS = (
    (40, 26, 13),
    (106, 66, 32),
    (190, 130, 50),
    (232, 203, 120),
    (150, 42, 30),
    (125, 125, 130),
)
CLOTHES = (
    (200, 40, 45),
    (40, 90, 190),
    (35, 140, 75),
    (235, 180, 40),
    (125, 60, 160),
    (50, 50, 55),
)
GROUNDS = ((160, 205, 240), (245, 225, 165), (190, 225, 180), (240, 190, 195), (210, 200, 235))
DARK = (35, 30, 35)

ATTRIBUTES = {
    "hat": ("none", "cap", "beanie", "top-hat"),
    "hair": ("bald", "short", "long"),
    "mouth": ("smile", "open", "straight"),
    "eyes": ("plain", "glasses", "closed"),
}


Box = Callable[[float, float, float, float], tuple[float, ...]]
"""From left, top, right, bottom round a face's middle, in parts of its side, to pixels."""


class Face(NamedTuple):
    """What a face shows: indices into `ATTRIBUTES` and the colours, shifts in parts of its side."""

    hat: int
    hair: int
    mouth: int
    eyes: int
    skin: int
    hair_colour: int
    clothes: int
    ground: int
    x: float
    y: float
    width: float

    @property
    def words(self) -> dict[str, str]:
        """Attribute -> its value in words."""
        return {name: values[getattr(self, name)] for name, values in ATTRIBUTES.items()}


class FacesSource(Source):
    """`faces`, `faces:N` or `faces:N:SEED`: N faces, N=4,096 and seed 0 by default.

    The class is the hat. `faces@SIDE` draws them with that many pixels a side instead of 64; below
    32, heads, eyes and mouths are larger and bolder, so that they can be told apart.
    """

    kind = "faces drawn by code"

    def __init__(self, name: str):
        super().__init__()
        match = re.fullmatch(r"faces(?::(\d+))?(?::(\d+))?(?:@(\d+))?", name)
        num, seed, side = match.groups() if match else ("0", "0", "0")
        self.num_images = int(num or NUM_IMAGES)
        self._seed, self._side = int(seed or 0), int(side or SIDE)
        if not self.num_images or not 8 <= self._side <= 1024:
            raise ValueError(
                f"data.source {name}: expected faces, faces:N, faces:N:SEED, and @SIDE behind them "
                "for a side of 8 to 1,024 pixels: faces:2000:7@128"
            )
        self.class_names = list(ATTRIBUTES["hat"])
        facts = f"faces {VERSION} {self.num_images} {self._seed} {self._side}"
        facts += " bold" * (self._side < BOLD_BELOW)
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        assert self.num_images is not None
        for number in part_of(range(self.num_images), part):
            face = face_of(number, self._seed)
            yield Item(f"{number:08d}", draw_face(face, self._side), face.hat)


def is_faces(name: str) -> bool:
    """Whether a source's name means drawn faces."""
    return re.match(r"faces($|[:@])", name) is not None


def face_of(number: int, seed: int = 0) -> Face:
    """The face of that number: attributes and colours are independent and uniform.

    The same on every machine, for any number of faces.
    """
    random = np.random.Generator(np.random.Philox(derive_seed(seed, "face", number)))
    sizes = {name: len(values) for name, values in ATTRIBUTES.items()}
    sizes |= {"skin": len(SKINS), "hair_colour": len(HAIRS)}
    sizes |= {"clothes": len(CLOTHES), "ground": len(GROUNDS)}
    chosen = {name: int(random.integers(size)) for name, size in sizes.items()}
    x, y = random.uniform(-0.05, 0.05, 2)
    return Face(**chosen, x=float(x), y=float(y), width=random.uniform(0.9, 1.08))


def draw_face(face: Face, side: int = SIDE) -> np.ndarray:
    """Draws a face: uint8 (side, side, 3), RGB."""
    scale, is_bold = side * FINER, side < BOLD_BELOW
    width = face.width * (1.17 if is_bold else 1)
    image = Image.new("RGB", (scale, scale), GROUNDS[face.ground])
    draw = ImageDraw.Draw(image)
    skin, hair = SKINS[face.skin], HAIRS[face.hair_colour]
    clothes = CLOTHES[face.clothes]
    words = face.words

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        """Corners round the face's middle, in parts of the side."""
        across = [0.5 + face.x + width * value for value in (left, right)]
        down = [0.52 + face.y + value for value in (top, bottom)]
        return across[0] * scale, down[0] * scale, across[1] * scale, down[1] * scale

    # From back to front: long hair, shoulders, head, short hair, eyes and mouth, hat.
    if words["hair"] == "long":
        draw.rounded_rectangle(box(-0.3, -0.32, 0.3, 0.36), 0.2 * scale, hair)
    draw.ellipse(box(-0.42, 0.3, 0.42, 0.9), clothes)
    draw.rectangle(box(-0.09, 0.2, 0.09, 0.36), skin)
    draw.ellipse(box(-0.24, -0.3, 0.24, 0.3), skin)
    if words["hair"] != "bald":
        draw.pieslice(box(-0.26, -0.34, 0.26, 0.22), 180, 360, hair)
        draw.ellipse(box(-0.2, -0.16, 0.2, 0.1), skin)
    (_bold_features if is_bold else _fine_features)(draw, box, words, scale)
    if words["hat"] == "cap":
        draw.pieslice(box(-0.27, -0.42, 0.27, 0.06), 180, 360, clothes)
        draw.rounded_rectangle(box(-0.05, -0.21, 0.4, -0.15), 0.03 * scale, clothes)
    elif words["hat"] == "beanie":
        draw.pieslice(box(-0.27, -0.46, 0.27, 0.1), 180, 360, clothes)
        draw.rounded_rectangle(box(-0.28, -0.24, 0.28, -0.14), 0.04 * scale, "white")
    elif words["hat"] == "top-hat":
        draw.rectangle(box(-0.2, -0.55, 0.2, -0.2), DARK)
        draw.rectangle(box(-0.2, -0.27, 0.2, -0.22), clothes)
        draw.rectangle(box(-0.32, -0.22, 0.32, -0.18), DARK)
    return np.asarray(image.reduce(FINER))


def _fine_features(draw: ImageDraw.ImageDraw, box: Box, words: dict[str, str], scale: int) -> None:
    """Eyes and a mouth that 32 pixels can show."""
    for middle in (-0.1, 0.1):
        if words["eyes"] == "closed":
            draw.arc(box(middle - 0.05, -0.06, middle + 0.05, 0.02), 0, 180, DARK, scale // 45)
            continue
        draw.ellipse(box(middle - 0.055, -0.07, middle + 0.055, 0.03), "white")
        draw.ellipse(box(middle - 0.026, -0.048, middle + 0.026, 0.012), DARK)
        if words["eyes"] == "glasses":
            draw.ellipse(box(middle - 0.085, -0.1, middle + 0.085, 0.06), None, DARK, scale // 40)
    if words["mouth"] == "smile":
        draw.chord(box(-0.12, 0.02, 0.12, 0.2), 10, 170, (190, 50, 60))
    elif words["mouth"] == "open":
        draw.ellipse(box(-0.06, 0.1, 0.06, 0.22), (120, 25, 35))
    else:
        draw.rectangle(box(-0.09, 0.15, 0.09, 0.175), (150, 60, 60))


def _bold_features(draw: ImageDraw.ImageDraw, box: Box, words: dict[str, str], scale: int) -> None:
    """Eyes and a mouth that 16 pixels can show: large, and of strong contrast."""
    for middle in (-0.105, 0.105):
        if words["eyes"] == "closed":
            draw.rectangle(box(middle - 0.06, -0.04, middle + 0.06, 0.025), DARK)
            continue
        draw.ellipse(box(middle - 0.073, -0.1, middle + 0.073, 0.06), "white")
        draw.ellipse(box(middle - 0.038, -0.065, middle + 0.038, 0.025), DARK)
        if words["eyes"] == "glasses":
            draw.rectangle(box(middle - 0.1, -0.13, middle + 0.1, 0.09), None, DARK, scale // 20)
    if words["mouth"] == "smile":
        draw.chord(box(-0.145, 0.0, 0.145, 0.26), 5, 175, "white", (150, 30, 40), scale // 40)
    elif words["mouth"] == "open":
        draw.ellipse(box(-0.073, 0.1, 0.073, 0.27), (90, 10, 25))
    else:
        draw.rectangle(box(-0.11, 0.16, 0.11, 0.225), (205, 60, 70))
