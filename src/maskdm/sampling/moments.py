"""Images on their way from noise: what the solver holds at some of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from maskdm.engine import on_all_ranks, process_state
from maskdm.families import SAMPLERS
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Sampling
from maskdm.sampling.generate import Randomness, generate, to_uint8
from maskdm.sampling.samplers import Denoise
from maskdm.tokens import unpatchify


def draw_moments(
    trained: TrainedModel,
    settings: Sampling,
    num: int,
    at: Sequence[int],
    seed: int | Randomness = 0,
    labels: Tensor | None = None,
    weak: TrainedModel | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Draws images 0..num-1, each rank its share, and keeps moments of the way; all ranks get all.

    The last moment is the finished image, the same as `generate` draws. The others are x_t, scaled
    to alpha^2 + sigma^2 = 1, in [-1, 1] as far as a picture can show it.

    Args:
        trained, settings, seed, labels, weak, progress: as for `generate`.
        num: images.
        at: numbers of the solver's levels at which to look, rising, none twice; may be empty.

    Returns:
        uint8 (num, len(at) + 1, H, W, C).

    Raises ValueError and RuntimeError as `generate` does.
    """
    model, run = trained.model, SAMPLERS[settings.sampler].run

    def pixels(patches: Tensor) -> Tensor:
        return to_uint8(unpatchify(patches, model.patch_size, model.grid)).cpu()

    def draw(indices: list[int]) -> Tensor:
        parts: list[Tensor] = []

        def solve(denoise: Denoise, noise: Tensor, levels: Tensor, own: list[Generator]) -> Tensor:
            number_of = {level: number for number, level in enumerate(levels.tolist())}
            kept: dict[int, Tensor] = {}

            def watched(x: Tensor, log_snr: float) -> Tensor:
                number = number_of[log_snr]
                if number in at:  # the last look at a level counts: heun first guesses
                    kept[number] = pixels(x)
                return denoise(x, log_snr)

            x: Tensor = run(watched, noise, levels, settings, own)
            parts.append(torch.stack([*(kept[i] for i in at), pixels(x)], dim=1))
            return x

        is_shown = progress and process_state().is_main_process
        own_labels = None if labels is None else labels[indices]
        generate(trained, settings, indices, seed, own_labels, weak, None, is_shown, solve)
        return torch.cat(parts)  # (n, len(at) + 1, H, W, C)

    return on_all_ranks(num, draw).cpu().numpy()


def moments_of(levels: Tensor, num: int) -> list[int]:
    """Numbers of the levels at which to look, rising, the first one first.

    They lie as evenly as the steps allow in the angle whose tangent is sigma / alpha, which falls
    to 0 at the clean image: so the noise seems to fade evenly, whatever the schedule and spacing.

    Args:
        levels: log-SNR of the solver's steps, rising, float64 (steps,).
        num: how many, at most the number of steps.
    """
    angles = (-levels / 2).exp().atan()
    chosen: list[int] = []
    for k in range(num):
        wanted = angles[0] * (1 - k / num)
        nearest = int((angles - wanted).abs().argmin())
        earliest, latest = (chosen[-1] + 1 if chosen else 0), len(levels) - num + k
        chosen.append(min(max(nearest, earliest), latest))
    return chosen
