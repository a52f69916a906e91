"""From a source of any kind to a store of uint8 images, read in a known order."""
