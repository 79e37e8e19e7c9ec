"""What a file is, told without a base: a LoRA, or a checkpoint."""
