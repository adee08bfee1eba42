"""A trained network's attention replaced by other mechanisms: distilled, pruned by structure, carried to other data."""
