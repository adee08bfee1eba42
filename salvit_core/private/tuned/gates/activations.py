"""Activations of networks that others wrote, besides GELU and ReLU: each a piecewise polynomial of one opening.

Letters in costs as in `tuned`.
"""

import functools
import math

import numpy as np
import torch
from torch import nn

from ....models.activations import TanhGELU
from ...domains import Span, spans
from ..arithmetic.polynomials import Even, Polynomials, fitted
from ..arithmetic.share import Share, session
from .curve import piecewise
from .truncate import truncate

REACH = 56.0  # of |x|: its difference to a knot at 8, too, stays in a window of 64
SMOOTH = 48.0  # of |x| where the last knot is at 10
LINES = 9  # bits below one that a comparison sees
FINE = 11  # fractional bits of x where a quartic is evaluated
LARGE = 10  # where it becomes as large as x


def lines(x: Share, knots: tuple[float, ...], pieces: tuple[tuple[float, float], ...], extra: int) -> Share:
    """A function that is (constant, slope) between knots, the slopes multiples of 2^-extra. Three rounds."""
    x = x.settle().to(session.bits)
    whole = _lines(knots, pieces, x.bits, extra)
    return piecewise(x, whole, max(0, x.bits - LINES))


@functools.cache
def _lines(knots: tuple, pieces: tuple, bits: int, extra: int) -> Polynomials:
    return Polynomials(list(knots), [(0.0, list(piece)) for piece in pieces], bits, extra)


def clip(module: nn.Hardtanh, secret: dict, x: Share) -> Share:
    """min(max(x, a), b), a and b public, within 2^-9. Three rounds; n words and 14 n bits.

    Functionality:
        Inputs: x shared.
        Output: x, a or b, shared; which, for x nearer than 2^-9 to either, the lowest bits of the opened word decide.
        Opened: x - r and masked bits, to both.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number.
    """
    low, high = module.min_val, module.max_val
    return lines(x, (low, high), ((low, 0.0), (0.0, 1.0), (high, 0.0)), 0)


def clip_domain(module: nn.Hardtanh, x: torch.Tensor) -> list[Span]:
    """The input's range: a difference to a bound stays below 64."""
    return spans("inputs", x, (module.max_val - 64, module.min_val + 64))


def leaky_relu(module: nn.LeakyReLU, secret: dict, x: Share) -> Share:
    """x, or a slope times x where that is negative, the slope to 2^-19 and x to 2^-9 of zero. Five rounds, or four.

    Functionality:
        Inputs: x shared.
        Output: x or its multiple, shared, truncated exactly.
        Opened: x - r and masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x; of the result 0.
    """
    y = lines(x, (0.0,), ((0.0, module.negative_slope), (0.0, 1.0)), 18)
    return truncate(y, session.bits)


def hardswish(module: nn.Hardswish, secret: dict, x: Share) -> Share:
    """The product x min(max(x + 3, 0), 6) / 6 for |x| below 56, within 2^-9: a parabola between two knots.

    Five rounds, four for few numbers; n words and 14 n bits, and those of `truncate`.

    Functionality:
        Inputs: x shared.
        Output: Zero, the parabola or x, shared, truncated exactly; within 2^-9 of a knot either side's.
        Opened: x - r and masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x; of the result 0.
    """
    x = x.settle().to(session.bits)
    return truncate(piecewise(x, _hardswish(x.bits), max(0, x.bits - LINES)), session.bits)


@functools.cache
def _hardswish(bits: int) -> Polynomials:
    pieces = [(0.0, [0.0, 0.0, 0.0]), (0.0, [0.0, 0.5, 1 / 6]), (0.0, [0.0, 1.0, 0.0])]
    return Polynomials([-3.0, 3.0], pieces, bits, 14)


def hardsigmoid(module: nn.Hardsigmoid, secret: dict, x: Share) -> Share:
    """min(max(x + 3, 0), 6) / 6 for |x| below 56, within 2^-11. Five rounds, or four; n words and 14 n bits.

    Functionality:
        Inputs: x shared.
        Output: Zero, the line or one, shared, truncated exactly.
        Opened: x - r and masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x; of the result 0.
    """
    y = lines(x, (-3.0, 3.0), ((0.0, 0.0), (0.5, 1 / 6), (1.0, 0.0)), 16)
    return truncate(y, session.bits)


