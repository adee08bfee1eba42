"""Recurrences: LSTMs, a step after the other, and scans of what is linear in the state, in log2 N rounds.

A step of an LSTM is 7 rounds, all heads, directions and images together:

    1  U h, known to the server: the client's h less its mask
    2  what the gates read, masked, for the logistic function's five opened words a hidden unit
    3  which segments they lie in, masked bits: now i, f, o and g are shared, at 60 bits
    4  i, f and g masked, which truncates them exactly, and c masked: f c + i g
    5  the new c, masked      6  its segment, masked bits
    7  o and tanh c masked, which truncates them exactly: h = o tanh c

A comparison of 16 bits in digits takes a round more (`compare`). Here a window of 9 bits is looked up at once, in a
secret table of 512 bits per number (Ishai et al., 2013): it tells a knot to a quarter only, so that neighbouring
polynomials are each fitted a quarter beyond the knot that they share, and either is right there. And a product takes
its factors from the words that were opened to truncate them, as `truncate.times_rows` has one.

Letters in costs as in `tuned`, K hidden units of all cells, B sequences.
"""

import functools
import itertools
from collections.abc import Callable

import torch

from ....models.operations import LSTM, BlockLinear, LinearScan
from ...domains import Span, spans
from ..arithmetic.polynomials import Polynomials, fitted
from ..arithmetic.randomness import Dealing, Mask, correlation, pack
from ..arithmetic.share import Share, session
from .activations import FINE, SMOOTH, logistic_of
from .compare import open_bits
from .curve import check, curve_supply, evaluate
from .linear import by_weight
from .product import entered
from .truncate import above, cut, rows_product, rows_supply, unmasked

WINDOW, QUARTER = 9, 2  # bits that are looked up, 2 of them below one: 64 either way
KNOTS = (0.0, 2.0, 4.75, 9.5)  # of the logistic function, either way, on the window's grid


def block_linear(module: BlockLinear, secret: dict, x: Share) -> Share:
    """A matrix for each block of features, known to the server. One round; n / 2 words.

    Functionality:
        Inputs: x shared; the matrices and the bias of the server.
        Output: W x + b, shared, at twice `session.bits`.
        Opened: x1 - r, to the server.
        Simulator: uniform words.
        Failure: 2^-36 a number of x.
    """
    weight, x = secret["weight"], x.settle().to(session.bits)
    operation = ("blocks", module.inputs, module.outputs)
    return by_weight(operation, weight.name, x, weight, (*x.shape[:-1], sum(module.outputs))) + secret["bias"]


# The logistic function in two rounds


@functools.cache
def _pieces(bits: int) -> Polynomials:
    """A quartic on each of six segments, within 1.1e-4, also a quarter beyond its ends."""
    edges, near = sorted({side * knot for knot in KNOTS for side in (-1, 1)}), 2.0**-QUARTER
    parts = [fitted(logistic_of, [low - near, high + near], 4, 16)[0] for low, high in zip(edges, edges[1:])]
    return Polynomials(edges, [(0.0, [0.0] * 5), *parts, (0.0, [1.0] + [0.0] * 4)], bits, 16)


def half_circles(secret: torch.Tensor) -> torch.Tensor:
    """For windows s (n) tables (n, 8) words: bit v says whether v - s, of `WINDOW` bits, has its highest set."""
    places = torch.arange(1 << WINDOW, dtype=torch.int16, device=secret.device)
    return pack(((places - secret.short()[:, None]) >> (WINDOW - 1) & 1).to(torch.uint8))


