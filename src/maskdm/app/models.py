"""The models of the page, by the names under which it shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import numpy as np

from maskdm.engine import process_state
from maskdm.evaluation.reference import reference_of_run
from maskdm.families import GUIDANCE
from maskdm.files import expanded
from maskdm.images.joined import SelectedRows
from maskdm.images.order import training_subset
from maskdm.models.build import Backbone
from maskdm.models.class_names import class_number
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Mask, Recipe, Sampling
from maskdm.runs.find import stage_checkpoint
from maskdm.runs.load import Loaded, load_model, load_weak
from maskdm.words import listed

DEFAULT_MASK = Mask(kind="patch", rate=0.5)
IN_TURN, NO_CLASS = -1, -2  # instead of a class's number


@dataclass
class Shown:
    """A model on the page.

    Attributes:
        run: as for `load_model`.
        mask: that of its stage, or a usual one.
        loaded: the model on this process's device, once it was used.
        weak: its weak model, once autoguidance was used.
        images: those that it was trained on, (n, H, W, C), once one was shown.
    """

    run: str
    mask: Mask = DEFAULT_MASK
    loaded: Loaded | None = None
    weak: TrainedModel | None = None
    images: SelectedRows | None = None


@dataclass
class Models:
    """The models that the page shows: those that were named, and the ends of their masked stages.

    Attributes:
        given: names of the former.
        primers: names of the latter.
        lock: is held while models are loaded, and while one draws.
    """

    runs: Sequence[str]
    note: Callable[[str], None]
    given: list[str] = field(default_factory=list)
    primers: list[str] = field(default_factory=list)
    lock: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        """Loads the named models. Raises ValueError where one is not available."""
        self._shown: dict[str, Shown] = {}
        names = short_names(self.runs)
        for run, name in zip(self.runs, names, strict=True):
            self._shown[name] = Shown(run)
            self.given.append(name)
            self.load(name)
        for run, name in zip(self.runs, names, strict=True):
            self._add_primers(run, name)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.given, *self.primers]

    def load(self, name: str) -> Loaded:
        """A model, on this process's device. Raises ValueError where it is not available."""
        shown = self.shown(name)
        with self.lock:
            if shown.loaded is None:
                loaded = load_model(shown.run, self.note)
                loaded.trained.model.to(process_state().device)
                shown.loaded = loaded
        return shown.loaded

    def weak(self, name: str, sampling: Sampling) -> TrainedModel | None:
        """The weak model that its guidance needs, or None. Raises ValueError without one."""
        if not GUIDANCE[sampling.guidance.kind].needs_model:
            return None
        shown, strong = self.shown(name), self.load(name)
        with self.lock:
            if shown.weak is None:
                weak = load_weak(strong.location, sampling.guidance.weak, self.note).trained
                weak.model.to(process_state().device)
                shown.weak = weak
        return shown.weak

    def training_image(self, name: str, number: int) -> np.ndarray:
        """An image that a model was trained on, as it saw it: uint8 (H, W, C).

        Raises ValueError where they are not available, or not so many.
        """
        shown, location = self.shown(name), self.load(name).location
        if location.run is None:
            raise ValueError(f"{name} is not in a run's folder, which names its training images")
        with self.lock:
            if shown.images is None:
                shown.images = _training_images(location.run, location.recipe)
        num = len(shown.images)
        if not 0 <= number < num:
            raise ValueError(f"image {number}: {name} was trained on images 0 to {num - 1:,}")
        return np.array(shown.images[number])

    def shown(self, name: str) -> Shown:
        """What is known of a model. Raises ValueError for another name."""
        if name not in self._shown:
            raise ValueError(f"no model {name!r} on this page: {listed(self.names)}")
        return self._shown[name]

    def classes(self) -> list[tuple[str, int]]:
        """Choices of a class, as text and number; empty where no named model has classes."""
        model = next((model for model in self._given() if model.num_classes), None)
        if model is None:
            return []
        names = model.config.class_names or map(str, range(model.num_classes))
        classes = [("all in turn", IN_TURN), *((name, i) for i, name in enumerate(names))]
        return classes + [("no class", NO_CLASS)] * bool(model.config.label_dropout)

    def class_of(self, name: str, number: int) -> int:
        """A choice of `classes` as a class of this model: by its name, where it has names.

        Raises ValueError where it has no such class.
        """
        config = self.load(name).trained.model.config
        text = dict((value, text) for text, value in self.classes()).get(number, str(number))
        if number == NO_CLASS:
            if not (config.num_classes and config.label_dropout):
                raise ValueError(f"{name} cannot draw without a class: choose one, or all in turn")
            return int(config.num_classes)
        if not config.num_classes:
            raise ValueError(f"{name} has no classes: choose all in turn")
        return class_number(config, text)

    def guidance_kinds(self) -> list[str]:
        """Kinds of guidance that at least one named model can have."""
        drops = any(model.num_classes and model.config.label_dropout for model in self._given())
        return [kind for kind in GUIDANCE if drops or kind != "classifier-free"]

    def _given(self) -> list[Backbone]:
        return [self.load(name).trained.model for name in self.given]

    def _add_primers(self, run: str, name: str) -> None:
        """Adds the ends of a run's masked stages, as far as there are checkpoints."""
        location, path = self.load(name).location, expanded(run)
        if location.run is None or location.run.resolve() != path.resolve():
            return
        for stage in location.recipe.stages:
            if not stage.mask.rate:
                continue
            try:
                stage_checkpoint(location.run, stage.name)
            except ValueError:  # the run has not reached it, or its checkpoint is gone
                continue
            primer = f"{name}@{stage.name}"
            if primer not in self._shown:
                self._shown[primer] = Shown(f"{run}@{stage.name}", stage.mask)
                self.primers.append(primer)


def short_names(runs: Sequence[str]) -> list[str]:
    """Names for runs: the last parts of their paths, as few as keep them apart.

    Raises ValueError where one is named twice.
    """
    parts = [Path(run).parts for run in runs]
    for num in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-num:]) for one in parts]
        if len({*names}) == len(names):
            return names
    twice = next(run for run, own in zip(runs, parts, strict=True) if parts.count(own) > 1)
    raise ValueError(f"{twice} is named twice: name each run once")


def _training_images(run: Path, recipe: Recipe) -> SelectedRows:
    """The images that a run was trained on, wherever its source is now: (n, H, W, C).

    Raises ValueError where they are not there, or have changed.
    """
    reference, is_unchanged = reference_of_run(run, recipe.data, False)
    if not is_unchanged or reference.store is None:
        raise ValueError(f"the images of {reference.name} are not those that {run} was trained on")
    store = reference.store
    return SelectedRows(store.images, training_subset(len(store), recipe.data))
