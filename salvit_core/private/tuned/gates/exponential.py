"""Exponentials of numbers that are not positive."""

import functools

import numpy as np
import torch

from ....models.operations import Exponential
from ...domains import Span, spans, spread
from ..arithmetic.polynomials import Polynomials, fitted
from ..arithmetic.share import Share, session
from .curve import piecewise
from .maximum import largest
from .truncate import truncate


@functools.cache
def _exp(bits: int) -> Polynomials:
    knots = [-21.33, -9.93, -6.21, -3.9, -1.91]
    extra = min(20, 61 - 4 * bits)
    return Polynomials(knots, [(0.0, [0.0] * 5), *fitted(np.exp, [*knots, 0.05], 4, extra)], bits, extra)


def exponentials(x: Share) -> Share:
    """exp(x) for x from -118 to 0, as a quartic on each of five segments and zero below -21. Five rounds; 1.5 n words.

    Within 1e-3 of the value, of which x's rounding to 11 bits is half, and 2^-13.
    """
    bits = min(session.bits - 1, 11)
    return truncate(piecewise(x.to(bits), _exp(bits), max(0, bits - 8)), session.bits + 1)


def exponential(module: Exponential, secret: dict, x: Share) -> Share:
    """exp(a - max a) for entries that differ by less than 118, as `softmax` finds it; without a maximum, a <= 0.

    The maximum to 2^-12, since here no sum makes up for a common factor. Within 1e-3 of the value, 2^-12 of it and
    2^-13. 5 rounds, 4 for few numbers, and those of `largest`; 1.5 n words, 4 n / 3 for the maximum.

    Functionality:
        Inputs: x shared.
        Output: exp of x or of x less its maximum, shared, truncated exactly.
        Opened: By `largest` and `piecewise`, masked words and bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-34 a number of x; of the result 0.
    """
    x = x.settle().to(session.bits)
    if module.dims:
        best = largest(Share(x.data.flatten(-module.dims), x.bits), -1, 12, 5)
        x = x - best[(..., *[None] * (module.dims - 1))]
    return exponentials(x)


def exponential_domain(module: Exponential, a: torch.Tensor) -> list[Span]:
    """The range of what is raised, or of its spread."""
    if not module.dims:
        return spans("exponents", a, (-118, 0.05))
    return spans("spreads", spread(a.flatten(-module.dims), -1), (0, 118))
