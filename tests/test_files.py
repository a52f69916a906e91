"""Files and folders are whole or not there, whatever goes wrong in between."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from maskdm.files import whole_folder, write_text


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.txt").write_text(text)


def content(folder: Path) -> str:
    return (folder / "inner" / "a.txt").read_text()


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path):
    place = tmp_path / "new" / "model"
    with whole_folder(place) as writing:
        assert writing.parent == place.parent and not place.exists()
        fill(writing, "one")
    assert content(place) == "one"
    with whole_folder(place) as writing:
        fill(writing, "two")
        assert content(place) == "one"
    assert content(place) == "two"
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error", [OSError(5, "x"), KeyboardInterrupt(), SafetensorError("No space left on device")]
)
def test_an_error_leaves_the_old_folder_alone(tmp_path, error):
    place = tmp_path / "model"
    with whole_folder(place) as writing:
        fill(writing, "one")
    expected = OSError if isinstance(error, SafetensorError) else type(error)
    with pytest.raises(expected) as caught, whole_folder(place) as writing:
        fill(writing, "two")
        raise error
    if isinstance(error, SafetensorError):
        assert caught.value.errno == errno.ENOSPC and str(writing) in str(caught.value)
    assert content(place) == "one" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    place, real, seen = tmp_path / "model", Path.rename, []
    with whole_folder(place) as writing:
        fill(writing, "one")

    def rename(self, target):
        if self.name.startswith("writing"):
            seen.append(content(tmp_path / "removing-model"))  # what a kill here would leave
            raise OSError(5, "no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"), whole_folder(place) as writing:
        fill(writing, "two")
    assert seen == ["one"] and content(place) == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_to_be_replaced_stays(tmp_path):
    place = tmp_path / "store"
    place.mkdir()  # empty: it gives way
    with whole_folder(place, tmp_path / "building", replace=False) as writing:
        assert writing.name == "building"
        fill(writing, "one")
    with whole_folder(place, tmp_path / "building", replace=False) as writing:
        fill(writing, "two")
    assert content(place) == "one" and [path.name for path in tmp_path.iterdir()] == ["store"]


def test_files_get_the_mode_of_any_new_file(tmp_path):
    with whole_folder(tmp_path / "a") as writing:
        fill(writing, "one")
        (writing / "inner" / "a.txt").chmod(0o600)
    (tmp_path / "plain").touch()
    mode = (tmp_path / "a" / "inner" / "a.txt").stat().st_mode
    assert mode == (tmp_path / "plain").stat().st_mode


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "one")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "one" and len(list(tmp_path.iterdir())) == 1
