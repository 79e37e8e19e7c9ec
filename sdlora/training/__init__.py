"""From captioned images and a frozen base to LoRA weights."""
