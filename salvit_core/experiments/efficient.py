"""Efficient attention: accuracy against cost in the clear and on shares, Table 2 complete, growth with the tokens."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import workspace
from ..datasets import Data
from ..models import maps
from ..models.config import Network, preset
from ..models.operations import KINDS
from ..models.rows import MECHANISMS, ROWS
from . import latency, store
from .accuracy import best
from .profiles import Profile
from .runs import ClearRun, PrivateRun, TrainRun, network

BASES = ("SA softmax", "SA L2Q", "EA softmax", "EA L2Q")


def methods(size: Profile) -> list[str]:
    """The mechanisms that a profile compares: quick leaves out what differs little from its neighbours."""
    if size.name == "smoke":
        return ["SA softmax", "EA softmax", "Linformer", "Performer", "Hamburger", "Dilated hybrid"]
    every = [*BASES, *MECHANISMS]
    few = ("Linformer, heads", "Performer ReLU", "SA separate") if size.name == "quick" else ()
    return [name for name in every if name not in few]


def config(size: Profile, data: str, method: str, backbone: str = "cct") -> Network:
    """The network that is trained: the profile's CCT, or a ViT of about its size."""
    if backbone == "cct":
        return size.config(data, method)
    return network("vit_2" if data == "digits" else "vit_tiny", data, method)


def plan(size: Profile, sets: Iterable[str], backbone: str = "cct", seed: int = 0) -> dict[tuple[str, str], TrainRun]:
    """The trainings by data set and method."""
    return {
        (data, method): size.training(data, config(size, data, method, backbone), seed=seed)
        for data in sets
        for method in methods(size)
    }


def clear_runs(plan: Mapping[tuple[str, str], TrainRun], seed: int = 0) -> dict[tuple[str, str], ClearRun]:
    """What each network of a plan costs in the clear."""
    return {which: ClearRun(run.network, seed=seed) for which, run in plan.items()}


def private_runs(
    plan: Mapping[tuple[str, str], TrainRun], queries: int, seed: int = 0
) -> dict[tuple[str, str], list[PrivateRun]]:
    """Queries of each network of a plan on shares."""
    return {
        which: [PrivateRun(run.network, query=query, seed=seed) for query in range(queries)]
        for which, run in plan.items()
    }


def comparison(plan: Mapping, trained: Mapping, clear: Mapping, spent: Mapping, private: Mapping, on_shares: Mapping):
    """One row per training on record: accuracy, and what the network costs in the clear and on shares.

    Args:
        plan: (data set, method) to a training.
        trained: trainings to records.
        clear: (data set, method) to a `ClearRun`.
        spent: these to records.
        private: (data set, method) to queries.
        on_shares: these to records.
    """
    rows = []
    for which, run in plan.items():
        if run not in trained:
            continue
        metrics = trained[run]["metrics"]
        row = {"dataset": which[0], "method": which[1], "accuracy": metrics["test_accuracy"]}
        row |= {"top5": metrics.get("test_top5")}
        row |= {"train_s_per_epoch": metrics["seconds"] / len(trained[run]["history"])}
        if clear[which] in spent:
            free = spent[clear[which]]["metrics"]
            times = {batch: 1e3 * pd.Series(seconds) for batch, seconds in free["seconds"].items()}
            row |= {"parameters": free["parameters"], "mflops": free["flops"] / 1e6, "memory_mb": free["memory"] / 1e6}
            row |= {"ms_1": times["1"].median(), "iqr_1": times["1"].quantile(0.75) - times["1"].quantile(0.25)}
            row |= {"ms_64": times["64"].median() / 64}
            row |= {"iqr_64": times["64"].quantile([0.25, 0.75]).diff().iloc[1] / 64}
            row |= {"ms_64_low": times["64"].min() / 64, "ms_64_high": times["64"].max() / 64}
        if there := [on_shares[each] for each in private[which] if each in on_shares]:
            queries = pd.DataFrame([latency.costs(record) for record in there])
            cost = queries.median()
            row |= {"private_s": cost["seconds"], "private_mb": cost["bytes"] / 1e6, "rounds": int(cost["rounds"])}
            row |= {"private_s_low": queries["seconds"].min(), "private_s_high": queries["seconds"].max()}
            row |= {"dealer_mb": cost["offline_bytes"] / 1e6}
            row |= {"error": max(record["metrics"]["logit_error"] for record in there)}
        rows.append(row)
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """`comparison` to be read: rounded, errors to a digit, without the spread of measurements, which figures draw."""
    spread = [name for name in table if name.endswith(("_low", "_high")) or name.startswith("iqr_")]
    made = table.drop(columns=spread).set_index(["dataset", "method"]).round(3)
    return made.assign(error=table["error"].map("{:.1g}".format).to_numpy()) if "error" in table else made


