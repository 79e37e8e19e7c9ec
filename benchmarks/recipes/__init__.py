"""Measured comparisons of trainings on ``mini``: see ``__main__``."""
