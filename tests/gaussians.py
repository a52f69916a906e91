"""Networks whose best answer is known in closed form, behind the face of the real ones."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from maskdm.diffusion.prediction import target_from
from maskdm.diffusion.schedule import schedule_of
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Diffusion


class ClosedForm(nn.Module):
    """The posterior mean of x0 under a known distribution, in any prediction; patches of a pixel.

    Subclasses give `posterior_mean(x_t, positions, alpha, sigma)`.
    """

    def __init__(self, diffusion: Diffusion, image_size: int):
        super().__init__()
        self.diffusion, self.schedule = diffusion, schedule_of(diffusion, image_size)
        self.config = SimpleNamespace(
            patch_size=1, channels=1, num_classes=0, label_dropout=0.0, class_names=None
        )
        self.patch_size, self.grid = 1, (image_size, image_size)
        self.image_shape = (image_size, image_size, 1)
        self.num_patches = image_size**2
        self.place = nn.Parameter(torch.zeros(1))  # tells the device
        self.calls: list[tuple[Tensor, float]] = []

    def forward(self, x_t: Tensor, positions: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append((x_t, t[0].item()))
        t = t.double()[:, None, None]
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = x_t.double()
        x0 = self.posterior_mean(x, positions, alpha, sigma)
        return target_from(self.diffusion.prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)


class Normal(ClosedForm):
    """Independent normal values of one mean and spread."""

    mean, std = 0.3, 0.4

    def posterior_mean(self, x: Tensor, positions: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


class Mixture(ClosedForm):
    """Independent values, each from one of two normal distributions."""

    weights, means, std = (0.3, 0.7), (-0.6, 0.5), 0.1

    def posterior_mean(self, x: Tensor, positions: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        spread = alpha**2 * self.std**2 + sigma**2
        logits = torch.stack(
            [
                torch.tensor(weight).double().log() - (x - alpha * mean) ** 2 / (2 * spread)
                for weight, mean in zip(self.weights, self.means, strict=True)
            ]
        )
        means = torch.stack(
            [mean + alpha * self.std**2 / spread * (x - alpha * mean) for mean in self.means]
        )
        return (logits.softmax(0) * means).sum(0)


class Correlated(ClosedForm):
    """Four correlated normal values, a 2x2 image; patches that aren't shown are not known of."""

    mean = torch.tensor([0.2, -0.1, 0.0, 0.1], dtype=torch.float64)
    factor = torch.tensor(
        [[0.3, 0, 0, 0], [0.24, 0.18, 0, 0], [-0.2, 0.1, 0.15, 0], [0.1, 0.1, 0.1, 0.2]],
        dtype=torch.float64,
    )
    covariance = factor @ factor.T

    def __init__(self, diffusion: Diffusion):
        super().__init__(diffusion, 2)

    def posterior_mean(self, x: Tensor, positions: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean = self.mean[positions][..., None]  # (B, V, 1)
        shown = self.covariance[positions[:, :, None], positions[:, None, :]]  # (B, V, V)
        noisy = alpha**2 * shown + sigma**2 * torch.eye(shown.shape[1], dtype=torch.float64)
        return mean + alpha * shown @ torch.linalg.solve(noisy, x - alpha * mean)


def trained(network: type[ClosedForm], *arguments: int, **settings: object) -> TrainedModel:
    """Such a network with the diffusion that it answers for."""
    diffusion = Diffusion(**settings)
    return TrainedModel(network(diffusion, *arguments), diffusion)
