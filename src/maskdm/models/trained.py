"""A network with the diffusion that it was trained under."""

from __future__ import annotations

from dataclasses import dataclass

from maskdm.diffusion.schedule import Schedule, schedule_of
from maskdm.models.build import Backbone
from maskdm.recipe import Diffusion


@dataclass(frozen=True)
class TrainedModel:
    """All that a denoiser needs: the network, and what its answers mean.

    Attributes:
        model: `model(patches, positions, t, labels) -> patches`, on the device to use.
        diffusion: its schedule and prediction.
    """

    model: Backbone
    diffusion: Diffusion

    @property
    def schedule(self) -> Schedule:
        """Its noise schedule, for images of the model's size."""
        return schedule_of(self.diffusion, self.model.image_shape[:2])
