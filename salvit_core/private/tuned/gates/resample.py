"""What a public matrix does to a picture, and what stands for every image of a batch: local."""

import math

import torch

from ....models.operations import Repeat, Resample
from ..arithmetic.ring import product
from ..arithmetic.share import Share, session

EXTRA = 4  # bits of a matrix below its largest entry, beyond those of an activation


def resample(module: Resample, secret: dict, x: Share) -> Share:
    """R x C^T, R and C public, to 2^-17 of their largest entries; rounded after each of the two products. Local.

    Functionality:
        Inputs: x shared.
        Output: The product, shared, at `session.bits`.
        Opened: Nothing; what waits for x, as by `times_rows`.
        Simulator: uniform words.
        Failure: 2^-34 a number, of x and of both products.
    """
    x = x.settle().to(session.bits)
    rows, columns = module.matrices()
    return _times(_times(x, columns).data.mT, rows, transposed=True)


def _times(x: "Share | torch.Tensor", matrix: torch.Tensor, transposed: bool = False) -> Share:
    """X M^T over the last dimension, M public, rounded to `session.bits`; `transposed` is undone at the end."""
    data = x.data if isinstance(x, Share) else x
    bits = session.bits + EXTRA - math.floor(math.log2(float(matrix.abs().max())))
    whole = (matrix * 2.0**bits).round().long().to(data.device)
    made = product(data.flatten(0, -2), whole.T.contiguous(), session.bits + EXTRA + 3).unflatten(0, data.shape[:-1])
    made = made.mT if transposed else made
    return Share(made, session.bits + bits).to(session.bits)


def repeat(module: Repeat, secret: dict, images: Share) -> Share:
    """The server's tensor for every image: its part of each is the tensor, the client's is zero. Local.

    Functionality:
        Inputs: Of the images their number; the tensor of the server.
        Output: The tensor, shared, at `session.bits`, once for every image.
        Opened: Nothing.
        Simulator: nothing.
        Failure: 0.
    """
    weight = secret["weight"].enter(session.bits)
    return Share(weight.data.expand(images.shape[0], *weight.shape[1:]), weight.bits)
