"""The table of gates, a cheaper order of a graph, and what a party does before, between and after its operations."""

import contextlib
import operator
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx, nn

from ...compat import Shapes, without_compiler
from ...models.activations import LearnedQuad, Quad, TanhGELU
from ...models.attention.fused import Dropout
from ...models.blocks import StochasticDepth
from ...models.normalizers import L1, L2Q, Scaling, Softmax, TwoQuad, TwoReLU
from ...models.operations import (
    LSTM,
    BlockLinear,
    Divide,
    Exponential,
    Gain,
    HeadLinear,
    LinearScan,
    Lookup,
    MatMul,
    Multiply,
    NewtonInverse,
    PseudoInverse,
    Repeat,
    Resample,
    Reweight,
    SegmentMeans,
    ShiftDivide,
    SquaredNorm,
    Sum,
    Take,
    TokenConv,
    TokenSum,
)
from ..domains import Span
from ..protocol import CLIENT, LAYOUT, LIMIT, LINEAR, ROLES, SERVER, Protocol, Traffic
from ..reserve import Reserve
from ..transport import Channel, TransportError
from .arithmetic.randomness import Cost, Dealing, Keys, new_key, packed, unpacked
from .arithmetic.schedule import Schedule
from .arithmetic.share import BITS, Share, Weight, keep_memory, session
from .gates.activations import (
    clip,
    clip_domain,
    hardsigmoid,
    hardsigmoid_domain,
    hardswish,
    hardswish_domain,
    leaky_relu,
    leaky_relu_domain,
    sigmoid,
    silu,
    smooth_domain,
    tanh,
    tanh_gelu,
    tanh_gelu_domain,
)
from .gates.answer import answer
from .gates.curve import check, gelu, gelu_domain
from .gates.divide import divide, divide_domain, shift_divide, shift_divide_domain
from .gates.exponential import exponential, exponential_domain
from .gates.inverse import newton_inverse, newton_inverse_domain, pseudo_inverse, pseudo_inverse_domain
from .gates.layernorm import layer_norm, layer_norm_domain
from .gates.linear import conv2d, gain, head_linear, linear, token_conv
from .gates.lookup import lookup, lookup_domain
from .gates.lstm import block_linear, lstm, lstm_domain, scan
from .gates.maximum import max_pool2d, max_pool2d_domain, relu, relu_domain
from .gates.move import cat, identity, layout, moved, pad, reweight, segment_means
from .gates.normalise import (
    l1,
    l1_domain,
    l2q,
    l2q_domain,
    scaling,
    softmax,
    softmax_domain,
    two_quad,
    two_quad_domain,
    two_relu,
    two_relu_domain,
)
from .gates.product import either, learned_quad, matmul, quad, squared_norm, times
from .gates.resample import repeat, resample
from .rewrite import rewrite

MODULES: dict[type, Callable] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    MatMul: matmul,
    Multiply: times,
    Divide: divide,
    ShiftDivide: shift_divide,
    Lookup: lookup,
    Exponential: exponential,
    SquaredNorm: squared_norm,
    HeadLinear: head_linear,
    TokenConv: token_conv,
    Gain: gain,
    BlockLinear: block_linear,
    LSTM: lstm,
    LinearScan: scan,
    Take: moved,
    TokenSum: moved,
    SegmentMeans: segment_means,
    Reweight: reweight,
    NewtonInverse: newton_inverse,
    PseudoInverse: pseudo_inverse,
    nn.ReLU: relu,
    nn.ReLU6: clip,
    nn.Hardtanh: clip,
    nn.LeakyReLU: leaky_relu,
    nn.Hardswish: hardswish,
    nn.Hardsigmoid: hardsigmoid,
    nn.SiLU: silu,
    nn.Sigmoid: sigmoid,
    nn.Tanh: tanh,
    TanhGELU: tanh_gelu,
    Sum: moved,
    Resample: resample,
    Repeat: repeat,
    nn.MaxPool2d: max_pool2d,
    nn.GELU: gelu,
    Quad: quad,
    LearnedQuad: learned_quad,
    nn.LayerNorm: layer_norm,
    Softmax: softmax,
    TwoQuad: two_quad,
    TwoReLU: two_relu,
    L2Q: l2q,
    Scaling: scaling,
    L1: l1,
    nn.Dropout: identity,
    Dropout: identity,
    nn.Identity: identity,
    StochasticDepth: identity,
}

FUNCTIONS: dict[object, Callable] = {
    **{name: layout(name) for name in LAYOUT},
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: either,
    operator.truediv: operator.truediv,
    operator.neg: operator.neg,
    operator.getitem: operator.getitem,
    torch.add: operator.add,
    torch.cat: cat,
    torch.nn.functional.pad: pad,
}


# What leaves its domain, seen in the clear

