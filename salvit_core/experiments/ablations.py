"""The ablations of L2Q (Figures 7 and 8): what is trained, its accuracy, what learning costs on shares."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ..models.config import preset
from . import latency
from .profiles import Profile
from .runs import PrivateRun, TrainRun
from .store import seeds_said

# The variants of one network whose normaliser differs (Figures 7 and 8).
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": dict(normalizer="softmax"),
    "2Quad": dict(normalizer="2quad"),
    "L2Q global": dict(normalizer="l2q", l2q_granularity="global"),
    "L2Q head-wise": dict(normalizer="l2q", l2q_granularity="head"),
    "L2Q element-wise": dict(normalizer="l2q"),
    "L2Q, C only": dict(normalizer="l2q", l2q_learn_d=False),
    "L2Q, D only": dict(normalizer="l2q", l2q_learn_c=False),
}
FIGURE_7 = ("softmax", "2Quad", "L2Q global", "L2Q head-wise", "L2Q element-wise")
FIGURE_8 = ("softmax", "2Quad", "L2Q, C only", "L2Q, D only", "L2Q element-wise")


def runs(size: Profile, sets: Iterable[str], seed: int = 0) -> dict[TrainRun, tuple[str, str, int]]:
    """What notebook 02 trains: run to (data set, variant, seed)."""
    return {
        size.training(data, size.config(data, **changes), seed=seed + s): (data, variant, s)
        for data in sets
        for s in range(size.seeds)
        for variant, changes in VARIANTS.items()
    }


def accuracies(plan: Mapping[TrainRun, tuple[str, str, int]], found: Mapping[TrainRun, dict]) -> pd.DataFrame:
    """One row per training on record: dataset, variant (a category), seed, accuracy (%), parameters."""
    rows = [
        (*plan[run], record["metrics"]["test_accuracy"], record["metrics"]["parameters"])
        for run, record in found.items()
    ]
    table = pd.DataFrame(rows, columns=["dataset", "variant", "seed", "accuracy", "parameters"])
    return table.assign(variant=pd.Categorical(table["variant"], list(VARIANTS)))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per data set and variant: mean accuracy, lowest, highest, how many seeds, parameters."""
    groups = table.astype({"variant": str}).groupby(["dataset", "variant"], sort=False)
    return groups.agg(
        accuracy=("accuracy", "mean"),
        low=("accuracy", "min"),
        high=("accuracy", "max"),
        seeds=("accuracy", "size"),
        parameters=("parameters", "first"),
    )


def variant_runs(shape: str, queries: int, protocol: str, seed: int = 0) -> dict[PrivateRun, str]:
    """Private inferences of each variant of a preset, to the variant's name."""
    return {
        PrivateRun(preset(shape, attention="self", **changes), protocol, query=query, seed=seed): variant
        for query in range(queries)
        for variant, changes in VARIANTS.items()
    }


def variant_costs(asked: Mapping[PrivateRun, str], found: Mapping[PrivateRun, dict]) -> pd.DataFrame:
    """Operations of the variants that are on record, as `latency.operations`, in the order of the variants."""
    order = list(VARIANTS)
    kept = sorted(found, key=lambda run: (order.index(asked[run]), run.query))
    return latency.operations({run: found[run] for run in kept}, {run: asked[run] for run in kept})


def counted_variants(shape: str) -> pd.DataFrame:
    """Rounds and bytes of the variants of a preset with `tuned`, from shapes: all of one version of the code."""
    return latency.estimated({name: preset(shape, attention="self", **changes) for name, changes in VARIANTS.items()})


def cost_of_learning(rows: pd.DataFrame, mean: pd.Series, data: str) -> pd.DataFrame:
    """What each variant costs in private, its normalisers' part, and the accuracy it has on a data set."""
    table = latency.totals(rows, baseline="softmax")
    table = table[["queries", "seconds", "low", "high", "rounds", "megabytes", "offline_megabytes", "ratio"]]
    part = rows[rows["kind"] == "normaliser"].groupby(["method", "query"], observed=True)[["seconds", "bytes"]].sum()
    part = part.groupby("method", observed=True).median()
    table = table.assign(normaliser_seconds=part["seconds"], normaliser_mb=part["bytes"] / 1e6)
    return table.set_axis(table.index.astype(str)).rename_axis("method").join(mean.rename(f"accuracy {data}"))


def said_of_ablations(table: pd.DataFrame, cost: pd.DataFrame, tuned: pd.DataFrame) -> str:
    """Markdown: the order of the variants, and what learning C and D costs.

    Args:
        table: `summary`.
        cost: `cost_of_learning` with stock.
        tuned: `counted_variants`.
    """
    mean, lines = table["accuracy"].unstack(0), []
    for data in mean:
        order = mean[data].dropna().sort_values(ascending=False)
        within, seeds = (table.loc[data, "high"] - table.loc[data, "low"]).max(), table.loc[data, "seeds"]
        spread = (
            f"{seeds_said(seeds).capitalize()} each; those of one variant lie up to {within:.2f} points apart: smaller "
            "differences say nothing."
            if seeds.max() > 1
            else "One seed each: how far seeds alone move these numbers was not measured."
        )
        lines.append(f"- **{data}**: {', '.join(f'{name} {value:.2f}' for name, value in order.items())}. {spread}")
    if {"L2Q element-wise", "2Quad", "L2Q, C only"} <= set(cost.index):
        mb, rounds = cost["normaliser_mb"], cost["rounds"]
        lines.append(
            "- **With `stock`, element-wise L2Q is not free**: its normalisers move "
            f"{mb['L2Q element-wise']:.0f} MB one way, 2Quad's {mb['2Quad']:.0f}; "
            f"{rounds['L2Q element-wise'] - rounds['2Quad']} rounds more. All of it is $D$, a product of two secrets. "
            f"$C$ is an addition, local: C only moves {mb['L2Q, C only']:.0f} MB."
        )
    counted = tuned.groupby("method", observed=True)[["rounds", "bytes"]].sum()
    told = [f"{name} {line['bytes'] / 1e6:.1f} MB in {line['rounds']:.0f} rounds" for name, line in counted.iterrows()]
    more = counted.loc["L2Q element-wise"] - counted.loc["2Quad"]
    lines.append(
        f"- **With `tuned`** the whole network has (exact, from shapes): {', '.join(told)}. There the server, which "
        "knows C and D, multiplies by them without a message: an entry's own cost what one pair for the network "
        f"costs. What L2Q has more than 2Quad, {more['rounds']:.0f} rounds and {more['bytes'] / 1e6:.1f} MB, is the "
        "exact truncation of its squares."
    )
    return "\n".join(lines)
