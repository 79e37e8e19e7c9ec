"""LoRAs on pipelines of diffusers that the user made."""
