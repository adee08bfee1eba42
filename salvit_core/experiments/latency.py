"""What private inferences cost, as tables: operations, totals, kinds, links, and the paper's numbers beside ours.

A table is made of records by run (`execute.collect`). Networks are called by their row in the papers' tables
(`runs.name_of`) unless names are given.
"""

import dataclasses
import functools
from collections.abc import Mapping

import pandas as pd
import torch

from .. import workspace
from ..models import cost
from ..models.cct import CCT
from ..models.config import Network, preset
from ..models.operations import KINDS
from ..models.rows import ROWS
from ..models.vit import build
from ..private.estimation import estimate
from ..private.links import Link
from .execute import subject
from .runs import PrivateRun, name_of

COSTS = ("seconds", "offline_seconds", "rounds", "bytes", "serial_bytes", "offline_bytes")

# Columns that older records lack: from before queries shared a session, one-way messages and the dealer were counted.
# What a dealer of stock sends was not counted for longer: `operations` finds it from the shapes, exactly.
_LATER = {
    "query": lambda rows: 0,
    "serial_bytes": lambda rows: rows["bytes"],
    "offline_seconds": lambda rows: 0.0,
    "offline_bytes": lambda rows: 0,
}

Records = Mapping[PrivateRun, dict]

CLOSE = 0.05  # of a logit: less is no other answer
NOISE = 1.0  # more is larger than any clear logit of random weights


def paper(table: int) -> pd.DataFrame:
    """A table of the SAL-ViT paper, as data/paper has it."""
    return pd.read_csv(workspace.ROOT / "data" / "paper" / f"table_{table}.csv")


def operations(found: Records, names: Mapping[PrivateRun, str] | None = None) -> pd.DataFrame:
    """Records as one table of operations, a row per query, layer and kind.

    Args:
        found: records of private runs, of any protocols.
        names: what to call the networks; where left out, their row in the papers' tables.

    Returns:
        columns network (preset), method, query, protocol, layer, kind and the costs, as in `private.Result`. Methods
        and kinds are categories in the order of all rows and kinds, so that each looks the same in every figure.

    Raises:
        ValueError: a network that has no name, and none is given.
    """
    tables = []
    for run, record in found.items():
        name = name_of(run.network)
        if names is None and name is None:
            raise ValueError(f"record {record['key']} is of a network without a name: give names")
        rows = pd.DataFrame(record["metrics"]["operations"])
        rows = rows.assign(**{column: make(rows) for column, make in _LATER.items() if column not in rows})
        if run.protocol == "stock" and not rows["offline_bytes"].any():
            rows["offline_bytes"] = _dealt(run, rows)
        rows["query"] += run.query
        rows.insert(0, "network", name[0] if name else "")
        rows.insert(1, "method", names[run] if names is not None else name[1] if name else "")
        rows.insert(3, "protocol", run.protocol)
        tables.append(rows)
    columns = ["network", "method", "query", "protocol", "layer", "kind", *COSTS]
    table = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    order = list(dict.fromkeys(names.values())) if names is not None else list(dict.fromkeys([*ROWS, *table["method"]]))
    table["method"] = pd.Categorical(table["method"], order)
    table["kind"] = pd.Categorical(table["kind"], KINDS)
    return table


def estimated(networks: Mapping[str, Network], protocol: str = "tuned") -> pd.DataFrame:
    """One query of each network as `operations` would have it, but from shapes alone: exact, and without seconds.

    Args:
        networks: by what to call them, in their order in figures.
        protocol: as in `private.infer`.
    """
    tables = [_counted(config, protocol).assign(method=name, query=0) for name, config in networks.items()]
    table = pd.concat(tables, ignore_index=True).assign(protocol=protocol)
    table["method"] = pd.Categorical(table["method"], list(networks))
    table["kind"] = pd.Categorical(table["kind"], KINDS)
    return table


@functools.cache
def _counted(config: Network, protocol: str) -> pd.DataFrame:
    with torch.device("meta"):
        model = build(config)
    return estimate(model, (1, config.channels, config.image, config.image), protocol).operations


