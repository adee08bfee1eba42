"""Correlated randomness for `tuned`: what a dealer hands out before it is needed, and how little of it must travel.

Each of the two parties shares a key with the dealer and expands it by AES-128 in counter mode (OpenSSL's, through
`cryptography`), so that every uniform share costs no bytes. Only what depends on both parties' randomness is computed
by the dealer: the server's share of it, the *correction*. The client receives nothing but its key.

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
from typing import NamedTuple

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from .interpreter import CLIENT, DEALER, SERVER
from .ring import Factor, apply, prepared, product

DIGIT = 4  # bits of a comparison's digit: its truth tables have 2^DIGIT entries
_ZEROS = bytes(1 << 20)


class Stream:
    """Uniform 64-bit words from a key: AES-128 in counter mode, whose key stream is what it makes of zeros."""

    def __init__(self, key: bytes):
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, *shape: int) -> torch.Tensor:
        """Uniform int64 of this shape."""
        count = math.prod(shape)
        made = np.empty(count + 2, np.int64)  # the cipher wants a block of slack behind what it writes
        room, size = memoryview(made).cast("B"), 8 * count
        for start in range(0, size, len(_ZEROS)):
            part = min(len(_ZEROS), size - start)
            self._cipher.update_into(_ZEROS if part == len(_ZEROS) else _ZEROS[:part], room[start : start + part + 15])
        return torch.from_numpy(made[:count]).view(shape)


class Mask(NamedTuple):
    """A random value: this party's share of it (None at the dealer), and the value (None where nobody deals)."""

    mine: torch.Tensor | None
    clear: torch.Tensor | None


class Dealing:
    """One process's view of the correlated randomness: the same calls in the same order at every process.

    Args:
        rank: SERVER, CLIENT or DEALER.
        keys: the server's and the client's key; None where this process does not hold it.
        meta: only shapes are wanted: tensors are on the meta device.
    """

    def __init__(self, rank: int, keys: tuple[bytes | None, bytes | None] = (None, None), meta: bool = False):
        self.rank, self.meta = rank, meta
        self.streams = [key and Stream(key) for key in keys]
        self.deals = None not in keys
        self.weights: dict[str, torch.Tensor] = {}  # B at the server and the dealer; W - B at the client
        self.factors: dict[str, Factor | torch.Tensor] = {}  # the weights, ready to be multiplied
        self.inbox: torch.Tensor | None = None  # at a server that does not deal: the corrections, still to be read
        self.outbox: list[torch.Tensor] = []  # at the dealer: the corrections, still to be sent
        self.corrected = 0  # words of corrections so far

    def _draw(self, owner: int, shape: tuple[int, ...]) -> torch.Tensor | None:
        if self.meta:
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return self.streams[owner].words(*shape) if self.streams[owner] else None

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

    def share(self, make, *shape: int, binary: bool = False) -> torch.Tensor | None:
        """This party's share of what `make` computes from the clear masks."""
        count = math.prod(shape)
        self.corrected += count
        drawn = self._draw(CLIENT, shape)
        if self.meta or self.rank == CLIENT:
            return drawn
        if not self.deals:
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
        return torch.from_numpy(np.frombuffer(secrets.token_bytes(8 * count), np.int64).copy())

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The mask B of a weight, fixed for the session; None at the client, which gets W - B instead."""
        drawn = self._draw(SERVER, shape)
        if drawn is not None:
            self.weights[name] = drawn
        return drawn


# Correlations: each is called with the same arguments by every process, and gives that process its part.


def by_weight(deal: Dealing, name: str, operation: tuple, shape: tuple, out: tuple):
    """For W x: a mask r of the client's share of x, and shares of W r (the client has W - B for its own part)."""
    r = deal.own(CLIENT, *shape)
    share = deal.share(lambda: apply(operation, r.clear, deal.factor(operation, name)), *out)
    if deal.rank == CLIENT and not deal.meta:
        share = share.add_(apply(operation, r.mine, deal.factor(operation, name)))
    return r.mine, share


def matmul(deal: Dealing, left: tuple, right: tuple, out: tuple):
    """Beaver's triple a, b, a b for a matrix product."""
    a, b = deal.mask(*left), deal.mask(*right)
    return a.mine, b.mine, deal.share(lambda: product(a.clear, b.clear), *out)


def products(deal: Dealing, shape: tuple, count: int, pairs: tuple):
    """For matrices that each are in several products: masks of `count` square matrices, and the products of pairs."""
    masks = [deal.mask(*shape) for _ in range(count)]
    made = {(i, j): deal.share(lambda i=i, j=j: product(masks[i].clear, masks[j].clear), *shape) for i, j in pairs}
    return [mask.mine for mask in masks], made


