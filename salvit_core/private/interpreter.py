"""A model's graph run node by node: on secret shares with every cost counted, or in the clear with domains checked."""

import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..models.foreign import read
from ..models.graph import parameters_of
from .domains import Span, spans
from .protocol import LIMIT, OPTIONS, Protocol, Traffic


def unsupported(graph: fx.GraphModule, protocol: Protocol) -> list[str]:
    """The operations of a graph for which a protocol table has no entry, each by name and place."""
    missing = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(node.target)
            kind = type(module)
            if kind not in protocol.modules:
                missing.append(f"{kind.__name__} ({node.target})")
            elif kind in OPTIONS and not OPTIONS[kind](module):
                missing.append(f"{module} ({node.target})")
        elif node.target is torch.nn.functional.pad and set(_of_pad(*node.args, **node.kwargs)) - {"constant", None, 0}:
            missing.append(f"pad but with zeros ({node.meta['layer']})")
        elif node.op in ("call_function", "call_method") and node.target not in protocol.functions:
            missing.append(f"{getattr(node.target, '__name__', node.target)} ({node.meta['layer']})")
    return missing


def _of_pad(x: fx.Node, pad: Any, mode: str = "constant", value: float | None = None) -> tuple:
    """How torch.nn.functional.pad is asked to fill."""
    return mode, value


