"""Which kind of source it is that a user named."""

from __future__ import annotations

import glob
import tarfile
import zipfile
from pathlib import Path

from maskdm.images.archives import TAR_SUFFIXES, TarSource, ZipSource, expand_pattern
from maskdm.images.arrays import ArraySource
from maskdm.images.huggingface import PREFIX, HuggingFaceSource
from maskdm.images.known import KNOWN, locate
from maskdm.images.source import IMAGE_SUFFIXES, DigitsSource, FolderSource, Source


def open_source(name: str) -> Source:
    """Opens the source that the user named.

    `digits`; a known set's name (celeba, ...); `hf:...`; a URL or pattern of tars; a folder, a
    zip, a tar, an `.npz` or `.npy`. A folder of nothing but tars is taken for shards.

    Raises ValueError where there is none, or no image in it.
    """
    try:
        return _open(name)
    except PermissionError as error:
        raise ValueError(f"data.source {name} cannot be read: {error.strerror or error}") from None


def _open(name: str) -> Source:
    if name == "digits":
        return DigitsSource()
    if name.startswith(PREFIX):
        return HuggingFaceSource(name)
    if "://" in name or (not Path(name).expanduser().exists() and _is_pattern(name)):
        return TarSource(expand_pattern(name))
    path = locate(name) if name in KNOWN else Path(name).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return HuggingFaceSource(f"{PREFIX}{path}")
        shards = _shards(path)
        return TarSource(shards) if shards else FolderSource(path)
    if not path.exists():
        raise ValueError(
            f"data.source {name} does not exist: name a folder, zip, tar, .npz or .npy of images, "
            f"hf:OWNER/NAME, or one of digits, {', '.join(KNOWN)}"
        )
    if path.suffix in (".npz", ".npy"):
        return ArraySource(path)
    # The name decides where it can: a tar may hold, and so look like, a zip.
    if path.name.endswith(TAR_SUFFIXES):
        return TarSource([str(path)])
    if path.suffix == ".zip":
        return ZipSource(path)
    if path.is_file() and tarfile.is_tarfile(path):
        return TarSource([str(path)])
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    way_out = "name one, or a folder"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        way_out = f"name its folder, {path.parent}"
    elif path.suffix in (".parquet", ".arrow"):
        way_out = f"say hf:{path.parent}, for Hugging Face's reader"
    raise ValueError(f"data.source {name} is a file, but no zip, tar, .npz or .npy: {way_out}")


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) or "{" in name


def _shards(folder: Path) -> list[str]:
    """The tars in a folder that holds nothing else."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    tars = [str(path) for path in files if path.is_file() and path.name.endswith(TAR_SUFFIXES)]
    return sorted(tars) if len(tars) == len(files) else []
