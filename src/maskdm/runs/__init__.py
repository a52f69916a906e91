"""What a run leaves on disk, and how to find and load its model."""
