"""The family of figures that say how good samples or a model are: a table, as in `families.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from maskdm.choices import Later, known, shown


@dataclass(frozen=True)
class Metric:
    """A figure that says how good samples, or a model, are.

    Attributes:
        title: its name in print.
        help: what it is, for `--help`.
        compute: (compared: `evaluation.measure.Compared`) -> `evaluation.measure.Measured`, or a
            dict of them by name where one computation serves several rows, which then runs once;
            a name that is missing from the dict could not be measured.
        higher_is_better: else lower is.
        needs: what it is computed from besides samples and the reference's statistics: `images`
            (the reference's), `logits` (Inception's), `training` (which images the model was
            trained on); or instead of all that `model`, in training, with held-out images.
        is_cheap: whether it is measured in training too, into quality.jsonl.
        is_report: whether it gives, instead of a figure, a dict for the record, under its name,
            with `verdict` (a sentence) and `warning` (a sentence or None).
        in_pca: whether it is measured in features `pca` without being named.
        short_title: its name in tables; None = the title.
        inception_title: its name in features `inception`, if it has one of its own there.
        library: the package whose code computes it.
        unit: of its values, for the axis of a plot; empty = none.
        limits: the lowest and the highest value that it can have; intervals end there.
    """

    title: str
    help: str
    compute: Callable[..., Any]
    higher_is_better: bool = False
    needs: frozenset[str] = frozenset()
    is_cheap: bool = False
    is_report: bool = False
    in_pca: bool = True
    short_title: str | None = None
    inception_title: str | None = None
    library: str = "maskdm"
    unit: str = ""
    limits: tuple[float, float] = (-math.inf, math.inf)

    def title_in(self, features: str, short: bool = False) -> str:
        """Its name for a figure in some features: `FID`, `Frechet distance`."""
        if features == "inception" and self.inception_title:
            return self.inception_title
        return self.short_title if short and self.short_title else self.title

    def heading_in(self, features: str) -> str:
        """Its name above a column of a table: `FID`, `Frechet (pca)`."""
        title = self.title_in(features, short=True)
        depends = self.inception_title is not None and features != "inception"
        return f"{title} ({features})" if depends else title


METRICS: dict[str, Metric] = {
    "frechet": Metric(
        "Frechet distance",
        "between Gaussians fitted to both sets (FID in features inception)",
        Later("evaluation.distances:measure_frechet"),
        short_title="Frechet",
        inception_title="FID",
        unit="squared units of the features",
        limits=(0, math.inf),
    ),
    "sliced": Metric(
        "sliced Wasserstein distance",
        "mean over random directions, without the assumption of Gaussians",
        Later("evaluation.distances:measure_sliced"),
        needs=frozenset({"images"}),
        is_cheap=True,
        short_title="sliced",
        unit="squared units of the features",
        limits=(0, math.inf),
    ),
    "kid": Metric(
        "kernel distance (KID)",
        "unbiased, for features whose values are near 1 (in pca only if named)",
        Later("evaluation.distances:measure_kid"),
        needs=frozenset({"images"}),
        is_cheap=True,
        in_pca=False,
        short_title="KID",
        inception_title="KID",
        library="torch-fidelity",
    ),
    "precision": Metric(
        "precision",
        "share of the samples that lie among the real images",
        Later("evaluation.distances:measure_precision_recall"),
        higher_is_better=True,
        needs=frozenset({"images"}),
        library="torch-fidelity",
        limits=(0, 1),
    ),
    "recall": Metric(
        "recall",
        "share of the real images that lie among the samples",
        Later("evaluation.distances:measure_precision_recall"),
        higher_is_better=True,
        needs=frozenset({"images"}),
        library="torch-fidelity",
        limits=(0, 1),
    ),
    "inception_score": Metric(
        "Inception score",
        "how clear and varied the Inception network's classes are (in features inception)",
        Later("evaluation.distances:measure_inception_score"),
        higher_is_better=True,
        needs=frozenset({"logits"}),
        short_title="IS",
        library="torch-fidelity",
        limits=(1, math.inf),
    ),
    "memorization": Metric(
        "copies of training images",
        "samples nearer to a training image than 99 % of real images are",
        Later("evaluation.memorization:measure_memorization"),
        needs=frozenset({"images", "training"}),
        is_report=True,
        short_title="copies",
    ),
    "dense_loss": Metric(
        "dense denoising loss, held-out images",
        "measured in training only, where data.held_out is above 0",
        Later("evaluation.dense_loss:measure_dense_loss"),
        needs=frozenset({"model"}),
        is_cheap=True,
        short_title="dense loss",
    ),
}

MetricName = Annotated[
    str,
    AfterValidator(lambda name: name.replace("-", "_")),
    known(METRICS, "metric"),
    shown(METRICS),
]


def qualities() -> tuple[str, ...]:
    """The figures that are measured in training; the first is the usual one."""
    return tuple(name for name, row in METRICS.items() if row.is_cheap and not row.is_report)
