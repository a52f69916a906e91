"""Hugging Face data sets, from the Hub or a local folder, read as a stream."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from maskdm.files import expanded
from maskdm.images.decode import Content
from maskdm.images.source import Item, Source, file_state, litter_of
from maskdm.words import one_line

PREFIX = "hf:"


class HuggingFaceSource(Source):
    """The first image column of a data set; its class column, if there is one, gives labels.

    Only what is read is downloaded, and nothing is kept.

    Args:
        name: hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT. NAME is `owner/name` on the
            Hub, or a folder: of data files, or one that `save_to_disk` wrote. The split is `train`
            by default.

    Raises ValueError for a data set that cannot be opened or has no images.
    """

    kind = "Hugging Face data set"

    def __init__(self, name: str):
        super().__init__()
        drive, path = os.path.splitdrive(name.removeprefix(PREFIX))  # Windows: C:\folder:train
        path, *rest = path.split(":")
        if not path or len(rest) > 2:
            raise ValueError(
                f"data.source {name}: expected hf:NAME[:SPLIT] or hf:NAME:CONFIG:SPLIT"
            )
        split = rest.pop() if rest else "train"
        try:
            self._dataset, identity = _open(drive + path, rest[0] if rest else None, split)
        except Exception as error:  # of the library, the network, or a file
            raise ValueError(f"cannot open data.source {name}: {one_line(error)}") from None
        self.fingerprint = hashlib.sha256(f"{identity}\0{split}".encode()).hexdigest()
        self._image, self._label = self._columns(name)

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        (number, count), dataset, num_images = part, self._dataset, 0
        if count > 1:
            if dataset.num_shards < count:
                raise ValueError(
                    f"this data set cannot be split into {count} parts: each part needs a file of "
                    f"its own, so use at most {dataset.num_shards}"
                )
            dataset = dataset.shard(num_shards=count, index=number)
        try:
            for row in dataset:
                label = row[self._label] if self._label else None
                if not isinstance(label, str | int) or label == -1:  # -1: it is not published
                    label = None
                yield Item(f"{num_images:08d}", _content(row[self._image]), label)
                num_images += 1
        except Exception as error:  # of the network, or a damaged file
            raise ValueError(
                f"reading the data set failed after {num_images:,} images: {one_line(error)}"
            ) from None

    def _columns(self, name: str) -> tuple[str, str | None]:
        """The columns of images and labels; sets the images not to be decoded."""
        import datasets

        features = self._dataset.features or {}
        images, classes = (
            [column for column, feature in features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        )
        if not images:
            raise ValueError(f"data.source {name} has no images among {', '.join(features)}")
        self._dataset = self._dataset.cast_column(images[0], datasets.Image(decode=False))
        if classes:
            self.class_names = features[classes[0]].names
            return images[0], classes[0]
        return images[0], "label" if "label" in features else None


def _open(path: str, config: str | None, split: str) -> tuple[Any, str]:
    """A data set as a stream, and a text that changes when the data set does."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # else a typo prints ten lines
    folder = expanded(path)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has no split {split}: use one of {', '.join(saved)}")
            saved = saved[split]
        files = [Path(file["filename"]) for file in saved.cache_files]
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return saved.to_iterable_dataset(num_shards=max(1, len(files))), repr(state)
    local = str(folder) if folder.is_dir() else path
    builder = datasets.load_dataset_builder(local, config)
    identity = f"{local}\0{builder.config_id}\0{builder.hash}"
    if folder.is_dir():  # a README's `configs` keep the files' states out of the hash
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        own = [name for name in sorted(paths) if paths[name].is_file() and not litter_of(name)]
        identity += "".join(name + file_state(paths[name]).decode() for name in own)
    return builder.as_streaming_dataset(split=split), identity


def _content(image: dict[str, Any] | None) -> Content:
    """What a row of the library holds, undecoded."""
    if not image or not (image["bytes"] or image["path"]):
        return ValueError("this row has no image")
    if image["bytes"]:
        return bytes(image["bytes"])
    if "://" not in image["path"]:
        return Path(image["path"])
    try:
        with fsspec.open(image["path"], "rb") as file:
            return bytes(file.read())
    except Exception as error:  # each file system has its own
        return error
