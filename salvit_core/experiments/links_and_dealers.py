"""What a private inference costs in full, as tables: Table 4, links, dealers, growth, activations, any network."""

import dataclasses
from collections.abc import Iterable, Mapping

import pandas as pd

from ..models.config import TransformerConfig, preset
from ..private.links import LINKS, Link
from . import execute, latency
from .profiles import Profile
from .runs import PrivateRun, name_of

# Table 4 with latencies of a correct, complete inference


def paper_methods(size: Profile) -> list[str]:
    """The methods of a profile that the paper's Table 4 has on CIFAR-10."""
    if size.name == "smoke":
        return ["SA softmax", "SAL-ViT B=3"]
    published = latency.paper(4).query("dataset == 'cifar10' and not distilled")
    return [name for name in size.methods if name in set(published["method"])]


def both_protocols(size: Profile, methods: Iterable[str], source: str, seed: int = 0) -> tuple[dict, str]:
    """Records of the paper's methods at full size with both protocols, and a word on where stock's are from.

    Stock takes minutes a query: where notebook 01 has not measured it on this machine, the project's own records stand
    in, and the word says so. Of tuned one query is measured, or all that the long profiles ask for.
    """
    network, long = size.networks[0], size.name in ("short", "paper")
    runs = {
        protocol: [
            PrivateRun(preset(network, method), protocol, query=query, seed=seed)
            for query in range(size.queries)
            for method in methods
        ]
        for protocol in ("stock", "tuned")
    }
    where = ""
    stock = execute.collect(runs["stock"], source) if size.name == "smoke" else execute.recorded(runs["stock"], source)
    if {run.network for run in stock} != {run.network for run in runs["stock"]}:
        stock = execute.recorded(runs["stock"], "reference")
        where = "" if source == "reference" else "Stock is from the project's own records, another machine or day. "
    execute.collect([run for run in runs["tuned"] if run.query == 0 or long], source, "tuned")
    return {**stock, **execute.recorded(runs["tuned"], source)}, where


def complete(found: Mapping[PrivateRun, dict]) -> bool:
    """Whether the same networks are on record with both protocols."""
    by = [{run.network for run in found if run.protocol == protocol} for protocol in ("stock", "tuned")]
    return bool(by[0]) and by[0] == by[1]


def by_kind_beside(rows: pd.DataFrame, quantity: str, ranges: bool = False) -> pd.DataFrame:
    """A cost by kind, stock and tuned under each method; of seconds, what is offline in a column of its own.

    With `ranges` also low and high, as in `latency.by_kind`.
    """
    table = latency.by_kind(rows, quantity)
    if quantity == "seconds":
        offline = latency.by_kind(rows, "offline_seconds")
        table = (table - offline).clip(lower=0)
        table.columns = table.columns.add_categories(["offline"])
        table["offline"] = offline.sum(axis=1)
    if ranges:
        known = latency.by_kind(rows, quantity, ranges=True)
        table = table.join(known[[end for end in ("low", "high") if end in known]])
    table = table.swaplevel().sort_index(level=0, sort_remaining=False)
    return table.set_axis([f"{method}, {protocol}" for method, protocol in table.index])


