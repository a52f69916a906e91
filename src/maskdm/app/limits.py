"""How much the page may be asked for, and the refusals, each in a line that names the way out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maskdm.words import counted, size_text

MOST_SEED = 2**53 - 1  # what a browser's numbers hold exactly


@dataclass(frozen=True)
class Limits:
    """How much the page may be asked for."""

    max_images: int = 64
    """Images in one go."""
    max_steps: int = 1000
    """Steps of the sampler."""
    max_evaluations: int = 100_000
    """Evaluations of the network in one go: images x steps, x resamplings of inpainting."""
    max_upload_mb: int = 32
    """Size of an uploaded file, in MB."""
    max_megapixels: int = 64
    """Pixels of an uploaded image, in millions."""
    max_waiting: int = 8
    """Drawings that wait while another runs; more are refused."""

    def refuse_impossible(self) -> None:
        """Raises ValueError for a limit below 1."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")

    def refuse_drawing(self, num: int, steps: int, evaluations: int) -> None:
        """Raises ValueError for too many images, too many steps, or too many of both together.

        Args:
            num: images.
            steps: of the sampler.
            evaluations: of the network, for each image.
        """
        if not 1 <= num <= self.max_images:
            raise ValueError(f"{counted(num, 'image')}: from 1 to {self.max_images} in one go")
        if not 1 <= steps <= self.max_steps:
            raise ValueError(f"{counted(steps, 'step')}: from 1 to {self.max_steps:,}")
        if num * evaluations > self.max_evaluations:
            most = self.max_evaluations // evaluations
            way_out = f"at most {counted(most, 'image')}, or fewer steps" if most else "fewer steps"
            raise ValueError(
                f"{counted(num, 'image')} x {counted(evaluations, 'evaluation')} of the network "
                f"are {num * evaluations:,}, more than {self.max_evaluations:,} in one go: "
                f"{way_out}"
            )

    def refuse_file(self, path: Path) -> None:
        """Raises ValueError for an uploaded file of too many bytes."""
        if path.stat().st_size > self.max_upload_mb * 10**6:
            raise ValueError(
                f"{path.name} has {size_text(path.stat().st_size)}: at most {self.max_upload_mb} MB"
            )

    def refuse_pixels(self, width: int, height: int) -> None:
        """Raises ValueError for an uploaded image of too many pixels."""
        if width * height > self.max_megapixels * 10**6:
            raise ValueError(
                f"{width}x{height} pixels: at most {self.max_megapixels} million, make it smaller"
            )


def refuse_seed(seed: int) -> None:
    """Raises ValueError for a seed that a browser cannot give exactly."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed {seed}: from 0 to {MOST_SEED}")
