"""Shares in Z_2^64, the session that two parties hold, and the arithmetic of `tuned` that is exact in the ring.

The shares are CrypTen's: additive, fixed point, on its communicator. Unlike CrypTen's each knows its own fractional
bits, so that scales can differ and a power of two costs nothing.

Truncation. Dropping t bits of a share locally errs by at most one unit, but with probability |y| / 2^63 by 2^(64-t),
where y is the integer before it (SecureML, Mohassel and Zhang, 2017, Theorem 1). Scales are chosen so that y stays near
2^(2 bits) for most values: near 2^26 for five million at 13 bits, which puts the chance of one such failure in an
inference of CCT-7/3x1 near 1e-4. It is four times as large with every bit more. `power` ends so too, in numbers near
2^36 / x of which there are some ten thousand, for about the same chance. Where y must be larger still (piecewise
polynomials, scaled sums) `truncate` is exact.
"""

import ctypes
import math
import sys
from collections import deque

import crypten.communicator as comm
import torch
import torch.distributed as dist

from .dealing import CLIENT, CORRELATIONS, SERVER, Dealing, Tape, pack, unpack
from .ring import apply, prepared

BITS = 13  # fractional bits of an activation and of a weight


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

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, factor):
        if isinstance(factor, Share):
            return multiply(self.settle().to(session.bits), factor.settle().to(session.bits))
        return scaled(self, float(factor))

    def __truediv__(self, number):
        return scaled(self, 1 / float(number))

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

    def enter(self, bits: int) -> Share:
        """As an operand like any other: what the server's share is, and the client's share is zero."""
        if session.recording:
            return Share(torch.empty(self.shape, dtype=torch.int64, device="meta"), bits)
        zero = torch.zeros(self.shape, dtype=torch.int64)
        return Share(self.encode(bits) if session.rank == SERVER else zero, bits)


# The session


class Session:
    """One party's side: the dealer's supplies, the weights' masks, the messages. Set up by `begin`.

    Attributes:
        bits: fractional bits of activations and weights.
        recording: shapes only are run, to find what the dealer must supply.
        audit: if a list, every message that this party receives is appended to it.
        link: delays each message, where a link is emulated; see `network`.
    """

    def __init__(self):
        self.begin(SERVER)

    def begin(self, rank: int, bits: int = BITS) -> None:
        """Forget everything."""
        self.rank, self.bits = rank, bits
        self.recording, self.tape = False, Tape()
        self.meta = Dealing(rank, meta=True)
        self.dealing: Dealing | None = None
        self.makers, self.clear, self.factors = {}, {}, {}
        self.ready: deque = deque()
        self.supplied, self.serial, self.place = (0.0, 0), 0, ""
        self.check, self.violations = False, {}
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
        self.serial += 8 * message.numel()
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


session = Session()


def _flat(tensors) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1).contiguous()


def _split(flat: torch.Tensor, shapes) -> list[torch.Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def keep_memory() -> None:
    """Let glibc keep what is freed: by default a large tensor costs page faults anew. Elsewhere: nothing."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        except OSError:  # another libc
            pass


# Products


def multiply(x: Share, y: Share) -> Share:
    """X y, element by element with broadcasting (Beaver). One round; the words of x and of y."""
    out = torch.broadcast_shapes(x.shape, y.shape)
    a, b, share = session.correlation("multiply", tuple(x.shape), tuple(y.shape), tuple(out))
    e, f = session.reveal(x.data - a, y.data - b)
    # (e + a)(f + b), one product fewer than Beaver wrote: the public e f goes with one party's e b.
    return Share(e * (b + f if session.serving else b) + a * f + share, x.bits + y.bits)


def scaled(x: Share, factor: float) -> Share:
    """X times a public number; a power of two costs nothing but a note of the scale. Local."""
    power, exact = math.frexp(abs(factor))[1] - 1, math.frexp(abs(factor))[0] == 0.5
    if exact and factor > 0:
        return Share(x.data, x.bits - power, x.over)
    bits = session.bits - power
    return Share(x.data * round(factor * 2.0**bits), x.bits + bits, x.over).to(x.bits)


def by_weight(operation: tuple, name: str, x: Share, value: Weight, out: tuple) -> Share:
    """W x, W known to the server: the client sends x1 - r. One round; half the words of x."""
    bits = session.bits
    weight = session.known(name, value.shape, lambda: value.encode(bits))
    r, share = session.correlation("by_weight", name, operation, tuple(x.shape), out)
    if session.rank == CLIENT:
        session.send(x.data - r)
        return Share(share, x.bits + bits)
    (masked,) = session.receive(x.shape)
    if not session.recording:
        if name not in session.factors:
            size = 1 + int(weight.abs().max()).bit_length()
            session.factors[name] = prepared(operation, weight, size)
        weight = session.factors[name]
    return Share(apply(operation, x.data + masked, weight).add_(share), x.bits + bits)


def truncate(x: Share, bits: int) -> Share:
    """The same value with fewer fractional bits, within one unit and without failure for |x| below 2^62 units.

    The client masks its part by s and sends it; the server adds its own: c = x + 2^62 - s. Then x is (c >> t) +
    (s >> t) less 2^(64-t) if c + s passed 2^64, which it did unless the highest bits of c and of s are both zero. That
    product takes one masked bit back. Two rounds; n / 2 + n / 128 words.
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
