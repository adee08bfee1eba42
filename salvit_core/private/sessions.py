"""Equal queries in one session of the parties: what a link, a batch, a dealer or the size of a network changes.

The parties start once and the weights are masked once, so that a session of a few queries costs little more than one.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from ..cct import TransformerConfig
from ..vit import build
from .launch import infer
from .network import Link

QUANTITIES = ("seconds", "offline_seconds", "rounds", "bytes", "serial_bytes", "offline_bytes")


@dataclass(frozen=True)
class SessionRun:
    """Queries of random images to one network with random weights, in one session.

    Attributes:
        network: the architecture.
        batch: images in a query.
        queries: how many queries.
        protocol: as in `private.infer`.
        provider: as in `private.infer`.
        link: emulated connection; None for the bare loopback.
        seed: of the weights and of the images.
        alone: only the attention of the first layer, on random tokens in place of images.
    """

    network: TransformerConfig
    batch: int = 1
    queries: int = 3
    protocol: str = "tuned"
    provider: str = "TFP"
    link: Link | None = None
    seed: int = 0
    alone: bool = False


class _Alone(nn.Module):
    """One attention as a network: tokens stand where images do, (B, 1, N, M)."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(tokens.squeeze(1))


def measure(run: SessionRun) -> dict:
    """Metrics of a session: the table of operations of every query as rows, and whether the answers were right."""
    torch.manual_seed(run.seed)
    model = build(run.network)
    shape = (run.network.channels, run.network.image, run.network.image)
    if run.alone:
        model, shape = _Alone(model.blocks[0].attention), (1, run.network.tokens, run.network.width)
    torch.manual_seed(run.seed + 1)
    images = torch.randn(run.queries * run.batch, *shape)
    result = infer(model, images, run.protocol, run.provider, run.link, timeout=3600, batch=run.batch)
    return {
        "faithful": result.faithful,
        "logit_error": result.error,
        "violations": result.violations,
        "setup_seconds": result.setup,
        "threads": result.threads,
        "operations": result.queries.astype({"kind": str}).to_dict("records"),
    }


def costs(record: dict, statistic: str = "median") -> dict[str, float]:
    """What one query of a record cost: see `QUANTITIES`.

    Args:
        record: of a `SessionRun` or of a `latency.LatencyRun`. Records from before CrypTen's dealer was timed have 0
            for what is offline, and their messages all went both ways at once.
        statistic: over the queries, "median" or "min".
    """
    rows = pd.DataFrame(record["metrics"]["operations"])
    rows = rows.assign(**{name: make(rows) for name, make in _ABSENT.items() if name not in rows})
    per_query = rows.groupby("query")[list(QUANTITIES)].sum()
    return {name: float(value) for name, value in per_query.agg(statistic).items()}


_ABSENT = {
    "query": lambda rows: 0,
    "serial_bytes": lambda rows: rows["bytes"],
    "offline_seconds": lambda rows: 0.0,
    "offline_bytes": lambda rows: 0,
}


def on_link(record: dict, link: Link | None, statistic: str = "median") -> float:
    """Modelled seconds of one query of a loopback record on a link (`Link.latency`); None leaves them as measured."""
    query = costs(record, statistic)
    return query["seconds"] if link is None else link.latency(pd.DataFrame([query]))
