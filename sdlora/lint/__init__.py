"""What is wrong with a dataset, reported at once; repaired copies and contact sheets."""
