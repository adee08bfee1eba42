"""The SAL-ViT paper's tables one after another, ours beside, for the page that reviewers read (docs/reviewer.md).

From the project's own records and nothing else: what is not on record stays empty.
"""

import statistics
from collections.abc import Callable, Iterable

import pandas as pd

from ..models.config import preset
from ..models.rows import METHODS
from ..private.links import LINKS
from . import efficient, evidence, execute, latency, profiles
from .runs import PrivateRun, Run, name_of

SIZES = {"reference": "small network", "short": "CCT-7/3x1"}  # by profile: what its trainings are of


def spread(runs: Iterable[tuple[str, Run]]) -> pd.DataFrame:
    """Test accuracy over the seeds that are on record, of runs with names.

    Returns:
        Indexed by name: n, mean, low and high (%), and what they were trained on, and in which precision.
    """
    rows = []
    for name, run in runs:
        for record in execute.recorded([run], "reference").values():
            rows.append((name, record["metrics"]["test_accuracy"], _trained_on(record)))
    table = pd.DataFrame(rows, columns=["method", "accuracy", "machine"])
    groups = table.groupby("method", sort=False)
    found = groups["accuracy"].agg(n="count", mean="mean", low="min", high="max")
    found["machine"] = groups["machine"].agg(lambda each: "; ".join(dict.fromkeys(each)))
    return found


def _trained_on(record: dict) -> str:
    """Processor or accelerator, and the precision of products; older records say nothing of it and used bfloat16."""
    machine = record["machine"]
    words = machine.get("accelerator", machine["processor"]).replace("(R)", "").replace(" Processor", "")
    return f"{words}, {'bf16' if record['metrics'].get('bf16', True) else 'fp32'}"


def accuracies(data: str = "cifar10") -> pd.DataFrame:
    """The campaign's trainings on one data set beside the paper's accuracies.

    Returns:
        Indexed by method, all that the campaign plans or the paper has: paper (%), then of each of `SIZES` n (0 where
        it is not trained yet), mean, low and high (%), and what they were trained on.
    """
    plan = set(evidence.campaign())
    runs = {name: list(evidence.named(profiles.profile(name), data)) for name in SIZES}
    names = dict.fromkeys(label for label, run in runs["reference"] if run in plan)
    parts = {of: spread(runs[name]) for name, of in SIZES.items()}
    known = pd.Series(_published(data))
    names |= dict.fromkeys([*(label for found in parts.values() for label in found.index), *known.index])
    table = pd.concat({of: found.reindex(names) for of, found in parts.items()}, axis=1)
    table.insert(0, ("paper", "accuracy"), known.reindex(names))
    for of in parts:
        table[of, "n"] = table[of, "n"].fillna(0).astype(int)
    return table.rename_axis("method")


def _published(data: str) -> dict[str, float]:
    """The paper's accuracies under the names that the campaign gives its rows (Tables 3, 4 and 6)."""
    found: dict[str, float] = {}
    for number in (3, 4):
        for row in latency.paper(number).query("dataset == @data").itertuples():
            if not getattr(row, "distilled", False):
                found.setdefault(str(row.method), float(row.accuracy_percent))
    for row in latency.paper(6).query("dataset == @data").itertuples():
        found[f"{row.search} B={row.heads_self // 4}"] = float(row.accuracy_percent)
    for budget in (1, 2, 3):  # the same networks as SAS-L's of Table 6
        found.pop(f"SAL-ViT B={budget}", None)
    return found


def table_2() -> pd.DataFrame:
    """Latency of one attention layer of ten mechanisms and of the whole network, with nothing left out."""
    layers, networks = efficient.table_2_runs(profiles.profile("reference"))
    found = [execute.recorded(runs.values(), "reference") for runs in (layers, networks)]
    table = efficient.table_2(layers, found[0], networks, found[1])
    columns = ["paper s", "paper ratio", "stock ratio", "tuned ratio", "stock seconds", "tuned seconds"]
    columns += ["stock network s", "tuned network s", "stock faithful", "tuned faithful"]
    return table[columns]


