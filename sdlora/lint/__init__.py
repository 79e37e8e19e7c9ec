"""Checks of a dataset, all faults at once; repaired copies and contact sheets."""