def network_of(model: nn.Module, shape: Sequence[int], protocol: Protocol) -> fx.GraphModule:
    """A model's graph, every operation of which the protocol has: traced, or adopted where others wrote it.

    Args:
        model: any module.
        shape: of the images that it reads, (B, C, height, width).
        protocol: whose operations count.

    Raises:
        ValueError: operations that it lacks, one line each, with what could stand in for it.
    """
    graph = read(model, torch.zeros(tuple(shape)), lambda graph: unsupported(graph, protocol))
    if missing := unsupported(graph, protocol):
        raise ValueError(f"no private protocol for {', '.join(missing)}: {protocol.name} has none")
    return graph


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
        protocol: how each operation is computed.
        keep: keep this party's share of every activation of the last run in `kept`, by node.
    """

    def __init__(self, graph: fx.GraphModule, protocol: Protocol, keep: bool = False):
        super().__init__(graph)
        self.protocol, self.keep = protocol, keep
        self.kept: dict[str, list] = {}
        self.secrets: dict[str, Any] = {}
        self.rows: list[dict] = []
        self._mark = (0.0, Traffic(0, 0.0, 0.0))
        self.order: list[fx.Node] = []  # as they started
        self._recording = False

    def share_weights(self, rank: int) -> None:
        """Turn the server's weights into secrets, in the protocol's way, at the party of this rank."""
        for name, tensor in sorted(self.module.state_dict().items()):
            self.secrets[name] = self.protocol.secret(name, tensor, rank)

    def record(self, images):
        """Run the protocols on shapes alone, each node announced by its index, so that they can note their needs."""
        self._recording = True
        try:
            return self.run(images)
        finally:
            self._recording = False

    def start(self) -> None:
        """Begin counting: both parties are ready and the clock starts."""
        self.rows = []
        self.protocol.reset()
        self._mark = (time.perf_counter(), Traffic(0, 0.0, 0.0))

    def run(self, images):
        """The graph on secret images, its nodes side by side where the protocol can."""
        self.order, self._seconds, self._offline = [], {}, {}
        with self.protocol.schedule(self._charge) as schedule:
            if schedule is None:
                return super().run(images)
            result = self._side_by_side(schedule, images)
        if not self._recording:
            self._count_all()
        self.kept = {name: parts for name, value in self.kept.items() if (parts := self.protocol.parts(value))}
        return result

    def _side_by_side(self, schedule, images):
        """Start every node as soon as what it reads is there; forget that when nobody is left who reads it."""
        nodes = list(self.module.graph.nodes)
        missing = {node: len(node.all_input_nodes) for node in nodes}
        readers = {node: len(node.users) for node in nodes}
        self.env: dict[fx.Node, Any] = {}
        self.args_iter = iter([images])

        def start(node: fx.Node) -> None:
            schedule.start(len(self.order), functools.partial(work, node, len(self.order)))
            self.order.append(node)

        def work(node: fx.Node, index: int) -> None:
            self.env[node] = self._run_one(node, index)
            for source in node.all_input_nodes:
                readers[source] -= 1
                if not readers[source]:
                    del self.env[source]
            for reader in node.users:
                missing[reader] -= 1
                if not missing[reader]:
                    start(reader)

        for node in nodes:
            if not missing[node]:
                start(node)
        schedule.run()
        return self.env[nodes[-1]]

    def _run_one(self, node: fx.Node, index: int):
        if self._recording:
            self.protocol.note(index)
        else:
            self.protocol.supply(index, str(node.target))
            self._offline[index] = self.protocol.supplied()
        result = getattr(self, node.op)(node.target, *self.fetch_args_kwargs_from_env(node))
        if self.keep and not self._recording and node.op == "call_module":
            self.kept[node.name] = result
        return result

    def _charge(self, index: int) -> None:
        """All the time since the last call is of this node."""
        (before, traffic), now = self._mark, time.perf_counter()
        self._mark = now, traffic
        self._seconds[index] = self._seconds.get(index, 0.0) + now - before

    def _count_all(self) -> None:
        """A row for every node, in the order of the graph."""
        started = {node: index for index, node in enumerate(self.order)}
        for node in self.module.graph.nodes:
            index = started[node]
            spent, seconds = self.protocol.spent(index), self._seconds.get(index, 0.0)
            self._row(node.meta["layer"], node.meta["kind"], seconds, spent, self._offline[index])
        self._mark = self._mark[0], self.protocol.traffic()

    def count(self, layer: str, kind: str, offline: tuple[float, int] = (0.0, 0)) -> None:
        """Charge all that happened since the last call to one layer and kind, so that the rows add up to the whole.

        `offline` is the dealer's part: seconds, which are among all that happened, and bytes, which come on top.
        """
        seconds, before = self._mark
        self._mark = now, after = time.perf_counter(), self.protocol.traffic()
        rounds, size, serial = (b - a for a, b in zip(before, after))
        self._row(layer, kind, now - seconds, Traffic(int(rounds), size, serial), offline)

    def _row(self, layer: str, kind: str, seconds: float, spent: Traffic, offline: tuple[float, int]) -> None:
        self.rows.append(
            {
                "layer": layer,
                "kind": kind,
                "seconds": seconds,
                "rounds": spent.rounds,
                "bytes": int(spent.bytes),
                "serial_bytes": int(spent.serial),
                "offline_seconds": offline[0],
                "offline_bytes": offline[1],
            }
        )

    def tell_clocks(self, rank: int) -> None:
        """Give the client the server's clock: seconds of every row, and how long dealing took.

        Under TFP it is the server that deals, and the client merely waits for it. What the server computes when the
        client has already sent shows in `server_seconds` alone.
        """
        ours = torch.tensor([[row["seconds"], row["offline_seconds"]] for row in self.rows], dtype=torch.float64)
        for row, (seconds, offline) in zip(self.rows, self.protocol.to_client(ours, rank).tolist(), strict=True):
            row["server_seconds"], row["offline_seconds"] = seconds, min(offline, row["seconds"])

    def run_node(self, node: fx.Node):
        """Run one node after those before it, and charge it to its place in the network."""
        index = len(self.order)
        self.order.append(node)
        if self._recording:
            self.protocol.note(index)
            return super().run_node(node)
        self.protocol.supply(index, str(node.target))
        result = super().run_node(node)
        if self.keep and node.op == "call_module" and (parts := self.protocol.parts(result)):
            self.kept[node.name] = parts
        self.count(node.meta["layer"], node.meta["kind"], self.protocol.supplied())
        return result

    def call_module(self, target, args, kwargs):
        """A leaf module, by the protocol of its type."""
        module = self.fetch_attr(target)
        secret = {name: self.secrets[f"{target}.{name}"] for name in parameters_of(module)}
        result = self.protocol.modules[type(module)](module, secret, *args, **kwargs)
        self.protocol.watch(result)
        return result

    def call_function(self, target, args, kwargs):
        """A function, by the protocol's table."""
        return self.protocol.functions[target](*args, **kwargs)

    def call_method(self, target, args, kwargs):
        """A method, by the protocol's table."""
        return self.protocol.functions[target](*args, **kwargs)

    def get_attr(self, target, args, kwargs):
        """A parameter that the graph uses directly, such as the position embedding."""
        return self.secrets[target]


class DomainInterpreter(fx.Interpreter):
    """Runs a graph in the clear and notes every operation whose input leaves what its protocol can compute.

    `violations` says so in words; `spans` has what was seen of every operation in all runs, by its place and quantity.

    Args:
        graph: the traced model, with its weights.
        protocol: whose domains are watched.
    """

    def __init__(self, graph: fx.GraphModule, protocol: Protocol):
        super().__init__(graph)
        self.protocol = protocol
        self.violations: list[str] = []
        self.spans: dict[tuple[str, str], Span] = {}

    def call_module(self, target, args, kwargs):
        """A leaf module, its input checked first."""
        module = self.fetch_attr(target)
        found = self.protocol.domains.get(type(module), lambda *_: [])(module, *args)
        for span in found:
            before = self.spans.setdefault((str(target), span.what), span)
            widest = span._replace(low=min(before.low, span.low), high=max(before.high, span.high))
            self.spans[str(target), span.what] = widest
        result = super().call_module(target, args, kwargs)
        whole = found + spans("results", result, (-LIMIT, LIMIT))
        self.violations += [f"{target}: {reason}" for span in whole if (reason := span.outside)][:1]
        return result
