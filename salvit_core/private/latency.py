"""The latency study: one network with random weights, one random query, one record."""

import functools
from dataclasses import dataclass

import pandas as pd
import torch

from ..cct import PRESETS, ROWS, TransformerConfig, config_of, preset
from ..vit import build
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

    network: TransformerConfig
    query: int = 0
    protocol: str = "stock"
    provider: str = "TFP"
    seed: int = 0


def measure(run: LatencyRun) -> dict:
    """Metrics of a run: totals, whether the answer was right, and the table of operations as rows."""
    torch.manual_seed(run.seed)
    model = build(run.network)
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
def _named_networks() -> dict[TransformerConfig, tuple[str, str]]:
    names = {}
    for network, fields in PRESETS.items():
        layers = fields.get("layers", TransformerConfig.layers)
        for method, choice in ROWS.items():
            # On a network of B layers, SAL-ViT at budget B is plain self-attention: the first name stays.
            if not isinstance(choice["attention"], int) or choice["attention"] <= layers:
                names.setdefault(preset(network, method), (network, method))
    return names


def name_of(record: dict) -> tuple[str, str] | None:
    """Preset and method of a record's network, or None where it is no preset with a method of the paper."""
    return _named_networks().get(config_of(record["config"]["network"]))


# Columns that older records lack.
_LATER = {
    "serial_bytes": lambda rows: rows["bytes"],
    "offline_seconds": lambda rows: 0.0,
    "offline_bytes": lambda rows: 0,
}


def operations(found: list[dict], methods: list[str] | None = None) -> pd.DataFrame:
    """Latency records as one table of operations: network, method, query, protocol, layer, kind and what each cost.

    Costs are seconds, rounds, bytes, serial_bytes, offline_seconds and offline_bytes, as in `private.Result`. Records
    from before the last three were told apart get bytes, 0 and 0.

    Args:
        found: latency records, of any protocols.
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
        rows.insert(3, "protocol", record["config"]["protocol"])
        tables.append(rows.assign(**{name: make(rows) for name, make in _LATER.items() if name not in rows}))
    table = pd.concat(tables, ignore_index=True)
    order = list(dict.fromkeys(methods)) if methods else [name for name in ROWS if name in set(table["method"])]
    table["method"] = pd.Categorical(table["method"], order)
    return table


def _by(rows: pd.DataFrame) -> list[str]:
    """What tells measurements apart: the method, within its protocol where there are several."""
    return ["protocol", "method"] if rows["protocol"].nunique() > 1 else ["method"]


def totals(rows: pd.DataFrame, baseline: str = "SA softmax") -> pd.DataFrame:
    """Per method: median seconds with their range over the queries, rounds and MB one way, and ratios to a baseline.

    Args:
        rows: a table of `operations`, of one network.
        baseline: the method whose median latency is 1, each protocol's own; ratios are NaN in a protocol without it.

    Returns:
        Indexed by method, or by protocol and method where the rows are of several protocols: queries, seconds, low,
        high, seconds_without_layernorm (the paper's accounting), offline_seconds (a part of seconds), rounds,
        megabytes, offline_megabytes (what a dealer must send besides), ratio, ratio_without_layernorm.
    """
    by = _by(rows)
    costs = ["seconds", "offline_seconds", "rounds", "bytes", "offline_bytes"]
    per_query = rows.groupby([*by, "query"], observed=True)[costs].sum()
    paper = rows[rows["kind"] != "LayerNorm"].groupby([*by, "query"], observed=True)["seconds"].sum()
    seconds = per_query["seconds"].groupby(by, observed=True)
    median = per_query.groupby(by, observed=True).median()
    table = pd.DataFrame(
        {
            "queries": seconds.size(),
            "seconds": seconds.median(),
            "low": seconds.min(),
            "high": seconds.max(),
            "seconds_without_layernorm": paper.groupby(by, observed=True).median(),
            "offline_seconds": median["offline_seconds"],
            "rounds": median["rounds"].astype(int),
            "megabytes": median["bytes"] / 1e6,
            "offline_megabytes": median["offline_bytes"] / 1e6,
        }
    )
    for column, ratio in (("seconds", "ratio"), ("seconds_without_layernorm", "ratio_without_layernorm")):
        if len(by) == 1:
            table[ratio] = table[column] / table[column][baseline]
        else:
            table[ratio] = table[column].div(table[column].xs(baseline, level="method"), level="protocol")
    return table


def by_kind(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One row per method, one column per kind of operation: the median over the queries of seconds, rounds or bytes.

    Where the rows are of several protocols, one row per protocol and method.
    """
    by = _by(rows)
    per_query = rows.groupby([*by, "query", "kind"], observed=True)[quantity].sum()
    return per_query.groupby([*by, "kind"], observed=True).median().unstack(fill_value=0.0)
