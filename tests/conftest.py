"""One thread in every test: networks this small only lose by sharing their work, and tests run side by side."""

import dataclasses

import pytest
import torch

from salvit_core import datasets


@pytest.fixture(autouse=True, scope="session")
def one_thread_each():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="session")
def few_digits(digits):
    """A third of the images, for what must run and need not learn much."""

    def third(split):
        return dataclasses.replace(split, images=split.images[::3], labels=split.labels[::3])

    return dataclasses.replace(
        digits, train=third(digits.train), validation=third(digits.validation), test=third(digits.test)
    )
