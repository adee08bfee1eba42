"""The latency study: one network with random weights, one random query, one record."""

import functools
from dataclasses import dataclass

import pandas as pd
import torch

from ..cct import CCT, METHODS, PRESETS, CCTConfig, preset
from .launch import infer


@dataclass(frozen=True)
class LatencyRun:
    """One private inference of one image. Latency needs no training: it depends on shapes, not on values.

    Attributes:
        network: the architecture.
        query: which of several equal queries this is; they differ in the image and in the machine's noise.
        protocol: as in `private.infer`.
        provider: as in `private.infer`.
        seed: of the weights and, with `query`, of the image.
    """

    network: CCTConfig
    query: int = 0
    protocol: str = "stock"
    provider: str = "TFP"
    seed: int = 0


def measure(run: LatencyRun) -> dict:
    """Metrics of a run: totals, whether the answer was right, and the table of operations as rows."""
    torch.manual_seed(run.seed)
    model = CCT(run.network)
    torch.manual_seed(run.seed + 1 + run.query)
    images = torch.randn(1, run.network.channels, run.network.image, run.network.image)
    result = infer(model, images, run.protocol, run.provider, timeout=1800)
    return {
        "seconds": result.seconds,
        "offline_seconds": result.offline,
        "rounds": result.rounds,
        "bytes": result.bytes,
        "faithful": result.faithful,
        "logit_error": result.error,
        "violations": result.violations,
        "setup_seconds": result.setup,
        "threads": result.threads,
        "operations": result.operations.astype({"kind": str}).to_dict("records"),
    }


@functools.cache
def _named_networks() -> dict[CCTConfig, tuple[str, str]]:
    names = {}
    for network, fields in PRESETS.items():
        layers = fields.get("layers", CCTConfig.layers)
        for method, choice in METHODS.items():
            # On a network of B layers, SAL-ViT at budget B is plain self-attention: the first name stays.
            if not isinstance(choice["attention"], int) or choice["attention"] <= layers:
                names.setdefault(preset(network, method), (network, method))
    return names


def name_of(record: dict) -> tuple[str, str] | None:
    """Preset and method of a record's network, or None where it is no preset with a method of the paper."""
    return _named_networks().get(CCTConfig(**record["config"]["network"]))


def operations(found: list[dict], methods: list[str] | None = None) -> pd.DataFrame:
    """Latency records as one table of operations: network, method, query, layer, kind, seconds, rounds, bytes.

    Args:
        found: latency records.
        methods: what to call each; where left out, the paper's names.

    Raises:
        ValueError: a record of a network that has no name, and none is given.
    """
    tables = []
    for i, record in enumerate(found):
        name = name_of(record)
        if methods is None and name is None:
            raise ValueError(f"record {record['key']} is of a network without a name: give methods")
        rows = pd.DataFrame(record["metrics"]["operations"])
        rows.insert(0, "network", name[0] if name else "")
        rows.insert(1, "method", methods[i] if methods else name[1])
        rows.insert(2, "query", record["config"]["query"])
        tables.append(rows)
    table = pd.concat(tables, ignore_index=True)
    order = list(dict.fromkeys(methods)) if methods else [name for name in METHODS if name in set(table["method"])]
    table["method"] = pd.Categorical(table["method"], order)
    return table


def totals(rows: pd.DataFrame, baseline: str = "SA softmax") -> pd.DataFrame:
    """Per method: median seconds with their range over the queries, rounds and MB one way, and ratios to a baseline.

    Args:
        rows: a table of `operations`, of one network.
        baseline: the method whose median latency is 1.

    Returns:
        Indexed by method: queries, seconds, low, high, seconds_without_layernorm (the paper's accounting), rounds,
        megabytes, ratio, ratio_without_layernorm.
    """
    per_query = rows.groupby(["method", "query"], observed=True)[["seconds", "rounds", "bytes"]].sum()
    paper = rows[rows["kind"] != "LayerNorm"].groupby(["method", "query"], observed=True)["seconds"].sum()
    seconds = per_query["seconds"].groupby("method", observed=True)
    others = per_query.groupby("method", observed=True)
    table = pd.DataFrame(
        {
            "queries": seconds.size(),
            "seconds": seconds.median(),
            "low": seconds.min(),
            "high": seconds.max(),
            "seconds_without_layernorm": paper.groupby("method", observed=True).median(),
            "rounds": others["rounds"].median().astype(int),
            "megabytes": others["bytes"].median() / 1e6,
        }
    )
    table["ratio"] = table["seconds"] / table["seconds"][baseline]
    without = table["seconds_without_layernorm"]
    table["ratio_without_layernorm"] = without / without[baseline]
    return table


def by_kind(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One row per method, one column per kind of operation: the median over the queries of seconds, rounds or bytes."""
    per_query = rows.groupby(["method", "query", "kind"], observed=True)[quantity].sum()
    return per_query.groupby(["method", "kind"], observed=True).median().unstack(fill_value=0.0)