def table_3() -> pd.DataFrame:
    """Latency of attention and normaliser, as a ratio to softmax self-attention without LayerNorm, as the paper's."""
    rows = latency.paper(3).query("dataset == 'cifar10'").set_index("method")
    return _latencies([str(name) for name in rows.index], rows["latency_s"])


def table_4() -> pd.DataFrame:
    """Latency of the main comparison on CIFAR-10, in the form of `table_3`."""
    rows = latency.table_4_rows().set_index("method")
    return _latencies([str(name) for name in rows.index], rows["latency_s"])


def _latencies(methods: list[str], published: pd.Series) -> pd.DataFrame:
    pair = latency.totals(latency.operations(variants_on_record(["SA softmax", *methods])))
    table = pd.DataFrame({"paper s": published, "paper ratio": published / published["SA softmax"]})
    for protocol in ("stock", "tuned"):
        ours = pair.loc[protocol].rename(index=str)
        table[f"{protocol} s"] = ours["seconds"]
        table[f"{protocol} ratio"] = ours["ratio_without_layernorm"]
        table[f"{protocol} difference (%)"] = 100 * (table[f"{protocol} ratio"] / table["paper ratio"] - 1)
    return table.rename_axis("method")


def variants_on_record(methods: Iterable[str] = METHODS) -> dict[PrivateRun, dict]:
    """Private inferences of CCT-7/3x1 with each of the paper's variants, both protocols, every query."""
    runs = [
        PrivateRun(preset("cct_7_3x1", name), protocol, query=query)
        for name in dict.fromkeys(methods)
        for protocol in ("stock", "tuned")
        for query in range(profiles.profile("reference").queries)
    ]
    return execute.recorded(runs, "reference")


def variants() -> pd.DataFrame:
    """Thirteen variants with both protocols: seconds with their range, rounds, MB, ratios, errors of a logit.

    With `tuned` a dealer's MB too, and the seconds on a WAN (modelled), of the median query.
    """
    found = variants_on_record()
    pair = latency.totals(latency.operations(found))
    table = pd.DataFrame(index=pd.Index(list(METHODS), name="method"))
    for protocol in ("stock", "tuned"):
        ours = pair.loc[protocol].rename(index=str)
        table[f"{protocol} s"] = ours["seconds"]
        table[f"{protocol} range"] = _ranges(ours)
    for name, column in (("rounds", "rounds"), ("MB", "megabytes"), ("ratio", "ratio_without_layernorm")):
        for protocol in ("stock", "tuned"):
            table[f"{protocol} {name}"] = pair.loc[protocol].rename(index=str)[column]
    table["paper ratio"] = latency.paper_ratios()
    table["dealer's MB"] = pair.loc["tuned"].rename(index=str)["offline_megabytes"]
    waits: dict[str, list[float]] = {}
    for run, record in found.items():
        if run.protocol == "tuned" and (named := name_of(run.network)):
            waits.setdefault(named[1], []).append(latency.on_link(record, LINKS["WAN (Cheetah)"]))
    table["WAN s"] = pd.Series({name: statistics.median(each) for name, each in waits.items()})
    for protocol in ("stock", "tuned"):
        right = latency.answers({run: record for run, record in found.items() if run.protocol == protocol})
        table[f"{protocol} error"] = right["largest_logit_error"].map("{:.2g}".format)
    return table.rename_axis("method")


def _ranges(table: pd.DataFrame) -> pd.Series:
    """The columns low and high in words."""
    return table["low"].map("{:.2f}".format) + " to " + table["high"].map("{:.2f}".format)


