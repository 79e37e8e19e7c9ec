"""From a prompt, a base and weighted LoRAs to images."""
