"""Hugging Face data sets, of the Hub or a local folder, read as a stream."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskdm.images.labels import Label
from maskdm.images.prepare import Content
from maskdm.images.source import Item, Source

PREFIX = "hf:"


class HuggingFaceSource(Source):
    """The first image column of a data set; its class column, if there is one, gives labels.

    Args:
        name: hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT. NAME is `owner/name` on the
            Hub, or a folder: of data files, or one that `save_to_disk` wrote. The split is `train`
            where none is given. Nothing but what is read is downloaded, and nothing is kept.

    Raises ValueError for a data set that can't be had, or has no images.
    """

    def __init__(self, name: str):
        super().__init__()
        self.kind = "Hugging Face data set"
        path, *rest = name.removeprefix(PREFIX).split(":")
        if not path or len(rest) > 2:
            raise ValueError(
                f"data.source {name}: expected hf:NAME[:SPLIT] or hf:NAME:CONFIG:SPLIT"
            )
        split = rest.pop() if rest else "train"
        try:
            self._dataset, identity = _open(path, rest[0] if rest else None, split)
        except Exception as error:  # of the library, the network, or a file
            text = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"data.source {name} can't be opened: {text}") from None
        self.fingerprint = hashlib.sha256(f"{identity}\0{split}".encode()).hexdigest()
        self._image, self._label = self._columns(name)

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        number, count = part
        dataset = self._dataset
        if count > 1:
            if dataset.num_shards < count:
                raise ValueError(
                    f"this data set has {dataset.num_shards} files, and can't be cut into {count} "
                    "parts: use at most as many"
                )
            dataset = dataset.shard(num_shards=count, index=number)
        rows = iter(dataset)
        for i in itertools.count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of the network, or a damaged file
                text = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"the data set broke off after {i:,} images: {text}") from None
            label = row[self._label] if self._label else None
            yield Item(f"{i:08d}", _content(row[self._image]), _known(label))

    def _columns(self, name: str) -> tuple[str, str | None]:
        """The columns of images and labels, the former set not to be decoded."""
        import datasets

        features = self._dataset.features or {}
        of_kind = {
            kind: [column for column, feature in features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        }
        if not of_kind[datasets.Image]:
            raise ValueError(f"data.source {name} has no images among {', '.join(features)}")
        image = of_kind[datasets.Image][0]
        self._dataset = self._dataset.cast_column(image, datasets.Image(decode=False))
        if classes := of_kind[datasets.ClassLabel]:
            self.class_names = features[classes[0]].names
            return image, classes[0]
        return image, "label" if "label" in features else None


def _open(path: str, config: str | None, split: str) -> tuple[Any, str]:
    """A data set as a stream, and what changes when it does."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # else a typo scrolls by in ten lines
    folder = Path(path).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has no split {split}: there is {', '.join(saved)}")
            saved = saved[split]
        files = [Path(file["filename"]) for file in saved.cache_files]
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return saved.to_iterable_dataset(num_shards=max(1, len(files))), repr(state)
    local = str(folder) if folder.is_dir() else path
    builder = datasets.load_dataset_builder(local, config)
    identity = f"{os.fspath(local)}\0{builder.config_id}\0{builder.hash}"
    return builder.as_streaming_dataset(split=split), identity


def _content(image: dict[str, Any] | None) -> Content:
    """An undecoded image of the library's, as ours."""
    if not image:
        return ValueError("there is none in this row")
    if image["bytes"]:
        return bytes(image["bytes"])
    path = image["path"]
    if not path:
        return ValueError("there is none in this row")
    if "://" not in path:
        return Path(path)
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except Exception as error:  # each file system has its own
        return error


def _known(label: object) -> Label:
    """A class's number or name; -1 is how data sets say that they don't tell."""
    return label if isinstance(label, str | int) and label != -1 else None
