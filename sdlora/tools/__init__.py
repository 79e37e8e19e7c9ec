"""Work on LoRA files and checkpoints: inspect, convert."""
