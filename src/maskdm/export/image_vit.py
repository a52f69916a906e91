"""The plain vision transformer on whole images."""

from __future__ import annotations

from maskdm.export.image_face import ImageFace
from maskdm.models.vit import ViT


class ImageViT(ImageFace, ViT):  # type: ignore[misc]
    """ViT with the face of diffusers' UNet2DModel; its arguments are those of ViT."""