def publish(table: pd.DataFrame, name: str) -> None:
    """The comparison beside the local records, as JSON and CSV."""
    folder = store.folder() / "efficient"
    workspace.write(folder / f"{name}.json", table.to_json(orient="records", indent=1))
    workspace.write(folder / f"{name}.csv", table.to_csv(index=False))


COSTS = {
    "mflops": ("FLOPs", "MFLOPs per image (log)"),
    "ms_64": ("in the clear", "ms per image in the clear (log)"),
    "private_s": ("on shares", "private latency (s, log)"),
}


def panels(table: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Accuracy against each cost that is there, for a figure: panels and the labels of their axes, by title."""
    series = pd.Categorical(table["method"], list(ROWS))
    made = {}
    for column in (name for name in COSTS if name in table):
        ends = {f"x{end}": table[f"{column}{end}"] for end in ("", "_low", "_high") if f"{column}{end}" in table}
        made[column] = table.assign(series=series, **ends)
    made = {column: part.dropna(subset=["x"]) for column, part in made.items()}
    made = {column: part for column, part in made.items() if len(part)}
    titles = {column: COSTS[column] for column in made}
    return {titles[c][0]: part for c, part in made.items()}, dict(titles.values())


def said_of_comparison(table: pd.DataFrame) -> str:
    """Markdown: what nothing beats by each cost, and how little FLOPs say of private latency."""
    lines, there = [], [column for column in COSTS if column in table and table[column].notna().any()]
    for column in there:
        part = table.dropna(subset=[column]).set_index("method")
        order = part.loc[best(part, column)].sort_values(column)
        told = ", ".join(f"{name} ({one[column]:.3g}; {one['accuracy']:.2f} %)" for name, one in order.iterrows())
        lines.append(f"- **{COSTS[column][0]}**: nothing is both cheaper and more accurate than {told}.")
    if len(there) == len(COSTS):
        order = table.set_index("method")[list(COSTS)].rank()
        moved = (order["private_s"] - order["mflops"]).sort_values()
        alike = order.corr().loc["mflops", "private_s"]
        lines.append(
            f"- **FLOPs and private latency** have a rank correlation of {alike:.2f} over {len(order)} "
            f"mechanisms: {moved.index[-1]} falls {moved.iloc[-1]:.0f} places from one order to the other, "
            f"{moved.index[0]} climbs {-moved.iloc[0]:.0f}."
        )
    lines.append("- One seed: differences of a point or so say nothing (notebook 02 shows spreads).")
    return "\n".join(lines)


# Table 2, with nothing left out

TABLE_2 = (
    "SA softmax",
    "Linformer",
    "CosFormer",
    "Hamburger",
    "SOFT",
    "EA softmax",
    "Performer",
    "Performer ReLU",
    "Nystromformer",
    "Dilated hybrid",
    "ReLU linear",
)


def at_full(method: str, brief: bool) -> Network:
    """The paper's network with a mechanism; Linformer's k is 128, as its row implies."""
    more = {"memory": 128} if method == "Linformer" and not brief else {}
    return preset("cct_4_3x2" if brief else "cct_7_3x1", method, **more)


def table_2_runs(size: Profile, seed: int = 0) -> tuple[dict[tuple[str, str], PrivateRun], ...]:
    """One attention layer of each mechanism with both protocols, and, in the long profiles, whole networks."""
    brief, long = size.name == "smoke", size.name in ("short", "paper", "reference")
    pairs = [(m, p) for m in (TABLE_2[:3] if brief else TABLE_2) for p in ("stock", "tuned")]
    layers = {(m, p): PrivateRun(at_full(m, brief), p, queries=2, alone=True, seed=seed) for m, p in pairs}
    whole = {(m, p): PrivateRun(at_full(m, brief), p, seed=seed) for m, p in pairs} if long else {}
    return layers, whole


def layer_rows(runs: Mapping[tuple[str, str], PrivateRun], found: Mapping[PrivateRun, dict]) -> pd.DataFrame:
    """Operations of the attention layers on record, with columns method (a category) and protocol."""
    parts = [
        pd.DataFrame(found[run]["metrics"]["operations"]).assign(method=method, protocol=protocol)
        for (method, protocol), run in runs.items()
        if run in found
    ]
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows["layer"] == "attention"]
    order = pd.Categorical(rows["method"], list(ROWS))
    return rows.assign(method=order, kind=pd.Categorical(rows["kind"], KINDS))


def table_2(runs: Mapping, found: Mapping, networks: Mapping, whole: Mapping) -> pd.DataFrame:
    """Table 2, ours beside the paper's: per mechanism the cost of an attention layer, and of a whole network.

    Args:
        runs: (method, protocol) to the run of a layer.
        found: these to records.
        networks: (method, protocol) to the run of a whole network.
        whole: these to records.
    """
    cells = {}
    for (method, protocol), run in runs.items():
        if run not in found:
            continue
        rows = latency.operations({run: found[run]}, {run: method}).query("layer == 'attention'")
        kinds = rows.groupby(["query", "kind"], observed=True)["seconds"].sum().groupby("kind", observed=True).median()
        total = rows.groupby("query")[["seconds", "rounds", "bytes", "offline_bytes"]].sum().median()
        cells[method, protocol] = {
            "seconds": total["seconds"],
            "rounds": int(total["rounds"]),
            "mb": total["bytes"] / 1e6,
            "dealer mb": total["offline_bytes"] / 1e6,
            "most": f"{kinds.idxmax()} {100 * kinds.max() / kinds.sum():.0f} %",
            "faithful": found[run]["metrics"]["faithful"],
        }
    table = pd.DataFrame(cells).T.unstack().swaplevel(axis=1).sort_index(axis=1)
    table = table.loc[[name for name in TABLE_2 if name in table.index]]
    table.columns = pd.Index([" ".join(names) for names in table.columns])
    for protocol in ("stock", "tuned"):
        seconds = table[f"{protocol} seconds"]
        table[f"{protocol} ratio"] = seconds / seconds["SA softmax"]
        costs = {
            m: latency.costs(whole[r])["seconds"] for (m, p), r in networks.items() if p == protocol and r in whole
        }
        table[f"{protocol} network s"] = pd.Series(costs, dtype=float)
    published = latency.paper(2).set_index("method")
    told = published["latency_s"].map("{:g}".format)
    table["paper s"] = told.where(~published["lower_bound"], ">" + told)
    table["paper ratio"] = published["latency_s"] / published["latency_s"]["SA softmax"]
    table["paper bottleneck"] = published["bottleneck"]
    return table.rename_axis("method")


def shown_table_2(table: pd.DataFrame) -> pd.DataFrame:
    """`table_2` to be read: rounded, under the protocols' names and the paper's; what is not on record is left out."""
    names = {"seconds": "s", "ratio": "ratio", "network s": "network s", "rounds": "rounds", "mb": "MB"}
    names |= {"most": "most", "faithful": "right"}
    columns = {(protocol, names[name]): f"{protocol} {name}" for protocol in ("stock", "tuned") for name in names}
    columns |= {("paper", name): f"paper {name}" for name in ("ratio", "bottleneck")}
    made = pd.DataFrame({place: table[name] for place, name in columns.items()}).dropna(axis=1, how="all")
    numbers = [place for place in made if place[1] not in ("most", "right", "bottleneck", "rounds")]
    return made.astype(dict.fromkeys(numbers, float)).round(2)


def table_2_panels(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Seconds of one attention layer by method and kind, with the range over the queries, a panel per protocol."""
    drawn = {}
    for protocol, part in rows.groupby("protocol"):
        table = latency.by_kind(part, "seconds", ranges=True)
        there = [name for name in TABLE_2 if name in table.index]
        drawn[f"{protocol}: seconds per layer"] = table.loc[there]
    return drawn


def said_of_table_2(table: pd.DataFrame) -> str:
    """Markdown: each mechanism's cost relative to softmax attention's, whether it answers rightly, what takes most."""
    lines = []
    for name, row in table.iterrows():
        told = f"{row['stock ratio']:.2f} of SA softmax with `stock`, {row['tuned ratio']:.2f} with `tuned`"
        right = {protocol: _called(row[f"{protocol} faithful"]) for protocol in ("stock", "tuned")}
        named = row["paper bottleneck"]
        named = f" The paper names: {named}." if isinstance(named, str) and name != "SA softmax" else ""
        most = f"{row['stock most']} (`stock`), {row['tuned most']} (`tuned`)"
        answers = f"answers {right['stock']} and {right['tuned']}"
        lines.append(f"- **{name}**: {told}; {answers}. Most of the seconds: {most}.{named}")
    return "\n".join(lines)


def _called(faithful: object) -> str:
    return "not on record" if pd.isna(faithful) else "right" if faithful else "wrong"


# Growth with the tokens

GROWING = (
    "SA softmax",
    "EA softmax",
    "Linformer",
    "CosFormer",
    "Performer",
    "Nystromformer",
    "Dilated hybrid",
    "SOFT",
    "Hamburger",
)


# What a figure of growth has on its axes, in the clear and on shares.
AXES = {
    "clear": {"mflops": "MFLOPs", "ms": "ms in the clear", "memory_mb": "MB of activations"},
    "private": {
        "private_s": "seconds on shares",
        "private_mb": "MB one way",
        "dealer_mb": "dealer's MB",
        "rounds": "rounds",
    },
}


def resolution_runs(size: Profile, seed: int = 0) -> tuple[dict, dict]:
    """One attention layer of each mechanism at several resolutions, by (method, side): in the clear, on shares."""
    brief, long = size.name == "smoke", size.name in ("short", "paper", "reference")
    sides = (32, 64) if brief else (32, 64, 112, 224)
    grown = GROWING[:3] if brief else GROWING

    def at(method: str, side: int) -> Network:
        return preset("cct_4_3x2", method, image=side, channels=3, layers=1, memory=64)

    free = {(method, side): ClearRun(at(method, side), (1,), 5, True, seed) for method in grown for side in sides}
    paid = {
        (method, side): PrivateRun(at(method, side), alone=True, seed=seed)
        for method in grown[: None if long else 4]
        for side in (sides if long else sides[:2])
    }
    return free, paid


def growth(free: Mapping, grown: Mapping, paid: Mapping, bought: Mapping) -> pd.DataFrame:
    """One row per mechanism (series) and number of tokens: cost in the clear, and on shares where it was run."""
    rows = []
    for (method, side), run in free.items():
        if run not in grown:
            continue
        found = grown[run]["metrics"]
        row = {"series": method, "tokens": run.network.tokens, "side": side, "mflops": found["flops"] / 1e6}
        times = 1e3 * pd.Series(found["seconds"]["1"])
        row |= {"memory_mb": found["memory"] / 1e6, "ms": times.median(), "ms_low": times.min(), "ms_high": times.max()}
        if (there := paid.get((method, side))) in bought:
            cost = latency.costs(bought[there])
            row |= {"private_s": cost["seconds"], "private_mb": cost["bytes"] / 1e6, "rounds": cost["rounds"]}
            row |= {"dealer_mb": cost["offline_bytes"] / 1e6}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(series=pd.Categorical(table["series"], list(ROWS)))


def said_of_growth(table: pd.DataFrame) -> str:
    """Markdown: from how many tokens on each mechanism is cheaper than softmax attention."""

    def crossing(method: str, column: str) -> str:
        both = table.dropna(subset=[column]).pivot_table(index="tokens", columns="series", values=column, observed=True)
        cheaper = both[method] < both["SA softmax"]
        held = [n for n in both.index if cheaper[cheaper.index >= n].all()]
        return f"from {held[0]} tokens" if held else f"never up to {both.index[-1]}"

    lines = []
    for method in [name for name in GROWING[1:] if name in set(table["series"])]:
        told = [f"{crossing(method, 'ms')} in the clear"]
        if "private_s" in table and table.loc[table["series"] == method, "private_s"].notna().any():
            told.append(f"{crossing(method, 'private_s')} on shares")
        lines.append(f"- **{method}** is faster than SA softmax {', '.join(told)}.")
    unpaid = table[table["private_s"].isna()] if "private_s" in table else table
    if len(unpaid):
        sizes = unpaid.groupby("series", observed=True)["tokens"].agg(lambda each: ", ".join(map(str, sorted(each))))
        names = "; ".join(f"{name} at {each}" for name, each in sizes.items())
        lines.append(f"- Not run on shares here: {names} tokens.")
    return "\n".join(lines)


# What they look at


def pictures(data: Data, count: int = 8) -> tuple[list[np.ndarray], torch.Tensor]:
    """The first test images, as pictures from 0 to 1 and as a network reads them."""
    images = data.test.images[:count].cpu()
    plain = [image.permute(1, 2, 0).squeeze(-1).numpy() / 255 for image in images]
    return plain, data.test.normalised(images)


def views(networks: Mapping[str, nn.Module], inputs: torch.Tensor) -> dict[str, list[np.ndarray]]:
    """Maps of each network's last layer, and its rollout through all layers, one per image."""
    found = {name: maps.last(model, inputs).mean(1) for name, model in networks.items()}
    found |= {f"{name}, rollout": maps.rollout(model, inputs).mean(1) for name, model in networks.items()}
    return {name: [maps.grid(one).numpy() for one in view] for name, view in found.items()}


def look(model: nn.Module, image: torch.Tensor, layer: int, head: int) -> np.ndarray:
    """The mean token's weights in one layer and head (from 1), as a picture."""
    weights = maps.weights(model, image)[layer - 1][0]
    return maps.grid(weights[min(head, len(weights)) - 1].abs().mean(0)).numpy()


def with_weights(plan: Mapping, data: str, source: str) -> dict[str, TrainRun]:
    """The trainings on one data set whose weights are here, and have maps of tokens, by method; none without images."""
    return _weights(plan, data, source) if _images(data, source) else {}


def said_of_absent_maps(plan: Mapping, data: str, source: str) -> str:
    """Markdown: what the maps lack."""
    here = len(_weights(plan, data, source))
    if not here:
        return f"No maps: no weights of these networks are on record ({source})."
    return (
        f"No maps: weights of {here} networks are on record, the images of {data} are not here. Looking at the "
        "project's own records downloads nothing; a local study does, and then they are drawn."
    )


def _weights(plan: Mapping, data: str, source: str) -> dict[str, TrainRun]:
    """External attention moves nothing between tokens."""
    runs = {method: run for (name, method), run in plan.items() if name == data and not method.startswith("EA")}
    return {method: run for method, run in runs.items() if store.path(run, source, ".pt").exists()}


def _images(data: str, source: str) -> bool:
    """Eight pictures are not worth a download."""
    return source != "reference" or data != "cifar10" or Path(workspace.ROOT, "data", "cifar-10-batches-py").is_dir()
