"""Products of two activations, and polynomials of second degree of one."""

import functools

import torch

from ....models.activations import LearnedQuad, Quad
from ....models.operations import MatMul, Multiply, SquaredNorm
from ..arithmetic.randomness import CLIENT, SERVER, Dealing, correlation
from ..arithmetic.ring import product
from ..arithmetic.share import Share, Weight, scaled, session
from .truncate import times_rows, truncate


@correlation("multiply")
def deal_multiply(deal: Dealing, left: tuple, right: tuple, out: tuple):
    """Beaver's triple for a product element by element, with broadcasting."""
    a, b = deal.mask(*left), deal.mask(*right)
    return a.mine, b.mine, deal.share(lambda: a.clear * b.clear, *out)


def multiply(x: Share, y: Share) -> Share:
    """X y, element by element with broadcasting (Beaver). One round; the words of x and of y."""
    out = torch.broadcast_shapes(x.shape, y.shape)
    a, b, share = session.correlation("multiply", tuple(x.shape), tuple(y.shape), tuple(out))
    e, f = session.reveal(x.data - a, y.data - b)
    # (e + a)(f + b), one product fewer than Beaver wrote: the public e f goes with one party's e b.
    return Share(e * (b + f if session.serving else b) + a * f + share, x.bits + y.bits)


def entered(x: Share | Weight) -> Share:
    """An operand: a weight that the graph uses directly becomes a share."""
    return x.enter(session.bits) if isinstance(x, Weight) else x


def times(module: Multiply, secret: dict, left: Share | Weight, right: Share | Weight) -> Share:
    """Product of two activations, entry by entry (Beaver). One round; the words of both.

    Errs by what the operands' rounding to `session.bits` does.

    Functionality:
        Inputs: Both factors shared.
        Output: x y, shared, at twice `session.bits`.
        Opened: x - a and y - b, to both.
        Simulator: uniform words.
        Failure: 2^-34 a number of either.
    """
    left, right = (entered(x).settle().to(session.bits) for x in (left, right))
    return multiply(left, right)


def either(left, right):
    """What `*` means in a graph: a product of two activations, as `times`, or one by a public number, as `scaled`."""
    if isinstance(left, Share) and isinstance(right, Share):
        return multiply(left.settle().to(session.bits), right.settle().to(session.bits))
    return left * right


@correlation("matmul")
def deal_matmul(deal: Dealing, left: tuple, right: tuple, out: tuple):
    """Beaver's triple a, b, a b for a matrix product."""
    a, b = deal.mask(*left), deal.mask(*right)
    return a.mine, b.mine, deal.share(lambda: product(a.clear, b.clear), *out)


def matmul(module: MatMul, secret: dict, left: Share | Weight, right: Share | Weight) -> Share:
    """Product of two activations (Beaver). One round; the words of both. A factor of left's rows waits.

    Functionality:
        Inputs: Both factors shared.
        Output: x y, shared.
        Opened: x - a and y - b, to both; what waits for x, as by `times_rows`.
        Simulator: uniform words.
        Failure: 2^-33 a number of either factor, and of the product where a factor of its rows waits.
    """
    left, right = entered(left), entered(right)
    over = left.over if left.over is not None and left.over.shape[-1] == 1 else None
    left = Share(left.data, left.bits) if over is not None else left.settle()
    left = left.to(min(left.bits, session.bits + 7) if over is not None else session.bits)
    right = right.settle().to(min(session.bits, 2 * session.bits + 4 - left.bits))
    out = torch.Size((*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1]))
    a, b, share = session.correlation("matmul", tuple(left.shape), tuple(right.shape), tuple(out))
    if session.recording:
        session.tape.costs[session.here()].products += out.numel() * left.shape[-1]
    e, f = session.reveal(left.data - a, right.data - b)
    y = product(e, b + f if session.serving else b).add_(product(a, f)).add_(share)
    y = Share(y, left.bits + right.bits)
    return y if over is None else times_rows(y.to(session.bits), over)


@correlation("square")
def deal_square(deal: Dealing, shape: tuple):
    """A mask r and its square."""
    r = deal.mask(*shape)
    return r.mine, deal.share(lambda: r.clear * r.clear, *shape)


