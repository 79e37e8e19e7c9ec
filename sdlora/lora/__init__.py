"""The low-rank mathematics: torch alone, nothing of diffusers."""
