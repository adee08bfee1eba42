"""Data sets as uint8 tensors on the training device, and batches of them."""

from .load import AUGMENT, DATA, PROTOCOLS, Data, Split, batches, load, pieces

__all__ = ["AUGMENT", "DATA", "PROTOCOLS", "Data", "Split", "batches", "load", "pieces"]
