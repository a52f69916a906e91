"""The paper's data sets by name: where to get them, how to store them, how to crop them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from maskdm.recipe import Data


@dataclass(frozen=True)
class KnownSet:
    """A data set of the paper."""

    title: str  # its name in print
    num_images: int  # in a complete copy
    size: str | None  # WIDTHxHEIGHT of the files, or None where they vary
    layout: str  # what its folder holds
    where: str  # the page that offers it
    crop: str = "center"  # as in papers


KNOWN = {
    "celeba": KnownSet(
        "CelebA, aligned and cropped",
        202_599,
        "178x218",
        "000001.jpg to 202599.jpg (img_align_celeba.zip, 1.3 GB, or its contents)",
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        "celeba",
    ),
    "celebahq": KnownSet(
        "CelebA-HQ",
        30_000,
        None,
        "30,000 square images of 256 pixels or more (for example CelebA-HQ-img of CelebAMask-HQ)",
        "https://github.com/switchablenorms/CelebAMask-HQ",
    ),
    "ffhq": KnownSet(
        "FFHQ",
        70_000,
        None,
        "00000/00000.png to 69000/69999.png (images1024x1024, 89 GB, or thumbnails128x128, 2 GB)",
        "https://github.com/NVlabs/ffhq-dataset",
    ),
    "afhq": KnownSet(
        "AFHQ, training part",
        14_630,
        "512x512",
        "the contents of afhq/train: class folders cat, dog and wild of 512x512 images",
        "https://github.com/clovaai/stargan-v2",
    ),
    "vggface2": KnownSet(
        "VGGFace2, training part",
        3_141_890,
        None,
        "the contents of train: 8,631 class folders n000002, n000003, ... of JPEG files",
        "https://github.com/ox-vgg/vgg_face2",
    ),
}


def crop_of(data: Data) -> str:
    """The crop of some settings; `auto` is that of a known set, else `center`."""
    if data.crop != "auto":
        return data.crop
    return KNOWN[data.source].crop if data.source in KNOWN else "center"


def locate(name: str) -> Path:
    """The path of a known set: NAME, NAME.zip or NAME.tar in $MASKDM_DATA, or in ./data.

    Raises ValueError, which says how to get it, where it is missing.
    """
    root = Path(os.environ.get("MASKDM_DATA") or "data").expanduser()
    for path in (root / name, root / f"{name}.zip", root / f"{name}.tar"):
        if path.exists():
            return path
    known = KNOWN[name]
    raise ValueError(
        f"data.source {name} ({known.title}, {known.num_images:,} images) is not at {root / name}: "
        f"get it from {known.where} and put {known.layout} there, or a zip or tar of them at "
        f"{root / name}.zip or .tar. The environment variable MASKDM_DATA sets another folder for "
        "data sets. To train on your own images: --data.source FOLDER"
    )
