"""scikit-learn's digits: 1,797 images of 8x8, always there; for tests."""

from pathlib import Path

import numpy as np
import torch

from .source import Source


def digits(root: Path, seed: int, image: int | None) -> Source:
    """The digits; a fifth of them, drawn with `seed`, is the test set, of which there is none."""
    from sklearn.datasets import load_digits  # a second, which no other data set needs

    found = load_digits()
    pixels = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(labels) // 5 :], order[: len(labels) // 5]
    return Source(pixels[train], labels[train], pixels[test], labels[test], 10, flip=False, image=image)
