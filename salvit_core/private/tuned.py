"""The functions of `stock`, several times cheaper and right where trained networks need them.

The model is stock's: two semi-honest parties with additive shares in Z_2^64 on CrypTen's communicator, and a dealer of
correlated randomness (`dealing`). Under provider "TFP" that dealer is the server, which could unmask everything: fit
for measuring only. Nothing is opened but values masked by fresh uniform randomness, and the logits to the client.

What differs from stock, and where it comes from:

- The server knows the weights, so a product with a weight needs one message of the client, x1 - r, and one product at
  each party; W - B is opened once per session (in the spirit of Delphi, Mishra et al., 2020, Section 4, and of
  MiniONN, Liu et al., 2017). An activation is opened masked once and used for all its monomials.
- Comparisons open 64 bits for the value and about 7 per knot: the masked value's digits are looked up in secret truth
  tables (Ishai et al., 2013, one-time truth tables) and joined by products of several bits at once
  (Damgard et al., 2006; ABY2.0, Patra et al., 2021, Section 3.2, for products of many inputs in one round).
- Everything curved is a piecewise polynomial: knots and coefficients are public, the segment is secret.
- Reciprocals and inverse roots scale their input to [1, 2) by a secret power of two and then evaluate one quadratic per
  quarter octave: no iteration, no starting value, a domain of many octaves.
- Sums are normalised after the product with the values; max-pooling is separable and comes before its ReLU;
  LayerNorm's scale and shift move into the linear maps that alone read it.
- Scales are bookkeeping: each share knows its fractional bits, so that powers of two cost nothing.

Truncation. Dropping t bits of a share locally errs by at most one unit, but with probability |y| / 2^63 by 2^(64-t),
where y is the integer before it (SecureML, Mohassel and Zhang, 2017, Theorem 1). Scales are chosen so that y stays near
2^28 for most values, which puts the chance of one such failure in an inference of CCT-7/3x1 near 1e-4. Where y must be
larger (piecewise polynomials, scaled sums) `truncate` is exact.

Letters in costs: n elements of the value, J knots, k digits, p degree; a word is 64 bits, and words are counted as
those a party sends and receives, halved, like the bytes in a record. A round is one message or one exchange.
"""

import ctypes
import functools
import math
import operator
import sys
import time
from collections import deque

import crypten
import crypten.communicator as comm
import numpy as np
import torch
import torch.distributed as dist
from torch import fx, nn

from ..attention.matmul import MatMul
from ..cct import StochasticDepth
from ..normalizers import L1, L2Q, Scaling, Softmax, TwoQuad, TwoReLU
from .dealing import (
    CLIENT,
    CORRELATIONS,
    DIGIT,
    SERVER,
    Dealing,
    Tape,
    apply,
    chain,
    new_key,
    pack,
    product,
    subsets,
    unpack,
    variables,
)
from .stock import OPTIONS, identity

BITS = 13  # fractional bits of an activation and of a weight
WEIGHT_RANGE = 2.0**5  # of a weight: what `product` is told of its size

# Octaves, and absolute bounds, that the protocols cover. `DOMAINS` says what leaves them.
VARIANCE = (-12, 8)
ROW_SUM = (-8, 8)
WINDOW_DIGITS = 4


class Share:
    """One party's part of a secret: an int64 tensor; the two parts add up to the value times 2^bits, mod 2^64.

    `over` is a secret factor still to be multiplied: a reciprocal per row that waits for the product with the values.
    """

    __slots__ = ("data", "bits", "over")

    def __init__(self, data: torch.Tensor, bits: int, over: "Share | None" = None):
        self.data, self.bits, self.over = data, bits, over

    @property
    def shape(self) -> torch.Size:
        """Shape of the secret."""
        return self.data.shape

    def to(self, bits: int) -> "Share":
        """The same value with other fractional bits. Local; see the module's text for its failure."""
        shift = self.bits - bits
        if shift == 0:
            return self
        if shift < 0:
            return Share(self.data << -shift, bits, self.over)
        data = self.data >> shift if session.rank == SERVER else -(-self.data >> shift)
        return Share(data, bits, self.over)

    def settle(self) -> "Share":
        """Multiply by what still waits."""
        if self.over is None:
            return self
        return multiply(Share(self.data, self.bits), self.over)

    def plus(self, value: torch.Tensor | int) -> "Share":
        """Add a public integer, or one that the server alone knows: only its part changes."""
        if session.rank != SERVER or (isinstance(value, torch.Tensor) and value.device != self.data.device):
            return self
        return Share(self.data + value, self.bits)

    def __add__(self, other):
        ours, theirs = self.settle(), other
        if isinstance(other, Weight):
            value = other.encode(ours.bits) if session.rank == SERVER else 0
            return ours.plus(value)
        if not isinstance(other, Share):
            return ours.plus(round(float(other) * 2.0**ours.bits))
        theirs = other.settle()
        bits = max(ours.bits, theirs.bits)
        return Share(ours.to(bits).data + theirs.to(bits).data, bits)

    __radd__ = __add__

    def __neg__(self):
        return Share(-self.data, self.bits, self.over)

    def __sub__(self, other):
        return self + (-other)

    def __mul__(self, factor):
        if isinstance(factor, Share):
            return multiply(self.settle().to(session.bits), factor.settle().to(session.bits))
        return scaled(self, float(factor))

    __rmul__ = __mul__

    def __getitem__(self, index):
        whole = self.settle()
        return Share(whole.data[index], whole.bits)


