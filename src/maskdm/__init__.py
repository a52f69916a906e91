"""maskdm: masked pre-training and denoising fine-tuning of raw-pixel diffusion models."""

__version__ = "0.1.0.dev0"
