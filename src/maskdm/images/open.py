"""Opening a source of any kind by its name."""

from __future__ import annotations

import glob
import tarfile
import warnings
import zipfile
from pathlib import Path

from maskdm.files import expanded
from maskdm.images.archives import TAR_SUFFIXES, TarSource, ZipSource, expand_pattern
from maskdm.images.arrays import ArraySource
from maskdm.images.decode import PLACEHOLDERS, foreign_kind
from maskdm.images.faces import FacesSource, is_faces
from maskdm.images.huggingface import PREFIX, HuggingFaceSource
from maskdm.images.known import KNOWN, locate
from maskdm.images.source import IMAGE_SUFFIXES, DigitsSource, FolderSource, Source, litter_of


def open_source(name: str) -> Source:
    """Opens a source by its name.

    Args:
        name: `digits`, `faces`, a known set's name (celeba, ...); `hf:...`; a URL or pattern of
            tars; a folder, a zip, a tar, an `.npz` or `.npy`. A folder that holds only tars is
            read as shards.

    Raises ValueError where it does not exist or has no images.
    """
    if (name == "digits" or is_faces(name)) and _is_own_folder(Path(name)):
        warnings.warn(
            f"data.source {name} is the set of that name, not the folder here: ./{name} is that",
            stacklevel=2,
        )
    try:
        if name == "digits":
            return DigitsSource()
        if is_faces(name):
            return FacesSource(name)
        if name.startswith(PREFIX):
            return HuggingFaceSource(name)
        path = locate(name) if name in KNOWN else expanded(name)
        is_pattern = glob.has_magic(name) or "{" in name
        if "://" in name or (is_pattern and not path.exists()):
            return TarSource(expand_pattern(name))
        return _open_folder(path) if path.is_dir() else _open_file(name, path)
    except PermissionError as error:
        raise ValueError(f"cannot read data.source {name}: {error.strerror or error}") from None


def refuse_inside(source: str, path: Path, flag: str) -> None:
    """Raises ValueError for a place in an image folder: what is written there would become images.

    Args:
        source: any; only folders of image files are looked at.
        path: where pictures are to be written.
        flag: that names another place, for the message.
    """
    try:
        folder = locate(source) if source in KNOWN else expanded(source)
    except ValueError:  # it is not here, so nothing can be inside
        return
    if folder.is_dir() and path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} lies in the image folder {source}, so that pictures in it would become "
            f"images: name a place elsewhere with {flag}"
        )


def _is_own_folder(path: Path) -> bool:
    """Whether a name is also that of a folder, other than a run's."""
    return path.is_dir() and not (path / "recipe.yaml").is_file()


def _open_folder(path: Path) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return HuggingFaceSource(f"{PREFIX}{path}")
    files = [file for file in path.iterdir() if not litter_of(f"{file.name}/")]
    tars = [str(file) for file in files if file.is_file() and _is_tar(file)]
    # Shards, where there is nothing else.
    return TarSource(sorted(tars)) if tars and len(tars) == len(files) else FolderSource(path)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def _looks_like_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # damaged fields make tarfile raise nearly anything
        return False


def _open_file(name: str, path: Path) -> Source:
    if not path.exists():
        raise ValueError(
            f"data.source {name} does not exist: use a folder, zip, tar, .npz or .npy of images, "
            f"hf:OWNER/NAME, or one of digits, faces, {', '.join(KNOWN)}"
        )
    if path.is_file() and (kind := foreign_kind(path, PLACEHOLDERS)):
        raise ValueError(f"data.source {name} is {kind}")
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy"):
        return ArraySource(path)
    # The suffix decides where there is one: a tar that holds a zip looks like a zip.
    if _is_tar(path):
        return TarSource([str(path)])
    if suffix == ".zip":
        return ZipSource(path)
    if path.is_file() and _looks_like_tar(path):
        return TarSource([str(path)])
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    way_out = "use one of these, or a folder"
    if suffix in IMAGE_SUFFIXES:
        way_out = f"use its folder, {path.parent}"
    elif suffix in (".parquet", ".arrow"):
        way_out = f"use hf:{path.parent}, for Hugging Face's reader"
    raise ValueError(f"data.source {name} is a file, but not a zip, tar, .npz or .npy: {way_out}")
