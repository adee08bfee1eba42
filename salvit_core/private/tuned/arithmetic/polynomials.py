"""Piecewise polynomials in the raw units of their input, as shares evaluate them; nothing here is secret."""

import math
from fractions import Fraction

import numpy as np

from .ring import signed


class Polynomials:
    """Public knots and one integer polynomial per segment, in the raw units of its input.

    Attributes:
        base: the first segment's coefficients, lowest first.
        steps: what each bit adds to them: here a bit per knot, whether the input is at or above it.
        joined: for every bit, the knots whose comparisons it is the exclusive or of.
        groups: of bits: how many, and the degree of what they add.

    Args:
        knots: where segments meet, ascending, in units of the input's value.
        pieces: for every segment a centre and coefficients, lowest first, in powers of (x - centre).
        bits: fractional bits of the input.
        extra: fractional bits of the leading coefficients.
    """

    def __init__(self, knots: list[float], pieces: list[tuple[float, list[float]]], bits: int, extra: int):
        self.degree = len(pieces[0][1]) - 1
        self.knots = [round(knot * 2.0**bits) for knot in knots]
        self.bits = extra + bits * self.degree
        whole = []
        for centre, coefficients in pieces:
            # What multiplies x^m has all the fractional bits that x^m leaves: the leading coefficient the fewest.
            *lower, top = coefficients
            sums = [Fraction(0)] * (self.degree + 1)
            for i, c in enumerate([*lower, round(top * 2.0**extra) / 2.0**extra]):
                for m in range(i + 1):  # (x - centre)^i
                    sums[m] += Fraction(c) * math.comb(i, m) * Fraction(-centre) ** (i - m)
            whole.append([round(c * 2 ** (extra + bits * (self.degree - m))) for m, c in enumerate(sums)])
        self.base = [signed(c) for c in whole[0]]
        self.steps = [[signed(b - a) for a, b in zip(*pair, strict=True)] for pair in zip(whole, whole[1:])]
        self.groups = ((len(self.steps), self.degree),) if self.steps else ()
        self.joined: list[list[int]] = [[j] for j in range(len(self.steps))]


class Even:
    """x / 2 and an even function that ends as |x| / 2: GELU, from comparisons of x with -b, -a, a and b.

    The even part is fitted by 1, x^2, x^4 for |x| < a, and by a quartic in |x| for |x| < b. So a bit that says whether
    x is within -a and a (or -b and b) needs its products with the powers of r, but one that says whether x is above a
    (or b), which tells |x| from x, only those up to the third.

    Args:
        function: x to the even part.
        edges: a and b.
        near: as far from an edge the comparison may be wrong.
        bits: fractional bits of the input.
        extra: fractional bits of the coefficients of x^4.
    """

    degree = 4
    groups = ((2, 4), (2, 3))
    joined = [[1, 2], [0, 3], [2], [3]]

    def __init__(self, function, edges: tuple[float, float], near: float, bits: int, extra: int):
        a, b = edges
        self.knots = [round(knot * 2.0**bits) for knot in (-b, -a, a, b)]
        self.bits = extra + 4 * bits
        inner = minimax(function, 0.0, a + near, (0, 2, 4), extra)
        outer = minimax(function, a - near, b + near, (0, 1, 2, 3, 4), extra)
        # The sign of x between a and b is 2 (above a) - 2 (above b) - (within b) + (within a); beyond b it is
        # 2 (above b) + (within b) - 1.
        odd = [0.0, outer[1], 0.0, outer[3], 0.0]
        even, half = [c - o for c, o in zip(outer, odd)], [0.0, 0.5, 0.0, 0.0, 0.0]
        within = [[i - e + o for i, e, o in zip(inner, even, odd)], [e + h - o for e, h, o in zip(even, half, odd)]]
        above = [[2 * o for o in odd], [2 * h - 2 * o for h, o in zip(half, odd)]]
        self.base = [0] * 5
        self.steps = [
            [signed(round(c * 2.0 ** (extra + bits * (4 - m)))) for m, c in enumerate(step)]
            for step in (*within, *above)
        ]


def minimax(function, low: float, high: float, powers: tuple[int, ...], extra: int) -> list[float]:
    """The coefficients of 1 to x^4 whose largest error is least, by Lawson's iteration; x^4's has `extra` bits."""
    x = np.linspace(low, high, 501)

    def fit(basis: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        weights = np.full(len(x), 1 / len(x))
        for _ in range(100):
            root = np.sqrt(weights)
            found = np.linalg.lstsq(basis * root[:, None], wanted * root, rcond=None)[0]
            weights *= np.abs(basis @ found - wanted)
            weights /= weights.sum()
        return found

    basis, wanted = np.stack([x**power for power in powers], 1), function(x)
    top = round(fit(basis, wanted)[-1] * 2.0**extra) / 2.0**extra
    made = [0.0] * 4 + [top]
    for power, value in zip(powers, fit(basis[:, :-1], wanted - top * x**4)):
        made[power] = float(value)
    return made


def fitted(function, edges: list[float], degree: int, extra: int = 52) -> list[tuple[float, list[float]]]:
    """Near-minimax polynomials between edges: interpolation at Chebyshev's nodes, as (centre, coefficients) each.

    The leading coefficients have `extra` fractional bits; those below take up most of what that rounds off.
    """

    def interpolated(function, half, degree):
        series = np.polynomial.Chebyshev.interpolate(function, degree, [-half, half])
        found = series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef
        return np.pad(found, (0, degree + 1 - len(found)))

    pieces = []
    for low, high in zip(edges, edges[1:]):
        centre, half = (low + high) / 2, (high - low) / 2
        coefficients = interpolated(lambda x: function(x + centre), half, degree)  # noqa: B023  called at once
        lost = coefficients[-1] - round(coefficients[-1] * 2.0**extra) / 2.0**extra
        coefficients[:-1] += interpolated(lambda x: lost * x**degree, half, degree - 1)  # noqa: B023
        pieces.append((centre, [*coefficients[:-1], coefficients[-1] - lost]))
    return pieces