def _dealt(run: PrivateRun, rows: pd.DataFrame) -> list[int]:
    """What a dealer sends for every row of a record of stock, from shapes."""
    known = _dealt_for(dataclasses.replace(run, provider="TFP", query=0, queries=1, link=None, seed=0))
    return [known.get(place, 0) for place in zip(rows["layer"], rows["kind"], strict=True)]


@functools.cache
def _dealt_for(run: PrivateRun) -> dict[tuple[str, str], int]:
    with torch.device("meta"):
        model, shape = subject(run)
    table = estimate(model, (run.batch, *shape), run.protocol).operations
    return {(layer, str(kind)): int(size) for layer, kind, size in table[["layer", "kind", "offline_bytes"]].values}


def _by(rows: pd.DataFrame) -> list[str]:
    """What tells measurements apart: the method, within its protocol where there are several."""
    return ["protocol", "method"] if rows["protocol"].nunique() > 1 else ["method"]


def totals(rows: pd.DataFrame, baseline: str = "SA softmax") -> pd.DataFrame:
    """Per method: median seconds with their range over the queries, rounds and MB one way, and ratios to a baseline.

    Args:
        rows: a table of `operations`, of one network.
        baseline: the method whose median latency is 1, each protocol's own; ratios are NaN where it is missing.

    Returns:
        Indexed by method, or by protocol and method where the rows are of several protocols: queries, seconds, low,
        high, seconds_without_layernorm (the paper's accounting), offline_seconds (a part of seconds), rounds,
        megabytes, offline_megabytes (what a dealer must send besides), ratio, ratio_without_layernorm.
    """
    by = _by(rows)
    costs = ["seconds", "offline_seconds", "rounds", "bytes", "offline_bytes"]
    per_query = rows.groupby([*by, "query"], observed=True)[costs].sum()
    without = rows[rows["kind"] != "LayerNorm"].groupby([*by, "query"], observed=True)["seconds"].sum()
    seconds = per_query["seconds"].groupby(by, observed=True)
    median = per_query.groupby(by, observed=True).median()
    table = pd.DataFrame(
        {
            "queries": seconds.size(),
            "seconds": seconds.median(),
            "low": seconds.min(),
            "high": seconds.max(),
            "seconds_without_layernorm": without.groupby(by, observed=True).median(),
            "offline_seconds": median["offline_seconds"],
            "rounds": median["rounds"].astype(int),
            "megabytes": median["bytes"] / 1e6,
            "offline_megabytes": median["offline_bytes"] / 1e6,
        }
    )
    for column, ratio in (("seconds", "ratio"), ("seconds_without_layernorm", "ratio_without_layernorm")):
        if len(by) == 1:
            table[ratio] = table[column] / table[column].get(baseline, float("nan"))
        else:
            table[ratio] = table[column].div(table[column].xs(baseline, level="method"), level="protocol")
    return table


def by_kind(rows: pd.DataFrame, quantity: str, ranges: bool = False) -> pd.DataFrame:
    """One row per method, one column per kind of operation: the median over the queries of a cost.

    Where the rows are of several protocols, one row per protocol and method. The columns are categories of all kinds.

    Args:
        rows: a table of `operations`.
        quantity: a cost in it.
        ranges: also low and high, the range of a query's whole cost, if any method has several queries.
    """
    by = _by(rows)
    per_query = rows.groupby([*by, "query", "kind"], observed=True)[quantity].sum()
    table = per_query.groupby([*by, "kind"], observed=True).median().unstack(fill_value=0)
    whole = per_query.groupby([*by, "query"], observed=True).sum().groupby(by, observed=True)
    if ranges and (whole.size() > 1).any():
        table.columns = table.columns.add_categories(["low", "high"])
        table[["low", "high"]] = whole.agg(["min", "max"])
    return table


