"""How LoRA files are spelled in the outside world: names, metadata, hashes, bytes."""
