"""Accuracy of trained networks, as tables: searches and their rivals, ours beside the paper's."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from ..models import cost
from ..models.cct import CCT
from ..models.config import CCTConfig, TransformerConfig, config_of, preset
from ..models.rows import ROWS
from . import execute, latency
from .profiles import Profile, profile
from .runs import PrivateRun, Training
from .store import seeds_said

Plan = dict[str, Training]  # everything that is trained on one data set, by the name it has in the tables


def budgets(size: Profile, data: str) -> list[int]:
    """The paper's budgets that a profile's network has layers for."""
    return [b for b in (1, 2, 3) if b < size.config(data).layers]


def middle(size: Profile, data: str) -> int:
    """The budget that stands for all where one is enough."""
    known = budgets(size, data)
    return known[len(known) // 2]


def plan(size: Profile, data: str, seed: int = 0) -> Plan:
    """Everything that notebook 03 trains on one data set."""
    long, b_middle = size.name in ("short", "paper"), middle(size, data)
    names = ("SA softmax", "SA 2Quad", "SA L2Q", "SA scaling", "EA softmax", "EA L2Q")
    base: Plan = {name: size.training(data, size.config(data, name), seed=seed) for name in names}
    distil = dict(teacher=base["SA softmax"], distill_logits=1.0)
    base["SA 2Quad (KD)"] = size.training(data, size.config(data, "SA 2Quad"), seed=seed, **distil)
    l2q = size.config(data, "SA L2Q")
    for b in budgets(size, data):
        base[f"SAS-L B={b}"] = size.search(data, l2q, b, seed)
        base[f"SAS-L-WC B={b}"] = size.search(data, l2q, b, seed, rule="bottom")
        base[f"random B={b}"] = size.search(data, l2q, b, seed, rule="random")
        base[f"SAS-H B={b}"] = size.search(data, l2q, b * l2q.heads, seed, granularity="head")
    for b in range(1, l2q.layers) if long else ():  # up to B = L, which is SA L2Q
        base.setdefault(f"SAS-L B={b}", size.search(data, l2q, b, seed))
    for b in budgets(size, data) if long else [b_middle]:
        base[f"SAS-L B={b} (KD)"] = size.search(data, l2q, b, seed, **distil)  # type: ignore[arg-type]
    base[f"no L1 B={b_middle}"] = size.search(data, l2q, b_middle, seed, weight=0.0)
    base[f"released B={b_middle}"] = size.search(data, l2q, b_middle, seed, released=True)
    for name in ("softmax", "2Quad", "2ReLU"):
        base[f"SAS-L {name} B={b_middle}"] = size.search(data, size.config(data, f"SA {name}"), b_middle, seed)
    return base


def results(plans: Mapping[str, Plan], found: Mapping[Training, dict]) -> pd.DataFrame:
    """One row per training on record: dataset, method, accuracy (%), config, record, parameters, flops."""
    rows = []
    for data, each in plans.items():
        for name, run in each.items():
            if run not in found:
                continue
            metrics, fields = found[run]["metrics"], dataclasses.asdict(run.network)
            config = config_of(fields | ({"attention": a} if (a := metrics.get("architecture")) else {}))
            model = CCT(config)  # type: ignore[arg-type]  # this notebook's networks are CCTs
            line = {"dataset": data, "method": name, "accuracy": metrics["test_accuracy"], "config": config}
            size = {"parameters": cost.parameters(model), "flops": cost.flops(model)}
            rows.append({**line, "record": found[run], **size})
    return pd.DataFrame(rows)


def over_seeds(
    table: pd.DataFrame, size: Profile, seed: int = 0, source: str = "local", seeds: int = 3
) -> pd.DataFrame:
    """`results` with n seeds, accuracy their mean, accuracy_low and accuracy_high: of those that are on record.

    Nothing is trained for it: `make evidence` trains the others.

    Args:
        table: `results`.
        size: the profile that it is of.
        seed: the seed that it is of.
        source: as in `execute.recorded`.
        seeds: how many to look for, from 0.
    """
    values = {(line["dataset"], line["method"]): [line["accuracy"]] for _, line in table.iterrows()}
    for data, other in itertools.product(table["dataset"].unique(), set(range(seeds)) - {seed}):
        every = plan(size, data, other)
        found = execute.recorded(every.values(), source)
        for name, run in every.items():
            if run in found and (data, name) in values:
                values[data, name].append(found[run]["metrics"]["test_accuracy"])
    columns: dict[str, Callable[[list[float]], float]]
    columns = {"n": len, "accuracy": statistics.fmean, "accuracy_low": min, "accuracy_high": max}
    return table.assign(**{column: [made(each) for each in values.values()] for column, made in columns.items()})


def architectures(table: pd.DataFrame, data: str) -> dict[str, list[int]]:
    """What each search by layers gave self-attention: method to layers, from 1."""
    searches = table[(table["dataset"] == data) & table["method"].str.match("(SAS-L B|no L1|released)")]
    return {
        line["method"]: [i for i, kind in enumerate(line["record"]["metrics"]["architecture"], 1) if kind == "self"]
        for _, line in searches.iterrows()
    }


def paths(table: pd.DataFrame, data: str, searches: Mapping[str, str]) -> pd.DataFrame:
    """Alpha by epoch and layer of some searches, before the first epoch 0.1.

    Args:
        table: `results`.
        data: of one data set.
        searches: method to its title.

    Returns:
        columns search, layer, epoch, alpha.
    """
    rows = []
    for name, title in searches.items():
        for record in table.loc[(table["dataset"] == data) & (table["method"] == name), "record"]:
            trajectory = record["metrics"]["trajectory"]
            for epoch, alphas in enumerate([[0.1] * len(trajectory[0]), *trajectory]):
                rows += [(title, layer, epoch, alpha) for layer, alpha in enumerate(alphas, 1)]
    return pd.DataFrame(rows, columns=["search", "layer", "epoch", "alpha"])


def table_6(table: pd.DataFrame, sets: Iterable[str], known: Iterable[int]) -> pd.DataFrame:
    """Accuracy by data set, budget and search, ours beside the paper's (4-head networks of 7 or 9 layers)."""
    paper, rows = latency.paper(6), []
    for data, b, search in itertools.product(sets, known, ("SAS-L", "SAS-L-WC", "random", "SAS-H")):
        mine = table.query("dataset == @data").set_index("method")["accuracy"]
        compared = data if data in set(paper["dataset"]) else "cifar10"
        theirs = paper.query("dataset == @compared and search == @search and heads_self == 4 * @b")
        said = theirs["accuracy_percent"].iloc[0] if len(theirs) else None
        ours = mine.get(f"{search} B={b}")
        rows.append(dict(dataset=data, B=b, search=search, accuracy=ours, paper=said, paper_data=compared))
    return pd.DataFrame(rows).set_index(["dataset", "B", "search"])


