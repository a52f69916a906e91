"""From a folder, an archive or the digits to a store of uint8 images, read in a known order."""
