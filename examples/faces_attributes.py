"""Did a model of the drawn faces learn their attributes? Counts hats, hair, mouths and eyes.

    python examples/faces_attributes.py RUN [NUM]

A small classifier learns the attributes from other drawn faces, whose attributes are known; then it
reads them off the model's samples, and what it usually mistakes is allowed for. In the data each
value of an attribute is equally frequent.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.optimize import nnls
from sklearn.metrics import confusion_matrix
from sklearn.neural_network import MLPClassifier

from maskdm.images.faces import ATTRIBUTES, draw_face, face_of
from maskdm.runs.load import load_model
from maskdm.sampling.generate import generate

NUM_TRAIN, NUM_TEST = 4000, 1000


def drawn(numbers: range, side: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Faces, uint8 (N, side, side, 3), and their attributes, int (N,) each."""
    faces = [face_of(number, seed) for number in numbers]
    pixels = np.stack([draw_face(face, side) for face in faces])
    attributes = {name: np.array([getattr(f, name) for f in faces]) for name in ATTRIBUTES}
    return pixels, attributes


def shares_of(images: np.ndarray) -> dict[str, dict[str, float]]:
    """How frequent each value of each attribute is among faces: uint8 (N, side, side, 3)."""
    side = images.shape[1]
    train, known = drawn(range(NUM_TRAIN), side, seed=101)
    test, truth = drawn(range(NUM_TEST), side, seed=102)
    shares = {}
    for name, values in ATTRIBUTES.items():
        reader = MLPClassifier((64,), max_iter=200, early_stopping=True, random_state=0)
        reader.fit(_rows(train), known[name])
        seen = np.bincount(reader.predict(_rows(images)), minlength=len(values)) / len(images)
        # Row i of the confusion matrix is what the reader makes of value i: seen = shares @ matrix.
        matrix = confusion_matrix(truth[name], reader.predict(_rows(test)), normalize="true")
        found, _ = nnls(matrix.T, seen)
        shares[name] = dict(zip(values, (found / found.sum()).tolist(), strict=True))
    return shares


def _rows(images: np.ndarray) -> np.ndarray:
    """Images as rows of values from 0 to 1."""
    rows: np.ndarray = images.reshape(len(images), -1) / 255
    return rows


def main(run: str, num: int = 2000) -> None:
    """Prints the shares of all attributes among samples."""
    loaded = load_model(run)
    images = generate(loaded.trained, loaded.sampling, list(range(num)))
    for name, shares in shares_of(images).items():
        parts = ", ".join(f"{value} {100 * share:.0f} %" for value, share in shares.items())
        print(f"{name:6}  {parts}  (data: {100 / len(shares):.0f} % each)")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