# Private latency of what was trained


def measured_as(config: CCTConfig) -> CCTConfig:
    """The network whose latency stands for all with as many layers of each kind: which ones does not matter to it."""
    return dataclasses.replace(config, attention=tuple(sorted(config.attention, reverse=True, key=str)))


def counterpart(config: TransformerConfig, network: str) -> Any:
    """A preset with the attention of another network: its normaliser, and as many layers of self-attention.

    Args:
        config: of layers alike, or of self-attention in some and one other attention in the rest.
        network: the preset.
    """
    others = [name for name in config.attention if name != "self"]
    attention, layers = "self", preset(network).layers
    if others:
        count = len(config.attention) - len(others)
        attention = ("self",) * count + (others[0],) * (layers - count)
    same = {field: getattr(config, field) for field in dataclasses.asdict(config) if field.startswith("l2q_")}
    return preset(network, normalizer=config.normalizer, attention=attention, **same)


def private_runs(table: pd.DataFrame, queries: int, seed: int = 0, network: str | None = None) -> list[PrivateRun]:
    """Private inferences of each distinct architecture that figures draw; heads of their own are left out.

    With a preset's name these are of the counterparts (`counterpart`) of what Figures 1 and 5 draw: what is trained
    small is run at full size.
    """
    wanted = ~table["method"].str.startswith("SAS-H") if network is None else table["method"].str.match(_DRAWN)
    shown = table.loc[wanted, "config"]
    return [
        PrivateRun(config, protocol, query=query, seed=seed)
        for query in range(queries)
        for protocol in ("stock", "tuned")
        for config in dict.fromkeys(map(_stand(network), shown))
    ]


