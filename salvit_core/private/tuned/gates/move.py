"""What only moves and adds up numbers: local, the same on shares as in the clear."""

import torch
from torch import nn

from ....models.operations import Reweight, SegmentMeans
from ..arithmetic.ring import log2_above
from ..arithmetic.share import Share, Weight, session
from .product import entered


def identity(module: nn.Module, secret: dict, x: Share) -> Share:
    """What does nothing at inference. Local.

    Functionality:
        Inputs: x shared.
        Output: x.
        Opened: Nothing.
        Simulator: nothing.
        Failure: 0.
    """
    return x


def moved(module: nn.Module, secret: dict, x: Share) -> Share:
    """What only takes and adds up entries, the same on integers. Local.

    Functionality:
        Inputs: x shared.
        Output: Entries of x, or their sums, shared.
        Opened: Nothing; what waits for x, as by `times_rows`.
        Simulator: uniform words.
        Failure: 0.
    """
    x = x.settle()
    return Share(module(x.data), x.bits)


def segment_means(module: SegmentMeans, secret: dict, x: Share) -> Share:
    """Sums over segments, times the public 1 / size, right to 2^-(`session.bits` + 1) of the mean. Local.

    Functionality:
        Inputs: x shared.
        Output: The means, shared, at `session.bits`.
        Opened: Nothing; what waits for x, as by `times_rows`.
        Simulator: uniform words.
        Failure: 2^-37 a number, of x and of the means.
    """
    x = x.settle().to(session.bits)
    segment = torch.tensor(module.assignment())
    sizes = segment.bincount()[:, None]
    sums = x.data.new_zeros(*x.shape[:-2], module.segments, x.shape[-1])
    sums.index_add_(-2, segment.to(x.data.device), x.data)
    bits = session.bits + log2_above(int(sizes.max()))
    factors = (2.0**bits / sizes).round().long().to(x.data.device)
    return Share(sums * factors, x.bits + bits).to(session.bits)


def reweight(module: Reweight, secret: dict, x: Share) -> Share:
    """Rows times public cosines and sines, rounded to `session.bits`. Local.

    Functionality:
        Inputs: x shared.
        Output: x times cosines and sines, shared, at `session.bits`.
        Opened: Nothing; what waits for x, as by `times_rows`.
        Simulator: uniform words.
        Failure: 2^-37 a number, of x and of the products.
    """
    x = x.settle().to(session.bits)
    factors = (module.factors().T[:, :, None] * 2.0**session.bits).round().long().to(x.data.device)  # (N, F, 1)
    return Share((x.data.unsqueeze(-2) * factors).flatten(-2), x.bits + session.bits).to(session.bits)


def layout(name: str):
    """A method that only moves numbers about."""

    def apply_to(x: Share | Weight, *args, **kwargs):
        x = entered(x).settle()
        moved = getattr(x.data, name)(*args, **kwargs)
        if isinstance(moved, tuple):
            return tuple(Share(part, x.bits) for part in moved)
        return Share(moved, x.bits)

    return apply_to


def cat(parts: list[Share], dim: int = 0) -> Share:
    """Parts one after another, at the most fractional bits of any: none is truncated. Local."""
    parts = [entered(part).settle() for part in parts]
    bits = max(part.bits for part in parts)
    return Share(torch.cat([part.to(bits).data for part in parts], dim), bits)


def pad(x: Share, widths: tuple[int, ...], mode: str = "constant", value: float | None = None) -> Share:
    """Zeros around, as torch.nn.functional.pad has them: each party's part of a zero is zero. Local.

    A graph that was pickled says the mode and the value too, which are the defaults: `interpreter.unsupported` has
    refused others.
    """
    x = entered(x).settle()
    return Share(torch.nn.functional.pad(x.data, widths), x.bits)
