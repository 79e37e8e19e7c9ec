"""Captions for images that have none, by a local model."""