def _stand(network: str | None) -> Callable[[Any], Any]:
    """What is run in a trained network's place."""
    return measured_as if network is None else functools.partial(counterpart, network=network)


COSTS = ("seconds", "rounds", "bytes")


def with_costs(table: pd.DataFrame, found: Mapping[PrivateRun, dict], network: str | None = None) -> pd.DataFrame:
    """`results` with the least cost of the queries with stock (seconds, rounds, bytes) and tuned (tuned_seconds, ...).

    The least, because these networks are small: what else the machine does adds more to a query than the networks
    differ by, and only ever adds. seconds_low, seconds_high and the like are the range over the queries. Columns of a
    protocol of which nothing is on record are left out; tuned_faithful is 1 where all answers were right.

    With a preset's name the same of the counterparts, in columns that begin with large_; of these the median, as
    elsewhere.
    """
    size, typical = ("", min) if network is None else ("large_", _median)
    stand = _stand(network)
    # What has heads of their own is not drawn and was not run.
    keys = [stand(c) if all(isinstance(each, str) for each in c.attention) else None for c in table["config"]]
    timed: dict[tuple[str, object], list[dict]] = {}
    for run, record in found.items():
        facts = latency.costs(record) | {"faithful": float(record["metrics"]["faithful"])}
        timed.setdefault((run.protocol, run.network), []).append(facts)
    table = table.copy()
    for protocol, prefix, names in (("stock", "", COSTS), ("tuned", "tuned_", (*COSTS, "faithful"))):
        if not any(each == protocol for each, _ in timed):
            continue
        for name in names:
            values = [[one[name] for one in timed.get((protocol, key), [])] for key in keys]
            pick = min if name == "faithful" else typical
            table[f"{size}{prefix}{name}"] = [pick(each, default=None) for each in values]
            if name == "seconds":
                table[f"{size}{prefix}seconds_low"] = [min(each, default=None) for each in values]
                table[f"{size}{prefix}seconds_high"] = [max(each, default=None) for each in values]
    return table


def _median(values: list[float], default: None) -> float | None:
    return statistics.median(values) if values else default


def table_4(table: pd.DataFrame) -> pd.DataFrame:
    """`with_costs` to be read: by data set and method, megabytes for bytes, of the costs that are on record."""
    every = [*COSTS, *(f"tuned_{name}" for name in (*COSTS, "faithful"))]
    seeds = [name for name in ("n", "accuracy_low", "accuracy_high") if name in table]
    shown = table[["dataset", "method", *seeds[:1], "accuracy", *seeds[1:], *(name for name in every if name in table)]]
    shown = shown.join(table[["parameters", "flops"]])
    shown = shown.assign(**{name: shown[name] / 1e6 for name in ("bytes", "tuned_bytes", "flops") if name in shown})
    names = {"bytes": "mb", "tuned_bytes": "tuned_mb", "tuned_faithful": "tuned_right", "flops": "mflops"}
    return shown.rename(columns=names).set_index(["dataset", "method"])


_DRAWN = r"SA |EA |SAS-L B="  # in Figures 1 and 5
_SERIES = ["SAL-ViT", *ROWS, *(f"{name} (KD)" for name in ("SA 2Quad", "SAL-ViT", "MPCViT")), "MPCViT"]


def panel(table: pd.DataFrame, data: str, seconds: str = "seconds") -> pd.DataFrame:
    """Ours on one data set, for a figure: single attentions, distilled ones, and SAL-ViT joined along the budget."""
    part = table.query("dataset == @data").dropna(subset=[seconds])
    part = part[part["method"].str.match(_DRAWN)]
    series = part["method"].str.replace(r"SAS-L B=\d", "SAL-ViT", regex=True)
    alone = (series == "SAL-ViT").sum() == 1  # else the series has its name once, beside the first budget
    method = part["method"].str.replace("SAS-L ", "SAL-ViT " if alone else "")
    return _at(part, seconds).assign(series=pd.Categorical(series, _SERIES), method=method)


def _at(part: pd.DataFrame, seconds: str) -> pd.DataFrame:
    """With x, x_low and x_high of a figure: the cost and its range, where it is known."""
    ends = {f"x{end}": part[f"{seconds}{end}"] for end in ("", "_low", "_high") if f"{seconds}{end}" in part}
    return part.assign(**ends)


