"""`maskdm pack`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maskdm.choices import helped
from maskdm.commands.common import DONE, JsonFlag, Source, photos_size, quiet
from maskdm.families import CROPS, CropName
from maskdm.files import expanded, refuse_unwritable
from maskdm.recipe import Data
from maskdm.settings import changed
from maskdm.words import size_text

Destination = Annotated[Path, tyro.conf.Positional, quiet(metavar="OUT")]
DEFAULTS = Data()


def pack(
    source: Source,
    out: Destination,
    *,
    size: int | tuple[int, int],
    channels: Literal[1, 2, 3, 4] = DEFAULTS.channels,
    crop: Annotated[
        CropName, tyro.conf.arg(help=helped("how images come to the size.", CROPS))
    ] = DEFAULTS.crop,
    background: str = DEFAULTS.background,
    draft: bool = DEFAULTS.draft,
    on_bad: Literal["auto", "error", "skip"] = DEFAULTS.on_bad,
    shard: Annotated[str | None, quiet(metavar="I/N")] = None,
    json_output: JsonFlag = False,
) -> int:
    """Prepare images once, in a store that training reads with --data.source OUT.

    Training packs by itself; pack ahead to choose a folder or to use many machines.

    Args:
        source: a folder, zip, tar, .npz, .npy, hf:OWNER/NAME, ...: see docs/data.md.
        out: the store's folder; a finished store of these settings there is left as it is.
        size: side of the square images, in pixels; or their height and width.
        channels: 1 = grey, 2 = grey and alpha, 3 = RGB, 4 = RGBA.
        crop: how images come to the size.
        background: colour behind transparent images (channels 1 and 3).
        draft: decode large JPEGs at a fraction of their size.
        on_bad: unreadable images: skip, error, or auto = skip up to 1 %.
        shard: part I of N (0/N to N-1/N), for job arrays; the store is ready with its last part.
        json_output: print the manifest instead of a summary.
    """
    how = {"size": size, "channels": channels, "crop": crop, "background": background}
    data = changed(DEFAULTS, source=source, **how, draft=draft, on_bad=on_bad)
    part = None
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or not 0 <= int(match[1]) < int(match[2]):
            raise ValueError(f"--shard {shard}: expected I/N with I from 0 to N - 1, such as 0/64")
        part = int(match[1]), int(match[2])

    refuse_unwritable(out, "OUT")

    from maskdm.images import store

    if store.is_store(expanded(source)):
        raise ValueError(f"{source} is a packed store: pack the images that it was made from")
    manifest = store.pack(data, out, part, progress=sys.stderr.isatty()).manifest
    if json_output:
        print(json.dumps(manifest))
        return DONE
    num, height, width, channels = manifest["shape"]
    num_bytes = size_text(num * height * width * channels)
    print(f"{num:,} images {height}x{width}x{channels}, {num_bytes}")
    if manifest["left_out"]:
        print(f"{len(manifest['left_out']):,} unreadable, skipped: see {out}/manifest.json")
    print(f"-> {out}" + (f", part {shard}" if shard else ""))
    if not shard:
        name = photos_size(min(height, width))
        flags = "" if height == width == name else f" --data.size {height}"
        flags += "" if height == width else f" {width}"
        flags += "" if channels == Data().channels else f" --data.channels {channels}"
        print(f"next    maskdm train photos{name} --data.source {shlex.quote(str(out))}{flags}")
    return DONE
