"""What a protocol is: one entry per operation, and what a party does before, between and after them."""

import contextlib
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx, nn

from ..models.activations import LearnedQuad, Quad
from ..models.attention.fused import Dropout
from ..models.blocks import StochasticDepth
from ..models.normalizers import Scaling
from ..models.operations import (
    BlockLinear,
    Gain,
    HeadLinear,
    LinearScan,
    MatMul,
    Multiply,
    Repeat,
    Resample,
    Reweight,
    SegmentMeans,
    SquaredNorm,
    Sum,
    Take,
    TokenConv,
    TokenSum,
)
from .domains import Span
from .reserve import Reserve
from .transport import Channel

SERVER, CLIENT, DEALER = 0, 1, 2  # the parties' ranks
ROLES = ("server", "client", "dealer")
PROTOCOLS = ("stock", "tuned")
PROVIDERS = ("TFP", "TTP")  # who makes the correlated randomness: the server itself, or a dealer
DEALT = ("along", "ahead")  # when: while a query runs, or before
REVEALS = ("logits", "label")  # what the client may learn; of "stock" the logits

# Methods that only move numbers about.
LAYOUT = ("flatten", "unflatten", "reshape", "transpose", "permute", "unbind", "squeeze", "unsqueeze", "roll", "expand")

# Options of torch's modules that the protocols do not know: such a module is refused, not run as another.
OPTIONS: dict[type, Callable[[Any], bool]] = {
    nn.Conv2d: lambda m: (m.padding_mode, type(m.padding)) == ("zeros", tuple),
    nn.MaxPool2d: lambda m: (m.dilation, m.ceil_mode, m.return_indices) == (1, False, False),
    nn.GELU: lambda m: m.approximate == "none",
    nn.LayerNorm: lambda m: len(m.normalized_shape) == 1,
}


# Results of every operation stay below this: beyond it a local truncation of a product fails once in 10^6 numbers or
# more often, and soon the ring has no room.
LIMIT = 2.0**16

# What is linear, a product, a square, or only moves numbers holds in every protocol wherever its result is in `LIMIT`.
LINEAR = frozenset(
    {
        *(nn.Linear, nn.Conv2d, HeadLinear, TokenConv, Gain, MatMul, Multiply, SquaredNorm, Quad, LearnedQuad, Scaling),
        *(BlockLinear, LinearScan),
        *(Take, TokenSum, Sum, SegmentMeans, Reweight, Resample, Repeat),
        *(nn.Identity, nn.Dropout, Dropout, StochasticDepth),
    }
)


class Traffic(NamedTuple):
    """What has passed between the parties since a query began.

    Attributes:
        rounds: messages one way, or both ways at once.
        bytes: one way, (sent + received) / 2.
        serial: bytes that followed one another on the way.
    """

    rounds: int
    bytes: float
    serial: float


class Protocol(ABC):
    """How two parties compute every operation on secrets.

    Attributes:
        name: what it is asked for by.
        bits: fractional bits unless others are asked for.
        modules: every operation to a function of (module, its secrets by name, its secret inputs).
        functions: every function and method that a graph may call to the one on secrets.
        domains: the operations that hold on a part of the real line only, to what is seen of a module's clear inputs;
            `Span` says what leaves it.
        everywhere: those that hold wherever their result is below `LIMIT`: linear ones, products, and those that move
            numbers about.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    modules: ClassVar[dict[type, Callable]]
    functions: ClassVar[dict[Any, Callable]]
    domains: ClassVar[dict[type, Callable[..., list[Span]]]]
    everywhere: ClassVar[frozenset[type]]

    def rewrite(self, graph: fx.GraphModule) -> fx.GraphModule:
        """The same function in an order that is cheaper for this protocol; both parties do it by themselves."""
        return graph

    @abstractmethod
    def secret(self, name: str, tensor: torch.Tensor, rank: int) -> Any:
        """A weight as a secret of the server's; at the client `tensor` has only a shape."""

    @abstractmethod
    def prepare(
        self,
        network: Any,
        shape: tuple[int, ...],
        queries: int,
        rank: int,
        options: Namespace,
        peers: Mapping[str, Channel],
    ) -> None:
        """Begin a session.

        Args:
            network: the interpreter, its secrets in place.
            shape: of a query's images.
            queries: how many there will be.
            rank: of this party.
            options: the party's command line.
            peers: channels to the other parties, by role, for a protocol that runs over them.
        """

    def fill(self, reserve: Reserve, terms: dict) -> None:
        """Instead of queries: keep what a dealer deals for them, where a protocol can."""
        raise NotImplementedError(f"{self.name} deals as it goes")  # `parties.party` refuses it before

    @contextlib.contextmanager
    def schedule(self, charge: Callable[[int], None]) -> Iterator[Any]:
        """Within it: what runs a graph's nodes side by side, where a protocol can; None for one after the other.

        Args:
            charge: called with a node's index when it did something.
        """
        yield None

    def note(self, index: int) -> None:  # noqa: B027  not every protocol runs on shapes
        """While shapes alone are run: what follows belongs to the node of this index, in the order of their starts."""

    @abstractmethod
    def reset(self) -> None:
        """A query begins, once both parties are here: the traffic is counted anew."""

    @abstractmethod
    def traffic(self) -> Traffic:
        """Of this query so far."""

    @abstractmethod
    def to_client(self, numbers: torch.Tensor, rank: int) -> torch.Tensor:
        """The server's numbers, public ones, at the client; what the client gives has their shape."""

    @abstractmethod
    def leave(self) -> None:
        """Part from the other party, once both are done."""

    def watch(self, value: Any) -> None:  # noqa: B027  not every protocol can look at shares
        """After every operation: note it if its result, on shares, is where no result should be."""

    def violations(self) -> list[str]:
        """Where values left a range, as seen on shares."""
        return []

    @abstractmethod
    def parts(self, value: Any) -> list[tuple[torch.Tensor, int]] | None:
        """This party's share of an activation with its fractional bits, as a list of factors; None if it is none."""

    @abstractmethod
    def supply(self, index: int, place: str) -> None:
        """Deal for the node of this index and place, if this protocol deals ahead of its operations."""

    @abstractmethod
    def supplied(self) -> tuple[float, int]:
        """Seconds that dealing for the last node took, and bytes that only a third party would send."""

    def spent(self, index: int) -> Traffic:
        """Of the node of this index in this query, from a protocol that runs them side by side."""
        raise NotImplementedError(f"{self.name} runs one node after the other")

    @abstractmethod
    def share_images(self, images: torch.Tensor | None, shape: tuple[int, ...]) -> Any:
        """The client's images as a secret; the server has none."""

    @abstractmethod
    def reveal_to_client(self, logits: Any) -> torch.Tensor | None:
        """The answer, at the client alone: the logits, or what else the protocol was asked to reveal."""


def identity(module: nn.Module, secret: dict, x: Any) -> Any:
    """What does nothing at inference."""
    return x