def placed() -> dict[PrivateRun, str]:
    """Private inferences of CCT-7/3x1 with three layers' worth of self-attention in other places, each with its name.

    The paper gives SAS-L and SAS-H one latency. What is searched by heads may have whole layers of one kind, or both in
    every layer. Seed 1: all three were measured one after the other on one machine, which Table 4's rows were not on.
    """
    layers, heads, b = 7, 4, 3
    spread = [heads * b // layers + (layer < heads * b % layers) for layer in range(layers)]
    counts = {"heads of whole layers": [heads] * b + [0] * (layers - b), "heads of all layers": spread}
    places: dict = {"layers": ("self",) * b + ("external",) * (layers - b)}
    for where, each in counts.items():
        places[where] = tuple(("self",) * count + ("external",) * (heads - count) for count in each)
    return {
        PrivateRun(preset("cct_7_3x1", "SA L2Q", attention=attention), protocol, query=query, seed=1): where
        for query in range(3)
        for protocol in ("stock", "tuned")
        for where, attention in places.items()
    }


def placements() -> pd.DataFrame:
    """What as much self-attention costs in layers (SAS-L) and in heads (SAS-H): CCT-7/3x1 with L2Q, TFP.

    Returns:
        Indexed by places: of each protocol seconds (the median of the queries) with their range, rounds and
        MB one way, and whether its answers were right.
    """
    asked = placed()
    found = execute.recorded(asked, "reference")
    pair = latency.totals(latency.operations(found, {run: asked[run] for run in found}), baseline="layers")
    table = pd.DataFrame(index=pd.Index(dict.fromkeys(asked.values()), name="self-attention"))
    for protocol in ("stock", "tuned"):
        ours = pair.loc[protocol].rename(index=str)
        table[f"{protocol} s"] = ours["seconds"]
        table[f"{protocol} range"] = _ranges(ours)
        table[f"{protocol} rounds"], table[f"{protocol} MB"] = ours["rounds"], ours["megabytes"]
        ours = [record["metrics"]["faithful"] for run, record in found.items() if run.protocol == protocol]
        names = [asked[run] for run in found if run.protocol == protocol]
        table[f"{protocol} right"] = pd.Series(ours, names).groupby(level=0).all()
    return table


def mechanisms() -> pd.DataFrame:
    """Eighteen mechanisms in one small network: accuracy, and what it costs on shares, the most accurate first."""
    plan = efficient.plan(profiles.profile_of(profiles.profile("reference")), ["cifar10"])
    clear, private = efficient.clear_runs(plan), efficient.private_runs(plan, profiles.profile("reference").queries)
    trained, spent = execute.recorded(plan.values(), "reference"), execute.recorded(clear.values(), "reference")
    on_shares = execute.recorded([run for each in private.values() for run in each], "reference")
    table = efficient.comparison(plan, trained, clear, spent, private, on_shares).set_index("method")
    columns = {"accuracy": "accuracy (%)", "mflops": "MFLOPs", "private_s": "private (s)", "rounds": "rounds"}
    columns |= {"private_mb": "MB"}
    return table[list(columns)].rename(columns=columns).sort_values("accuracy (%)", ascending=False)


def table_6(data: str = "cifar10") -> pd.DataFrame:
    """Accuracy by search and budget."""
    table = accuracies(data)
    return table[table.index.str.match(r"(SAS-L|SAS-L-WC|SAS-H|random) B=\d$")]


def table_7() -> pd.DataFrame:
    """Parameters and FLOPs, in millions."""
    table = latency.table_7().rename_axis("method")
    for name in ("parameters", "flops"):
        table[f"{name} difference (%)"] = 100 * (table[f"{name}_m"] / table[f"paper_{name}_m"] - 1)
    return table


def shown(table: pd.DataFrame) -> str:
    """A table as HTML: two decimals, columns of whole numbers as they are, "-" for what is not there."""

    def cells(column: pd.Series) -> pd.Series:
        numbers = [value for value in column if isinstance(value, float) and value == value]
        whole = all(value == round(value) for value in numbers)

        def cell(value: object) -> object:
            if not isinstance(value, float):
                return value
            return f"{value:.0f}" if whole else f"{value:.2f}"

        return column.map(cell, na_action="ignore")

    drawn = table.apply(cells).reset_index()
    return f'<div class="wide">{drawn.to_html(index=False, na_rep="-", border=0)}</div>'


# What Table 5 needs, ImageNet, was never here.
TABLES: dict[int, Callable[[], pd.DataFrame]] = {2: table_2, 3: table_3, 4: table_4, 6: table_6, 7: table_7}
