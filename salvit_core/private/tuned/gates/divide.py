"""Quotients: reciprocals of many numbers, by one knot per octave and one polynomial for all."""

import functools
import math

import torch

from ....models.operations import Divide, ShiftDivide
from ...domains import Span, spans, within_octaves
from ..arithmetic.polynomials import Polynomials, fitted
from ..arithmetic.randomness import Dealing, correlation
from ..arithmetic.share import Share, Weight, session
from .compare import DIGIT, segments
from .curve import check, evaluate, piecewise, powers_supply
from .power import octave_window
from .product import entered, multiply
from .truncate import truncate

QUOTIENT = (-12, 9)  # of a denominator over its public scale, where eps does not keep it further from zero
INVERSE_BITS = 11  # of v, whose fifth power must fit
KEPT_BITS = 15  # of 1 / v
MOST_OCTAVES = 26  # whose comparison takes 8 digits


@functools.cache
def _octaves(octaves: tuple[int, int], bits: int) -> tuple[Polynomials, Polynomials]:
    """X times the power of two that takes it to [2^(high - 1), 2^high), and that power, of high - 1 fractional bits."""
    count = octaves[1] - octaves[0]
    knots = [2.0 ** (octaves[0] + j + bits) for j in range(1, count)]
    shifts = [2.0 ** (count - 1 - j) for j in range(count)]
    scaled = Polynomials(knots, [(0.0, [0.0, shift]) for shift in shifts], 0, 0)
    return scaled, Polynomials(knots, [(0.0, [shift]) for shift in shifts], 0, 0)


@functools.cache
def _inverse(bits: int, extra: int) -> Polynomials:
    """1 / v for v in [1, 2), within 1.4e-4; below 4.4 for v from zero to one."""
    return Polynomials([], fitted(lambda v: 1 / v, [1.0, 2.0], 5, extra), bits, extra)


def inverse_error() -> float:
    """The largest relative error of `reciprocal`, within its octaves and but for the last truncation.

    That is of the quintic at every v of `INVERSE_BITS` bits, for whatever is truncated to it: less than a step away.
    """
    inverse = _inverse(INVERSE_BITS, 59 - 5 * INVERSE_BITS)
    units = torch.arange(1 << INVERSE_BITS, 2 << INVERSE_BITS).double()
    y = sum(c * units**m for m, c in enumerate(inverse.base)) / 2.0**inverse.bits
    return max(float((y * (units + off) / 2.0**INVERSE_BITS - 1).abs().max()) for off in (-1, 1))


@correlation("powers")
def deal_powers(deal: Dealing, count: int, degree: int):
    """A mask r and its powers up to r^degree."""
    r = deal.mask(count)
    return r.mine, powers_supply(deal, r, count, degree)


def reciprocal(x: Share, octaves: tuple[int, int], bits: int) -> Share:
    """1 / x for x from 2^low to 2^high, to 7e-4 and a unit of 1 / v; below 2^low, or of zero, less than 5 * 2^-low.

    `power` for many numbers: its J is a quarter, for five rounds more. Three rounds find x's octave and with it a
    secret power of two that takes x to v in [1, 2), two truncate v, one opens it masked for a quintic, two truncate
    that, one multiplies by the power of two. With J = high - low - 1 and k digits: 5 n words and J (2 k - 1) n bits.

    Args:
        x: not negative.
        octaves: low and high.
        bits: fractional bits of 1 / v; those of the result are high - 1 more.
    """
    low, high = octaves
    x, lowest, digits = octave_window(x, octaves)
    count = x.data.numel()
    check(x.data, 0, round(2.0 ** (high + x.bits)))
    scaling, shift = _octaves(octaves, x.bits)
    first, curve = session.correlation("comparison", count, len(scaling.knots), scaling.groups, 1, digits, lowest)
    e, gamma = segments(x.data.reshape(-1), scaling.knots, scaling.joined, lowest, digits, first)
    v = truncate(Share(evaluate(scaling, e, curve, gamma), high - 1 + x.bits), INVERSE_BITS)
    r, raised = session.correlation("powers", count, 5)
    (opened,) = session.reveal(v.data - r)
    inverse = _inverse(INVERSE_BITS, 59 - 5 * INVERSE_BITS)  # below 4.4, it stays within what `truncate` takes
    y = truncate(Share(evaluate(inverse, opened, (r, raised, []), gamma[:0]), inverse.bits), bits)
    shares = [part[:1] for part in curve[2]]  # the shifts are constants: no power of r is needed
    y = multiply(y, Share(evaluate(shift, e, (curve[0], [], shares), gamma), high - 1))
    return Share(y.data.view(x.shape), y.bits)


def _quotient(module: Divide) -> tuple[tuple[int, int], bool]:
    """The octaves of (b + eps) / scale, and whether eps keeps every sum b >= 0 above the lowest.

    Where values set the scale, as in an adopted network, what it costs must not depend on them: there the octaves are
    of eps alone, with two to spare for scales up to 4.
    """
    low, high = QUOTIENT
    if module.eps <= 0:
        return (low, high), False
    least = math.floor(math.log2(module.eps)) - round(math.log2(module.scale))
    wanted = math.floor(math.log2(module.eps)) - 2 if module.sized else least
    # A large eps or a small scale leaves knots all the same: the reciprocal needs some.
    low = min(max(wanted, high - MOST_OCTAVES), low + 4)
    return (low, high), least >= low