def seconds_of(table: pd.DataFrame, protocol: str) -> str:
    """The column of a protocol's seconds that figures draw and conclusions read: the counterparts', if there is one."""
    own = {"stock": "seconds", "tuned": "tuned_seconds"}[protocol]
    return f"large_{own}" if f"large_{own}" in table else own


def panels(table: pd.DataFrame, data: str) -> dict[str, pd.DataFrame]:
    """Ours on one data set by protocol, of those that were run; their counterparts' latency where it is known."""
    columns = {f"ours, {data}, stock": seconds_of(table, "stock"), f"ours, {data}, tuned": seconds_of(table, "tuned")}
    made = {title: panel(table, data, column) for title, column in columns.items() if column in table}
    return {title: each for title, each in made.items() if len(each)}


def paper_panel(data: str) -> pd.DataFrame:
    """The paper's Table 4 on one data set, under the same names."""
    part = latency.paper(4).query("dataset == @data").copy()
    distilled = part["distilled"].map({True: " (KD)", False: ""})
    series = part["method"].str.replace(r" B=\d", "", regex=True) + distilled
    method = part["method"].str.replace("SAL-ViT ", "").mask(distilled != "", series)
    values = {"x": part["latency_s"], "accuracy": part["accuracy_percent"], "method": method}
    return part.assign(**values, series=pd.Categorical(series, _SERIES))


def figure_6(table: pd.DataFrame, data: str, b: int, seconds: str) -> pd.DataFrame:
    """SAS-L at one budget with each normaliser."""
    names = {f"SAS-L {n} B={b}": n for n in ("softmax", "2Quad", "2ReLU")} | {f"SAS-L B={b}": "L2Q"}
    part = table[(table["dataset"] == data) & table["method"].isin(list(names))].dropna(subset=[seconds])
    series = pd.Categorical(part["method"].map(names), list(names.values()))
    return _at(part, seconds).assign(method=part["method"].map(names), series=series)


def full_size(source: str = "local") -> dict[str, pd.DataFrame]:
    """The paper's network itself with its own latency with tuned, by data set: what profile `short` has on record."""
    size, made = profile("short"), {}
    for data in size.data:
        every = plan(size, data)
        if found := execute.recorded(every.values(), source):
            table = results({data: every}, found)
            timed = execute.recorded(private_runs(table, size.queries, network=size.trained), source)
            column = seconds_of(table := with_costs(table, timed, size.trained), "tuned")
            if column in table and len(points := panel(table, data, column)):
                made[data] = points
    return made


def latency_figures(
    table: pd.DataFrame, sets: Iterable[str], b: int, large: Mapping[str, pd.DataFrame] | None = None
) -> dict[str, dict[str, pd.DataFrame]]:
    """The panels of Figures 1, 5 and 6, by the file that they go to; a figure that would be empty is left out.

    Figure 1 is of the first data set, beside it the paper's of CIFAR-10; Figure 5 of CIFAR-100 and Tiny-ImageNet, ours
    where there is it, and the paper's; Figure 6 of SAS-L at one budget with each normaliser, with both protocols.

    Args:
        table: `with_costs`.
        sets: the data sets.
        b: the budget of Figure 6.
        large: `full_size`, a panel more for a data set.
    """
    whole = {name: {f"CCT-7/3x1, {name}, tuned": each} for name, each in (large or {}).items()}
    first, others = next(iter(sets)), ("cifar100", "tiny_imagenet")
    beside = {title: each for name in others for title, each in whole.get(name, {}).items()}
    beside |= {f"paper, {name}": paper_panel(name) for name in others}
    paper = {"paper, cifar10": paper_panel("cifar10")}
    made = {"figure_1_accuracy_latency": panels(table, first) | whole.get(first, {}) | paper}
    mine = {title: each for name in others if name in sets for title, each in panels(table, name).items()}
    for protocol, name in (("stock", "figure_5_accuracy_latency"), ("tuned", "figure_5_tuned")):
        ours = {title: each for title, each in mine.items() if title.endswith(protocol)}
        if ours or protocol == "stock":
            made[name] = ours | beside
    six = {
        f"{data}, B = {b}, {protocol}": figure_6(table, data, b, seconds)
        for data in sets
        for protocol, seconds in (("stock", "seconds"), ("tuned", "tuned_seconds"))
        if seconds in table
    }
    if six := {title: each for title, each in six.items() if len(each)}:
        made["figure_6_normalizers"] = six
    return made