def multiply(deal: Dealing, left: tuple, right: tuple, out: tuple):
    """Beaver's triple for a product element by element, with broadcasting."""
    a, b = deal.mask(*left), deal.mask(*right)
    return a.mine, b.mine, deal.share(lambda: a.clear * b.clear, *out)


def square(deal: Dealing, shape: tuple):
    """A mask r and its square."""
    r = deal.mask(*shape)
    return r.mine, deal.share(lambda: r.clear * r.clear, *shape)


def powers(deal: Dealing, count: int, degree: int):
    """A mask r and its powers up to r^degree."""
    r = deal.mask(count)
    return r.mine, _powers(deal, r, count, degree)


def layer_norm(deal: Dealing, shape: tuple):
    """For rows x and a factor y per row: masks r of x and b of y, the sum of r^2 in each row, and r b."""
    rows = (*shape[:-1], 1)
    r, b = deal.mask(*shape), deal.mask(*rows)
    squares = deal.share(lambda: (r.clear * r.clear).sum(-1, keepdim=True), *rows)
    return r.mine, b.mine, squares, deal.share(lambda: r.clear * b.clear, *shape)


def quadratic(deal: Dealing, name: str, shape: tuple, part: tuple):
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


def truncation(deal: Dealing, shape: tuple):
    """For `shares.truncate`: a mask s of the client's share, a bit of the server's, and their product."""
    count = math.prod(shape)
    s = deal.own(CLIENT, count)
    bit = deal.own(SERVER, -(-count // 64))
    share = deal.share(lambda: unpack(bit.clear, count) * (1 - (s.clear >> 63 & 1)), count)
    return s.mine, bit.mine, share


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Bits (..., n) as bytes, zero or one, to words (..., ceil(n / 64))."""
    words = -(-bits.shape[-1] // 64)
    if bits.device.type == "meta":
        return torch.empty(*bits.shape[:-1], words, dtype=torch.int64, device="meta")
    packed = np.packbits(bits.numpy(), axis=-1, bitorder="little")
    if packed.shape[-1] != 8 * words:
        packed = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, 8 * words - packed.shape[-1])])
    return torch.from_numpy(packed.view(np.int64))


def unpack(words: torch.Tensor, count: int) -> torch.Tensor:
    """Words (..., w) to bits (..., count), int64."""
    if words.device.type == "meta":
        return torch.empty(*words.shape[:-1], count, dtype=torch.int64, device="meta")
    bits = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, count=count, bitorder="little")
    return torch.from_numpy(bits).long()


def chain(digits: int) -> list[list[tuple]]:
    """The products of a comparison's borrow: one list of variables per term.

    Variables are ("equal", i) and ("less", i), i a digit, the highest digit last: x < y if x is less in digit i and
    equal in all above it, for some i. The highest digit's own "less" stands alone and is not among the terms.
    """
    return [[("equal", above) for above in range(digits - 1, i, -1)] + [("less", i)] for i in range(digits - 2, -1, -1)]


def subsets(digits: int) -> list[tuple]:
    """All sets of two or more variables that stand together in a term of `chain`, in a fixed order."""
    found = {}
    for term in chain(digits):
        for chosen in range(1, 1 << len(term)):
            if chosen & (chosen - 1):
                found.setdefault(tuple(v for i, v in enumerate(term) if chosen >> i & 1))
    return list(found)


def variables(digits: int) -> list[tuple]:
    """The variables of `chain`, in a fixed order."""
    return list(dict.fromkeys(v for term in chain(digits) for v in term))


def tables(window: torch.Tensor, digits: int) -> torch.Tensor:
    """Truth tables (digits, n), int32, of a comparison of secret windows with anything public.

    Entry v of digit i: bit v says whether v is less than the secret's digit, bit 16 + v whether it is equal. The
    highest digit holds the sign above DIGIT - 1 bits: its "less" is the sign of public minus secret with no borrow yet.
    """
    made = []
    for i in range(digits):
        value = (window >> (DIGIT * i) & (2**DIGIT - 1)).int()
        one = torch.ones_like(value)
        if i < digits - 1:
            equal = one << value
            made.append(equal - 1 | equal << 16)
        else:
            low, sign = value & 7, value >> 3
            equal = one << low
            less = equal - 1 ^ -sign & 0xFF  # public sign 0: the secret's sign, flipped by a borrow
            made.append(less | (less ^ 0xFF) << 8 | equal << 16 | equal << 24)
    return torch.stack(made)


def piecewise(deal: Dealing, count: int, knots: int, degree: int, digits: int, low: int):
    """For a piecewise polynomial: mask r of x, its powers, tables of -r's digits, and for every knot a bit with r.

    The bit of a knot is uniform; it masks the comparison's result and is known both bit by bit and as a number, as are
    its products with the powers of r.
    """
    packed = -(-count // 64)
    r = deal.mask(count)
    table = deal.share(
        lambda: _wide(tables(-r.clear >> low & (1 << DIGIT * digits) - 1, digits)), -(-digits * count // 2), binary=True
    )
    names = variables(digits)
    masks = deal.bits(len(names), knots, packed)
    sets = subsets(digits)
    products = deal.share(lambda: _products(masks.clear, names, sets), len(sets), knots, packed, binary=True)
    bit = deal.bits(knots, packed)
    powers = _powers(deal, r, count, degree)
    chosen = _chosen(deal, bit, r, knots, count, degree)
    return (r.mine, table, masks.mine, products, bit.mine, powers, chosen), bit


def _powers(deal: Dealing, r: Mask, count: int, degree: int) -> list[torch.Tensor]:
    """Shares of r^2 to r^degree."""
    made, clear = [], r.clear

    def make():
        nonlocal clear
        clear = clear * r.clear
        return clear

    for _ in range(2, degree + 1):
        made.append(deal.share(make, count))
    return made


def _chosen(deal: Dealing, bit: Mask, r: Mask, knots: int, count: int, degree: int) -> list[torch.Tensor]:
    """Shares (knots, count) of bit r^i for i = 0 to degree."""
    chosen, clear = [], None
    for i in range(degree + 1):

        def make(i=i):
            nonlocal clear
            clear = unpack(bit.clear, count) if i == 0 else clear * r.clear
            return clear

        chosen.append(deal.share(make, knots, count))
    return chosen


def _wide(narrow: torch.Tensor) -> torch.Tensor:
    """int32 to half as many int64."""
    flat = narrow.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat.view(torch.int64)


def _products(masks: torch.Tensor, names: list[tuple], sets: list[tuple]) -> torch.Tensor:
    place = {name: i for i, name in enumerate(names)}
    made = {}
    for chosen in sets:  # shorter sets come before those that hold them only by chance: build from what is there
        product = masks[place[chosen[0]]]
        for name in chosen[1:]:
            product = product & masks[place[name]]
        made[chosen] = product
    return torch.stack([made[chosen] for chosen in sets])


def comparison(deal: Dealing, count: int, knots: int, degree: int, digits: int, low: int):
    """`piecewise` without what only `power` needs."""
    return piecewise(deal, count, knots, degree, digits, low)[0]


def power(deal: Dealing, count: int, knots: int, digits: int, low: int, degree: int):
    """For x^p by knots: `piecewise` for the scaling to [1, 2), then a mask of the scaled value with the same bits."""
    first, bit = piecewise(deal, count, knots, 1, digits, low)
    r = deal.mask(count)
    powers = _powers(deal, r, count, degree)
    return first, (r.mine, powers, _chosen(deal, bit, r, knots, count, degree))


CORRELATIONS = {
    function.__name__: function
    for function in (
        by_weight,
        matmul,
        products,
        multiply,
        square,
        powers,
        layer_norm,
        quadratic,
        truncation,
        comparison,
        power,
    )
}


def new_key() -> bytes:
    """A key from the operating system's randomness."""
    return secrets.token_bytes(16)


class Tape:
    """What a network will need of the dealer, in order: found by running its protocols on shapes alone.

    Attributes:
        weights: name to shape of every weight that is masked for the session.
        calls: for every node of the graph, the correlations to deal: (name, arguments).
    """

    def __init__(self):
        self.weights: dict[str, tuple] = {}
        self.calls: list[list[tuple]] = []

    def deal(self, dealing: Dealing, node: int) -> deque:
        """The correlations of a node, ready to be used."""
        return deque(CORRELATIONS[name](dealing, *arguments) for name, arguments in self.calls[node])


def server_of_dealer():
    """CrypTen's dealer, which serves requests until told to end, with what `tuned` asks of it besides."""
    import torch.distributed as dist
    from crypten.mpc.provider import TTPServer

    class Dealer(TTPServer):
        def _setup_generators(self):
            super()._setup_generators()
            keys = new_key(), new_key()
            self.dealing = Dealing(DEALER, keys)
            for rank, key in enumerate(keys):
                dist.send(torch.from_numpy(np.frombuffer(key, np.int64).copy()), rank, self.ttp_group)

        def mask_weights(self, weights):
            for name, shape in weights.items():
                self.dealing.weight(name, shape)
            return torch.zeros(1, dtype=torch.int64)

        def correct(self, calls):
            for name, arguments in calls:
                CORRELATIONS[name](self.dealing, *arguments)
            made, self.dealing.outbox = torch.cat(self.dealing.outbox), []
            return made

    return Dealer