def layer_panels(
    rows: Mapping[str, pd.DataFrame], method: str, quantity: str
) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """One method's cost by layer and kind, for a figure: a panel per protocol, and how far its axis goes.

    Args:
        rows: protocol to a table of `operations` or `estimated`, of one network with several methods.
        method: one of theirs.
        quantity: a column of `COSTS`; bytes are given in MB.

    Returns:
        label to a table with a row per layer, and label to the most that a layer of any method costs, so that figures
        of two methods compare.
    """
    panels, ends = {}, {}
    for protocol, table in rows.items():
        scale, unit = (1e6, quantity.replace("bytes", "MB")) if "bytes" in quantity else (1, quantity)
        label = f"{unit.replace('_', ' ')}, {protocol}"
        each = ["method", "layer", "kind"]
        parts = table.groupby([*each, "query"], observed=True)[quantity].sum().groupby(each, observed=True).median()
        kinds = parts.xs(method, level="method").unstack(fill_value=0) / scale
        panels[label] = kinds.loc[table.loc[table["method"] == method, "layer"].unique()]
        ends[label] = float(parts.groupby(["method", "layer"], observed=True).sum().max() / scale)
    return panels, ends


def costs(record: dict, statistic: str = "median") -> dict[str, float]:
    """What one query of a record cost: see `COSTS`.

    Args:
        record: of a `PrivateRun`.
        statistic: over the queries, "median" or "min".
    """
    rows = pd.DataFrame(record["metrics"]["operations"])
    rows = rows.assign(**{column: make(rows) for column, make in _LATER.items() if column not in rows})
    per_query = rows.groupby("query")[list(COSTS)].sum()
    return {str(name): float(value) for name, value in per_query.agg(statistic).items()}


def on_link(record: dict, link: Link | None, statistic: str = "median") -> float:
    """Modelled seconds of one query of a loopback record on a link (`Link.latency`); None leaves them as measured."""
    query = costs(record, statistic)
    return query["seconds"] if link is None else link.latency(pd.DataFrame([query]))


# The papers' tables, ours beside theirs