def _bits(module: Divide, lowest: int) -> int:
    """The fewest bits that keep eps to 2^-11 of itself, or of the lowest octave where that is the larger."""
    eps, most = max(module.eps, 0.0), 12 - lowest - round(math.log2(module.scale))
    return next((n for n in range(most) if abs(round(eps * 2.0**n) / 2.0**n - eps) <= 2.0**-11 * eps), most)


def divide(module: Divide, secret: dict, numerator: Share | Weight, denominator: Share | Weight) -> Share:
    """Quotients a / (b + eps) for b / scale up to 2^9 and quotients below 2^8; of a zero a, zero whatever b is.

    Such a b is a sum of terms >= 0, of which `scale`, rounded to a power of two, is the usual size: in networks that
    were trained a few sums are a hundred times larger, and a few lie next to zero. The octaves of the reciprocal
    therefore reach down to eps / scale, which no sum can leave, but not below 2^-17; to 2^-12 where eps is zero. The
    reciprocal of b / scale has 23 fractional bits, 15 of them of its own, and a keeps the bits it comes with.

    Within 1e-3 of the value (3e-3 in the lowest octave) and a step, and what a and b err by themselves; eps has bits of
    its own. Twelve rounds; n + n / 2 words for n quotients, those of `reciprocal` and one more per denominator.

    Functionality:
        Inputs: Both shared.
        Output: a / b, shared, truncated exactly.
        Opened: b, its scaled v, 1 / v and a less their masks, masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 0: a has too few bits to lose any in every network here, and all else is truncated exactly.
    """
    octaves, _ = _quotient(module)
    down = round(math.log2(module.scale))  # a power of two is free
    b = entered(denominator).settle()
    b = b.to(max(b.bits, session.bits + 4, _bits(module, octaves[0]))) + module.eps
    b = Share(b.data, b.bits + down)
    inverse = reciprocal(b, octaves, KEPT_BITS)
    a = entered(numerator).settle()
    # Quotients below 2^8 leave 54 bits to the product.
    a = a.to(min(a.bits, 54 - inverse.bits - down))
    y = multiply(a, inverse)
    return truncate(Share(y.data, y.bits + down), session.bits)


def divide_domain(module: Divide, a: torch.Tensor, b: torch.Tensor) -> list[Span]:
    """The range of denominators and quotients."""
    a, b = torch.broadcast_tensors(a, b + module.eps)
    octaves, kept = _quotient(module)
    units = b / 2.0 ** round(math.log2(module.scale))
    found = spans("scaled denominators", units, (0, 2.0 ** octaves[1])) + spans("quotients", a / b, (-(2.0**8), 2.0**8))
    if kept and not (2 * b < module.eps).any():  # what is below zero, by more than rounding, eps keeps from nothing
        return found
    # Below the range a quotient may come out three times as large: that is nothing where it is next to nothing.
    small = (a / b).abs() < 2.0**-11
    return found + within_octaves("scaled denominators that count", units.masked_fill(small, 0), octaves, zeros=True)


@functools.cache
def _shifts(least: int, most: int, bits: int) -> Polynomials:
    """2^-y, with `most` fractional bits, between knots at 2^(y + 1/2)."""
    knots = [2.0 ** (y + 0.5) for y in range(least, most)]
    return Polynomials(knots, [(0.0, [2.0**-y]) for y in range(least, most + 1)], bits, max(0, most))


def shift_divide(module: ShiftDivide, secret: dict, numerator: Share | Weight, denominator: Share | Weight) -> Share:
    """Quotients a / 2^y: which of the exponents is b's is as secret as b is, so that the shift becomes a product.

    Five rounds, six for many numbers: three find the power of two, by a knot between every two exponents, one
    multiplies, and one or two truncate. With J = most - least and k digits: a word and J (2 k - 1) bits per
    denominator, and what `divide` has per quotient. `divide` takes nine rounds, twelve for many numbers: it looks up
    b's octave as this does, and spends four or six more on what this leaves out.

    Within a step, and what a errs by itself, over 2^y: a keeps the bits it comes with, up to the 47 - most that
    quotients below 2^15 leave it; what is cut off beyond is 2^(most - 47 - least) of a quotient, 2^-32 of 16 exponents.

    Functionality:
        Inputs: Both shared.
        Output: a / 2^y, shared, truncated by `truncate`; nearer than 2^(least - 5) to a knot, either neighbour's.
        Opened: b and a less their masks, masked bits, to both; by `truncate`, a masked word.
        Simulator: uniform words and bits.
        Failure: 2^-34 a number of either.
    """
    b = entered(denominator).settle()
    b = b.to(max(min(b.bits, 2 * session.bits), session.bits)) + module.eps
    b = Share(b.data << max(0, 5 - module.least - b.bits), max(b.bits, 5 - module.least))
    lowest = b.bits + module.least - 5  # the bits below are a 45th of the first knot
    digits = -(-(b.bits + module.most + 3 - lowest) // DIGIT)  # four times the largest divisor
    power = piecewise(b, _shifts(module.least, module.most, b.bits), lowest, digits)
    a = entered(numerator).settle()
    a = a.to(min(a.bits, 47 - power.bits))  # quotients below 2^15 leave 47 bits to the product
    return truncate(multiply(a, power), session.bits)


def shift_divide_domain(module: ShiftDivide, a: torch.Tensor, b: torch.Tensor) -> list[Span]:
    """The window of denominators, and what the product has room for."""
    a, b = torch.broadcast_tensors(a, b)
    return spans("denominators", b + module.eps, (0.0, 2.0 ** (module.most + 2))) + spans(
        "quotients", module(a, b), (-(2.0**15), 2.0**15)
    )
