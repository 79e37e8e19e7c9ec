"""Latents and caption embeddings of the frozen base, kept between runs."""
