"""Faces drawn by code: the same everywhere, each attribute visible and independent."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from maskdm.cli import main
from maskdm.images.faces import ATTRIBUTES, SKINS, FacesSource, draw_face, face_of
from maskdm.images.open import open_source
from maskdm.images.store import open_store
from maskdm.recipe import Data
from maskdm.recipe_files import load_recipe


def test_a_face_depends_on_its_seed_and_number_alone():
    assert [face_of(i, 3) for i in range(5)] == [face_of(i, 3) for i in range(9)][:5]
    assert face_of(0, 0) != face_of(0, 1) and face_of(0) != face_of(1)
    image = draw_face(face_of(0))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    # Stores and published figures depend on which faces these are.
    assert face_of(0).words == {
        "hat": "top-hat", "hair": "long", "mouth": "open", "eyes": "plain",
    }  # fmt: skip
    corners = image[0, 0].tolist(), image[0, -1].tolist()
    assert corners == ([190, 225, 180], [190, 225, 180])  # the ground, green


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_each_attribute_is_drawn(attribute):
    """Changing it changes the picture, at every size that recipes use."""
    face = face_of(2)._replace(hat=0, hair=1, mouth=0, eyes=0)
    for side in (16, 32, 64, 128):
        pictures = [
            draw_face(face._replace(**{attribute: value}), side).astype(int)
            for value in range(len(ATTRIBUTES[attribute]))
        ]
        for i, one in enumerate(pictures):
            assert one.shape == (side, side, 3)
            for other in pictures[:i]:
                assert np.abs(one - other).max() > 40


@pytest.mark.parametrize("attribute", ["mouth", "eyes"])
def test_small_faces_have_bold_features(attribute):
    """On every skin, at 16 pixels: several pixels tell any two mouths and pairs of eyes apart."""
    for skin in range(len(SKINS)):
        face = face_of(2)._replace(hat=0, hair=1, mouth=0, eyes=0, skin=skin)
        pictures = [draw_face(face._replace(**{attribute: i}), 16).astype(int) for i in range(3)]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            apart = np.abs(pictures[i] - pictures[j]).max(axis=-1) > 50
            assert apart.sum() >= 4


def test_attributes_are_uniform_and_independent():
    faces = [face_of(i) for i in range(4000)]
    for name, values in ATTRIBUTES.items():
        counts = np.bincount([getattr(face, name) for face in faces], minlength=len(values))
        share = 1 / len(values)
        error = 4 * np.sqrt(share * (1 - share) / len(faces))
        assert np.abs(counts / len(faces) - share).max() < error
    together = np.corrcoef(
        [[face.hat, face.mouth, face.eyes, face.skin] for face in faces], rowvar=False
    )
    assert np.abs(together - np.eye(4)).max() < 0.07


def test_the_source_is_named_with_number_seed_and_side(tmp_path):
    source = open_source("faces:12:7@32")
    assert source.num_images == 12 and source.class_names == list(ATTRIBUTES["hat"])
    items = list(source.items())
    assert [item.label for item in items] == [face_of(i, 7).hat for i in range(12)]
    assert items[3].content.shape == (32, 32, 3)
    halves = [item.name for i in range(2) for item in source.items((i, 2))]
    assert halves == [item.name for item in items]
    assert FacesSource("faces").num_images == 4096
    prints = {
        FacesSource(name).fingerprint for name in ("faces", "faces:12", "faces:12:7", "faces@32")
    }
    assert len(prints) == 4
    for name in ("faces:0", "faces:many", "faces:1:2:3", "faces@4", "faces@2000", "faces:"):
        with pytest.raises(ValueError, match="expected faces, faces:N, faces:N:SEED"):
            open_source(name)


def test_they_are_packed_checked_and_trained_on(tmp_path, capsys):
    store = open_store(Data(source="faces:40", size=16), progress=False)
    assert store.images.shape == (40, 16, 16, 3) and len(store.labels) == 40
    assert store.manifest["class_names"] == list(ATTRIBUTES["hat"])
    assert main(["check", "faces:40", "--size", "16"]) == 0
    assert "faces drawn by code, 40 images" in capsys.readouterr().out
    recipe = load_recipe("faces")
    assert recipe.data.source == "faces@16" and recipe.stages[-1].mask.kind == "none"
    flags = "--data.source faces:40 --stages.0.steps 2 --stages.1.steps 2 --model.num-classes 4"
    flags += " --stages.0.batch-size 4 --stages.1.batch-size 4 --evaluation.quick-num 0"
    assert main(["train", "faces", "--out", str(tmp_path / "run"), *flags.split()]) == 0
    out = str(tmp_path / "x.npz")
    assert (
        main(["sample", str(tmp_path / "run"), "--num", "2", "--label", "cap", "--out", out]) == 0
    )
    evaluate = ["evaluate", "faces:30:1", "--reference", "faces:40"]
    assert main([*evaluate, "--features", "pca", "--out", str(tmp_path / "e.json")]) == 0


def test_the_example_counts_attributes(monkeypatch):
    """Half of the faces wear top hats, which says nothing of their mouths and eyes."""
    path = Path(__file__).parent.parent / "examples" / "faces_attributes.py"
    spec = importlib.util.spec_from_file_location("faces_attributes", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "NUM_TRAIN", 1500)
    monkeypatch.setattr(example, "NUM_TEST", 300)
    images, truth = example.drawn(range(1000), 16, seed=7)
    is_top = truth["hat"] == 3
    chosen = np.concatenate([np.flatnonzero(is_top)[:150], np.flatnonzero(~is_top)[:150]])
    shares = example.shares_of(images[chosen])
    assert shares["hat"]["top-hat"] == pytest.approx(0.5, abs=0.05)
    for name in ("hat", "mouth", "eyes"):
        assert sum(shares[name].values()) == pytest.approx(1)
        for i, share in enumerate(shares[name].values()):
            assert share == pytest.approx((truth[name][chosen] == i).mean(), abs=0.12)