def table_4(found: Mapping[PrivateRun, dict], methods: list[str]) -> pd.DataFrame:
    """Table 4's latencies, the paper's, stock's and tuned's, with ratios, MB, rounds, and whether answers are right.

    What `tuned` takes *today*, exact from shapes, stands beside what it took when the records were made.
    """
    pair = latency.totals(latency.operations(found))
    by = {name: pair.loc[name].rename(index=str) for name in ("stock", "tuned")}
    right = {name: latency.answers({run: r for run, r in found.items() if run.protocol == name}) for name in by}
    published = latency.paper(4).query("dataset == 'cifar10' and not distilled")
    published = published.drop_duplicates("method").set_index("method")["latency_s"]
    networks = {(name_of(run.network) or ("", ""))[1]: run.network for run in found}
    today = latency.estimated({name: networks[name] for name in methods}).groupby("method", observed=True)
    today = today[["rounds", "bytes"]].sum().rename(index=str)
    columns = {
        "paper_s": published.reindex(methods),
        "stock_s": by["stock"]["seconds"],
        "tuned_s": by["tuned"]["seconds"],
        "tuned_online_s": by["tuned"]["seconds"] - by["tuned"]["offline_seconds"],
        "paper_ratio": (published / published["SA softmax"]).reindex(methods),
        "stock_ratio": by["stock"]["ratio"],
        "tuned_ratio": by["tuned"]["ratio"],
        "stock_over_tuned": by["stock"]["seconds"] / by["tuned"]["seconds"],
        "stock_mb": by["stock"]["megabytes"],
        "tuned_mb": by["tuned"]["megabytes"],
        "stock_dealer_mb": by["stock"]["offline_megabytes"],
        "tuned_dealer_mb": by["tuned"]["offline_megabytes"],
        "stock_rounds": by["stock"]["rounds"],
        "tuned_rounds": by["tuned"]["rounds"],
        "tuned_rounds_today": today["rounds"],
        "tuned_mb_today": today["bytes"] / 1e6,
        "stock_right": right["stock"]["faithful"],
        "tuned_right": right["tuned"]["faithful"],
        "tuned_queries": by["tuned"]["queries"],
    }
    return pd.DataFrame(columns).loc[methods].rename_axis("method")


def said_of_table_4(table: pd.DataFrame, seconds: pd.DataFrame) -> str:
    """Markdown: gains, what is left, right answers.

    Args:
        table: `table_4`.
        seconds: `by_kind_beside` of the same records.
    """
    base, lines = table["stock_s"]["SA softmax"], []
    for name in ("SA softmax", "SAL-ViT B=3"):
        row = table.loc[name]
        lines.append(
            f"- **{name}**: `tuned` {row['stock_over_tuned']:.1f} times as fast as `stock` on this network, with "
            f"{row['stock_mb'] / row['tuned_mb']:.1f} times fewer bytes and "
            f"{row['stock_rounds'] / row['tuned_rounds']:.1f} times fewer rounds; {base / row['tuned_s']:.1f} times as "
            "fast as SA softmax with `stock`."
        )
    gain = {source: 1 / table[f"{source}_ratio"]["SAL-ViT B=3"] for source in ("stock", "tuned", "paper")}
    lines.append(
        f"- **SAL-ViT (B = 3) against SA softmax**: {gain['stock']:.2f} times as fast with `stock`, "
        f"{gain['tuned']:.2f} with `tuned`, {gain['paper']:.2f} in the paper."
    )
    line = seconds.loc["SAL-ViT B=3, tuned"].astype(float)
    parts = (line / line.sum()).nlargest(5)
    told = ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in parts.items())
    lines.append(f"- **What is left** of SAL-ViT (B = 3) with `tuned`: {told}.")
    right = {name: int(table[f"{name}_right"].sum()) for name in ("stock", "tuned")}
    lines.append(f"- **Right answers**: `stock` {right['stock']} of {len(table)} methods, `tuned` {right['tuned']}.")
    row = table.loc["SAL-ViT B=3"]
    if row["tuned_rounds"] != row["tuned_rounds_today"]:
        lines.append(
            f"- **These records are of an older `tuned`**: {row['tuned_rounds']} rounds and {row['tuned_mb']:.0f} MB "
            f"for SAL-ViT (B = 3), today {row['tuned_rounds_today']} and {row['tuned_mb_today']:.0f}."
        )
    return "\n".join(lines)


# Links


EVERYWHERE: dict[str, Link | None] = {"loopback": None, **LINKS}


