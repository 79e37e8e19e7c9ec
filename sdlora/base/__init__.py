"""A base checkpoint: its family, its parts, and what they compute."""
