"""What a search has trained: a forest of runs, each of which goes on from the one before it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from maskdm.files import write_text
from maskdm.models.backbone import Backbone
from maskdm.recipe import Recipe
from maskdm.settings import changed
from maskdm.training.work import stage_work, total_flops

NEVER = 10**9
# Settings that decide the weights after the last step, besides the stages.
DECISIVE = ("data", "model", "diffusion", "init", "init_weights", "seed", "precision")


class Stopped(Exception):
    """A signal stopped training, after saving."""


class Diverged(Exception):
    """The loss was not finite any more."""


class Trainer(Protocol):
    """What trains and measures."""

    def train(self, recipe: Recipe, folder: Path, start: Path | None) -> None:
        """Trains a recipe in a folder to its end, or goes on there.

        Args:
            recipe: what is trained.
            folder: the run's folder.
            start: the run's folder whose last checkpoint a fresh run goes on from; None = from the
                first weights.

        Raises:
            Stopped: by a signal, after saving.
            Diverged: the loss was not finite.
        """

    def measure(self, recipe: Recipe, folder: Path) -> dict[str, float]:
        """Quick figures of a trained model, by their names; `dense_loss` among them."""

    def distance(self, recipe: Recipe, folder: Path) -> dict[str, dict[str, Any]]:
        """Distances of many samples by name: value, interval."""


@dataclass(frozen=True)
class Node:
    """A run of the forest.

    Attributes:
        name: of its folder.
        parent: the run that it goes on from; None = from the first weights.
        stages: as in its recipe.
        flops: of its whole history; `own_flops` of them were trained here.
        diverged: whether its loss was not finite in the end.
    """

    name: str
    parent: str | None
    stages: list[dict[str, Any]]
    flops: int
    own_flops: int
    diverged: bool = False


class Forest:
    """Trains recipes so that none of their common beginnings is trained twice.

    Several processes may share its folder: each waits for a run that another is training.

    Args:
        folder: of all runs.
        trainer: what trains.
        model: of all recipes; only its sizes matter.
    """

    def __init__(self, folder: Path, trainer: Trainer, model: Backbone):
        self.folder, self._trainer, self._model = folder, trainer, model
        folder.mkdir(parents=True, exist_ok=True)

    def grow(self, recipe: Recipe, marks: list[int], earlier: list[int]) -> Node:
        """Trains a recipe to its end, as far as that is not done.

        Args:
            recipe: what is trained.
            marks: steps of its first stage after which other recipes may go on: it is kept there.
            earlier: those at which it may have been kept before.

        Returns:
            The recipe's run, or that on the way to it which diverged.

        Raises:
            Stopped: by a signal; what was trained stays.
        """
        first = recipe.stages[0]
        beginnings = []
        for steps in sorted({*marks, *earlier}):
            rows = [{**first.model_dump(), "steps": steps}]
            one = changed(recipe, stages=rows) if steps < first.steps else None
            if one and (steps in marks or (self.folder / name_of(one) / "node.json").is_file()):
                beginnings.append(one)
        for num in range(1, len(recipe.stages) + 1):
            rows = [stage.model_dump() for stage in recipe.stages[:num]]
            beginnings.append(changed(recipe, stages=rows))
        node: Node | None = None
        for one in beginnings:
            node = self._ensure(one, node, is_leaf=one is beginnings[-1])
            if node.diverged:
                break
        assert node is not None
        return node

    def nodes(self) -> list[Node]:
        """All runs that are done, in the order of their names."""
        paths = sorted(self.folder.glob("*/node.json"))
        return [Node(**json.loads(path.read_text("utf-8"))) for path in paths]

    def spent(self) -> int:
        """FLOPs of everything that was trained."""
        return sum(node.own_flops for node in self.nodes())

    def drop_all_but(self, recipes: list[Recipe]) -> None:
        """Removes the checkpoints of runs from which none of these recipes goes on."""
        kept = [_beginning(one.seed, one.stages[0].model_dump(mode="json")) for one in recipes]
        for node in self.nodes():
            seed = int(node.name.rpartition("-")[2])
            if _beginning(seed, node.stages[0]) not in kept:
                self.drop(node)

    def drop(self, node: Node) -> None:
        """Removes a run's checkpoints; its exported model stays."""
        shutil.rmtree(self.folder / node.name / "checkpoints", ignore_errors=True)

    def _ensure(self, recipe: Recipe, parent: Node | None, is_leaf: bool) -> Node:
        """A run of the forest, trained if it is not there."""
        name = name_of(recipe)
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        with FileLock(self.folder / f"{name}.lock"):
            known = self._read(folder)
            if known and (known.diverged or is_leaf or (folder / "checkpoints").is_dir()):
                return known
            flops = total_flops(recipe, stage_work(recipe, self._model))
            own = flops - (parent.flops if parent else 0)
            start = None if parent is None else self.folder / parent.name
            diverged = False
            try:
                self._trainer.train(for_training(recipe), folder, start)
            except Diverged:
                diverged = True
            stages = [stage.model_dump(mode="json") for stage in recipe.stages]
            before = known.own_flops if known else 0  # whose checkpoints were removed by someone
            of = parent.name if parent else None
            node = Node(name, of, stages, flops, own + before, diverged)
            write_text(folder / "node.json", json.dumps(node.__dict__) + "\n")
            return node

    def _read(self, folder: Path) -> Node | None:
        path = folder / "node.json"
        return Node(**json.loads(path.read_text("utf-8"))) if path.is_file() else None


def name_of(recipe: Recipe) -> str:
    """A folder's name that says all that the weights depend on, with the seed at its end."""
    values = recipe.model_dump(mode="json")
    facts = [values[name] for name in DECISIVE] + values["stages"]
    sha256 = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return f"{sha256[:12]}-{recipe.seed}"


def for_training(recipe: Recipe) -> Recipe:
    """The recipe without looks at the model, and without checkpoints but those of ten minutes."""
    return changed(
        recipe,
        log_every="10%",
        checkpoint_every=NEVER,
        keep_checkpoints=1,
        preview_every=NEVER,
        num_previews=0,
        evaluate_every=0,
    )


def _beginning(seed: int, stage: dict[str, Any]) -> str:
    """What recipes have in common of which one may go on from the other."""
    return json.dumps([seed, {**stage, "steps": math.inf}], sort_keys=True)