def beside_paper(published: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """A latency table of the paper with our columns.

    The paper's seconds are for 10 queries on 8 cores: only ratios to the baseline can be compared.

    Args:
        published: rows of `paper`, with columns method and latency_s, SA softmax among them.
        table: our `totals` of one protocol.

    Returns:
        Indexed by method: paper_s, paper_ratio, then ours_seconds, ours_ratio, ours_ratio_without_layernorm,
        ours_rounds, ours_megabytes and ours_offline_megabytes; NaN where we have none.
    """
    theirs = published.set_index("method")["latency_s"].rename("paper_s").to_frame()
    theirs["paper_ratio"] = theirs["paper_s"] / theirs["paper_s"]["SA softmax"]
    ours = table[["seconds", "ratio", "ratio_without_layernorm", "rounds", "megabytes", "offline_megabytes"]]
    ours = ours.add_prefix("ours_")
    return theirs.join(ours.set_index(ours.index.astype(str)), how="left")


def table_4_rows() -> pd.DataFrame:
    """Table 4 of the paper on CIFAR-10, without distillation and MPCViT, whose networks are not measured here."""
    return paper(4).query("dataset == 'cifar10' and not distilled and method != 'MPCViT'")


def paper_ratios() -> pd.Series:
    """Latency over SA softmax's of every method that Tables 3 and 4 of the paper have on CIFAR-10."""
    ratios = [published.set_index("method")["latency_s"] for published in (paper(3), table_4_rows())]
    ratios = [seconds / seconds["SA softmax"] for seconds in ratios]
    return pd.concat(ratios).groupby(level=0, sort=False).first().rename("paper")


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Per method: latency over SA softmax's, complete, without LayerNorm as in the paper, and the paper's."""
    ours = table[["ratio", "ratio_without_layernorm"]].set_axis(["complete", "without_layernorm"], axis=1)
    return ours.set_axis(table.index.astype(str)).join(paper_ratios())


def table_7() -> pd.DataFrame:
    """Table 7, CIFAR-10: parameters and FLOPs in millions, ours and the paper's."""
    names = {
        "SA softmax": "-",
        "SA 2Quad": "-",
        "EA softmax": "-",
        "SAL-ViT B=3": 3,
        "SAL-ViT B=2": 2,
        "SAL-ViT B=1": 1,
    }
    published = paper(7).query("dataset == 'cifar10'").set_index("method")
    models = {name: CCT(preset("cct_7_3x1", name)) for name in names}  # type: ignore[arg-type]  # a CCT's
    return pd.DataFrame(
        {
            "B": names,
            "parameters_m": {name: cost.parameters(model) / 1e6 for name, model in models.items()},
            "paper_parameters_m": {name: published["parameters_m"][name] for name in names},
            "flops_m": {name: cost.flops(model) / 1e6 for name, model in models.items()},
            "paper_flops_m": {name: published["flops_m"][name] for name in names},
            "flops_all_products_m": {name: cost.flops(model, "torch") / 1e6 for name, model in models.items()},
        }
    )


def answers(found: Records) -> pd.DataFrame:
    """Per method: whether all answers were the clear network's, the largest logit error, and what left its domain.

    Returns:
        Indexed by method: faithful, close (all logits within `CLOSE` of the clear ones, whatever left its domain),
        largest_logit_error, left_domain (operations), and of these normalisers and gelus.
    """
    rows = [
        {
            "method": (name_of(run.network) or ("", ""))[1],
            "faithful": record["metrics"]["faithful"],
            "close": record["metrics"]["logit_error"] <= CLOSE,
            "largest_logit_error": record["metrics"]["logit_error"],
            "left_domain": len(record["metrics"]["violations"]),
            "normalisers": sum("normalizer" in v or ".l1" in v for v in record["metrics"]["violations"]),
            "gelus": sum("activation" in v for v in record["metrics"]["violations"]),
        }
        for run, record in found.items()
    ]
    table = pd.DataFrame(rows).groupby("method", sort=False)
    worst = dict.fromkeys(("largest_logit_error", "left_domain", "normalisers", "gelus"), "max")
    return table.agg({"faithful": "all", "close": "all", **worst})


def of(found: Records, network: str, protocol: str | None = None) -> dict[PrivateRun, dict]:
    """The records of one preset, and of one protocol if it is named."""
    return {
        run: record
        for run, record in found.items()
        if (name_of(run.network) or ("",))[0] == network and protocol in (None, run.protocol)
    }


def side_by_side(found: Records) -> pd.DataFrame:
    """Stock and tuned on the same networks: seconds, rounds, MB, and whether the answer is right.

    Args:
        found: records of one preset with both protocols.

    Returns:
        Indexed by method, columns of two levels, quantity and whose.
    """
    pair = totals(operations(found))
    ours = {protocol: pair.loc[protocol].rename(index=str) for protocol in ("stock", "tuned")}
    right = {name: answers({run: r for run, r in found.items() if run.protocol == name}) for name in ours}
    columns = {
        ("seconds", "stock"): ours["stock"]["seconds"],
        ("seconds", "tuned"): ours["tuned"]["seconds"],
        ("seconds", "of which offline"): ours["tuned"]["offline_seconds"],
        ("seconds", "stock / tuned"): ours["stock"]["seconds"] / ours["tuned"]["seconds"],
        ("rounds", "stock"): ours["stock"]["rounds"],
        ("rounds", "tuned"): ours["tuned"]["rounds"],
        ("mb", "stock"): ours["stock"]["megabytes"],
        ("mb", "tuned"): ours["tuned"]["megabytes"],
        ("dealer's mb", "stock"): ours["stock"]["offline_megabytes"],
        ("dealer's mb", "tuned"): ours["tuned"]["offline_megabytes"],
        ("faithful", "stock"): right["stock"]["faithful"],
        ("faithful", "tuned"): right["tuned"]["faithful"],
        ("logit error", "stock"): right["stock"]["largest_logit_error"],
        ("logit error", "tuned"): right["tuned"]["largest_logit_error"],
        ("queries", "tuned"): ours["tuned"]["queries"],
    }
    methods = [name for name in ours["stock"].index if name in ours["tuned"].index]
    return pd.DataFrame(columns).loc[methods]


def flat(table: pd.DataFrame) -> pd.DataFrame:
    """A table of two-level columns with one level, for a CSV."""
    return table.set_axis([" ".join(names) for names in table.columns], axis=1).rename_axis("method")


def both_ratios(found: Records) -> pd.DataFrame:
    """Ratios to SA softmax, each protocol's own, with and without LayerNorm, and the paper's; columns of two levels."""
    pair = totals(operations(found))
    parts = {name: pair.loc[name].rename(index=str) for name in ("stock", "tuned")}
    kept = [name for name in parts["stock"].index if name in parts["tuned"].index]
    named = (("complete", "ratio"), ("without_layernorm", "ratio_without_layernorm"))
    table = pd.DataFrame({(p, label): parts[p][column] for p in parts for label, column in named}).loc[kept]
    table[("paper", "without_layernorm")] = paper_ratios()
    return table


# What the numbers say


SHOWN = ("SA 2Quad", "SA 2ReLU", "SA scaling", "EA softmax", "EA 2Quad", "SAL-ViT B=3", "SAL-ViT B=1")


def said_of_ratios(table: pd.DataFrame) -> str:
    """Markdown: where our ratios agree with the paper's within a tenth, and by how much others differ."""
    compared, lines = ratios(table), []
    for name in [name for name in SHOWN if name in compared.index]:
        ours, theirs = compared["without_layernorm"][name], compared["paper"][name]
        more = ours / theirs - 1
        verdict = "agrees within 10 %" if abs(more) <= 0.1 else f"differs by {100 * more:+.0f} %"
        lines.append(
            f"- **{name}**: ours {ours:.2f} of SA softmax without LayerNorm, the paper's {theirs:.2f}: {verdict}."
        )
    return "\n".join(lines)


def said_of_stock(rows: pd.DataFrame, right: pd.DataFrame) -> str:
    """Markdown: what the seconds of CrypTen's functions consist of.

    Args:
        rows: `operations` of one network with `stock`.
        right: `answers` of the same records.
    """
    table, seconds, rounds = totals(rows), by_kind(rows, "seconds"), by_kind(rows, "rounds")
    share = 100 * seconds.div(seconds.sum(axis=1), axis=0)  # percent
    mb, trips = table["megabytes"], table["rounds"]
    pool = int(rounds["pooling"]["SA softmax"])
    noise = right["largest_logit_error"] > NOISE
    near = right.index[right["close"] & ~right["faithful"]]
    off = right.index[~right["close"] & ~noise]
    further = f"; {', '.join(off)} is further off" if len(off) else ""
    return f"""
- **The normaliser** takes {share["normaliser"]["SA softmax"]:.0f} % of the seconds of SA softmax and
  {share["normaliser"]["SAL-ViT B=3"]:.0f} % of SAL-ViT's at B = 3.
- **What no attention changes**: the network with SA scaling, which has no normaliser, already needs
  {100 * mb["SA scaling"] / mb["SA softmax"]:.0f} % of the bytes of SA softmax. The tokenizer's ReLU and max-pooling
  alone take {share["tokenizer"]["SAL-ViT B=3"]:.0f} % of SAL-ViT's seconds, GELU
  {share["activation"]["SAL-ViT B=3"]:.0f} %.
- **EA saves bytes, not rounds**: EA softmax moves {mb["EA softmax"]:.0f} MB in {trips["EA softmax"]} rounds, SA
  softmax {mb["SA softmax"]:.0f} MB in {trips["SA softmax"]}. With L2Q, EA has {trips["EA L2Q"]} rounds against SA's
  {trips["SA L2Q"]}: where rounds cost most, more EA layers make the network slower.
- **A round costs** {1000 * seconds["pooling"]["SA softmax"] / pool:.1f} ms here even where hardly any data moves (the
  pooling's {pool} rounds over 256 numbers).
- **Faithful**: {int(right["faithful"].sum())} of {len(right)} methods: in the others operations leave what CrypTen's
  functions hold for. Of {noise.sum()} of them the logits are noise, of {len(near)} they are within {CLOSE} of the clear
  ones all the same{f" ({', '.join(near)})" if len(near) else ""}{further}.
"""


def said_of_tuned(found: Records) -> str:
    """Markdown: what changes for the paper's conclusion with the tuned protocols.

    Args:
        found: records of one preset with both protocols, all of the paper's methods among them.
    """
    side, both = side_by_side(found), totals(operations(found))
    ours = {protocol: both.loc[protocol].rename(index=str) for protocol in ("stock", "tuned")}
    fast = {protocol: each["seconds"] for protocol, each in ours.items()}
    gain = {protocol: 1 / each["ratio"]["SAL-ViT B=3"] for protocol, each in ours.items()}
    without = {protocol: 1 / each["ratio_without_layernorm"]["SAL-ViT B=3"] for protocol, each in ours.items()}
    kinds = {name: by_kind(operations(of(found, *_preset(found), name)), "seconds") for name in ours}
    softmax = {p: each["normaliser"]["SA softmax"] / each.loc["SA softmax"].sum() for p, each in kinds.items()}
    times, right = side["seconds", "stock / tuned"], side["faithful"].sum()
    noise = int((side["logit error", "stock"] > NOISE).sum())
    offline = side["seconds", "of which offline"] / side["seconds", "tuned"]
    budget = ", ".join(f"{fast['tuned'][f'SAL-ViT B={b}']:.2f} s at B = {b}" for b in (3, 2, 1))
    alone, together = times["SA softmax"], fast["stock"]["SA softmax"] / fast["tuned"]["SAL-ViT B=3"]
    left = {
        (name_of(run.network) or ("", ""))[1]: record["metrics"]["violations"][0]
        for run, record in found.items()
        if run.protocol == "tuned" and record["metrics"]["violations"]
    }
    places = "".join(f" {name} leaves `tuned`'s range (`{violation}`)." for name, violation in left.items())

    def against(name: str, other: str) -> str:
        told = [f"{fast[protocol][name] / fast[protocol][other]:.2f} with `{protocol}`" for protocol in fast]
        return f"{name} takes {' and '.join(told)} of {other}"

    def exact(name: str) -> str:
        return f"{name} has {ours['tuned']['rounds'][name]} rounds and {ours['tuned']['megabytes'][name]:.0f} MB"

    return f"""
- **The answer**: {right["stock"]} of {len(side)} methods are faithful with `stock` ({noise} give noise),
  {right["tuned"]} with `tuned`, whose largest logit error is {side["logit error", "tuned"].max():.2g}.{places}
- **Protocols**: on the same network `stock` takes {times.min():.1f} ({times.idxmin()}) to {times.max():.1f}
  ({times.idxmax()}) times as long as `tuned`. Of its seconds {100 * offline.min():.0f} to
  {100 * offline.max():.0f} % are offline.
- **SAL-ViT's gain**: SA softmax takes {gain["stock"]:.2f} times as long as SAL-ViT (B = 3) with `stock`,
  {gain["tuned"]:.2f} times with `tuned`; without LayerNorm {without["stock"]:.2f} and {without["tuned"]:.2f}; in
  the paper {1 / paper_ratios()["SAL-ViT B=3"]:.2f}. With `tuned`, {exact("SA softmax")}; {exact("SAL-ViT B=3")}.
- **What each change buys**: SA softmax with `stock` takes {gain["stock"]:.2f} times as long as SAL-ViT with `stock`,
  {alone:.2f} times as long as itself with `tuned`, {together:.2f} times as long as SAL-ViT with `tuned`.
- **Softmax**: the normaliser is {100 * softmax["stock"]:.0f} % of the seconds of SA softmax with `stock`,
  {100 * softmax["tuned"]:.0f} % with `tuned`. {against("SA 2Quad", "SA softmax")}.
- **External attention**: {against("EA softmax", "SA softmax")}; {against("EA 2Quad", "SA 2Quad")};
  {against("EA L2Q", "SA L2Q")}. With `tuned`, {exact("EA 2Quad")}; {exact("SA 2Quad")}.
- **Fewer SA layers**: SAL-ViT with `tuned` takes {budget}.
- **Cheapest**: {fast["stock"].idxmin()} with `stock`, {fast["tuned"].idxmin()} with `tuned`.
"""


def _preset(found: Records) -> tuple[str]:
    """The one preset of some records."""
    (name,) = {(name_of(run.network) or ("",))[0] for run in found}
    return (name,)


def beside_stock(found: Records) -> pd.DataFrame:
    """One query of each protocol, indexed by protocol: seconds, rounds, bytes, offline_bytes, logit_error, faithful."""
    asked = ["seconds", "rounds", "bytes", "offline_bytes"]
    rows = {
        run.protocol: {
            **operations({run: record}, {run: ""}).groupby("query")[asked].sum().median(),
            **{name: record["metrics"][name] for name in ("logit_error", "faithful")},
        }
        for run, record in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").astype({name: int for name in asked if name != "seconds"})
