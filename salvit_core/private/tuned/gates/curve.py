"""Curves on shares: piecewise polynomials with public knots, evaluated where a secret lies.

The value is opened masked, once, to be compared with the knots (`compare`). The masked bit per knot that this gives and
the powers of the mask give the polynomial of the value's segment, and nothing else is opened.

Letters in costs as in `tuned`.
"""

import functools
import math

import torch
from torch import nn

from ...domains import Span, spans
from ..arithmetic.polynomials import Even, Polynomials
from ..arithmetic.randomness import Dealing, Mask, correlation, unpack
from ..arithmetic.ring import signed
from ..arithmetic.share import Share, session
from .compare import DIGIT, WINDOW_DIGITS, compared, segments
from .truncate import truncate

Groups = tuple[tuple[int, int], ...]  # of bits: how many, and up to which power of r their products go


def curve_supply(deal: Dealing, bit: Mask, r: Mask, count: int, groups: Groups, degree: int, start: int = 0):
    """For polynomials in x: the mask of x, its powers, and the products of the bits from `start` on with them."""
    chosen = []
    for size, most in groups:
        clear = None if bit.clear is None else bit.clear[start : start + size]
        chosen.append(chosen_supply(deal, Mask(None, clear), r, size, count, most))
        start += size
    return r.mine, powers_supply(deal, r, count, degree), chosen


def powers_supply(deal: Dealing, r: Mask, count: int, degree: int) -> list[torch.Tensor]:
    """Shares of r^2 to r^degree."""
    made, clear = [], r.clear

    def make():
        nonlocal clear
        clear = clear * r.clear
        return clear

    for _ in range(2, degree + 1):
        made.append(deal.share(make, count))
    return made


def chosen_supply(deal: Dealing, bit: Mask, r: Mask, knots: int, count: int, degree: int) -> list[torch.Tensor]:
    """Shares (bits, count) of bit r^i for i = 0 to degree."""
    chosen, clear = [], None
    for i in range(degree + 1):

        def make(i=i):
            nonlocal clear
            clear = unpack(bit.clear, count) if i == 0 else clear * r.clear
            return clear

        chosen.append(deal.share(make, knots, count))
    return chosen


@correlation("comparison")
def deal_comparison(deal: Dealing, count: int, knots: int, groups: Groups, degree: int, digits: int, low: int):
    """For a piecewise polynomial of x: what compares x with its knots, and what gives the chosen polynomial."""
    first, r, bit = compared(deal, count, knots, sum(size for size, _ in groups), digits, low)
    return first, curve_supply(deal, bit, r, count, groups, degree)


def evaluate(pieces: "Polynomials | Even", e: torch.Tensor, curve: tuple, gamma: torch.Tensor) -> torch.Tensor:
    """The piecewise polynomial of x = e + r, e public: sum over i of e^i times shares that are linear in the supply."""
    if session.recording:
        return torch.empty_like(e)
    r, powers, supplied = curve
    degree, start = pieces.degree, 0
    shares = [None, r, *powers]  # of r^m; r^0 is public
    inner: list[torch.Tensor | None] = [None] * (degree + 1)  # of each power of e

    def add(k: int, part: torch.Tensor, alpha: int) -> None:
        if alpha := signed(alpha):
            made = inner[k]
            inner[k] = part * alpha if made is None else made.add_(part, alpha=alpha)

    for k in range(degree + 1):
        if session.serving:
            add(k, torch.ones_like(e), pieces.base[k])
        for m in range(1, degree + 1 - k):
            add(k, shares[m], pieces.base[k + m] * math.comb(k + m, m))
    for (size, most), chosen in zip(pieces.groups, supplied, strict=True):
        steps, bits = pieces.steps[start : start + size], gamma[start : start + size]
        start, sign = start + size, 1 - 2 * bits
        weights = torch.tensor(steps, device=e.device).t() if size > 16 else None
        for m in range(most + 1):
            part = sign * chosen[m]  # shares of (bit) r^m
            if m > 0:
                part += bits * shares[m]
            elif session.serving:
                part += bits
            for k in range(most + 1 - m):
                if weights is None:
                    for j, step in enumerate(steps):
                        add(k, part[j], step[k + m] * math.comb(k + m, m))
                else:  # many knots, few elements: one large operation instead of many small ones
                    add(k, (part * weights[k + m][:, None]).sum(0), math.comb(k + m, m))
    y = torch.zeros_like(e)
    for made in reversed(inner):
        y.mul_(e)
        y = y if made is None else y.add_(made)
    return y