def at_budget(table: pd.DataFrame, data: str, b: int) -> pd.DataFrame:
    """What each search chose at a budget, with accuracy and private latency. S is self-attention, E external."""
    names = [f"{search} B={b}" for search in ("SAS-L", "SAS-L-WC", "random", "SAS-H")]
    part = table[(table["dataset"] == data) & table["method"].isin(names)]
    letters = [
        " ".join("".join(kind[0].upper() for kind in ([e] if isinstance(e, str) else e)) for e in config.attention)
        for config in part["config"]
    ]
    left_out = ["mflops", "accuracy_low", "accuracy_high"]
    chosen = table_4(part).droplevel("dataset").drop(columns=left_out, errors="ignore")
    table = shown(chosen)
    table.insert(0, "architecture", letters)
    return table


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table to be read: two decimals, "-" where nothing is on record, such as what networks by heads cost."""
    return table.round(2).astype(object).where(table.notna(), "-")


def best(table: pd.DataFrame, column: str) -> list[str]:
    """The rows that no other beats in both accuracy and a cost; `table` is indexed by method."""
    return [
        name
        for name, one in table.iterrows()
        if not ((table[column] < one[column]) & (table["accuracy"] >= one["accuracy"])).any()
        and not ((table[column] <= one[column]) & (table["accuracy"] > one["accuracy"])).any()
    ]


def said_of_searches(table: pd.DataFrame, data: str, known: list[int], b: int, queries: int) -> str:
    """Markdown: the search against its rivals, and which networks nothing beats, with each protocol."""
    part = table.query("dataset == @data").set_index("method")
    mine, lines = part["accuracy"], []
    for other in ("SAS-L-WC", "random", "SAS-H"):
        pairs = [each for each in known if {f"SAS-L B={each}", f"{other} B={each}"} <= set(mine.index)]
        gaps = {each: mine[f"SAS-L B={each}"] - mine[f"{other} B={each}"] for each in pairs}
        if gaps:
            told = ", ".join(f"{gap:+.2f} points at B = {each}" for each, gap in gaps.items())
            claim = " In the paper SAS-L is ahead at every budget." if other == "SAS-L-WC" else ""
            lines.append(f"- **SAS-L against {other}**: {told}.{claim}")
    if {"SA softmax", "EA L2Q"} <= set(mine.index):
        lines.append(f"- **What SA is worth**: SA softmax {mine['SA softmax']:.2f} %, EA L2Q {mine['EA L2Q']:.2f} %.")
    drawn = part[~part.index.str.startswith("SAS-H") & ~part.index.str.contains(r"\(KD\)")]
    for protocol in ("stock", "tuned"):
        if (column := seconds_of(part, protocol)) not in part:
            continue
        line = drawn.dropna(subset=[column])
        order = line.loc[best(line, column)].sort_values(column)
        told = ", ".join(f"{name} ({one[column]:.2f} s, {one['accuracy']:.2f} %)" for name, one in order.iterrows())
        lines.append(f"- **With `{protocol}`**, no network is both faster and more accurate than: {told}.")
        if {"SA softmax", f"SAS-L B={b}"} <= set(line.index):
            ratio = line[column][f"SAS-L B={b}"] / line[column]["SA softmax"]
            gap = mine[f"SAS-L B={b}"] - mine["SA softmax"]
            lines.append(f"  SAL-ViT at B = {b} takes {ratio:.2f} of SA softmax's latency, for {gap:+.2f} points.")
    if "tuned_faithful" in part:
        wrong = part.index[part["tuned_faithful"].lt(1)].tolist()
        least = f"the least of {queries}: small differences are the machine's"
        if "large_tuned_seconds" in part:
            least = f"the figures', of full-size networks with the same attention, medians of {queries}"
        lines.append(
            "- **Right answers**: with `tuned` "
            + (f"all but {', '.join(wrong)}" if wrong else "all")
            + f" stay in the protocols' range and give the clear network's logits. Latencies are {least}."
        )
    seeds = part.get("n", pd.Series(1, part.index))
    lines.append(
        f"- {seeds_said(seeds).capitalize()} each. Where there are several (notebook 02 too), their spread is what "
        "seeds alone do at this scale: differences within it are no evidence for or against the search."
    )
    return "\n".join(lines)