def link_table() -> pd.DataFrame:
    """The links of the literature: round trip (ms) and MB/s."""
    rows = [
        {"link": name, "round trip (ms)": 1000 * link.rtt, "MB/s": link.bandwidth / 1e6} for name, link in LINKS.items()
    ]
    return pd.DataFrame(rows).set_index("link")


def on_links(found: Mapping[PrivateRun, dict], methods: list[str]) -> dict[str, pd.DataFrame]:
    """Per protocol, seconds by method and link, medians of queries: measured on loopback, modelled elsewhere."""
    tables = {}
    for protocol in ("stock", "tuned"):
        rows = [
            ((name_of(run.network) or ("", ""))[1], *(latency.on_link(record, link) for link in EVERYWHERE.values()))
            for run, record in found.items()
            if run.protocol == protocol
        ]
        table = pd.DataFrame(rows, columns=["method", *EVERYWHERE]).groupby("method").median().loc[methods]
        tables[protocol] = table.set_axis(pd.CategoricalIndex(table.columns, list(EVERYWHERE)), axis=1)
    return tables


def said_of_links(tables: Mapping[str, pd.DataFrame]) -> str:
    """Markdown: the fastest and the last on each link."""
    lines = []
    for name in EVERYWHERE:
        order = {protocol: table[name].sort_values() for protocol, table in tables.items()}
        gain = order["stock"].iloc[0] / order["tuned"].iloc[0]
        told = {protocol: f"{each.index[0]} ({each.iloc[0]:.1f} s)" for protocol, each in order.items()}
        lines.append(
            f"- **{name}**: fastest with `stock` {told['stock']}, with `tuned` {told['tuned']}, {gain:.1f} "
            f"times as fast; last with `tuned` {order['tuned'].index[-1]} ({order['tuned'].iloc[-1]:.1f} s)."
        )
    return "\n".join(lines)


EMULATED: dict[str, Link | None] = {
    **EVERYWHERE,
    "10 ms, 100 Mbit/s": Link(0.010, 12.5e6),
    "1 ms, 10 Mbit/s": Link(0.001, 1.25e6),
}


def emulations(size: Profile, seed: int = 0) -> dict[str, PrivateRun]:
    """A small network on emulated links, by name; of the quick links many queries, of which the least counts."""
    small, brief = preset(size.trained, "SAL-ViT B=1"), size.name == "smoke"
    often = 5 if brief else 15  # what a machine does besides is larger than what a LAN adds
    times = {name: 1 if name[:3] == "WAN" else often if name in EVERYWHERE else 3 for name in EMULATED}
    return {
        name: PrivateRun(small, queries=times[name], link=link, seed=seed)
        for name, link in EMULATED.items()
        if not (brief and name == "LAN (Cheetah)")
    }


def model_against_emulation(runs: Mapping[str, PrivateRun], found: Mapping[PrivateRun, dict]) -> pd.DataFrame:
    """Indexed by link: modelled and emulated seconds, difference (%), and whether the link adds enough to count."""
    bare = found[runs["loopback"]]
    alone = latency.costs(bare, "min")["seconds"]
    rows = {
        name: {
            "modelled": latency.on_link(bare, run.link, "min"),
            "emulated": latency.costs(found[run], "min")["seconds"],
        }
        for name, run in runs.items()
        if run.link
    }
    table = pd.DataFrame(rows).T.rename_axis("link")
    table["difference (%)"] = 100 * (table["modelled"] / table["emulated"] - 1)
    table["counted"] = table["modelled"] > 1.5 * alone
    return table


def said_of_emulation(table: pd.DataFrame, bare: dict) -> str:
    """Markdown: how far the model is off where the link counts."""
    off = table.loc[table["counted"], "difference (%)"].abs()
    return (
        f"Without a link {latency.costs(bare, 'min')['seconds']:.2f} s. On {len(off)} links that add half of that or "
        f"more, the model is off by {off.max():.1f} % at most ({off.idxmax()}); {int((off <= 15).sum())} within 15 %."
    )


# Dealers