def piecewise(x: Share, pieces: "Polynomials | Even", low: int, digits: int = WINDOW_DIGITS) -> Share:
    """A piecewise polynomial of every element. Three rounds; n words and J (2 k - 1) n bits."""
    room = 1 << (low + DIGIT * digits - 1)
    # A difference to a knot, too, must stay within the window.
    check(x.data, max(pieces.knots) - room, min(pieces.knots) + room)
    return Share(unchecked(x.data.reshape(-1), pieces, low, digits).view(x.shape), pieces.bits)


def unchecked(x: torch.Tensor, pieces: "Polynomials | Even", low: int, digits: int) -> torch.Tensor:
    """`piecewise` of flat x, unchecked."""
    first, curve = session.correlation(
        "comparison", x.numel(), len(pieces.knots), pieces.groups, pieces.degree, digits, low
    )
    e, gamma = segments(x, pieces.knots, pieces.joined, low, digits, first)
    return evaluate(pieces, e, curve, gamma)


def check(x: torch.Tensor, low: int, high: int) -> None:
    """In checked mode: note this node if some entry of x, in raw units, is outside [low, high).

    Opens one number, the sum of a random number for each entry that is outside: zero if there is none, uniform else,
    however many there are. Windows of 32 bits look: a narrow one sees what is beyond a bound by 2^-24 of the larger of
    the two, or by half of the lower where that is less, a wide one up to 2^10 times the range, and one from bit 28 on
    whatever is farther off, such as the 2^(64-t) by which a truncation of t > 4 bits fails.

    What it leaks: the flag, to both parties. An operation has one wherever it looks: at the result (`Tuned.watch`), and
    before each comparison with knots or of four numbers, so that a softmax tells in which round of its maximum
    something was outside, and a network at which operation. Without `check` none of this is computed or opened.

    Functionality:
        Inputs: x shared; bounds public.
        Output: Whether any entry is outside, to both.
        Opened: Masked words and bits, and the flag, to both.
        Simulator: uniform words and bits, and the output: a flag of zero or a uniform one.
        Failure: 2^-64 that something outside is not told.
    """
    if not session.check:
        return
    flat, size = x.reshape(-1), max(abs(low), abs(high)).bit_length()
    found = []
    # A range of many octaves has its lower bound far below the larger one.
    narrow = min(size - 25, max(low.bit_length() - 2, size - 28)) if low > 0 else size - 25
    for step in dict.fromkeys([max(0, size - 21), max(0, narrow), max(28, size - 31)]):
        # Outwards: of the bits that a window ignores a carry may come.
        carry = step > size - 21
        bounds = [float(low >> step << step), float((-(-high >> step) + carry) << step)]
        pieces = Polynomials(bounds, [(0.0, [1.0]), (0.0, [0.0]), (0.0, [1.0])], 0, 0)
        found.append(unchecked(flat, pieces, step, 8))
    beyond = torch.cat(found)  # 0 or 1 each, so that a random number times it is 0 or uniform
    shape = tuple(beyond.shape)
    a, b, share = session.correlation("multiply", shape, shape, shape)
    random = b if session.recording else session.dealing.uniform(len(beyond))
    e, f = session.reveal(beyond - a, random - b)
    (flag,) = session.reveal((e * (b + f if session.serving else b) + a * f + share).sum().reshape(1))
    if not session.recording and flag.item() != 0:
        session.violations[session.place] = True


@functools.cache
def _gelu(bits: int) -> Even:
    def even(x):
        return x / 2 * torch.erf(torch.as_tensor(x) / math.sqrt(2)).numpy()

    return Even(even, (1.2, 3.55), 2.0**-6, bits, 12)


def gelu(module: nn.GELU, secret: dict, x: Share) -> Share:
    """GELU as x / 2 and an even quartic on each of two segments of |x|, zero to their left and x to their right.

    Within 1.5e-3 for |x| below 28, at 13 bits. Five rounds, four for few numbers; 1.5 n words and 20 n bits.

    Functionality:
        Inputs: x shared.
        Output: The quartic of x's segment at 11 bits, shared, truncated exactly; within 2^-6 of a knot either side's.
        Opened: x - r, masked bits and a masked result, to both or to the server.
        Simulator: uniform words and bits.
        Failure: 2^-38 a number of x; of the result 0.
    """
    bits = min(session.bits - 2, 11)
    x = x.settle().to(bits)
    return truncate(piecewise(x, _gelu(bits), max(0, bits - 6), 3), session.bits)


def gelu_domain(module: nn.GELU, x: torch.Tensor) -> list[Span]:
    """The input's range."""
    return spans("inputs", x, (-28, 28))
