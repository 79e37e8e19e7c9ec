"""Optimizers by one protocol: a step that a broken gradient cannot reach, and a state that a checkpoint holds."""
