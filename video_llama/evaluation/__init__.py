"""Ask files that a model has not seen, and measure its answers."""
