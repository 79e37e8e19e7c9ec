"""Write captions for images that have none, with a local model."""
