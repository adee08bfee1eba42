"""What notebook 00 shows: the network that ships, its answers on shares, costs, and where a reciprocal holds.

The network is small enough that its weights are a reference record's like any other's, and its images are always there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..models.config import preset
from ..models.normalizers import NORMALIZERS
from ..private.domains import Span
from ..training.recipe import Recipe
from . import latency
from .execute import Found, carry_over, collect, dataset
from .runs import EvaluationRun, TrainRun

SHIPPED = TrainRun("digits", preset("cct_4_3x1", "SAL-ViT B=2"), Recipe(epochs=40, batch=64, lr=2e-3, augment="none"))
IMAGES = 8  # of the test split, in one query
PROTOCOLS = ("tuned", "stock")


def images() -> torch.Tensor:
    """The images that are sent, as the network reads them: (IMAGES, 1, 8, 8), float."""
    from ..private.evaluation import drawn  # CrypTen, which a machine that only trains lacks

    return drawn(dataset(SHIPPED.data), IMAGES)[0]


def answered(source: str = "local") -> Found[EvaluationRun]:
    """The network's answers on shares with each protocol, `tuned` first; with "local" records run now, if need be.

    Raises:
        ValueError: an unknown source of records.
    """
    if source == "local":
        carry_over(SHIPPED)
    runs = [EvaluationRun(SHIPPED, n=IMAGES, batch=IMAGES, protocol=protocol) for protocol in PROTOCOLS]
    return collect(runs, source, "private inference")


def logits(found: Mapping[EvaluationRun, dict], image: int = 0) -> pd.DataFrame:
    """One image's logits, in the clear and on shares: indexed by class, columns in the clear and each protocol."""
    history = {run.protocol: record["history"][image] for run, record in found.items()}
    columns = {"in the clear": next(iter(history.values()))["clear"]}
    columns |= {f"on shares, {protocol}": each["private"] for protocol, each in history.items()}
    return pd.DataFrame(columns).rename_axis("class")


def said_of_answers(found: Mapping[EvaluationRun, dict]) -> str:
    """Markdown: the class of the first image and of all, in the clear and with each protocol; what left its domain."""
    lines = []
    for run, record in found.items():
        facts, first = record["metrics"], record["history"][0]
        clear, private = (int(np.argmax(first[name])) for name in ("clear", "private"))
        same = round(facts["agreement"] * facts["images"] / 100)
        left = f"; outside their domain: {len(facts['violations'])} operations" if facts["violations"] else ""
        lines.append(
            f"- **{run.protocol}**: the image is a {first['label']}, in the clear the network says {clear}, on shares "
            f"**{private}**. Of {facts['images']} images {same} get the clear network's class; the largest error of a "
            f"logit is {facts['largest_error']:.2g}{left}."
        )
    return "\n".join(lines)


# Where a reciprocal holds


def row_sums(found: Mapping[EvaluationRun, dict]) -> dict[str, tuple[float, float]]:
    """What the network divides by in its attention: the least and largest sum seen, and what each protocol covers.

    `stock` takes the reciprocal of the sum as it is, `tuned` of the sum over a public scale; its range is given times
    that scale, as far as it is common to all layers.
    """
    spans: dict[str, dict[str, Span]] = {}
    for run, record in found.items():
        rows = [row for row in record["metrics"]["ranges"] if row["place"].endswith("attention.normalizer")]
        spans[run.protocol] = {row["place"]: Span(*(row[name] for name in Span._fields)) for row in rows}
    raw, scaled = spans["stock"], spans["tuned"]
    scale = {place: raw[place].high / scaled[place].high for place in raw}
    covered = [(row.least * scale[place], row.most * scale[place]) for place, row in scaled.items()]
    return {
        "CrypTen within 1 %": (max(row.least for row in raw.values()), min(row.most for row in raw.values())),
        "sums in this network": (min(row.low for row in raw.values()), max(row.high for row in raw.values())),
        "tuned": (max(least for least, _ in covered), min(most for _, most in covered)),
    }


def reciprocal_errors(reciprocal: Callable[[np.ndarray], np.ndarray], bits: int = 16) -> pd.DataFrame:
    """Relative errors of a reciprocal in fixed point, for 400 numbers from 1e-2 to 1e4.

    Args:
        reciprocal: of whole numbers (n,), int64, in units of 2^-bits; gives the same.
        bits: fractional.

    Returns:
        columns x and error, |x y - 1|.
    """
    numbers = np.rint(np.logspace(-2, 4, 400) * 2**bits).astype(np.int64)
    x, y = numbers / 2**bits, reciprocal(numbers) / 2**bits
    return pd.DataFrame({"x": x, "error": np.abs(x * y - 1)})


# What a network would cost, and normalisers


QUANTITIES = {"rounds": ("rounds", 1), "MB one way": ("bytes", 1e6), "dealer's MB": ("offline_bytes", 1e6)}


def costs(method: str, baseline: str = "SA softmax", network: str = "cct_7_3x1") -> dict[str, pd.DataFrame]:
    """Rounds and bytes of a method beside a baseline's, with both protocols: a table by kind per quantity.

    Exact, from shapes alone.
    """
    networks = {name: preset(network, name) for name in dict.fromkeys([baseline, method])}
    counted = {protocol: latency.estimated(networks, protocol) for protocol in ("stock", "tuned")}
    tables = {}
    for label, (quantity, unit) in QUANTITIES.items():
        each = {protocol: latency.by_kind(rows, quantity) / unit for protocol, rows in counted.items()}
        tables[label] = pd.DataFrame({f"{name}, {p}": each[p].loc[name] for name in networks for p in each}).T
    return tables


def longest(network: str = "cct_7_3x1") -> list[float]:
    """The most that one of the paper's methods needs of each of `QUANTITIES`: where axes end that are to stay.

    It is SA softmax's or, of rounds, EA softmax's, which normalises twice; with `stock`.
    """
    rows = latency.estimated({name: preset(network, name) for name in ("SA softmax", "EA softmax")}, "stock")
    by_method = rows.groupby("method", observed=True)
    return [float(by_method[quantity].sum().max() / unit) for quantity, unit in QUANTITIES.values()]


def normalizer_weights(c: float = 1.0, d: float = 1.0) -> pd.DataFrame:
    """Each normaliser's weights over one row of 121 scores from -6 to 6: columns score, weight, normalizer."""
    scores = torch.linspace(-6, 6, 121)
    tables = []
    for name in ("softmax", "2Quad", "2ReLU", "L2Q"):
        options: dict[str, Any] = (
            {"granularity": "global", "initial_c": float(c), "initial_d": float(d)} if name == "L2Q" else {}
        )
        with torch.no_grad():
            row = NORMALIZERS[name.lower()](**options)(scores.reshape(1, 1, 1, -1)).flatten()
        tables.append(pd.DataFrame({"score": scores, "weight": row, "normalizer": name}))
    return pd.concat(tables)
