"""Powers of positive numbers: quadratics between knots that cut each octave into equal ratios."""

import functools
import math

import torch

from ..arithmetic.polynomials import Polynomials, fitted
from ..arithmetic.randomness import Dealing, correlation
from ..arithmetic.share import Share, session
from .compare import DIGIT, compared, segments
from .curve import check, curve_supply, evaluate

ROOM = 12  # bits of x below the lowest octave of a range
PARTS = {-1.0: 4, -0.5: 3}  # of an octave, by exponent: a quadratic each, within 3e-4


class Curves:
    """Factor x^exponent in integers: quadratics between knots that cut each octave into equal ratios.

    The octaves are cut into the fewest ranges whose quadratics stay below 2^61. Every range has x rounded to bits of
    its own, `ROOM` below its lowest octave. The integer polynomials of a range cancel beyond it, in the ring.

    Attributes:
        bits: fractional bits of the result.
        ranges: for each, the fractional bits of its x, its polynomials, and its first and last but one knot.
        knots: all, in units of x.
    """

    def __init__(self, octaves: tuple[int, int], exponent: float, factor: float):
        (low, high), parts = octaves, PARTS[exponent]
        rest = -math.log2(factor) - exponent * high  # octaves by which the smallest result is below one
        for count in range(1, 1 + high - low):
            width = -(-(high - low) // count)
            # An error of half a unit in the leading coefficient meets the square of half a segment.
            self.bits = math.ceil(rest + ROOM + 2 * (width + ROOM - 4))
            if self.bits + math.log2(factor) + exponent * low <= 61:
                break
        self.knots = [2.0 ** (low + j / parts) for j in range(1, parts * (high - low))]
        edges = [2.0**low, *self.knots, 2.0**high]
        pieces = fitted(lambda x: factor * x**exponent, edges, 2)
        self.ranges = []
        for start in range(low, high, width):
            stop, bits = min(start + width, high), ROOM - start
            before, after = [(0.0, [0.0] * 3)] * (start > low), [(0.0, [0.0] * 3)] * (stop < high)
            part = [*before, *pieces[parts * (start - low) : parts * (stop - low)], *after]
            whole = Polynomials([0.0] * (len(part) - 1), part, bits, self.bits - 2 * bits)
            begin = parts * (start - low) - len(before)
            self.ranges.append((bits, whole, (begin, begin + len(part) - 1)))


_curves = functools.cache(Curves)


def inverse_bits(exponent: float, octaves: tuple[int, int], factor: float) -> int:
    """The fractional bits of what `power` gives."""
    return _curves(octaves, exponent, factor).bits


def octave_window(x: Share, octaves: tuple[int, int]) -> tuple[Share, int, int]:
    """What is compared to tell x's octaves apart: x with bits enough, the lowest bit that counts, how many digits."""
    low, high = octaves
    if x.bits + low < 4:
        x = x.to(4 - low)
    lowest = x.bits + low - 4
    return x, lowest, -(-(high + x.bits + 2 - lowest) // DIGIT)


@correlation("power")
def deal_power(deal: Dealing, count: int, knots: int, spans: tuple, digits: int, low: int):
    """For x^p: `comparison`, and polynomials of degree 2 in x and in its roundings.

    Args:
        deal: this process's.
        count: numbers.
        knots: of all.
        spans: for x and each of its roundings, the first and the last but one of the knots where it is used.
        digits: as for `compare.tables`.
        low: as for `compare.segments`.
    """
    first, r, bit = compared(deal, count, knots, knots, digits, low)
    curves = []
    for i, (start, stop) in enumerate(spans):
        r = r if i == 0 else deal.mask(count)
        curves.append(curve_supply(deal, bit, r, count, ((stop - start, 2),), 2, start))
    return first, curves


def power(x: Share, exponent: float, octaves: tuple[int, int], factor: float = 1.0, nonzero: bool = True) -> Share:
    """Factor x^exponent for x from 2^low to 2^high, to about 5e-4 of its value; below 2^low it follows the last curve.

    The result is below 2^61 in its raw units, too large for a local truncation. Three rounds; with the J knots and the
    ranges of `Curves` and k digits: a word for each range and J (2 k - 1) bits, for each of n.

    Args:
        x: positive.
        exponent: -1 or -0.5.
        octaves: low and high.
        factor: a public number.
        nonzero: whether a value below 2^low is out of range; zeros may be meant.
    """
    low, high = octaves
    curves = _curves(octaves, exponent, factor)
    x, lowest, digits = octave_window(x.to(curves.ranges[0][0]), octaves)
    count = x.data.numel()
    check(x.data, round(2.0 ** (low + x.bits)) if nonzero else 0, round(2.0 ** (high + x.bits)))
    spans = tuple(span for _, _, span in curves.ranges)
    first, supplied = session.correlation("power", count, len(curves.knots), spans, digits, lowest)
    flat = Share(x.data.reshape(-1), x.bits)
    rounded = [flat.to(bits).data for bits, _, _ in curves.ranges[1:]]
    knots = [round(knot * 2.0**x.bits) for knot in curves.knots]
    e, gamma = segments(flat.data, knots, [[j] for j in range(len(knots))], lowest, digits, first, rounded, supplied)
    total = torch.zeros_like(flat.data)
    for opened, curve, (_, pieces, (start, stop)) in zip(e, supplied, curves.ranges, strict=True):
        total += evaluate(pieces, opened, curve, gamma[start:stop])
    return Share(total.view(x.shape), curves.bits)
