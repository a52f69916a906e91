"""From a trained denoiser to images."""
