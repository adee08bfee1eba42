"""What a private inference will cost, from shapes alone: exact rounds and bytes, nothing computed, no process.

The protocols are run on the meta device and what they would send is added up: `tuned` as both parties do before a
session to tell the dealer what they need, `stock` by a rehearsal of CrypTen's functions. Seconds are modelled from a
calibration of this machine (`experiments.calibration`).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from ..compat import without_compiler
from ..fields import shown, whole
from ..models.graph import TRACING
from ..models.operations import KINDS
from . import protocol_of
from .asked import Asked, config_of, link_problem, model_problem
from .interpreter import SecretInterpreter, network_of
from .links import Link
from .protocol import SERVER
from .rehearsal import rehearse
from .tuned import PROTOCOL as TUNED
from .tuned.arithmetic.share import BITS, session

_ONE_AT_A_TIME = threading.Lock()  # the session is this process's only one

# What a machine's seconds are made of, per unit: see `Speed`.
WORK = ("rounds", "words", "offline_words", "products", "uncached_words")
CACHED = 2**17  # words of one layer's operations, 1 MiB: what a core has near it


@dataclass(frozen=True)
class Speed:
    """What a unit of work takes on one machine, in seconds, both parties and the dealer sharing its processor.

    Attributes:
        rounds: of one exchange or message on loopback.
        words: of one 64-bit word that is opened: masked, sent, and worked on.
        offline_words: of one word of corrections that the dealer makes.
        products: of one multiplication of ring elements in a matrix product or convolution.
        uncached_words: what each word of either kind beyond the first `CACHED` of a layer's operations takes besides.
    """

    rounds: float
    words: float
    offline_words: float
    products: float
    uncached_words: float


@dataclass(frozen=True)
class Costs:
    """A table of operations, one row per layer and kind, and what it adds up to."""

    operations: pd.DataFrame

    @property
    def rounds(self) -> int:
        """Total of the operations' rounds."""
        return int(self.operations["rounds"].sum())

    @property
    def bytes(self) -> int:
        """Total of the operations' bytes, one way."""
        return int(self.operations["bytes"].sum())

    @property
    def dealer_bytes(self) -> int:
        """What a dealer of its own sends, or would send under "TFP"."""
        return int(self.operations["offline_bytes"].sum())


@dataclass(frozen=True)
class Estimate(Costs):
    """What one query will cost.

    Attributes:
        operations: one row per layer and kind of operation, as `private.Result.operations`: rounds, bytes (one way),
            serial_bytes and offline_bytes exact; with `tuned` products, the multiplications in matrix products and
            convolutions, and with a speed seconds, modelled.
    """

    @property
    def seconds(self) -> float | None:
        """Modelled, all in; None without a speed."""
        return float(self.operations["seconds"].sum()) if "seconds" in self.operations else None


def estimate(
    model: nn.Module,
    shape: Sequence[int],
    protocol: str = "tuned",
    provider: str = "TFP",
    link: Link | None = None,
    bits: int | None = None,
    reveal: str = "logits",
    speed: Speed | None = None,
) -> Estimate:
    """The table of `private.infer` from shapes alone, nothing run.

    Args:
        model: as in `infer`; its weights are not looked at.
        shape: of one query's images, (B, C, height, width).
        protocol: as in `infer`.
        provider: as in `infer`. The numbers are the same: offline_bytes are what a dealer of its own sends (TTP), or
            would send if the server did not deal itself (TFP).
        link: adds what rounds and bytes take on it to the modelled seconds.
        bits: as in `infer`.
        reveal: as in `infer`.
        speed: of this machine with `tuned`; without it no seconds are modelled.

    Raises:
        ValueError: an unknown protocol or provider, bits out of range, a shape that does not fit, a network that cannot
            be run, or a speed for `stock`.
    """
    bits = Asked(protocol, provider, bits=bits, reveal=reveal).bits
    if problem := model_problem(model) or link_problem(link):
        raise ValueError(problem)
    if speed is not None and not isinstance(speed, Speed):
        raise ValueError(f"speed is {shown(speed)}: give a Speed, which salvit calibrate measures, or None")
    if speed is not None and protocol != "tuned":
        raise ValueError(f"seconds of protocol {protocol!r} cannot be modelled: a speed is of tuned")
    if not isinstance(shape, Sequence) or len(shape) != 4 or not all(whole(side) and side > 0 for side in shape):
        raise ValueError(f"shape is {shown(shape)}: give (B, C, height, width), each at least 1")
    config = config_of(model)
    if config is not None and tuple(shape[1:]) != (config.channels, config.image, config.image):
        expected = f"(B, {config.channels}, {config.image}, {config.image})"
        raise ValueError(f"images of shape {tuple(shape)} do not fit: this network reads {expected}")
    graph = network_of(model, shape, protocol_of(protocol))
    with _ONE_AT_A_TIME, TRACING, without_compiler():
        graph = graph.to("meta")
        try:
            if protocol == "stock":
                rows = rehearse(graph, tuple(shape))
            else:
                rows = _recorded(TUNED.rewrite(graph), tuple(shape), bits or BITS, reveal)
        except RuntimeError as error:  # the interpreter adds lines on where it was
            reason = str(error).splitlines()[0]
            raise ValueError(f"images of shape {tuple(shape)} do not fit the network: {reason}") from error
    table = pd.DataFrame(rows).groupby(["layer", "kind"], sort=False).sum().reset_index()
    table["kind"] = pd.Categorical(table["kind"], KINDS)
    if speed is not None:
        table["seconds"] = modelled(table, speed)
        if link is not None:
            table["seconds"] += link.seconds(table["rounds"], table["serial_bytes"])
    return Estimate(table)


def work(table: pd.DataFrame) -> pd.DataFrame:
    """The work of a table with a row per layer and kind, in the units of `Speed`: columns `WORK`."""
    words, offline = table["bytes"] / 8, table["offline_bytes"] / 8
    uncached = (words + offline - CACHED).clip(lower=0)
    columns = (table["rounds"], words, offline, table["products"], uncached)
    return pd.DataFrame(dict(zip(WORK, columns, strict=True)))


def modelled(table: pd.DataFrame, speed: Speed) -> pd.Series:
    """Seconds on loopback of every row of such a table."""
    units = work(table)
    return sum((getattr(speed, name) * units[name] for name in WORK), start=pd.Series(0.0, units.index))


def _recorded(graph: torch.fx.GraphModule, shape: tuple[int, ...], bits: int, reveal: str) -> list[dict]:
    """With `tuned`, one row per node, and one for the answer's last message."""
    session.begin(SERVER, bits)
    network = SecretInterpreter(graph, TUNED)
    network.secrets = {name: TUNED.secret(name, tensor, 1 - SERVER) for name, tensor in graph.state_dict().items()}
    session.recording = True
    try:
        TUNED.record(network, shape, reveal)
        costs = session.tape.costs
    finally:
        session.begin(SERVER)
    found = dict(zip(network.order, costs))
    nodes = list(graph.graph.nodes)
    places = [(node.meta["layer"], node.meta["kind"]) for node in nodes] + [("head", "head")]
    return [
        {
            **{"layer": layer, "kind": kind, "rounds": cost.rounds, "bytes": int(8 * cost.words)},
            **{"serial_bytes": 8 * cost.serial, "offline_bytes": 8 * cost.offline, "products": cost.products},
        }
        for (layer, kind), cost in zip(places, [*(found[node] for node in nodes), costs[-1]], strict=True)
    ]
