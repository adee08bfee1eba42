"""More than two choices: a search among several mechanisms within a latency budget, beside SAL-ViT."""

import dataclasses
from collections.abc import Mapping

import pandas as pd

from ..models.config import TransformerConfig
from ..private.links import LINKS, Link
from ..search.priced import PricedSearch
from . import latency
from .accuracy import middle
from .profiles import Profile
from .runs import PrivateRun, SearchRun

CHOICES = {
    "self": "SA L2Q",
    "external": "EA L2Q",
    "scaling": "SA scaling",
    "linformer": "Linformer L2Q",
    "cosformer": "CosFormer",
    "dilated": "Dilated L2Q",
}
ATTENTION_KINDS = ("projection", "scores", "normaliser", "values", "recurrence")
FEW_CHOICES = ("self", "external", "scaling", "linformer")


def prices(networks: Mapping[str, TransformerConfig], link: Link) -> dict[str, float]:
    """What one layer of each mechanism's attention takes on a link with `tuned`, in seconds.

    Modelled from its rounds and bytes, which are exact: the same on every machine. The parties' computing is not in it.

    Args:
        networks: mechanism to a network that has it in every layer.
        link: between the parties.
    """

    def cost_of(config: TransformerConfig, kinds: tuple[str, ...]) -> pd.Series:
        steps = latency.estimated({"": config})
        inside = steps["layer"].str.startswith("block") & steps["kind"].isin(kinds)
        return steps.loc[inside, ["rounds", "serial_bytes"]].sum() / config.layers

    made = {}
    for name, config in networks.items():
        cost = cost_of(config, ATTENTION_KINDS)
        if name in ("hamburger", "parallel_scan", "mixer"):  # activations of their own, beside the MLP's
            bare = dataclasses.replace(config, attention="scaling")
            cost += cost_of(config, ("activation",)) - cost_of(bare, ("activation",))
        made[name] = round(link.seconds(cost["rounds"], cost["serial_bytes"]), 4)
    return made


def choice(size: Profile, data: str, seed: int = 0) -> tuple[SearchRun, dict[str, float]]:
    """The search among `CHOICES`, in short profiles `FEW_CHOICES`, within what SAL-ViT's attention takes on a WAN.

    That is with self-attention in `middle` layers. Beside the search each choice's price, in seconds.
    """
    few = size.name in ("smoke", "quick")
    known = prices(
        {name: size.config(data, row) for name, row in CHOICES.items() if not few or name in FEW_CHOICES},
        LINKS["WAN (Cheetah)"],
    )
    config, b = size.config(data, "SA L2Q"), middle(size, data)
    allowed = round(b * known["self"] + (config.layers - b) * known["external"], 4)
    return size.choice(data, config, known, allowed, seed), known


def chosen_network(search: SearchRun, record: dict) -> PrivateRun:
    """One query with `tuned` to the network that a search found."""
    config = dataclasses.replace(search.network, attention=tuple(record["metrics"]["architecture"]))
    return PrivateRun(config, seed=search.seed)


def choice_table(record: dict, known: Mapping[str, float]) -> pd.DataFrame:
    """|alpha| by layer and mechanism, the mechanisms' prices in ms, and what was chosen."""
    searched = record["metrics"]
    table = pd.DataFrame(searched["alphas"], columns=list(known)).abs()
    table.index = pd.Index([f"layer {i}" for i in range(1, len(table) + 1)], name="layer")
    table.loc["price (ms)"] = [1e3 * price for price in known.values()]
    return table.assign(chosen=[*searched["architecture"], ""])


def choice_panel(table: pd.DataFrame, data: str, record: dict, timed: dict, count: int) -> pd.DataFrame:
    """SAL-ViT by budget, and what the search among `count` mechanisms found, for a figure; `timed` is its query."""
    rivals = table[(table["dataset"] == data) & table["method"].str.match(r"SAS-L B=\d$")]
    rivals = rivals.dropna(subset=["tuned_seconds"])
    name = f"any of {count}"
    points = rivals.assign(x=rivals["tuned_seconds"], series="SA or EA", method=rivals["method"].str[6:])
    points = points[["x", "accuracy", "series", "method"]]
    points.loc[len(table)] = [latency.costs(timed)["seconds"], record["metrics"]["test_accuracy"], name, name]
    return points


def said_of_choice(table: pd.DataFrame, search: SearchRun, record: dict, timed: dict, b: int) -> str:
    """Markdown: what the search among several mechanisms took for its budget, beside SAL-ViT at budget `b`.

    Args:
        table: `with_costs`, with SAS-L at `b`.
        search: of `choice`.
        record: its.
        timed: the record of `chosen_network`.
        b: the budget.
    """
    of = search.search
    assert isinstance(of, PricedSearch)
    taken, known = record["metrics"]["architecture"], dict(zip(of.choices, of.prices, strict=True))
    rival = table[(table["dataset"] == search.data) & (table["method"] == f"SAS-L B={b}")].iloc[0]
    gap = record["metrics"]["test_accuracy"] - rival["accuracy"]
    return (
        f"Within {1e3 * of.budget:.0f} ms on a WAN for the attention of all layers (SAL-ViT's at B = {b}) the "
        f"search among {len(known)} takes {' - '.join(taken)}, {1e3 * sum(known[name] for name in taken):.0f} ms: "
        f"{gap:+.2f} points against SAL-ViT, whole networks {latency.costs(timed)['seconds']:.2f} s and "
        f"{rival['tuned_seconds']:.2f} s. One seed, its latency one query: a gap within the spread of seeds is no "
        "evidence of a better choice."
    )
