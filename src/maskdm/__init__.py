"""maskdm: masked pre-training and denoising fine-tuning of raw-pixel diffusion models.

The names below are the public face; each is imported when it is first used, so that `import maskdm`
and the command's help stay fast. `docs/api.md` lists them.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# OpenMP's threads spin while they wait, which slows small models 3 to 20 times on a busy CPU. It
# reads this once, when torch is loaded; if that was before, training prints a note.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from maskdm.diffusion.objective import masked_denoising_loss as masked_denoising_loss
    from maskdm.diffusion.schedule import make_schedule as make_schedule
    from maskdm.export.pipeline import MaskDMPipeline as MaskDMPipeline
    from maskdm.export.pipeline import load as load
    from maskdm.masks import draw_visible as draw_visible
    from maskdm.masks import num_visible as num_visible
    from maskdm.models.uvit import UViT as UViT
    from maskdm.models.vit import ViT as ViT
    from maskdm.recipe import Data as Data
    from maskdm.recipe import Diffusion as Diffusion
    from maskdm.recipe import Mask as Mask
    from maskdm.recipe import Recipe as Recipe
    from maskdm.recipe import Sampling as Sampling
    from maskdm.recipe import Stage as Stage
    from maskdm.recipe_files import load_recipe as load_recipe
    from maskdm.tokens import gather_patches as gather_patches
    from maskdm.tokens import patchify as patchify
    from maskdm.tokens import scatter_patches as scatter_patches
    from maskdm.tokens import unpatchify as unpatchify
    from maskdm.training.trainer import train as train

_PLACES = {
    "train": "training.trainer",
    "load": "export.pipeline",
    "load_recipe": "recipe_files",
    "Recipe": "recipe",
    "Data": "recipe",
    "Diffusion": "recipe",
    "Mask": "recipe",
    "Stage": "recipe",
    "Sampling": "recipe",
    "MaskDMPipeline": "export.pipeline",
    "UViT": "models.uvit",
    "ViT": "models.vit",
    "draw_visible": "masks",
    "num_visible": "masks",
    "patchify": "tokens",
    "unpatchify": "tokens",
    "gather_patches": "tokens",
    "scatter_patches": "tokens",
    "masked_denoising_loss": "diffusion.objective",
    "make_schedule": "diffusion.schedule",
}
__all__ = ["__version__", *_PLACES]  # noqa: PLE0604 (they are names)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'maskdm' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"maskdm.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
