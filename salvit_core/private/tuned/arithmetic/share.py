"""Shares in Z_2^64, the session that two parties hold, and the arithmetic of `tuned` that is exact in the ring.

The shares are as CrypTen's: additive, fixed point. Unlike CrypTen's each knows its own fractional
bits, so that scales can differ and a power of two costs nothing.

Truncation. Dropping t bits of a share locally (`Share.to`) errs by less than one unit, but with probability |y| / 2^64
by 2^(64-t), where y is the integer before it: half of what SecureML (Mohassel and Zhang, 2017, Theorem 1) bounds it by.
Scales are chosen so that y stays near 2^(2 bits) for most values: 2^26 to 2^30 at 13 bits for the nine million of an
inference of CCT-7/3x1. `tuned` says what that adds up to. It is four times as large with every bit more. Where y must
be larger (piecewise polynomials, inverses, the reciprocals of sums) `gates.truncate` is exact.
"""

import ctypes
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from ...transport import Channel
from .randomness import CORRELATIONS, SERVER, Cost, Dealing, Tape
from .ring import Factor
from .schedule import Later, Schedule, Task

BITS = 13  # fractional bits of an activation and of a weight


class Share:
    """One party's part of a secret: an int64 tensor; the two parts add up to the value times 2^bits, mod 2^64.

    `over` is a secret factor still to be multiplied: a reciprocal per row that waits for the product with the values.
    """

    __slots__ = ("data", "bits", "over")

    def __init__(self, data: torch.Tensor, bits: int, over: "Waiting | None" = None):
        self.data, self.bits, self.over = data, bits, over

    @property
    def shape(self) -> torch.Size:
        """Shape of the secret."""
        return self.data.shape

    def to(self, bits: int) -> "Share":
        """The same value with other fractional bits. Local.

        Functionality:
            Inputs: y shared.
            Output: y / 2^t, shared, rounded down, or up where the lowest t bits of the server's share are fewer than
                y's: with the probability of what is cut off.
            Opened: Nothing.
            Simulator: nothing: each party's share becomes a function of itself.
            Failure: 2^-64 |y|, to the last share: y / 2^t is then off by 2^(64-t).
        """
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
        return self.over.gate(Share(self.data, self.bits), self.over)

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
        return NotImplemented if isinstance(factor, Share) else scaled(self, float(factor))

    def __truediv__(self, number):
        return scaled(self, 1 / float(number))

    __rmul__ = __mul__

    def __getitem__(self, index):
        whole = self.settle()
        return Share(whole.data[index], whole.bits)


class Waiting(NamedTuple):
    """A factor that waits for its product: truncated, exactly, when it is opened for it."""

    factor: Share | Later
    bits: int  # fractional bits that it will have
    gate: Callable[[Share, "Waiting"], Share]  # the product that it waits for

    @property
    def share(self) -> Share:
        """The factor, which is asked for last: other openings may go before."""
        return self.factor if isinstance(self.factor, Share) else self.factor.result()

    @property
    def shape(self) -> torch.Size:
        """Shape of the secret."""
        return self.factor.shape


class Weight:
    """A tensor of the server's: the client knows its shape only."""

    def __init__(self, name: str, value: torch.Tensor, known: bool):
        self.name, self.shape = name, value.shape
        self.value = value.detach().double() if known else None

    def encode(self, bits: int) -> torch.Tensor | int:
        """At the server: the value in fixed point. While shapes are recorded: nothing to add."""
        return 0 if session.recording or self.value is None else (self.value * 2.0**bits).round().long()

    def enter(self, bits: int) -> Share:
        """As an operand like any other: what the server's share is, and the client's share is zero."""
        if session.recording:
            return Share(torch.empty(self.shape, dtype=torch.int64, device="meta"), bits)
        zero = torch.zeros(self.shape, dtype=torch.int64, device=session.device)
        return Share(self.encode(bits) if session.rank == SERVER else zero, bits)


