"""Files of other programs: bytes, names, formats of LoRA files, hashes, metadata."""
