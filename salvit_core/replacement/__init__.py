"""Attention of a trained network replaced by other mechanisms: distilled, pruned by structure, carried to other data."""