WAN = LINKS["WAN (Cheetah)"]


def dealers(found: Mapping[PrivateRun, dict]) -> pd.DataFrame:
    """Indexed by provider: what the same query costs, what a dealer sends, and both on a WAN (modelled)."""
    table = pd.DataFrame({run.provider: latency.costs(record) for run, record in found.items()}).T
    table = table.rename_axis("provider")
    table["online_seconds"] = table["seconds"] - table["offline_seconds"]
    table["dealer_mb"] = table.pop("offline_bytes").where(table.index == "TTP", 0) / 1e6
    table["wan_seconds"] = [latency.on_link(record, WAN) for record in found.values()]
    table["wan_dealer_seconds"] = 1e6 * table["dealer_mb"] / WAN.bandwidth
    table["mb"] = table.pop("bytes") / 1e6
    columns = ["seconds", "online_seconds", "offline_seconds", "rounds", "mb", "dealer_mb"]
    return table[[*columns, "wan_seconds", "wan_dealer_seconds"]]


def said_of_dealers(table: pd.DataFrame) -> str:
    """Markdown: what a dealer of its own costs."""
    ttp, tfp = table.loc["TTP"], table.loc["TFP"]
    return f"""
- With TTP the inference takes {ttp["seconds"] / tfp["seconds"]:.2f} times as long on this machine:
  three processes share the cores. The dealer sends {ttp["dealer_mb"]:.0f} MB,
  {ttp["dealer_mb"] / ttp["mb"]:.1f} times the {ttp["mb"]:.0f} MB that each party sends.
- Modelled on WAN (Cheetah), sending the dealer's part takes {ttp["wan_dealer_seconds"]:.1f} s beside
  {ttp["wan_seconds"]:.1f} s for the inference: where it cannot be sent beforehand, it counts.
"""


# Sizes


def sizes(size: Profile, seed: int = 0) -> dict[str, dict]:
    """Sessions of small networks: "tokens" by (method, side), "depth" by layers, "batch" by images in a query."""
    brief, long = size.name == "smoke", size.name in ("short", "paper")
    shape = dict(width=256, heads=4) if long else dict(width=64, heads=2)

    def scaled(method: str, image: int = 16, layers: int = 1, batch: int = 1) -> PrivateRun:
        config = preset("cct_7_3x1", method, image=image, layers=layers, **shape)
        return PrivateRun(config, queries=1 if image > 32 else 2, batch=batch, seed=seed)

    sides, depths, batches = ((16, 32), (1, 2), (1, 2)) if brief else ((16, 32, 64), (1, 2, 4, 7), (1, 2, 4, 8))
    kinds = ("SA softmax",) if brief else ("SA softmax", "EA L2Q")
    return {
        "tokens": {(method, side): scaled(method, side) for method in kinds for side in sides},
        "depth": {layers: scaled("SA softmax", layers=layers) for layers in depths},
        "batch": {images: scaled("SA softmax", batch=images) for images in batches},
    }


def growth(runs: Mapping[str, dict], found: Mapping[PrivateRun, dict]) -> dict[str, pd.DataFrame]:
    """Tables of `sizes`: costs by tokens, by layers, and seconds per image by batch on each link (modelled)."""

    def cost(run: PrivateRun, **place) -> dict:
        spent = latency.costs(found[run])
        return {**place, **spent, "mb": spent["bytes"] / 1e6, "dealer_mb": spent["offline_bytes"] / 1e6}

    tokens = [cost(run, series=method, tokens=run.network.tokens) for (method, _), run in runs["tokens"].items()]
    depth = [cost(run, series="SA softmax", layers=layers) for layers, run in runs["depth"].items()]
    batch = [
        {
            "series": name if link is None else f"{name}, modelled",
            "images in a query": images,
            "seconds": latency.on_link(found[run], link) / images,
        }
        for name, link in EVERYWHERE.items()
        if "CrypTFlow2" not in name
        for images, run in runs["batch"].items()
    ]
    return {"tokens": pd.DataFrame(tokens), "depth": pd.DataFrame(depth), "batch": pd.DataFrame(batch)}


