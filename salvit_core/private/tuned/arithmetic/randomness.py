"""Correlated randomness for `tuned`: what a dealer hands out before it is needed, and how little of it must travel.

Each of the two parties shares keys with the dealer, one for the masks of the weights and one for every query, and
expands them by AES-128 in counter mode (OpenSSL's, through `cryptography`), so that every uniform share costs no bytes.
Only what depends on both parties' randomness is computed by the dealer: the server's share of it, the *correction*. The
client receives nothing but its keys.

Who deals: with "TFP" the server itself, which therefore could unmask everything (CrypTen's default, fit for measuring
only); with "TTP" a third process that sees neither weights nor images. The dealing role knows the clear masks, the
others see `clear` as None.

Weights are known to the server. Each is masked once per session, W - B with B from the server's key, and this masked
weight is sent to the client; fresh masks cover every activation of every query. Reusing B is sound because the client
only ever sees W - B, once, with B uniform; what depends on B afterwards reaches the client as a share that is uniform
by itself (Mohassel and Zhang, SecureML, Section 4.1, mask a data matrix once for the same reason).
"""

import math
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ...protocol import CLIENT, DEALER, SERVER
from .ring import Factor, prepared

_ZEROS = bytes(1 << 20)


class Stream:
    """Uniform 64-bit words from a key: AES-128 in counter mode, whose key stream is what it makes of zeros."""

    def __init__(self, key: bytes):
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, *shape: int) -> torch.Tensor:
        """Uniform int64 of this shape."""
        count = math.prod(shape)
        made = np.empty(count + 2, np.int64)  # the cipher wants a block of slack behind what it writes
        room, size = memoryview(made).cast("B"), 8 * count  # type: ignore[arg-type]  # an array is a buffer
        for start in range(0, size, len(_ZEROS)):
            part = min(len(_ZEROS), size - start)
            self._cipher.update_into(_ZEROS if part == len(_ZEROS) else _ZEROS[:part], room[start : start + part + 15])
        return torch.from_numpy(made[:count]).view(shape)


Keys = tuple[bytes | None, bytes | None]  # the server's and the client's


class Mask(NamedTuple):
    """A random value: this party's share of it (None at the dealer), and the value (None where nobody deals)."""

    mine: Any
    clear: Any


class Dealing:
    """One process's view of the correlated randomness: the same calls in the same order at every process.

    Args:
        rank: SERVER, CLIENT or DEALER.
        keys: the server's and the client's key; None where this process does not hold it.
        meta: only shapes are wanted: tensors are on the meta device.
        device: where the tensors are to be. Streams are made by the processor, whose AES they are.
    """

    def __init__(self, rank: int, keys: Keys = (None, None), meta: bool = False, device: str | torch.device = "cpu"):
        self.rank, self.meta, self.device = rank, meta, torch.device(device)
        self.turn(keys)
        self.weights: dict[str, torch.Tensor] = {}  # B at the server and the dealer; W - B at the client
        self.factors: dict[str, Factor | torch.Tensor] = {}  # the weights, ready to be multiplied
        self.inbox: torch.Tensor | None = None  # at a server that does not deal: the corrections, still to be read
        self.outbox: list[torch.Tensor] = []  # at the dealer: the corrections, still to be sent
        self.corrected = 0  # words of corrections so far

    def turn(self, keys: Keys) -> None:
        """Go on with other keys. The masks of the weights stay."""
        self.streams = [Stream(key) if key else None for key in keys]
        self.deals = None not in keys

    def _draw(self, owner: int, shape: tuple[int, ...]) -> Any:
        if self.meta:
            return torch.empty(shape, dtype=torch.int64, device="meta")
        stream = self.streams[owner]
        return stream.words(*shape).to(self.device) if stream else None

    def mask(self, *shape: int) -> Mask:
        """A uniform value, shared additively."""
        mine, theirs = self._draw(SERVER, shape), self._draw(CLIENT, shape)
        clear = mine + theirs if self.deals and not self.meta else None
        return Mask(None if self.rank == DEALER else theirs if self.rank == CLIENT else mine, clear)

    def bits(self, *shape: int) -> Mask:
        """Uniform words, shared bit by bit."""
        mine, theirs = self._draw(SERVER, shape), self._draw(CLIENT, shape)
        clear = mine ^ theirs if self.deals and not self.meta else None
        return Mask(None if self.rank == DEALER else theirs if self.rank == CLIENT else mine, clear)

    def own(self, owner: int, *shape: int) -> Mask:
        """A uniform value that one party knows; the other's share of it is zero and not given."""
        drawn = self._draw(owner, shape)
        return Mask(drawn if self.rank == owner else None, drawn if self.deals else None)

    def share(self, make: Callable[[], torch.Tensor], *shape: int, binary: bool = False) -> Any:
        """This party's share of what `make` computes from the clear masks."""
        count = math.prod(shape)
        self.corrected += count
        drawn = self._draw(CLIENT, shape)
        if self.meta or self.rank == CLIENT:
            return drawn
        if not self.deals:
            assert self.inbox is not None  # corrections were asked for before
            mine, self.inbox = self.inbox[:count].view(shape), self.inbox[count:]
            return mine
        mine = make().expand(shape)
        mine = mine ^ drawn if binary else mine - drawn
        if self.rank == DEALER:
            self.outbox.append(mine.flatten())
            return None
        return mine

    def factor(self, operation: tuple, name: str) -> "torch.Tensor | Factor":
        """A weight's mask, or at the client its masked weight, ready to be multiplied."""
        if name not in self.factors:
            self.factors[name] = prepared(operation, self.weights[name])
        return self.factors[name]

    def uniform(self, count: int) -> torch.Tensor:
        """Words of this party's own, from the operating system's randomness."""
        return torch.from_numpy(np.frombuffer(secrets.token_bytes(8 * count), np.int64).copy()).to(self.device)

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The mask B of a weight, fixed for the session; None at the client, which gets W - B instead."""
        drawn = self._draw(SERVER, shape)
        if drawn is not None:
            self.weights[name] = drawn
        return drawn


# What a dealer can be asked for, by name: each is called with the same arguments by every process, and gives that
# process its part. A gate enters its own beside what the parties do with it.
CORRELATIONS: dict[str, Callable] = {}


def correlation(name: str) -> Callable[[Callable], Callable]:
    """Enter a function into `CORRELATIONS`.

    Raises:
        ValueError: another has this name.
    """

    def enter(function: Callable) -> Callable:
        if name in CORRELATIONS:
            raise ValueError(f"two correlations are called {name!r}: choose another name")
        CORRELATIONS[name] = function
        return function

    return enter


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Bits (..., n) as bytes, zero or one, to words (..., ceil(n / 64))."""
    words = -(-bits.shape[-1] // 64)
    if bits.device.type == "meta":
        return torch.empty(*bits.shape[:-1], words, dtype=torch.int64, device="meta")
    if bits.device.type != "cpu":
        return pack_on_device(bits, words)
    packed = np.packbits(bits.numpy(), axis=-1, bitorder="little")
    if packed.shape[-1] != 8 * words:
        packed = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, 8 * words - packed.shape[-1])])
    return torch.from_numpy(packed.view(np.int64))


