"""A LoRA as an upload: files, previews, model card."""
