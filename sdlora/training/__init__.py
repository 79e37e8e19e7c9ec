"""From captioned pictures and a frozen base to LoRA weights."""