def unpack(words: torch.Tensor, count: int) -> torch.Tensor:
    """Words (..., w) to bits (..., count), int64."""
    if words.device.type == "meta":
        return torch.empty(*words.shape[:-1], count, dtype=torch.int64, device="meta")
    if words.device.type != "cpu":
        return unpack_on_device(words, count)
    bits = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, count=count, bitorder="little")
    return torch.from_numpy(bits).long()


def pack_on_device(bits: torch.Tensor, words: int) -> torch.Tensor:
    """`pack` where the bits are, in torch alone."""
    padded = torch.nn.functional.pad(bits.long(), (0, 64 * words - bits.shape[-1])).unflatten(-1, (words, 64))
    return (padded << torch.arange(64, device=bits.device)).sum(-1)


def unpack_on_device(words: torch.Tensor, count: int) -> torch.Tensor:
    """`unpack` where the words are, in torch alone."""
    bits = words.unsqueeze(-1) >> torch.arange(64, device=words.device) & 1
    return bits.flatten(-2)[..., :count]


def new_key() -> bytes:
    """A key from the operating system's randomness."""
    return secrets.token_bytes(16)


def packed(keys: Iterable[bytes]) -> torch.Tensor:
    """Keys as words (keys, 2)."""
    return torch.from_numpy(np.frombuffer(b"".join(keys), np.int64).copy()).view(-1, 2)


def unpacked(words: torch.Tensor) -> list[bytes]:
    """Words (keys, 2) as keys."""
    return [row.tobytes() for row in words.cpu().numpy()]


@dataclass
class Cost:
    """What one node will cost.

    Attributes:
        rounds: messages one way, or both ways at once.
        words: 64-bit words that a party sends and receives, halved.
        serial: words that follow one another on the way.
        offline: words of corrections, which the dealer sends.
        products: multiplications in matrix products and convolutions, each done by both parties and the dealer.
    """

    rounds: int = 0
    words: float = 0.0
    serial: int = 0
    offline: int = 0
    products: int = 0


class Tape:
    """What a network will need of the dealer, in order: found by running its protocols on shapes alone.

    Nodes are in the order in which they start, which is the same whenever the graph runs.

    Attributes:
        weights: name to shape of every weight that is masked for the session.
        calls: for every node of the graph, the correlations to deal: (name, arguments).
        costs: for every node, what it will cost.
    """

    def __init__(self):
        self.weights: dict[str, tuple] = {}
        self.calls: list[list[tuple]] = []
        self.costs: list[Cost] = []

    def begin(self) -> None:
        """What follows belongs to the next node."""
        self.calls.append([])
        self.costs.append(Cost())

    def deal(self, dealing: Dealing, node: int) -> deque:
        """The correlations of a node, ready to be used."""
        return deque(CORRELATIONS[name](dealing, *arguments) for name, arguments in self.calls[node])