# The session


class Said(NamedTuple):
    """What one node sends and is to receive in one message."""

    node: int
    says: Sequence[torch.Tensor]
    hears: Sequence[torch.Size]


class Session:
    """One party's side: the dealer's supplies, the weights' masks, the messages. Set up by `begin`.

    Attributes:
        bits: fractional bits of activations and weights.
        recording: shapes only are run, to find what the dealer must supply.
        audit: if a list, every message that this party receives is appended to it.
        link: delays each message, where a link is emulated; see `links`.
        channel: the connection to the other party, which counts what passes.
        schedule: runs the nodes of a graph side by side, while it does; see `schedule`.
        spent: what each node, by its place on the tape, sent and received in this query.
        device: where this party's tensors are. Messages leave from the processor's memory, and come there.
    """

    def __init__(self):
        self.begin(SERVER)

    def begin(self, rank: int, bits: int = BITS, device: str | torch.device = "cpu") -> None:
        """Forget everything."""
        self.rank, self.bits, self.device = rank, bits, torch.device(device)
        self.recording, self.tape = False, Tape()
        self.meta = Dealing(rank, meta=True)
        self.shapes: dict[tuple, tuple] = {}  # of what was asked for while recording, and words of corrections
        self.dealing = Dealing(rank)  # until keys are agreed on it has nothing to deal
        self.makers: dict[str, Callable[[], torch.Tensor]] = {}
        self.clear: dict[str, torch.Tensor] = {}
        self.factors: dict[str, Factor | torch.Tensor] = {}
        self.schedule: Schedule | None = None
        self.node = 0  # the one that runs, by its place on the tape, where one runs after the other
        self.ready: dict[int, deque] = {}
        self.places: dict[int, str] = {}
        self.spent: dict[int, Cost] = {}
        self.serial = 0
        self.check = False
        self.violations: dict[str, bool] = {}
        self.audit: list | None = None
        self.link = None
        self.channel: Channel | None = None

    def correlation(self, name: str, *arguments):
        """What the dealer has for this call; while recording, the call is noted and only shapes come back."""
        node = self.here()
        if self.recording:
            self.tape.calls[node].append((name, arguments))
            if (name, arguments) not in self.shapes:  # the steps of a recurrence are alike, and so are layers
                before = self.meta.corrected
                made = CORRELATIONS[name](self.meta, *arguments)
                self.shapes[name, arguments] = made, self.meta.corrected - before
            made, words = self.shapes[name, arguments]
            self.tape.costs[node].offline += words
            return made
        return self.ready[node].popleft()

    def here(self) -> int:
        """The node that runs, by its place on the tape."""
        return self.node if self.schedule is None else self.schedule.node()

    @property
    def place(self) -> str:
        """Where in the network the node is that runs."""
        return self.places.get(self.here(), "")

    def later(self, make: Callable[[], Share], shape: torch.Size) -> Later:
        """What `make` gives, of this shape: made beside what else there is to do, or now where nothing is."""
        if self.schedule is None:
            return Later(shape).become(make())
        return self.schedule.start(self.here(), make, shape)

    def known(self, name: str, shape: tuple, make) -> torch.Tensor | None:
        """An integer tensor that the server makes from its weights, masked for the session; None at the client."""
        if self.recording:
            self.tape.weights[name] = tuple(shape)
            self.makers[name] = make
            self.meta.weights[name] = torch.empty(shape, dtype=torch.int64, device="meta")
            return self.meta.weights[name]
        return self.clear.get(name)

    def open_weights(self, kept: dict[str, torch.Tensor] | None = None) -> None:
        """Send W - B to the client, for all weights in one message. Once per session.

        Args:
            kept: what an earlier session with these weights and masks sent, at the client; nothing is sent again.
        """
        shapes = self.tape.weights
        if self.rank == SERVER:
            for name, shape in shapes.items():
                self.clear[name] = self.makers[name]().expand(shape).contiguous()
                self.dealing.weight(name, shape)
                self.dealing.weights[f"{name}-"] = self.clear[name] - self.dealing.weights[name]
            if kept is None:
                self.send(*(self.dealing.weights[f"{name}-"] for name in shapes))
            for name in shapes:
                if not name.endswith((".p", ".q")):
                    del self.dealing.weights[f"{name}-"]
        elif kept is None:
            parts = self.receive(*(torch.Size(shape) for shape in shapes.values()))
            self.dealing.weights.update(zip(shapes, parts, strict=True))
        else:
            self.dealing.weights.update({name: tensor.to(self.device) for name, tensor in kept.items()})

    def swap(self, *ours: torch.Tensor) -> list[torch.Tensor]:
        """Send tensors and receive the other's of the same shapes, in one message each way at once. One round."""
        return self._exchange(ours, [x.shape for x in ours])

    def send(self, *ours: torch.Tensor) -> None:
        """Send tensors; the other calls `receive`. One round."""
        self._exchange(ours, ())

    def receive(self, *shapes: torch.Size) -> list[torch.Tensor]:
        """Receive tensors of these shapes."""
        return self._exchange((), shapes)

    def _exchange(self, says: Sequence[torch.Tensor], hears: Sequence[torch.Size]) -> list[torch.Tensor]:
        if self.schedule is not None:
            return self.schedule.exchange(says, hears)
        return self.step([Said(self.node, says, hears)])[0]

    def step(self, parts: "Sequence[Said | Task]") -> list[list[torch.Tensor]]:
        """One message, or one each way at once, of all that several nodes have to say and are to hear.

        The round is the first one's, and so is what this message adds to what follows on the way.
        """
        sizes = [(sum(x.numel() for x in part.says), sum(map(torch.Size.numel, part.hears))) for part in parts]
        serial = max(map(sum, zip(*sizes)))
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            cost = self.tape.costs[part.node] if self.recording else self.spent.setdefault(part.node, Cost())
            cost.words += sum(size) / 2
            if i == 0:
                cost.rounds, cost.serial = cost.rounds + 1, cost.serial + serial
        says = [x for part in parts for x in part.says]
        hears = [shape for part in parts for shape in part.hears]
        if self.recording:
            found = [torch.empty(shape, dtype=torch.int64, device="meta") for shape in hears]
        else:
            assert self.channel is not None  # a session has begun
            into = torch.empty(sum(shape.numel() for shape in hears), dtype=torch.int64) if hears else None
            theirs = self.channel.exchange(_flat(says).cpu() if says else None, into)
            self.serial += 8 * serial
            if theirs is not None:
                if self.link is not None:
                    self.link.wait(8 * theirs.numel())
                if self.audit is not None:
                    self.audit.append(theirs.clone())
            found = [] if theirs is None else _split(theirs.to(self.device), hears)
        rest = iter(found)
        return [list(islice(rest, len(part.hears))) for part in parts]

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


def scaled(x: Share, factor: float) -> Share:
    """X times a public number; a power of two costs nothing but a note of the scale. Local.

    Functionality:
        Inputs: x shared.
        Output: The product, shared, at as many bits as x, but `session.bits` at most.
        Opened: Nothing.
        Simulator: nothing.
        Failure: 2^-35 a number, where the factor is no power of two. By a power of two 0.
    """
    power, exact = math.frexp(abs(factor))[1] - 1, math.frexp(abs(factor))[0] == 0.5
    if exact and factor > 0:
        return Share(x.data, x.bits - power, x.over)
    # A product still has the bits of both its factors; with a third one's, it would be truncated wrongly all too often.
    x, bits = x.to(min(x.bits, session.bits)), session.bits - power
    return Share(x.data * round(factor * 2.0**bits), x.bits + bits, x.over).to(x.bits)