@correlation("looked up")
def deal_looked_up(deal: Dealing, count: int, knots: int, degree: int, low: int):
    """For a piecewise polynomial of x: a table that tells it from its knots, and what gives the polynomial."""
    r = deal.mask(count)
    window = (1 << WINDOW) - 1
    table = deal.share(lambda: half_circles(-r.clear >> low & window), count, (1 << WINDOW) // 64, binary=True)
    bit = deal.bits(knots, -(-count // 64))
    return table, bit.mine, curve_supply(deal, bit, r, count, ((knots, degree),), degree)


def logistic(x: Share) -> Share:
    """1 / (1 + exp(-x)), within 1.5e-4 for |x| below 48, at 60 bits: who reads it truncates it. Two rounds.

    n words and 7 n bits.
    """
    bits = min(session.bits - 1, FINE)
    x, low = x.to(bits), bits - QUARTER
    pieces, count = _pieces(bits), x.data.numel()
    check(x.data, -round(SMOOTH * 2.0**bits), round(SMOOTH * 2.0**bits))
    knots = len(pieces.knots)
    table, bit, curve = session.correlation("looked up", count, knots, pieces.degree, low)
    (e,) = session.reveal(x.data.reshape(-1) - curve[0])
    found = bit
    if not session.recording:
        places = torch.tensor([knot >> low for knot in pieces.knots], device=e.device)
        v = (e >> low) - places[:, None] & (1 << WINDOW) - 1  # (J, n)
        below = table.T.gather(0, v >> 6) >> (v & 63) & 1  # shared bit by bit
        found = pack((below ^ 1 if session.serving else below).to(torch.uint8))
    gamma = open_bits(found, bit, count)
    return Share(evaluate(pieces, e, curve, gamma).view(x.shape), pieces.bits)


# Products of what is truncated on the way


def _parts(s: Mask, shift: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """What `cut` shares of a mask s, in the clear: a truncated value is made of both."""
    return (lambda: above(s.clear, shift)), (lambda: (s.clear >> 63 & 1) << (64 - shift))


def _times(one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]) -> torch.Tensor:
    return one() * other()


def pair_supply(deal: Dealing, shape: tuple, shift: int):
    """For the product of two factors that are truncated on the way: their masks, what `cut` makes of each, products."""
    s, u = deal.mask(*shape), deal.mask(*shape)
    pairs = itertools.product(_parts(s, shift), _parts(u, shift))
    products = [deal.share(functools.partial(_times, *pair), *shape) for pair in pairs]
    return s.mine, u.mine, cut(deal, s, shape, shift), cut(deal, u, shape, shift), products


def pair_product(opened: list[torch.Tensor], shift: int, supply: tuple) -> torch.Tensor:
    """The product of two factors, of which x + s and y + u were opened, each less its lowest `shift` bits. Local."""
    _, _, first, second, products = supply
    # A truncated factor is P - w + b h: P and b are public, w ("whole") and h ("high") of its mask.
    (p, b), (q, d) = (unmasked(c, shift, torch.ones_like(c)) for c in opened)
    ours = p * (d * second[1] - second[0]) + q * (b * first[1] - first[0])
    ours += products[0] - d * products[1] - b * products[2] + b * d * products[3]
    return ours + p * q if session.serving else ours


@correlation("pair")
def deal_pair(deal: Dealing, shape: tuple, shift: int):
    """For `cut_product`."""
    return pair_supply(deal, shape, shift)


@correlation("gated sum")
def deal_gated_sum(deal: Dealing, shape: tuple, shift: int):
    """For `gated_sum`: `pair_supply`, and what `times_rows` needs for a factor of each number."""
    r = deal.mask(*shape)
    return pair_supply(deal, shape, shift), r.mine, rows_supply(deal, r, shape, shape, shift)


def cut_product(x: Share, y: Share, bits: int) -> Share:
    """X y, both truncated to `bits` on the way, exactly, at twice those. One round; the words of both."""
    shift = x.bits - bits
    supply = session.correlation("pair", tuple(x.shape), shift)
    opened = session.reveal(x.data + supply[0], y.data + supply[1])
    return Share(pair_product(opened, shift, supply), 2 * bits)


def gated_sum(f: Share, c: Share, i: Share, g: Share, bits: int) -> Share:
    """F c + i g, where f, i and g are truncated to the `bits` of c on the way, exactly, at twice those. One round."""
    shift = f.bits - bits
    supply, a, rows = session.correlation("gated sum", tuple(f.shape), shift)
    e, masked, *opened = session.reveal(c.data - a, f.data + rows[0], i.data + supply[0], g.data + supply[1])
    product = rows_product(e, a, masked, shift, rows) + pair_product(opened, shift, supply)
    return Share(product, 2 * bits)


# LSTMs


@functools.lru_cache(maxsize=64)
def _order(cells: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    """The features that cells read, gate by gate in the order i, f, o, g; and which of a gate's are backward."""
    starts = [4 * sum(cells[:cell]) for cell in range(len(cells))]
    order = [starts[c] + gate * k + unit for gate in (0, 1, 3, 2) for c, k in enumerate(cells) for unit in range(k)]
    return order, [bool(cell % 2) for cell, k in enumerate(cells) for _ in range(k)]


def lstm(module: LSTM, secret: dict, z: Share) -> Share:
    """Hidden states of LSTMs side by side, for what gates read within 48 (g and c within 24) either way.

    7 N - 1 rounds for N steps, 9 K B words for the first, which has no h and no c, and 11.5 K B for every other; and 35
    bits for every hidden unit and step. Steps follow one another, whatever their number of heads, directions, images.

    Along the sequence the error grows until as much is forgotten as a step adds, some 2e-4 of the curves: c keeps the
    errors of 1 / (1 - f) steps. Largest errors of the h of 16, 64 and 256 steps, of 32 hidden units in 4 sequences,
    with weights as torch draws them: 5e-4, 6e-4, 7e-4; three times as wide 7e-4, 7e-4, 8e-4 (1.1e-3 once in 24); with f
    about 0.98 7e-4, 1.2e-3, 1.6e-3. With f about 0.999, where 256 steps are too few to forget, 1e-3, 2e-3, 9e-3.

    Functionality:
        Inputs: z shared; U and the bias of the server.
        Output: h of every step, shared, at `session.bits`; curves are the quartics of a segment at 11 bits, either
            side's within 1/4 of a knot, truncated exactly.
        Opened: h1 - r, to the server; what gates read, c, i, f, o, g and tanh c under masks, and masked bits, to both.
        Simulator: uniform words and bits.
        Failure: 2^-35 a number of what gates read, of c and of h.
    """
    if not sum(module.cells):
        return z
    weight, bits = secret["weight"], session.bits
    z, lead = z.settle() + secret["bias"], z.shape[:-2]
    order, backward = (torch.tensor(part, device=z.data.device) for part in _order(module.cells))
    rows = z.data.flatten(0, -3)[..., order].unflatten(-1, (4, -1))  # (B, N, 4, K)
    rows = torch.where(backward, rows.flip(1), rows)
    operation = ("blocks", module.cells, tuple(4 * k for k in module.cells))
    states: list[Share] = []
    c = None
    for t in range(rows.shape[1]):
        read = Share(rows[:, t], z.bits)  # (B, 4, K)
        if states:
            product = by_weight(operation, weight.name, states[-1], weight, (len(rows), len(order)))
            read = read + Share(product.data[:, order].view(read.shape), product.bits)
        # tanh(x) = 2 s(2 x) - 1
        whole = logistic(Share(torch.cat([read.data[:, :3], 2 * read.data[:, 3:]], 1), read.bits))
        i, f, o = (Share(whole.data[:, gate], whole.bits) for gate in range(3))
        g = Share(2 * whole.data[:, 3], whole.bits).plus(-(1 << whole.bits))
        c = cut_product(i, g, bits) if c is None else gated_sum(f, c, i, g, bits)
        tanh = logistic(Share(c.data, c.bits - 1))
        tanh = Share(2 * tanh.data, tanh.bits).plus(-(1 << tanh.bits))
        states.append(cut_product(o, tanh, bits).to(bits))
        c = c.to(bits)
    made = torch.stack([state.data for state in states], 1)  # (B, N, K)
    return Share(torch.where(backward, made.flip(1), made).unflatten(0, lead), bits)


def lstm_domain(module: LSTM, z: torch.Tensor) -> list[Span]:
    """The range of what gates read, and of twice what the two tanh do."""
    seen: dict[str, list[torch.Tensor]] = {"inputs of gates": [], "twice the inputs of tanh": []}

    def watch(read: torch.Tensor, c: torch.Tensor) -> None:
        for what, part in zip(seen, (read, torch.cat([2 * read.chunk(4, -1)[2], 2 * c], -1)), strict=True):
            seen[what].append(torch.stack([part.amin(), part.amax()]))

    if sum(module.cells):
        module.run(z, watch)
    return [span for what, parts in seen.items() if parts for span in spans(what, torch.cat(parts), (-SMOOTH, SMOOTH))]


# Scans


@functools.lru_cache(maxsize=256)
def _level(tokens: int, distance: int) -> tuple[list[int], list[int], list[int], int]:
    """Of runs of 2 `distance` tokens the later halves, the last token of each earlier one, and which is whose.

    Returns:
        the tokens of the later halves; the last tokens of the earlier ones; for each of the former its place among the
        latter; how many of the former are in the first run.
    """
    later = [t for t in range(tokens) if t // distance % 2]
    ends = sorted({t // distance * distance - 1 for t in later})
    return later, ends, [ends.index(t // distance * distance - 1) for t in later], sum(t < 2 * distance for t in later)


@correlation("scan")
def deal_scan(deal: Dealing, shape: tuple, distance: int):
    """For a level of `scan`: masks of f in the later halves, of h and f at the ends, and their products."""
    count, tokens, width = shape
    later, ends, place, first = _level(tokens, distance)
    a, b, c = (deal.mask(count, many, width) for many in (len(later), len(ends), len(ends) - 1))
    one = deal.share(lambda: a.clear * b.clear[:, place], count, len(later), width)
    rest = [at - 1 for at in place[first:]]
    two = deal.share(lambda: a.clear[:, first:] * c.clear[:, rest], count, len(later) - first, width)
    return a.mine, b.mine, c.mine, one, two


def scan(module: LinearScan, secret: dict, f: Share, i: Share) -> Share:
    """The recurrence h_t = f_t h_(t-1) + i_t, all tokens at once, in ceil(log2 N) rounds (Sklansky, 1960).

    Runs of 1, 2, 4, ... tokens are joined two by two: h of the later half's tokens grows by their f times h at the
    earlier half's end, and their f is multiplied by f there. What is opened at an end serves the whole half, so that a
    level costs N / 2 + N / distance words a feature, N log2(N) / 2 + 2 N in all: half of what Kogge and Stone's N
    products a level would, which Brent and Kung's undercut for twice the rounds, or nearly, and no fewer words: with 64
    tokens 5 N words in 6 rounds, against 10 N in 6 and about 5 N in 11.

    Errs by a step of the fixed point for each level, and by what f and i do.

    Functionality:
        Inputs: Both shared.
        Output: h, shared, at `session.bits`.
        Opened: f and h under masks, to both.
        Simulator: uniform words.
        Failure: 2^-36 a number of h and of f, at every level.
    """
    f, h = (entered(x).settle().to(session.bits) for x in (f, i))
    lead, tokens = h.shape[:-2], h.shape[-2]
    factors, states = (module.turned(x.data.flatten(0, -3)).clone() for x in (f, h))  # (B, N, K)
    distance = 1
    while distance < tokens:
        later, ends, place, first = _level(tokens, distance)
        supply = session.correlation("scan", tuple(states.shape), distance)
        a, b, c, one, two = supply
        sides = factors[:, later], states[:, ends], factors[:, ends[1:]]
        e, g, k = session.reveal(*(side - mask for side, mask in zip(sides, (a, b, c), strict=True)))
        states[:, later] += _product(e, g[:, place], a, b[:, place], one)
        rest = [at - 1 for at in place[first:]]
        factors[:, later[first:]] = _product(e[:, first:], k[:, rest], a[:, first:], c[:, rest], two)
        distance *= 2
    return Share(module.turned(states).unflatten(0, lead), session.bits)


def _product(e: torch.Tensor, f: torch.Tensor, a: torch.Tensor, b: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """(e + a)(f + b), e and f public, of a Beaver triple, truncated to `session.bits`. Local."""
    product = e * (b + f if session.serving else b) + a * f + share
    return Share(product, 2 * session.bits).to(session.bits).data
