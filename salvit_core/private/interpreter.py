"""A model's graph run node by node: on secret shares with every cost counted, or in the clear with domains checked."""

import hashlib
import time
from types import ModuleType

import crypten.communicator as comm
import torch
from torch import fx

from ..graph import parameters_of

SERVER, CLIENT, DEALER = 0, 1, 2


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
    """Runs a graph on secrets, counting seconds, rounds and bytes of every node.

    Args:
        graph: the traced model; its weights may be on the meta device at the client.
        protocol: a module with the tables `MODULES` and `FUNCTIONS`.
        keep: keep this party's share of every activation of the last run in `kept`, by node.
    """

    def __init__(self, graph: fx.GraphModule, protocol: ModuleType, keep: bool = False):
        super().__init__(graph)
        self.protocol, self.keep = protocol, keep
        self.kept: dict[str, list] = {}
        self.secrets: dict[str, object] = {}
        self.rows: list[dict] = []
        self._mark = (0.0, 0, 0, 0)
        self._index = {node: i for i, node in enumerate(graph.graph.nodes)}
        self._recording = False

    def share_weights(self) -> None:
        """Turn the server's weights into secrets, in the protocol's way."""
        rank = comm.get().get_rank()
        for name, tensor in sorted(self.module.state_dict().items()):
            self.secrets[name] = self.protocol.secret(name, tensor, rank)

    def record(self, images):
        """Run the protocols on shapes alone, each node announced by its index, so that they can note their needs."""
        self._recording = True
        result = self.run(images)
        self._recording = False
        return result

    def start(self) -> None:
        """Begin counting: both parties are ready and the clock starts."""
        comm.get().barrier()
        comm.get().reset_communication_stats()
        self.rows = []
        self.protocol.reset()
        self._mark = (time.perf_counter(), 0, 0, 0)

    def count(self, layer: str, kind: str, offline: tuple[float, int] = (0.0, 0)) -> None:
        """Charge all that happened since the last call to one layer and kind, so that the rows add up to the whole.

        `offline` is the dealer's part: seconds, which are among all that happened, and bytes, which come on top.
        """
        seconds, rounds, moved, serial = self._mark
        stats = comm.get().get_communication_stats()
        self._mark = (time.perf_counter(), stats["rounds"], stats["bytes"], self.protocol.serial_bytes(stats))
        self.rows.append(
            {
                "layer": layer,
                "kind": kind,
                "seconds": self._mark[0] - seconds,
                "rounds": int(self._mark[1] - rounds),
                # CrypTen counts what a party sends and what it receives; openings are symmetric, so one way is half.
                "bytes": int(self._mark[2] - moved) // 2,
                "serial_bytes": int(self._mark[3] - serial),
                "offline_seconds": offline[0],
                "offline_bytes": offline[1],
            }
        )

    def agree_on_offline(self) -> None:
        """Take the server's word for how long dealing took: under TFP it deals, and the client merely waits for it."""
        seconds = torch.tensor([row["offline_seconds"] for row in self.rows], dtype=torch.float64)
        if comm.get().get_rank() == SERVER:
            comm.get().send(seconds, CLIENT)
        else:
            for row, value in zip(self.rows, comm.get().recv(seconds, SERVER).tolist(), strict=True):
                row["offline_seconds"] = min(value, row["seconds"])

    def run_node(self, node: fx.Node):
        """Run one node and charge it to its place in the network."""
        if self._recording:
            self.protocol.note(self._index[node])
            return super().run_node(node)
        self.protocol.supply(self._index[node], node)
        result = super().run_node(node)
        if self.keep and node.op == "call_module" and (parts := self.protocol.parts(result)):
            self.kept[node.name] = parts
        self.count(node.meta["layer"], node.meta["kind"], self.protocol.supplied())
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

    `violations` says so in words; `spans` has what was seen of every operation in all runs, by its place and quantity.

    Args:
        graph: the traced model, with its weights.
        protocol: a module with the table `DOMAINS`.
    """

    def __init__(self, graph: fx.GraphModule, protocol: ModuleType):
        super().__init__(graph)
        self.protocol = protocol
        self.violations: list[str] = []
        self.spans: dict[tuple[str, str], tuple] = {}

    def call_module(self, target, args, kwargs):
        """A leaf module, its input checked first."""
        module = self.fetch_attr(target)
        found = self.protocol.DOMAINS.get(type(module), lambda *_: [])(module, *args)
        for span in found:
            before = self.spans.setdefault((str(target), span.what), span)
            widest = span._replace(low=min(before.low, span.low), high=max(before.high, span.high))
            self.spans[str(target), span.what] = widest
        self.violations += [f"{target}: {reason}" for span in found if (reason := span.outside)][:1]
        return super().call_module(target, args, kwargs)
