"""U-ViT on whole images."""

from __future__ import annotations

from maskdm.export.image_face import ImageFace
from maskdm.models.uvit import UViT


class ImageUViT(ImageFace, UViT):  # type: ignore[misc]
    """U-ViT with the face of diffusers' UNet2DModel; its arguments are those of UViT."""