class Weight:
    """A tensor of the server's: the client knows its shape only."""

    def __init__(self, name: str, value: torch.Tensor, known: bool):
        self.name, self.shape = name, value.shape
        self.value = value.detach().double() if known else None

    def encode(self, bits: int) -> torch.Tensor | int:
        """At the server: the value in fixed point. While shapes are recorded: nothing to add."""
        return 0 if session.recording else (self.value * 2.0**bits).round().long()


# The session


class Session:
    """One party's side: the dealer's supplies, the weights' masks, the messages. Set up by `begin`.

    Attributes:
        bits: fractional bits of activations and weights.
        recording: shapes only are run, to find what the dealer must supply.
        audit: if a list, every message that this party receives is appended to it.
        link: delays each message, where a link is emulated; see `network`.
    """

    def __init__(self, rank: int, bits: int = BITS):
        self.rank, self.bits = rank, bits
        self.recording, self.tape = False, Tape()
        self.meta = Dealing(rank, meta=True)
        self.dealing: Dealing | None = None
        self.makers, self.clear = {}, {}
        self.ready: deque = deque()
        self.supplied = (0.0, 0)
        self.audit: list | None = None
        self.link = None

    def correlation(self, name: str, *arguments):
        """What the dealer has for this call; while recording, the call is noted and only shapes come back."""
        if self.recording:
            self.tape.calls[-1].append((name, arguments))
            return CORRELATIONS[name](self.meta, *arguments)
        return self.ready.popleft()

    def known(self, name: str, shape: tuple, make) -> torch.Tensor | None:
        """An integer tensor that the server makes from its weights, masked for the session; None at the client."""
        if self.recording:
            self.tape.weights[name] = tuple(shape)
            self.makers[name] = make
            self.meta.weights[name] = torch.empty(shape, dtype=torch.int64, device="meta")
            return self.meta.weights[name]
        return self.clear.get(name)

    def open_weights(self) -> None:
        """Send W - B to the client, for all weights in one message. Once per session."""
        shapes = self.tape.weights
        if self.rank == SERVER:
            for name, shape in shapes.items():
                self.clear[name] = self.makers[name]().expand(shape).contiguous()
                self.dealing.weight(name, shape)
                self.dealing.weights[f"{name}-"] = self.clear[name] - self.dealing.weights[name]
            self.send(*(self.dealing.weights[f"{name}-"] for name in shapes))
            for name in shapes:
                if not name.endswith((".p", ".q")):
                    del self.dealing.weights[f"{name}-"]
        else:
            parts = self.receive(*(torch.Size(shape) for shape in shapes.values()))
            self.dealing.weights.update(zip(shapes, parts, strict=True))

    def swap(self, *ours: torch.Tensor) -> list[torch.Tensor]:
        """Send tensors and receive the other's of the same shapes, in one message each way at once. One round."""
        if self.recording:
            return [torch.empty_like(x) for x in ours]
        flat = _flat(ours)
        theirs, group, other = torch.empty_like(flat), comm.get().main_group, 1 - self.rank
        waiting = dist.irecv(theirs, other, group), dist.isend(flat, other, group)
        for request in waiting:
            request.wait()
        self._log(theirs, 2)
        return _split(theirs, [x.shape for x in ours])

    def send(self, *ours: torch.Tensor) -> None:
        """Send tensors; the other calls `receive`. One round."""
        if not self.recording:
            flat = _flat(ours)
            dist.send(flat, 1 - self.rank, comm.get().main_group)
            self._log(flat, 1, received=False)

    def receive(self, *shapes: torch.Size) -> list[torch.Tensor]:
        """Receive tensors of these shapes."""
        if self.recording:
            return [torch.empty(shape, dtype=torch.int64, device="meta") for shape in shapes]
        theirs = torch.empty(sum(shape.numel() for shape in shapes), dtype=torch.int64)
        dist.recv(theirs, 1 - self.rank, comm.get().main_group)
        self._log(theirs, 1)
        return _split(theirs, shapes)

    def _log(self, message: torch.Tensor, ways: int, received: bool = True) -> None:
        comm.get()._log_communication(ways * message.numel())
        if self.link is not None and received:
            self.link.wait(8 * message.numel())
        if self.audit is not None and received:
            self.audit.append(message.clone())

    def reveal(self, *ours: torch.Tensor) -> list[torch.Tensor]:
        """Open masked values: both parties learn the sums."""
        return [x + y for x, y in zip(ours, self.swap(*ours), strict=True)]

    def reveal_bits(self, ours: torch.Tensor) -> torch.Tensor:
        """Open masked words, shared bit by bit."""
        return ours ^ self.swap(ours)[0]

    @property
    def serving(self) -> bool:
        """Whether this party adds what is public."""
        return self.rank == SERVER


session: Session = Session(SERVER)


def _flat(tensors) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1).contiguous()


