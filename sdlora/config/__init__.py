"""What a run is configured by: sections, their loading, and kohya's dataset file."""