DOMAINS: dict[type, Callable[..., list[Span]]] = {
    nn.ReLU: relu_domain,
    nn.ReLU6: clip_domain,
    nn.Hardtanh: clip_domain,
    nn.LeakyReLU: leaky_relu_domain,
    nn.Hardswish: hardswish_domain,
    nn.Hardsigmoid: hardsigmoid_domain,
    nn.SiLU: smooth_domain,
    nn.Sigmoid: smooth_domain,
    nn.Tanh: smooth_domain,
    TanhGELU: tanh_gelu_domain,
    nn.MaxPool2d: max_pool2d_domain,
    nn.GELU: gelu_domain,
    nn.LayerNorm: layer_norm_domain,
    Softmax: softmax_domain,
    TwoQuad: two_quad_domain,
    TwoReLU: two_relu_domain,
    L2Q: l2q_domain,
    L1: l1_domain,
    Divide: divide_domain,
    ShiftDivide: shift_divide_domain,
    Lookup: lookup_domain,
    Exponential: exponential_domain,
    LSTM: lstm_domain,
    NewtonInverse: newton_inverse_domain,
    PseudoInverse: pseudo_inverse_domain,
}


class Tuned(Protocol):
    """This project's protocols."""

    name, bits = "tuned", BITS
    modules, functions, domains, everywhere = MODULES, FUNCTIONS, DOMAINS, LINEAR
    reveal = "logits"
    peers: Mapping[str, Channel]

    def rewrite(self, graph: fx.GraphModule) -> fx.GraphModule:
        """The same function in a cheaper order, found from the architecture alone: both parties do it by themselves."""
        return rewrite(graph)

    def secret(self, name: str, tensor: torch.Tensor, rank: int) -> Weight:
        """A weight: the server keeps it, the client knows its shape."""
        return Weight(name, tensor, rank == SERVER)

    def prepare(self, network, shape: tuple, queries: int, rank: int, options, peers: Mapping[str, Channel]) -> None:
        """Begin a session: find what the dealer must supply, agree on keys, open the masked weights.

        With a dealer each party gets its key over its own link, and neither sees the other's; without one the server
        makes both and sends the client the client's.

        Args:
            network: the interpreter, its secrets in place.
            shape: of a query's images.
            queries: how many there will be.
            rank: SERVER or CLIENT.
            options: the party's command line.
            peers: the channels to the other parties, by role.
        """
        keep_memory()
        self.peers = peers
        session.begin(rank, BITS if options.bits is None else options.bits, options.device)
        session.check, session.link = options.check, options.link
        session.audit = None if options.audit is None else []
        session.channel = self.peers[ROLES[1 - rank]]
        session.recording = True
        with without_compiler():
            self.record(network, shape, options.reveal)
        session.recording = False
        self.ahead, self.reserve = options.ahead, None if options.fill else options.reserve
        kept = None
        if self.reserve is not None:
            key, kept = self.reserve.weights()
            self.keys = [_held(rank, key)]
        else:
            self.keys = self._agreed(1 + queries, rank)
        pair = self.keys.pop(0)
        self.first = pair[rank]
        session.dealing = Dealing(rank, pair, device=session.device)
        session.open_weights(kept)

    def _agreed(self, count: int, rank: int) -> list[Keys]:
        """What this party may know of so many pairs of keys."""
        if dealer := self.peers.get("dealer"):
            tape = session.tape
            dealer.say({"queries": count - 1, "weights": list(tape.weights.items()), "calls": tape.calls})
            found = dealer.receive(torch.empty(count, 2, dtype=torch.int64))
        elif rank == SERVER:
            theirs = [new_key() for _ in range(count)]
            session.send(packed(theirs))
            return [(new_key(), key) for key in theirs]
        else:
            (found,) = session.receive(torch.Size((count, 2)))
        return [_held(rank, key) for key in unpacked(found)]

    def fill(self, reserve: Reserve, terms: dict) -> None:
        """Instead of queries: keep what the dealer deals for them.

        Args:
            reserve: an empty one.
            terms: what those who draw from it must have alike, and the number of queries.
        """
        assert session.channel is not None and self.first is not None
        for query, pair in enumerate(self.keys):
            key = pair[session.rank]
            assert key is not None
            reserve.put(query, key, self._corrections())
        session.channel.barrier()  # the other has its part, too
        masked = session.dealing.weights if session.rank == CLIENT else {}
        reserve.seal(self.first, {name: tensor.cpu() for name, tensor in masked.items()}, terms)

    def _corrections(self) -> Iterator[torch.Tensor]:
        """At the server: what the dealer sends for a query, node by node."""
        if session.rank == SERVER:
            for cost in session.tape.costs:
                if cost.offline:
                    yield self.peers["dealer"].receive(torch.empty(cost.offline, dtype=torch.int64))

    def record(self, network, shape: tuple, reveal: str) -> None:
        """Run a query on shapes alone: what it needs of the dealer, and sends, comes to be on the session's tape."""
        with Shapes():
            logits = network.record(Share(torch.empty(shape, dtype=torch.int64, device="meta"), session.bits))
            self.note(len(session.tape.calls))
            self.reveal = reveal
            session.send(answer(logits, reveal).data)

    @contextlib.contextmanager
    def schedule(self, charge: Callable[[int], None]) -> Iterator[Schedule | None]:
        """Within it, nodes run side by side and their openings travel together."""
        session.schedule = Schedule(session.step, charge)
        try:
            yield session.schedule
        finally:
            session.schedule = None

    def note(self, index: int) -> None:
        """While recording: what follows belongs to the node that starts now, as this many did before."""
        session.tape.begin()
        session.node = index

    def reset(self) -> None:
        """A query begins, once both parties are here."""
        assert session.channel is not None  # `prepare` came before
        if self.reserve is not None:
            self.keys = [self._drawn(self.reserve)]
        session.dealing.turn(self.keys.pop(0))
        if self.ahead:
            self.lying = deque(map(self._dealt, range(len(session.tape.calls))))
        session.channel.barrier()
        session.channel.reset()
        session.serial, session.spent = 0, {}

    def _drawn(self, reserve: Reserve) -> Keys:
        """The next query that neither party ever drew: this party's key; the server's corrections lie ready."""
        assert session.channel is not None
        session.channel.say(reserve.next)
        theirs = session.channel.hear()
        if type(theirs) is not int:
            raise TransportError(f"the {session.channel.peer} named no query: {str(theirs)[:100]}")
        key, corrections = reserve.draw(max(reserve.next, theirs))
        session.dealing.inbox = None if corrections is None else corrections.to(session.device)
        return _held(session.rank, key)

    def _dealt(self, index: int) -> deque:
        """What the node of this index needs."""
        words = session.tape.costs[index].offline
        if words and session.rank == SERVER and "dealer" in self.peers:
            corrections = self.peers["dealer"].receive(torch.empty(words, dtype=torch.int64))
            session.dealing.inbox = corrections.to(session.device)
        return session.tape.deal(session.dealing, index)

    def traffic(self) -> Traffic:
        """Of this query so far. What follows on the way is each message, whichever way it went."""
        channel = session.channel
        assert channel is not None
        return Traffic(channel.rounds, (channel.sent + channel.received) / 2, session.serial)

    def to_client(self, numbers: torch.Tensor, rank: int) -> torch.Tensor:
        """The server's numbers at the client."""
        channel = session.channel
        assert channel is not None
        if rank == SERVER:
            channel.send(numbers)
            return numbers
        return channel.receive(torch.empty_like(numbers))

    def leave(self) -> None:
        """Part from the other party, once both are done. The dealer was done before."""
        assert session.channel is not None
        session.channel.barrier()
        for channel in self.peers.values():
            channel.close()

    def watch(self, value) -> None:
        """With a check: note this node if its result is beyond `LIMIT`, as one of a failed truncation is."""
        if session.check and isinstance(value, Share):
            most = round(LIMIT * 2.0**value.bits)
            check(value.data, -most, most)

    def violations(self) -> list[str]:
        """Where values left a protocol's range, if that was checked on shares."""
        return list(session.violations)

    def parts(self, value) -> list[tuple] | None:
        """This party's share of an activation with its fractional bits, as a list of factors."""
        if not isinstance(value, Share):
            return None
        factors = [value] if value.over is None else [value, value.over.share]
        return [(share.data.cpu(), share.bits) for share in factors]

    def supply(self, index: int, place: str) -> None:
        """Deal for one node, or take what lies ready.

        Where it is dealt now, both parties wait for each other, so that what follows is online alone.
        """
        session.node, session.places[index], start = index, place, time.perf_counter()
        if self.ahead:
            session.ready[index] = self.lying.popleft()
        elif session.tape.calls[index]:
            session.ready[index] = self._dealt(index)
            assert session.channel is not None
            session.channel.barrier()
        self._supplied = time.perf_counter() - start, 8 * session.tape.costs[index].offline

    def supplied(self) -> tuple[float, int]:
        """Seconds that dealing for the last node took, and bytes of corrections, which a third party would send."""
        return self._supplied

    def spent(self, index: int) -> Traffic:
        """Of the node of this index alone, in this query."""
        cost = session.spent.get(index, Cost())
        return Traffic(cost.rounds, 8 * cost.words, 8 * cost.serial)

    def share_images(self, images: torch.Tensor | None, shape: tuple) -> Share:
        """The client's images. Nothing is sent: the server's part is zero, and a first product masks the client's."""
        if images is None:
            return Share(torch.zeros(shape, dtype=torch.int64, device=session.device), session.bits)
        return Share((images.double() * 2.0**session.bits).round().long().to(session.device), session.bits)

    def reveal_to_client(self, logits: Share) -> torch.Tensor | None:
        """What `answer` gives, at the client alone: logits (B, K), or the highest one's place (B, 1)."""
        self.supply(len(session.tape.calls) - 1, "answer")
        found = answer(logits, self.reveal)
        if session.rank == SERVER:
            session.send(found.data)
            return None
        return ((found.data + session.receive(found.shape)[0]).double() / 2.0**found.bits).float().cpu()


def _held(rank: int, key: bytes) -> Keys:
    """A pair of keys of which this party has its own."""
    return (key, None) if rank == SERVER else (None, key)


PROTOCOL = Tuned()
