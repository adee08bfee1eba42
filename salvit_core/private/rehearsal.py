"""CrypTen's functions on shapes alone: what would travel is counted, nothing is computed or sent, in this process.

CrypTen's own code runs, on tensors of torch's meta device, which have a shape and no values. In the place of the
process group stands a communicator that sends nothing; the counting around it is CrypTen's.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from .. import compat
from ..models.graph import parameters_of
from .interpreter import SecretInterpreter
from .protocol import CLIENT

compat.repair()  # before anything imports crypten
import crypten  # noqa: E402
import crypten.communicator as comm  # noqa: E402
from crypten.communicator.communicator import Communicator, _logging  # noqa: E402
from crypten.mpc.provider import TrustedFirstParty  # noqa: E402

from .stock import Stock  # noqa: E402

META = torch.device("meta")


def rehearse(graph: torch.fx.GraphModule, shape: tuple[int, ...]) -> list[dict]:
    """The rows that the client of a session with `stock` would count for one query, without its seconds.

    Args:
        graph: of the network, on the meta device.
        shape: of the images.
    """
    protocol = Stock()
    with _in_place_of_the_parties(), META, compat.Shapes(), torch.no_grad(), crypten.no_grad():
        network = Rehearsal(graph, protocol)
        network.share_weights(CLIENT)
        protocol.prepare(network, shape, 1, CLIENT, Namespace(link=None), {})
        network.start()
        protocol.reveal_to_client(network.run(protocol.share_images(None, shape)))
        network.count("head", "head", protocol.supplied())
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in network.rows]


class Silent(Communicator):
    """The client's end of a connection over which nothing goes; `_logging` counts as in a session."""

    BYTES_PER_ELEMENT = 8

    def __init__(self):
        self.reset_communication_stats()

    def get_rank(self) -> int:
        """The client's."""
        return CLIENT

    def get_world_size(self) -> int:
        """Server and client."""
        return 2

    @_logging
    def barrier(self) -> None:
        """Nobody to wait for."""

    @_logging
    def recv(self, tensor, src=None):
        """A tensor of the shape of what would come."""
        return tensor.clone()

    @_logging
    def all_reduce(self, input, op=None, batched=False):
        """Tensors of the shapes of the sums."""
        return [part.clone() for part in input] if batched else input.clone()


class Rehearsal(SecretInterpreter):
    """Runs each kind of module once for each combination of shapes; the next such costs the same."""

    def __init__(self, graph: torch.fx.GraphModule, protocol: Stock):
        super().__init__(graph, protocol)
        self.stock = protocol
        self._known: dict[tuple, tuple[Any, int, int, int]] = {}

    def call_module(self, target, args, kwargs):
        """A leaf module, or what was counted for its like."""
        module = self.fetch_attr(target)
        weights = [(name, self.secrets[f"{target}.{name}"].size()) for name in parameters_of(module)]
        like = (type(module), repr(module), str(weights), str([value.size() for value in args]))
        wire, protocol = comm.get(), self.stock
        if like not in self._known:
            rounds, moved, dealt = wire.comm_rounds, wire.comm_bytes, protocol.dealt
            result = super().call_module(target, args, kwargs)
            cost = wire.comm_rounds - rounds, wire.comm_bytes - moved, protocol.dealt - dealt
            self._known[like] = (result, *cost)
            return result
        result, rounds, moved, dealt = self._known[like]
        wire.comm_rounds += rounds
        wire.comm_bytes += moved
        protocol.dealt += dealt
        return result


@contextmanager
def _in_place_of_the_parties() -> Iterator[None]:
    """CrypTen as if a session were open; as it was before, afterwards."""
    silent, source = Silent(), TrustedFirstParty()
    # On the meta device no generator is needed. CrypTen makes empty tensors on the processor besides.
    generators = {META: None, torch.device("cpu"): torch.Generator("cpu")}
    with ExitStack() as stack:
        for each in crypten.generators.values():
            stack.enter_context(mock.patch.dict(each, generators))
        stack.enter_context(mock.patch.object(comm, "get", lambda: silent))
        stack.enter_context(mock.patch.object(crypten.mpc, "get_default_provider", lambda: source))
        stack.enter_context(crypten.cfg.temp_override({"communicator.verbose": True}))
        yield
