"""One thread in every test and in every process it starts: networks this small only lose by sharing their work.

Tests run side by side. Threads that wait for each other by spinning, of two processes on two cores, took 20 times as
long: two minutes for a cell of a notebook that needs five seconds.
"""

import dataclasses
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, here and in what tests start

import pytest  # noqa: E402

from salvit_core import datasets  # noqa: E402


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
