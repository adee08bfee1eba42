"""A model's graph run node by node: on secret shares with every cost counted, or in the clear with domains checked."""

import hashlib
import time
from types import ModuleType

import crypten
import crypten.communicator as comm
import torch
from torch import fx

from ..graph import parameters_of

SERVER, CLIENT = 0, 1


def unsupported(graph: fx.GraphModule, protocol: ModuleType) -> list[str]:
    """The operations of a graph for which a protocol table has no entry, each by name and place."""
    missing = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(node.target)
            kind = type(module)
            if kind not in protocol.MODULES:
                missing.append(f"{kind.__name__} ({node.target})")
            elif kind in protocol.OPTIONS and not protocol.OPTIONS[kind](module):
                missing.append(f"{module} ({node.target})")
        elif node.op in ("call_function", "call_method") and node.target not in protocol.FUNCTIONS:
            missing.append(f"{getattr(node.target, '__name__', node.target)} ({node.meta['layer']})")
    return missing


def fingerprint(graph: fx.GraphModule) -> str:
    """A hash of what both parties must agree on: the operations in order, their options, the shapes of the weights."""
    # A function's name, not its text: that would hold an address of this process.
    names = [getattr(node.target, "__name__", node.target) for node in graph.graph.nodes]
    lines = [f"{node.op} {name} {node.args} {node.kwargs}" for node, name in zip(graph.graph.nodes, names)]
    for name, module in graph.named_modules():
        if not list(module.children()):
            lines.append(f"{name} {module!r}")
    lines += [f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(graph.state_dict().items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class SecretInterpreter(fx.Interpreter):
    """Runs a graph on CrypTensors, counting seconds, rounds and bytes of every node.

    Args:
        graph: the traced model; its weights may be on the meta device at the client.
        protocol: a module with the tables `MODULES` and `FUNCTIONS`.
    """

    def __init__(self, graph: fx.GraphModule, protocol: ModuleType):
        super().__init__(graph)
        self.protocol = protocol
        self.secrets: dict[str, crypten.CrypTensor] = {}
        self.rows: list[dict] = []
        self._mark = (0.0, 0, 0)

    def share_weights(self) -> None:
        """Turn the server's weights into shares. No bytes travel: the server masks them with shared randomness."""
        for name, tensor in sorted(self.module.state_dict().items()):
            value = tensor if comm.get().get_rank() == SERVER else torch.empty(tensor.shape)
            self.secrets[name] = crypten.cryptensor(value, src=SERVER)

    def start(self) -> None:
        """Begin counting: both parties are ready and the clock starts."""
        comm.get().barrier()
        comm.get().reset_communication_stats()
        self._mark = (time.perf_counter(), 0, 0)

    def count(self, layer: str, kind: str) -> None:
        """Charge all that happened since the last call to one layer and kind, so that the rows add up to the whole."""
        seconds, rounds, moved = self._mark
        stats = comm.get().get_communication_stats()
        self._mark = (time.perf_counter(), stats["rounds"], stats["bytes"])
        self.rows.append(
            {
                "layer": layer,
                "kind": kind,
                "seconds": self._mark[0] - seconds,
                "rounds": int(self._mark[1] - rounds),
                # CrypTen counts what a party sends and what it receives; openings are symmetric, so one way is half.
                "bytes": int(self._mark[2] - moved) // 2,
            }
        )

    def run_node(self, node: fx.Node):
        """Run one node and charge it to its place in the network."""
        result = super().run_node(node)
        self.count(node.meta["layer"], node.meta["kind"])
        return result

    def call_module(self, target, args, kwargs):
        """A leaf module, by the protocol of its type."""
        module = self.fetch_attr(target)
        secret = {name: self.secrets[f"{target}.{name}"] for name in parameters_of(module)}
        return self.protocol.MODULES[type(module)](module, secret, *args, **kwargs)

    def call_function(self, target, args, kwargs):
        """A function, by the protocol's table."""
        return self.protocol.FUNCTIONS[target](*args, **kwargs)

    def call_method(self, target, args, kwargs):
        """A method, by the protocol's table."""
        return self.protocol.FUNCTIONS[target](*args, **kwargs)

    def get_attr(self, target, args, kwargs):
        """A parameter that the graph uses directly, such as the position embedding."""
        return self.secrets[target]


class DomainInterpreter(fx.Interpreter):
    """Runs a graph in the clear and notes every operation whose input leaves what its protocol can compute.

    Args:
        graph: the traced model, with its weights.
        protocol: a module with the table `DOMAINS`.
    """

    def __init__(self, graph: fx.GraphModule, protocol: ModuleType):
        super().__init__(graph)
        self.protocol = protocol
        self.violations: list[str] = []

    def call_module(self, target, args, kwargs):
        """A leaf module, its input checked first."""
        module = self.fetch_attr(target)
        check = self.protocol.DOMAINS.get(type(module))
        if check and (reason := check(module, *args)):
            self.violations.append(f"{target}: {reason}")
        return super().call_module(target, args, kwargs)