def said_of_growth(tables: Mapping[str, pd.DataFrame]) -> str:
    """Markdown: how cost grows with tokens, depth and batch."""
    lines = []
    for method, part in tables["tokens"].groupby("series", sort=False):
        part = part.set_index("tokens")
        first, last, times = part.iloc[0], part.iloc[-1], part.index[-1] // part.index[0]
        lines.append(
            f"- **Tokens**, {method}: {part.index[-1]} instead of {part.index[0]}, {times} times as many, "
            f"take {last['mb'] / first['mb']:.0f} times the bytes, {last['seconds'] / first['seconds']:.0f} "
            f"times the seconds, and {last['rounds']:.0f} instead of {first['rounds']:.0f} rounds."
        )
    rounds = tables["depth"].set_index("layers")["rounds"]
    per = (rounds.iloc[-1] - rounds.iloc[-2]) / (rounds.index[-1] - rounds.index[-2])
    lines.append(
        f"- **Depth**: a layer of SA softmax adds {per:.0f} rounds; tokenizer, pooling and head have "
        f"{rounds.iloc[0] - per:.0f}."
    )
    for name, part in tables["batch"].groupby("series", sort=False):
        each, most = part["seconds"].to_list(), part["images in a query"].max()
        lines.append(
            f"- **Batch**, {name}: of {most} images in a query each takes {each[-1] / each[0]:.2f} of the time of one "
            "alone."
        )
    return "\n".join(lines)


# Activations

ACTIVATIONS = ("gelu", "quad", "learned_quad")


def activation_steps(found: Mapping[PrivateRun, dict]) -> pd.DataFrame:
    """`latency.operations` of networks that differ in their activation; the method is the activation."""
    named = {run: run.network.activation for run in found if isinstance(run.network, TransformerConfig)}
    rows = latency.operations(found, named)
    return rows.assign(online=rows["seconds"] - rows["offline_seconds"])


def activations(rows: pd.DataFrame, layers: int, trained: Mapping[str, dict]) -> pd.DataFrame:
    """Per activation: cost of a layer's on shares, and the test accuracy of a network trained with it.

    Args:
        rows: `activation_steps`.
        layers: of the networks.
        trained: activation to the record of a training.
    """
    part = rows[rows["kind"] == "activation"].groupby("method", observed=True)
    part = part[["seconds", "online", "rounds", "bytes", "offline_bytes"]].sum() / layers
    columns = {
        "ms_per_layer": 1e3 * part["seconds"],
        "online_ms_per_layer": 1e3 * part["online"],
        "rounds_per_layer": part["rounds"],
        "mb_per_layer": part["bytes"] / 1e6,
        "dealer_mb_per_layer": part["offline_bytes"] / 1e6,
    }
    table = pd.DataFrame(columns).set_axis(part.index.astype(str))
    accuracies = {name: record["metrics"]["test_accuracy"] for name, record in trained.items()}
    table["test_accuracy"] = pd.Series(accuracies, dtype=float)
    return table.loc[list(ACTIVATIONS)].rename_axis("activation")


def said_of_activations(table: pd.DataFrame, rows: pd.DataFrame, layers: int) -> str:
    """Markdown: what a quadratic in GELU's place saves, and what it costs in accuracy."""
    total, lines = rows.loc[rows["method"] == "gelu", "seconds"].sum(), []
    for name in ACTIVATIONS[1:]:
        less = (table["ms_per_layer"]["gelu"] - table["ms_per_layer"][name]) * layers
        saved = {str(column): 1 - table[column][name] / table[column]["gelu"] for column in table}
        gap = table["test_accuracy"][name] - table["test_accuracy"]["gelu"]
        accuracy = "not on record" if pd.isna(gap) else f"(SA softmax, one seed) {gap:+.2f} points"
        lines.append(
            f"- **{name}** saves {100 * saved['rounds_per_layer']:.0f} % of GELU's rounds, "
            f"{100 * saved['mb_per_layer']:.0f} % of its bytes and {100 * saved['ms_per_layer']:.0f} % of its seconds, "
            f"{100 * less / 1e3 / total:.0f} % of the network's. Accuracy: {accuracy}."
        )
    return "\n".join(lines)