def _split(flat: torch.Tensor, shapes) -> list[torch.Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def keep_memory() -> None:
    """Let glibc keep what is freed: by default each large tensor costs page faults anew. Elsewhere this does nothing."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        except OSError:  # another libc
            pass


# Products


def multiply(x: Share, y: Share) -> Share:
    """x y, element by element with broadcasting (Beaver). One round; the words of x and of y."""
    out = torch.broadcast_shapes(x.shape, y.shape)
    a, b, share = session.correlation("multiply", tuple(x.shape), tuple(y.shape), tuple(out))
    e, f = session.reveal(x.data - a, y.data - b)
    # (e + a)(f + b), one product fewer than Beaver wrote: the public e f goes with one party's e b.
    return Share(e * (b + f if session.serving else b) + a * f + share, x.bits + y.bits)


def scaled(x: Share, factor: float) -> Share:
    """x times a public number; a power of two costs nothing but a note of the scale. Local."""
    power, exact = math.frexp(abs(factor))[1] - 1, math.frexp(abs(factor))[0] == 0.5
    if exact and factor > 0:
        return Share(x.data, x.bits - power, x.over)
    bits = session.bits - power
    return Share(x.data * round(factor * 2.0**bits), x.bits + bits, x.over).to(x.bits)


def _by_weight(operation: tuple, name: str, x: Share, value: Weight, out: tuple) -> Share:
    """W x, W known to the server: the client sends x1 - r. One round; half the words of x."""
    bits = session.bits
    weight = session.known(name, value.shape, lambda: value.encode(bits))
    r, share = session.correlation("by_weight", name, operation, tuple(x.shape), out)
    if session.rank == CLIENT:
        session.send(x.data - r)
        return Share(share, x.bits + bits)
    (masked,) = session.receive(x.shape)
    size = 1 + bits + int(math.log2(WEIGHT_RANGE))
    return Share(apply(operation, x.data + masked, weight, size).add_(share), x.bits + bits)


def linear(module: nn.Linear, secret: dict, x: Share) -> Share:
    """x W^T + b. One round; n / 2 words."""
    over = x.over if "bias" not in secret and x.over is not None and x.over.shape[-1] == 1 else None
    x = Share(x.data, x.bits) if over is not None else x.settle()
    x = x.to(min(x.bits, session.bits + 7) if over is not None else session.bits)
    y = _by_weight(("linear",), secret["weight"].name, x, secret["weight"], (*x.shape[:-1], module.out_features))
    y = y + secret["bias"] if "bias" in secret else y
    return y if over is None else Share(y.to(session.bits).data, session.bits, over)


def conv2d(module: nn.Conv2d, secret: dict, x: Share) -> Share:
    """Convolution; the image is masked before its windows overlap. One round; n / 2 words."""
    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    side = [(x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    operation = ("conv", kernel, stride, padding)
    out = (x.shape[0], side[0] * side[1], module.out_channels)
    y = _by_weight(operation, secret["weight"].name, x.settle().to(session.bits), secret["weight"], out)
    y = y + secret["bias"] if "bias" in secret else y
    return Share(y.data.transpose(1, 2).unflatten(2, side), y.bits)


def matmul(module: MatMul, secret: dict, left: Share, right: Share) -> Share:
    """Product of two activations (Beaver). One round; the words of both. A factor per row of the left waits for after."""
    over = left.over if left.over is not None and left.over.shape[-1] == 1 else None
    left = Share(left.data, left.bits) if over is not None else left.settle()
    left = left.to(min(left.bits, session.bits + 7) if over is not None else session.bits)
    right = right.settle().to(min(session.bits, 2 * session.bits + 4 - left.bits))
    out = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]) + (left.shape[-2], right.shape[-1])
    a, b, share = session.correlation("matmul", tuple(left.shape), tuple(right.shape), tuple(out))
    e, f = session.reveal(left.data - a, right.data - b)
    y = product(torch.cat([e, a], -1), torch.cat([b + f if session.serving else b, f], -2)).add_(share)
    y = Share(y, left.bits + right.bits)
    return y if over is None else multiply(y.to(session.bits), over)


# Comparisons, piecewise polynomials, truncation


def truncate(x: Share, bits: int) -> Share:
    """The same value with fewer fractional bits, within one unit and without failure for |x| below 2^62 units.

    The client masks its part by s and sends it; the server adds its own: c = x + 2^62 - s. Then x is (c >> t) + (s >> t)
    less 2^(64-t) if c + s passed 2^64, which it did unless the highest bits of c and of s are both zero. That product
    takes one masked bit back. Two rounds; n / 2 + n / 128 words.
    """
    shift = x.bits - bits
    flat = x.data.reshape(-1)
    count = flat.numel()
    s, bit, share = session.correlation("truncation", tuple(x.shape))
    mask = (1 << (64 - shift)) - 1
    if session.rank == CLIENT:
        session.send(flat - s)
        (masked,) = session.receive(torch.Size((-(-count // 64),)))
        masked = unpack(masked, count)
        high = masked * (1 - (s >> 63 & 1)) + (1 - 2 * masked) * share
        y = (s >> shift & mask) + (high << (64 - shift))
    else:
        (masked,) = session.receive(torch.Size((count,)))
        c = flat + masked + (1 << 62)
        masked = pack((c >= 0).to(torch.uint8)) ^ bit
        session.send(masked)
        masked = unpack(masked, count)
        high = (1 - 2 * masked) * share - 1
        y = (c >> shift & mask) - (1 << (62 - shift)) + 1 + (high << (64 - shift))
    return Share(y.view(x.shape), bits)


def _signed(value: int) -> int:
    """An integer mod 2^64 as int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


class Polynomials:
    """Public knots and one integer polynomial per segment, in the raw units of its input.

    Args:
        knots: where segments meet, ascending, in units of the input's value.
        pieces: for every segment a centre and coefficients, lowest first, in powers of (x - centre).
        bits: fractional bits of the input.
        extra: fractional bits of the coefficients.
    """

    def __init__(self, knots: list[float], pieces: list[tuple[float, list[float]]], bits: int, extra: int):
        self.degree = len(pieces[0][1]) - 1
        self.knots = [round(knot * 2.0**bits) for knot in knots]
        self.bits = extra + bits * self.degree
        whole = []
        for centre, coefficients in pieces:
            middle, sums = round(centre * 2.0**bits), [0] * (self.degree + 1)
            for i, c in enumerate(coefficients):
                c = round(c * 2.0**extra) << bits * (self.degree - i)
                for m in range(i + 1):  # (x - middle)^i
                    sums[m] += c * math.comb(i, m) * (-middle) ** (i - m)
            whole.append(sums)
        self.base = [_signed(c) for c in whole[0]]
        self.steps = [[_signed(b - a) for a, b in zip(*pair, strict=True)] for pair in zip(whole, whole[1:])]


def fitted(function, edges: list[float], degree: int) -> list[tuple[float, list[float]]]:
    """Near-minimax polynomials between edges: interpolation at Chebyshev's nodes, as (centre, coefficients) each."""
    pieces = []
    for low, high in zip(edges, edges[1:]):
        series = np.polynomial.Chebyshev.interpolate(function, degree, [low, high])
        centre = (low + high) / 2
        shifted = np.polynomial.Chebyshev(series.coef, [low - centre, high - centre])
        plain = shifted.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef
        pieces.append((centre, [*plain, *[0.0] * (degree + 1 - len(plain))]))
    return pieces


def _segments(x: torch.Tensor, knots: list[int], low: int, digits: int, supply: tuple):
    """For flat x and each knot: whether x is at or above it, as a masked public bit and the dealer's supply.

    Bits below `low` are ignored; x and its differences to the knots lie within 2^(low + 4 digits - 1). Three rounds:
    n words, then J (2 k - 2) n bits, two per digit but for the ends, then J n bits.
    """
    r, table, masks, products, bit, powers, chosen = supply
    count, size = x.numel(), DIGIT * digits
    (e,) = session.reveal(x - r)
    if session.recording:
        window = torch.empty(len(knots), count, dtype=torch.int32, device="meta")
        table = torch.empty(digits, count, dtype=torch.int32, device="meta")
    else:
        table = table.view(torch.int32)[: digits * count].view(digits, 1, count)
        # int32 is enough for up to 8 digits, and half the memory of int64.
        window = (e >> low).int() - torch.tensor([_narrow(knot >> low) for knot in knots], dtype=torch.int32)[:, None]
    less, equal = [], []
    for i in range(digits):
        found = table[i] >> (window >> (DIGIT * i) & (2**DIGIT - 1))
        less.append((found & 1).to(torch.uint8))
        equal.append((found >> 16 & 1).to(torch.uint8) if i else None)
    names = variables(digits)
    local = pack(torch.stack([{"less": less, "equal": equal}[kind][i] for kind, i in names]))
    public = dict(zip(names, session.reveal_bits(local ^ masks), strict=True))
    # At least the knot: not below, so the sign flipped.
    result = pack(less[-1])
    result = ~result if session.serving else result
    place = _places(digits)
    for term in chain(digits):
        for subset, rest in _partitions(tuple(term)):
            if not subset:
                part = functools.reduce(operator.and_, [public[name] for name in rest])
                result = result ^ part if session.serving else result
                continue
            share = masks[names.index(subset[0])] if len(subset) == 1 else products[place[subset]]
            for name in rest:
                share = share & public[name]
            result = result ^ share
    gamma = unpack(session.reveal_bits(result ^ bit), count)  # (J, n)
    return e, r, gamma, powers, chosen


def _narrow(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


@functools.cache
def _places(digits: int) -> dict:
    return {chosen: i for i, chosen in enumerate(subsets(digits))}


@functools.cache
def _partitions(term: tuple) -> list[tuple[tuple, tuple]]:
    """Every way to part the variables of a term: those taken as masks, those taken as public."""
    ways = []
    for chosen in range(1 << len(term)):
        ways.append((
            tuple(v for i, v in enumerate(term) if chosen >> i & 1),
            tuple(v for i, v in enumerate(term) if not chosen >> i & 1),
        ))  # fmt: skip
    return ways


def _evaluate(pieces: Polynomials, e: torch.Tensor, r: torch.Tensor, powers: list, chosen: list, gamma: torch.Tensor):
    """The piecewise polynomial of x = e + r, e public: sum over i of e^i times shares that are linear in the supply."""
    sign = 1 - 2 * gamma
    degree = pieces.degree
    shares = [None, r, *powers]  # of r^m; r^0 is public
    steps = []
    for m in range(degree + 1):  # shares of (x at or above the knot) r^m
        plain = gamma if m == 0 else gamma * shares[m]
        step = sign * chosen[m]
        steps.append(step + plain if m > 0 or session.serving else step)
    y = None
    for k in range(degree, -1, -1):
        inner = torch.zeros_like(e)
        for m in range(degree - k + 1):
            times = math.comb(k + m, m)
            if base := _signed(pieces.base[k + m] * times):
                if m > 0:
                    inner.add_(shares[m], alpha=base)
                elif session.serving:
                    inner.add_(base)
            for j, step in enumerate(pieces.steps):
                if alpha := _signed(step[k + m] * times):
                    inner.add_(steps[m][j], alpha=alpha)
        y = inner if y is None else y.mul_(e).add_(inner)
    return y


def piecewise(x: Share, pieces: Polynomials, low: int, digits: int = WINDOW_DIGITS) -> Share:
    """A piecewise polynomial of every element. Three rounds; n words and J (2 k - 1) n bits."""
    count = x.data.numel()
    supply = session.correlation("comparison", count, len(pieces.knots), pieces.degree, digits, low)
    found = _segments(x.data.reshape(-1), pieces.knots, low, digits, supply)
    e, r, gamma, powers, chosen = found
    return Share(_evaluate(pieces, e, r, powers, chosen, gamma).view(x.shape), pieces.bits)


_RELU = Polynomials([0.0], [(0.0, [0.0, 0.0]), (0.0, [0.0, 1.0])], 0, 0)


def positive_part(x: Share, resolution: int) -> Share:
    """max(x, 0) for |x| below 2^(15 - resolution); within 2^-resolution. Three rounds; n words and 7 n bits."""
    low = max(0, x.bits - resolution)
    return Share(piecewise(Share(x.data, 0), _RELU, low).data, x.bits)


def maximum(x: Share, y: Share, resolution: int) -> Share:
    """The larger of two, within 2^-resolution, for |x - y| below 2^(15 - resolution). Three rounds."""
    return y + positive_part(x - y, resolution)


def relu(module: nn.ReLU, secret: dict, x: Share) -> Share:
    """max(x, 0) for |x| below 64, within 2^-9. Three rounds; n words and 7 n bits."""
    return positive_part(x.settle().to(session.bits), 9)


def max_pool2d(module: nn.MaxPool2d, secret: dict, x: Share) -> Share:
    """The maximum of each window: along rows, then along columns, one comparison less than there are entries in each.

    Values differ by less than 64; within 2^-9 for each comparison. Three rounds per comparison.
    """
    x = x.settle().to(session.bits)
    pairs = [p if isinstance(p, tuple) else (p, p) for p in (module.kernel_size, module.stride, module.padding)]
    for axis in (3, 2):
        kernel, stride, padding = (pair[axis - 2] for pair in pairs)
        size = x.shape[axis]
        starts = range(-padding, size + padding - kernel + 1, stride)
        best = None
        for offset in range(kernel):
            # Outside the image stands the nearest pixel of the window: a maximum may count it twice.
            index = torch.tensor(
                [min(max(start + offset, max(start, 0)), min(start + kernel, size) - 1) for start in starts]
            )
            part = Share(x.data.index_select(axis, index.to(x.data.device)), x.bits)
            best = part if best is None else maximum(best, part, 9)
        x = best
    return x


_GELU_KNOTS = [-3.35, -2.1, -1.15, 0.0, 1.15, 2.1, 3.35]


@functools.cache
def _gelu(bits: int) -> Polynomials:
    def exact(x):
        return x / 2 * (1 + torch.erf(torch.as_tensor(x) / math.sqrt(2)).numpy())

    nothing, itself = (0.0, [0.0] * 4), (0.0, [0.0, 1.0, 0.0, 0.0])
    return Polynomials(_GELU_KNOTS, [nothing, *fitted(exact, _GELU_KNOTS, 3), itself], bits, 12)


def gelu(module: nn.GELU, secret: dict, x: Share) -> Share:
    """GELU as a cubic on each of six segments, zero to their left and x to their right; within 2e-3 for |x| below 64.

    Five rounds; 1.5 n words and 50 n bits.
    """
    bits = min(session.bits - 1, 16)
    x = x.settle().to(bits)
    return truncate(piecewise(x, _gelu(bits), max(0, bits - 9)), session.bits)


# Powers of positive numbers


@functools.cache
def _scaling(octaves: tuple[int, int], bits: int) -> Polynomials:
    """x times the power of two that takes it to [2^(high - 1), 2^high), knots at every quarter octave."""
    low, high = octaves
    knots = [2.0 ** (low + j / 4 + bits) for j in range(1, 4 * (high - low))]
    pieces = [(0.0, [0.0, 2.0 ** (high - low - 1 - j // 4)]) for j in range(4 * (high - low))]
    return Polynomials(knots, pieces, 0, 0)


@functools.cache
def _curves(octaves: tuple[int, int], exponent: float, factor: float, bits: int, extra: int) -> Polynomials:
    """factor x^exponent from the scaled v, one quadratic per quarter octave."""
    low, high = octaves
    pieces = []
    for j in range(4 * (high - low)):
        scale = factor * 2.0 ** (exponent * (low + j // 4))
        edges = [2.0 ** (j % 4 / 4), 2.0 ** ((j % 4 + 1) / 4)]
        pieces += fitted(lambda v: scale * v**exponent, edges, 2)  # noqa: B023  called at once
    return Polynomials([0.0] * (len(pieces) - 1), pieces, bits, extra)


def power(x: Share, exponent: float, octaves: tuple[int, int], factor: float = 1.0, extra: int = 0) -> Share:
    """factor x^exponent for x from 2^low to 2^high, to about 5e-4 of its value; below 2^low it follows the last curve.

    Three rounds find x's quarter octave and multiply x by a secret power of two into [1, 2), two truncate, one
    evaluates the quarter's quadratic. With J = 4 (high - low) - 1 and k digits: 2.5 n words and J (2 k - 1) n bits. The
    idea of scaling by a secret power of two is that of Catrina and Saxena (2010, Section 3.4).

    Args:
        x: positive.
        exponent: -1 or -0.5.
        octaves: low and high.
        factor: a public number.
        extra: fractional bits of the result beyond `session.bits` + 1.
    """
    low, high = octaves
    if x.bits + low < 4:
        x = x.to(4 - low)
    lowest = x.bits + low - 4
    digits = -(-(high + x.bits + 2 - lowest) // DIGIT)
    count = x.data.numel()
    scaling = _scaling(octaves, x.bits)
    first, (r2, powers2, chosen2) = session.correlation("power", count, len(scaling.knots), digits, lowest, 2)
    e, r, gamma, powers, chosen = _segments(x.data.reshape(-1), scaling.knots, lowest, digits, first)
    v = Share(_evaluate(scaling, e, r, powers, chosen, gamma), high - 1 + x.bits)
    bits = min(session.bits - 2, 14)
    v = truncate(v, bits)
    (e,) = session.reveal(v.data - r2)
    curves = _curves(octaves, exponent, factor, bits, session.bits + 1 + extra)
    y = Share(_evaluate(curves, e, r2, powers2, chosen2, gamma).view(x.shape), curves.bits)
    return y.to(session.bits + 1 + extra)


def layer_norm(module: nn.LayerNorm, secret: dict, x: Share) -> Share:
    """(x - mean) / sqrt(variance + eps), scaled and shifted, for a variance from 2^-12 to 2^8.

    One opening of x - mean serves the variance and the result. Eight rounds, and one for the scale; n words and, per
    row, those of `power` and one more; n / 2 for the scale.
    """
    size = module.normalized_shape[-1]
    x = x.settle().to(min(session.bits, (59 - 3 * int(math.log2(size))) // 2))
    total = Share(x.data.sum(-1, keepdim=True), x.bits)
    mean = scaled(total, 1 / size).to(x.bits)
    centred = x - mean
    r, b, squares, share = session.correlation("layer_norm", tuple(x.shape))
    (e,) = session.reveal(centred.data - r)
    variance = 2 * (e * r).sum(-1, keepdim=True) + squares
    if session.serving:
        variance += (e * e).sum(-1, keepdim=True)
    # The sum of squares is `size` times the variance; eps joins in its own units.
    units = 2 * x.bits
    variance = Share(variance, units).plus(round(module.eps * size * 2.0**units))
    whole = math.ceil(math.log2(size))
    inverse = power(Share(variance.data, units + whole), -0.5, VARIANCE, math.sqrt(size / 2.0**whole))
    (f,) = session.reveal(inverse.data - b)
    y = Share(e * (b + f if session.serving else b) + r * f + share, x.bits + inverse.bits).to(session.bits)
    if "weight" in secret:
        weight = secret["weight"]
        y = _by_weight(("multiply",), weight.name, y, weight, tuple(y.shape))
    return y + secret["bias"] if "bias" in secret else y


# Normalisers


def _normalised(weights: Share, dim: int, octaves: tuple[int, int], extra: int = 0) -> Share:
    """Weights that still wait for the reciprocal of their sum."""
    total = Share(weights.data.sum(dim, keepdim=True), weights.bits)
    return Share(weights.data, weights.bits, power(total, -1.0, octaves, extra=extra))


def _log2(count: int) -> int:
    return max(0, math.ceil(math.log2(count)))


@functools.cache
def _exp(bits: int) -> Polynomials:
    knots = [-9.0, -5.5, -3.7, -2.4, -1.4, -0.6]
    nothing = (0.0, [0.0] * 4)
    return Polynomials(knots, [nothing, *fitted(np.exp, [*knots, 0.1], 3)], bits, 12)


def softmax(module: Softmax, secret: dict, scores: Share) -> Share:
    """exp(a - max a) over its sum, weights to 1e-3, for scores that differ by less than 128.

    The maximum by a tournament of ceil(log2 K) comparisons in depth, without an argmax; the exponential as a cubic on
    each of six segments and zero below -9. 3 ceil(log2 K) + 11 rounds; 2.5 n words for exp, n for the maximum.
    """
    scores = scores.settle().to(session.bits)
    dim = module.dim % len(scores.shape)
    best = scores
    while (size := best.shape[dim]) > 1:
        half = size // 2
        parts = best.data.split([half, half, size - 2 * half], dim)
        most = maximum(Share(parts[0], best.bits), Share(parts[1], best.bits), 8)
        best = Share(torch.cat([most.data, parts[2]], dim), best.bits) if size % 2 else most
    bits = min(session.bits - 1, 16)
    x = (scores - best).to(bits)
    exponentials = truncate(piecewise(x, _exp(bits), max(0, bits - 8)), session.bits + 1)
    count = scores.shape[dim]
    # The sum lies between 1 and K: its reciprocal needs the more bits, the smaller it can become.
    return _normalised(exponentials, dim, (-1, _log2(count) + 1), extra=_log2(count) // 2)


def two_quad(module: TwoQuad, secret: dict, scores: Share) -> Share:
    """(a + c)^2 over its sum; squares are scaled by 1 / (32 K), so that sums stay near one. n words and one per row."""
    x = scores.settle().to(session.bits - 2) + module.c
    r, share = session.correlation("square", tuple(x.shape))
    (e,) = session.reveal(x.data - r)
    y = 2 * e * r + share
    y = y + e * e if session.serving else y
    down = 5 + _log2(scores.shape[module.dim])
    return _normalised(Share(y, 2 * x.bits + down).to(session.bits + 7), module.dim, ROW_SUM)


def two_relu(module: TwoReLU, secret: dict, scores: Share) -> Share:
    """relu(a) over its sum; a row without a positive score gives zeros. Sums are scaled by 1 / K."""
    positive = positive_part(scores.settle().to(session.bits), 9)
    down = _log2(scores.shape[module.dim])
    return _normalised(Share(positive.data, positive.bits + down).to(session.bits + 7), module.dim, ROW_SUM)


def l2q(module: L2Q, secret: dict, scores: Share) -> Share:
    """(d a + c)^2 over its sum, from one opening of a and without a truncation in between.

    With P = d^2, Q = 2 d c and R = c^2, all the server's, the square is P a^2 + Q a + R. One round and n words, and those
    of the sums' reciprocals.
    The server scales (d, c) so that the sum is near one where a is near one: L2Q does not change when both are scaled.
    Its eps, 2^-14, is left out: it would move a weight by that part of itself.
    """
    x = scores.settle().to(session.bits - 4)
    down, size = _log2(scores.shape[module.dim]), session.bits - 1
    pair = [secret.get(name) for name in "dc"]
    shape = torch.broadcast_shapes(*(value.shape for value in pair if value is not None), ())
    name = next((value.name for value in pair if value is not None), "").rpartition(".")[0] or "fixed"
    name = f"{name} of {'x'.join(map(str, scores.shape[1:]))}" if name == "fixed" else name

    def integers(which: str, more: int) -> torch.Tensor:
        d, c = (
            torch.as_tensor(fixed if value is None else value.value, dtype=torch.float64)
            for value, fixed in zip(pair, (module.d, module.c), strict=True)
        )
        scale = 1 / (d.square().mean() + c.square().mean())
        whole = {"p": d * d, "q": 2 * d * c, "r": c * c}[which].expand(shape) * scale
        return (whole * 2.0 ** (size + more)).round().long()

    bits = size + down  # of P; the sum of K such terms is near one once they are divided by K
    p, q = (
        session.known(f"{name}.{which}", tuple(shape), lambda which=which, more=more: integers(which, more))
        for which, more in (("p", 0), ("q", x.bits))
    )
    r, pr, rest = session.correlation("quadratic", name, tuple(x.shape), tuple(shape))
    (e,) = session.reveal(x.data - r)
    y = 2 * e * pr + rest
    if session.serving and not session.recording:
        y += (p * e + q) * e + integers("r", 2 * x.bits)
    return _normalised(Share(y, bits + 2 * x.bits).to(session.bits + 7), module.dim, ROW_SUM)


def scaling(module: Scaling, secret: dict, scores: Share) -> Share:
    """Scores over n, a public number: local."""
    return scaled(scores, 1 / scores.shape[module.dim])


def l1(module: L1, secret: dict, weights: Share) -> Share:
    """Weights over their sum."""
    return _normalised(weights.settle().to(session.bits + 7), module.dim, (-10, 6))


MODULES = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    MatMul: matmul,
    nn.ReLU: relu,
    nn.MaxPool2d: max_pool2d,
    nn.GELU: gelu,
    nn.LayerNorm: layer_norm,
    Softmax: softmax,
    TwoQuad: two_quad,
    TwoReLU: two_relu,
    L2Q: l2q,
    Scaling: scaling,
    L1: l1,
    nn.Dropout: identity,
    nn.Identity: identity,
    StochasticDepth: identity,
}


def _layout(name: str):
    """A method that only moves numbers about."""

    def apply_to(x: Share, *args, **kwargs):
        x = x.settle()
        moved = getattr(x.data, name)(*args, **kwargs)
        if isinstance(moved, tuple):
            return tuple(Share(part, x.bits) for part in moved)
        return Share(moved, x.bits)

    return apply_to


def _cat(parts: list[Share], dim: int = 0) -> Share:
    parts = [part.settle() for part in parts]
    bits = max(part.bits for part in parts)
    return Share(torch.cat([part.to(bits).data for part in parts], dim), bits)


LAYOUT = ("flatten", "unflatten", "reshape", "transpose", "permute", "unbind", "squeeze", "unsqueeze")

FUNCTIONS = {
    **{name: _layout(name) for name in LAYOUT},
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.getitem: operator.getitem,
    torch.add: operator.add,
    torch.cat: _cat,
}


# What the interpreter asks of a table of protocols


def rewrite(graph: fx.GraphModule) -> fx.GraphModule:
    """The same function in a cheaper order, found from the architecture alone: both parties do it by themselves.

    A max-pool goes before the ReLU that only it reads: a quarter of the comparisons. A LayerNorm that only linear maps
    read hands its scale and shift to them.
    """
    modules = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    for node in calls:
        readers = list(node.users)
        kinds = {type(modules.get(reader.target)) if reader.op == "call_module" else None for reader in readers}
        module = modules[node.target]
        if isinstance(module, nn.ReLU) and len(readers) == 1 and kinds == {nn.MaxPool2d}:
            pool = readers[0]
            pool.replace_all_uses_with(node)
            pool.args, node.args = node.args, (pool,)
            pool.append(node)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None and kinds == {nn.Linear}:
            targets = [reader.target for reader in readers]
            if all(sum(call.target == target for call in calls) == 1 for target in [node.target, *targets]):
                for target in targets:
                    graph.add_submodule(target, _absorbing(modules[target], module))
                graph.add_submodule(node.target, nn.LayerNorm(module.normalized_shape, module.eps, False))
    graph.recompile()
    return graph


def _absorbing(reader: nn.Linear, norm: nn.LayerNorm) -> nn.Linear:
    """The linear map that reads what the norm would have scaled and shifted."""
    whole = nn.Linear(reader.in_features, reader.out_features, device="meta")
    bias = 0 if norm.bias is None else reader.weight @ norm.bias
    bias = bias + (torch.zeros_like(reader.weight[:, 0]) if reader.bias is None else reader.bias)
    whole.weight, whole.bias = nn.Parameter((reader.weight * norm.weight).detach()), nn.Parameter(bias.detach())
    return whole



def secret(name: str, tensor: torch.Tensor, rank: int) -> Weight:
    """A weight: the server keeps it, the client knows its shape."""
    return Weight(name, tensor, rank == SERVER)


def prepare(network, shape: tuple, rank: int, provider: str, bits: int | None = None) -> None:
    """Begin a session: find what the dealer must supply, agree on keys, open the masked weights.

    Args:
        network: the interpreter, its secrets in place.
        shape: of the images.
        rank: SERVER or CLIENT.
        provider: "TFP" or "TTP".
        bits: fractional bits, `BITS` where None.
    """
    global session
    keep_memory()
    session = Session(rank, BITS if bits is None else bits)
    session.recording = True
    network.record(Share(torch.empty(shape, dtype=torch.int64, device="meta"), session.bits))
    session.recording = False
    keys = [None, None]
    if provider == "TTP":
        key = torch.empty(2, dtype=torch.int64)
        dist.recv(key, 2, comm.get().ttp_group)
        keys[rank] = key.numpy().tobytes()
    elif rank == SERVER:
        keys = [new_key(), new_key()]
        session.send(torch.from_numpy(np.frombuffer(keys[CLIENT], np.int64).copy()))
    else:
        keys[CLIENT] = session.receive(torch.Size((2,)))[0].numpy().tobytes()
    session.dealing = Dealing(rank, tuple(keys))
    if provider == "TTP" and rank == SERVER:
        _ask("mask_weights", session.tape.weights)
    session.open_weights()


def _ask(what: str, *arguments) -> torch.Tensor:
    return crypten.mpc.provider.ttp_provider.TTPClient.get().ttp_request(what, "cpu", *arguments)


def note(index: int) -> None:
    """While recording: what follows belongs to the node of this index."""
    session.tape.calls.append([])


def supply(index: int) -> None:
    """Deal for one node. Both parties wait for each other, so that what follows is online alone."""
    session.supplied = (0.0, 0)
    if not session.tape.calls[index]:
        return
    start, before = time.perf_counter(), session.dealing.corrected
    if session.rank == SERVER and not session.dealing.deals:
        session.dealing.inbox = _ask("correct", session.tape.calls[index])
    session.ready = session.tape.deal(session.dealing, index)
    dist.barrier(comm.get().main_group)
    session.supplied = time.perf_counter() - start, 8 * (session.dealing.corrected - before)


def supplied() -> tuple[float, int]:
    """Seconds that dealing for the last node took, and bytes of corrections, which only a third party would send."""
    return session.supplied


def share_images(images: torch.Tensor | None, shape: tuple) -> Share:
    """The client's images. Nothing is sent: the server's part is zero, and a first product masks the client's."""
    if images is None:
        return Share(torch.zeros(shape, dtype=torch.int64), session.bits)
    return Share((images.double() * 2.0**session.bits).round().long(), session.bits)


def reveal_to_client(logits: Share) -> torch.Tensor | None:
    """The logits, at the client alone."""
    logits = logits.settle()
    if session.rank == SERVER:
        return session.send(logits.data)
    return ((logits.data + session.receive(logits.shape)[0]).double() / 2.0**logits.bits).float()


# What leaves its domain


DOMAINS = {}
