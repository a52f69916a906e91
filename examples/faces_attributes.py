"""Did a model of the drawn faces learn their attributes? Counts hats, hair, mouths and eyes.

    python examples/faces_attributes.py RUN [NUM]

A small classifier learns the attributes from other drawn faces, whose attributes are known; then it
reads them off the model's samples. In the data each value of an attribute is equally frequent.
"""

from __future__ import annotations

import sys

import numpy as np
from sklearn.neural_network import MLPClassifier

from maskdm.images.faces import ATTRIBUTES, draw_face, face_of
from maskdm.runs.load import load_model
from maskdm.sampling.generate import generate

NUM_TRAIN, NUM_TEST = 4000, 1000


def drawn(numbers: range, side: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Faces as pixels, float (N, side * side * 3) in [0, 1], and their attributes, int (N,)."""
    faces = [face_of(number, seed) for number in numbers]
    pixels = np.stack([draw_face(face, 64) for face in faces])
    pixels = pixels.reshape(len(faces), side, 64 // side, side, 64 // side, 3).mean(axis=(2, 4))
    return flat(pixels), {name: np.array([getattr(f, name) for f in faces]) for name in ATTRIBUTES}


def flat(pixels: np.ndarray) -> np.ndarray:
    """Images of values 0 to 255 as rows of values 0 to 1."""
    rows: np.ndarray = pixels.reshape(len(pixels), -1) / 255
    return rows


def main(run: str, num: int = 2000) -> dict[str, dict[str, float]]:
    """Prints the shares of all attributes among samples; gives them."""
    loaded = load_model(run)
    side = loaded.trained.model.image_shape[0]
    images = generate(loaded.trained, loaded.sampling, list(range(num)))
    train, known = drawn(range(NUM_TRAIN), side, seed=101)
    test, truth = drawn(range(NUM_TEST), side, seed=102)
    shares: dict[str, dict[str, float]] = {}
    for name, values in ATTRIBUTES.items():
        reader = MLPClassifier((64,), max_iter=200, early_stopping=True, random_state=0)
        reader.fit(train, known[name])
        right = reader.score(test, truth[name])
        seen = reader.predict(flat(images))
        shares[name] = {value: float((seen == i).mean()) for i, value in enumerate(values)}
        parts = ", ".join(f"{value} {100 * share:.1f} %" for value, share in shares[name].items())
        expected = 100 / len(values)
        print(
            f"{name:6} {parts}  (data: {expected:.1f} % each; the reader is right in {right:.1%})"
        )
    return shares


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
