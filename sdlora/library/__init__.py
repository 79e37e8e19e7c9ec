"""A folder of LoRA files as a list: from their headers alone, remembered in an index."""