# One network, one link

ATTENTIONS: dict[str, str | int] = {"self": "self", "external": "external", **{f"SAL-ViT B={b}": b for b in (3, 2, 1)}}
NORMALIZERS = ("softmax", "2quad", "2relu", "l2q", "scaling")


def network(name: str, attention: str, normalizer: str, activation: str) -> TransformerConfig:
    """A preset with any attention, normaliser and activation of the study.

    Args:
        name: of the preset.
        attention: a key of `ATTENTIONS`.
        normalizer: one of `NORMALIZERS`; self-attention with "scaling" has no normaliser at all.
        activation: one of `ACTIVATIONS`.
    """
    config = preset(name, attention=ATTENTIONS[attention], normalizer=normalizer, activation=activation)
    assert isinstance(config, TransformerConfig)  # as all of `PRESETS` are
    if normalizer == "scaling":
        kinds = ["scaling" if kind == "self" else kind for kind in config.attention]
        config = dataclasses.replace(config, attention=tuple(kinds))
    return config


def bars(networks: Mapping[str, TransformerConfig], protocol: str, link: Link) -> dict[str, pd.DataFrame]:
    """What an image through each network asks of a link, by kind of operation: a table per axis of a figure.

    Exact, from shapes alone; the seconds are what the link's model makes of rounds and bytes (`Link.seconds`), without
    the parties' computing.

    Args:
        networks: by what to call them.
        protocol: "stock" or "tuned".
        link: between the parties.
    """
    rows = latency.estimated(networks, protocol)
    rows = rows.assign(link=link.seconds(rows["rounds"], rows["serial_bytes"]))
    return {
        "rounds": latency.by_kind(rows, "rounds"),
        "MB one way": latency.by_kind(rows, "bytes") / 1e6,
        "dealer's MB": latency.by_kind(rows, "offline_bytes") / 1e6,
        "seconds on the link": latency.by_kind(rows, "link"),
    }


def ends(name: str, protocol: str, link: Link) -> dict[str, float]:
    """How far each axis of `bars` goes, whatever the network: most bytes has self-attention, most rounds external."""
    dearest = {kind: network(name, kind, "softmax", "gelu") for kind in ("self", "external")}
    return {axis: float(table.sum(axis=1).max()) for axis, table in bars(dearest, protocol, link).items()}


# What agrees with the paper


def said_of_the_paper(table: pd.DataFrame, links: Mapping[str, pd.DataFrame]) -> str:
    """Markdown: the ratios of Table 4, and what a WAN changes.

    Args:
        table: `table_4`.
        links: `on_links`.
    """
    lines = []
    for name in table.index[1:]:
        told = [f"{1 / table[f'{source}_ratio'][name]:.2f} ({source})" for source in ("paper", "stock", "tuned")]
        close = abs(table["tuned_ratio"][name] / table["paper_ratio"][name] - 1)
        verdict = "as in the paper, within 10 %" if close <= 0.1 else "not as in the paper"
        lines.append(f"- **{name}** is faster than SA softmax by {', '.join(told)}: with `tuned` {verdict}.")
    far = links["tuned"]["WAN (CrypTFlow2)"]
    lines.append(
        f"- **On a WAN** (modelled, CrypTFlow2's) rounds decide: {far.idxmin()} {far.min():.0f} s, "
        f"{far.idxmax()} {far.max():.0f} s. The paper measures on one machine."
    )
    return "\n".join(lines)