def square(x: Share) -> Share:
    """x^2. One round; n words."""
    r, share = session.correlation("square", tuple(x.shape))
    (e,) = session.reveal(x.data - r)
    y = 2 * e * r + share
    return Share(y + e * e if session.serving else y, 2 * x.bits)


def squared_norm(module: SquaredNorm, secret: dict, x: Share) -> Share:
    """Sum of squares of each row, from one opening. One round; n words.

    Functionality:
        Inputs: x shared.
        Output: Each row's sum of squares, shared, at twice `session.bits`.
        Opened: x - r, to both.
        Simulator: uniform words.
        Failure: 2^-38 a number.
    """
    y = square(x.settle().to(session.bits))
    return Share(y.data.sum(-1, keepdim=True), y.bits)


def quad(module: Quad, secret: dict, x: Share) -> Share:
    """(x^2 + 2 x + 1) / 8 + 3 / 8, for |x| below 2^8. One round; n words.

    Functionality:
        Inputs: x shared.
        Output: The quadratic, shared, at `session.bits`.
        Opened: x - r, to both.
        Simulator: uniform words.
        Failure: 2^-38 a number, of x and of the square.
    """
    a, b, c = module.coefficients
    shift = b / (2 * a)
    y = scaled(square(x.settle().to(session.bits - 2) + shift), a).to(session.bits)
    return y + (c - a * shift * shift)


@correlation("quadratic")
def deal_quadratic(deal: Dealing, name: str, shape: tuple, part: tuple):
    """For P x^2 + Q x with P and Q known to the server: a mask r of x, and shares of P r and of P r^2 + Q r."""
    r = deal.mask(*shape)
    squares = deal.share(lambda: r.clear * r.clear, *shape)
    p, q = (deal.weights.get(f"{name}.{letter}") for letter in "pq")
    pr = deal.share(lambda: p * r.clear, *shape)
    rest = deal.share(lambda: (p * r.clear + q) * r.clear, *shape)
    if not deal.meta and deal.rank == CLIENT:  # p and q are P - p and Q - q here
        pr, rest = pr + p * r.mine, rest + p * squares + q * r.mine
    elif not deal.meta and deal.rank == SERVER:  # the server's part of the masks meets the public differences too
        difference = deal.weights[f"{name}.p-"], deal.weights[f"{name}.q-"]
        pr = pr + difference[0] * r.mine
        rest = rest + difference[0] * squares + difference[1] * r.mine
    return r.mine, pr, rest


def quadratic(name: str, x: Share, shape: tuple, coefficients, bits: int) -> Share:
    """P x^2 + Q x + R with P, Q and R known to the server. One round; n words.

    Args:
        name: of the weights, unique in the network.
        x: (..., *shape) or broadcast with it.
        shape: of P, Q and R.
        coefficients: gives P, Q and R; called at the server only.
        bits: fractional bits of P.
    """

    def integers(which: int) -> torch.Tensor:
        return (coefficients()[which].expand(shape) * 2.0 ** (bits + which * x.bits)).round().long()

    p, q = (
        session.known(f"{name}.{letter}", tuple(shape), functools.partial(integers, which))
        for which, letter in enumerate("pq")
    )
    r, pr, rest = session.correlation("quadratic", name, tuple(x.shape), tuple(shape))
    (e,) = session.reveal(x.data - r)
    y = 2 * e * pr + rest
    if session.serving and not session.recording:
        y += (p * e + q) * e + integers(2)
    return Share(y, bits + 2 * x.bits)


def learned_quad(module: LearnedQuad, secret: dict, x: Share) -> Share:
    """The quadratic with the server's coefficients. Three rounds; 1.5 n words.

    Functionality:
        Inputs: x shared; the coefficients of the server.
        Output: The quadratic, shared, at `session.bits`.
        Opened: x - r and, by `truncate`, a masked word, to both or to the server.
        Simulator: uniform words.
        Failure: 2^-38 a number of x; of the result 0.
    """
    x = x.settle().to(session.bits - 1)
    values = [secret[name] for name in "abc"]
    y = quadratic(values[0].name, x, values[0].shape, lambda: [value.value for value in values], session.bits)
    return truncate(y, session.bits)
