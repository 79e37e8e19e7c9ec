"""One prompt over axes of weights, LoRAs, seeds and settings: cells, drawn once each, and the labelled image of all."""