def _reach(module: nn.Module, x: torch.Tensor) -> list[Span]:
    """The input's range."""
    return spans("inputs", x, (-REACH, REACH))


hardswish_domain = hardsigmoid_domain = leaky_relu_domain = _reach


def quartics(x: Share, name: str) -> Share:
    """A smooth function that ends as a constant or as x: a quartic on each of four segments. Five rounds, or four.

    n words and 35 n bits, and those of `truncate`.
    """
    bits = min(session.bits - 1, LARGE if name == "silu" else FINE)
    x = x.settle().to(bits)
    return truncate(piecewise(x, _quartics(name, bits), max(0, bits - LINES)), session.bits)


def logistic_of(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), to be fitted."""
    return 1 / (1 + np.exp(-x))


# By name: the function, where its segments end, and what it is beyond them.
_SMOOTH = {
    "sigmoid": (logistic_of, (2.75, 7.5), ([0.0, 0.0], [1.0, 0.0])),
    "silu": (lambda x: x * logistic_of(x), (2.75, 10.0), ([0.0, 0.0], [0.0, 1.0])),
    "tanh": (np.tanh, (1.375, 4.0), ([-1.0, 0.0], [1.0, 0.0])),
}


@functools.cache
def _quartics(name: str, bits: int) -> Polynomials:
    function, (inner, outer), ends = _SMOOTH[name]
    extra = 16  # of values up to one at 11 bits, or 48 at 10, within what `truncate` takes
    edges = [-outer, -inner, 0.0, inner, outer]
    first, last = ((0.0, [*end, 0.0, 0.0, 0.0]) for end in ends)
    return Polynomials(edges, [first, *fitted(function, edges, 4, extra), last], bits, extra)


def sigmoid(module: nn.Sigmoid, secret: dict, x: Share) -> Share:
    """1 / (1 + exp(-x)), within 1e-3 for |x| below 48. Costs as `quartics`.

    Functionality:
        Inputs: x shared.
        Output: The quartic of x's segment at 11 bits, shared, truncated exactly; within 2^-9 of a knot either side's.
        Opened: x - r and masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x; of the result 0.
    """
    return quartics(x, "sigmoid")


def silu(module: nn.SiLU, secret: dict, x: Share) -> Share:
    """The product of x and 1 / (1 + exp(-x)), x at 10 bits, within 2e-3 for |x| below 48. Costs as `quartics`.

    Functionality:
        Inputs: x shared.
        Output: The quartic of x's segment at 11 bits, shared, truncated exactly; within 2^-9 of a knot either side's.
        Opened: x - r and masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x; of the result 0.
    """
    return quartics(x, "silu")


def tanh(module: nn.Tanh, secret: dict, x: Share) -> Share:
    """The hyperbolic tangent, within 1.5e-3 for |x| below 48. Costs as `quartics`.

    Functionality:
        Inputs: x shared.
        Output: The quartic of x's segment at 11 bits, shared, truncated exactly; within 2^-9 of a knot either side's.
        Opened: x - r and masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x; of the result 0.
    """
    return quartics(x, "tanh")


def smooth_domain(module: nn.Module, x: torch.Tensor) -> list[Span]:
    """The input's range."""
    return spans("inputs", x, (-SMOOTH, SMOOTH))


@functools.cache
def _tanh_gelu(bits: int) -> Even:
    def even(x):
        return x / 2 * np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))

    return Even(even, (1.2, 3.55), 2.0**-6, bits, 12)


def tanh_gelu(module: TanhGELU, secret: dict, x: Share) -> Share:
    """GELU by a tanh, as `curve.gelu` has the exact one: within 1.5e-3 for |x| below 28, at its costs.

    Functionality:
        Inputs: x shared.
        Output: The quartic of x's segment at 11 bits, shared, truncated exactly; within 2^-6 of a knot either side's.
        Opened: x - r, masked bits and a masked result, to both or to the server.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x; of the result 0.
    """
    bits = min(session.bits - 2, FINE)
    x = x.settle().to(bits)
    return truncate(piecewise(x, _tanh_gelu(bits), max(0, bits - 6), 3), session.bits)


def tanh_gelu_domain(module: TanhGELU, x: torch.Tensor) -> list[Span]:
    """The input's range."""
    return spans("inputs", x, (-28, 28))
