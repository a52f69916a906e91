"""`maskdm pack`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maskdm.commands.common import DONE, Source, quiet
from maskdm.recipe import Data

Destination = Annotated[Path, tyro.conf.Positional, quiet(metavar="OUT")]
DEFAULTS = Data()


def pack(
    source: Source,
    out: Destination,
    *,
    size: int | tuple[int, int],
    channels: Literal[1, 2, 3, 4] = DEFAULTS.channels,
    crop: Literal["auto", "center", "resize", "celeba", "celeba140", "none"] = DEFAULTS.crop,
    background: str = DEFAULTS.background,
    draft: bool = DEFAULTS.draft,
    on_bad: Literal["auto", "error", "skip"] = DEFAULTS.on_bad,
    shard: Annotated[str | None, quiet(metavar="I/N")] = None,
    json_output: Annotated[bool, quiet(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Decode and prepare images once, into a store that training reads: --data.source OUT.

    Training packs by itself, into its cache; this is for packing ahead of time, to a place of
    your choice, or by many machines at once.

    Args:
        source: a folder, zip, tar, .npz, .npy, hf:OWNER/NAME, ...: see docs/data.md.
        out: the store's folder; one that is finished already is left as it is.
        size: side of the square images, in pixels; or their height and width.
        channels: 1 = grey, 2 = grey and alpha, 3 = RGB, 4 = RGBA.
        crop: how images come to the size; see `maskdm train RECIPE --help`.
        background: colour under transparent images (channels 1 and 3).
        draft: decode large JPEGs at a fraction of their size.
        on_bad: unreadable images: skip, error, or auto = skip up to 1 %.
        shard: only part I of N (0/N to N-1/N), into a folder in OUT: for the tasks of a job array,
            which need not run in any order. The store is ready when all parts are there.
        json_output: print the manifest instead of a summary.
    """
    data = Data(
        source=source,
        size=size,
        channels=channels,
        crop=crop,
        background=background,
        draft=draft,
        on_bad=on_bad,
    )
    part = None if shard is None else _part(shard)

    from maskdm.images import store
    from maskdm.images.problems import size_text

    if store.is_store(Path(source).expanduser()):
        raise ValueError(f"{source} is a packed store: pack the images that it was made from")
    packed = store.pack(data, out, part, progress=sys.stderr.isatty())
    manifest = packed.manifest
    if json_output:
        print(json.dumps(manifest))
        return DONE
    num, height, width, channels = manifest["shape"]
    size_of_all = size_text(num * height * width * channels)
    print(f"{num:,} images {height}x{width}x{channels}, {size_of_all}")
    if manifest["left_out"]:
        print(f"{len(manifest['left_out']):,} unreadable left out: see {out}/manifest.json")
    print(f"-> {out}" + (f", part {shard}" if shard else ""))
    return DONE


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 0 <= int(match[1]) < int(match[2]):
        raise ValueError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/64")
    return int(match[1]), int(match[2])
