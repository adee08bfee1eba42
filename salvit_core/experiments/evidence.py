"""The campaign: every training that the study's claims rest on, in order of worth, for hours in the background.

    make evidence
    make evidence PROFILE=short FLAGS="--minutes 12"     # on a GPU
    make evidence FLAGS="--engine ray"                   # on a cluster

It goes on where it was, whatever stopped it, and ends with the same records. `--publish` copies what is finished to
data/reference, where notebooks and the README read it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pandas as pd

from .. import workspace
from ..fields import Among, Checked, CountOrNone, Range
from ..models.config import TransformerConfig
from ..search.sas import SCORES, select
from . import execute, replaced, store
from .profiles import Profile, profile
from .runs import Run, SearchRun, Training, TrainRun

# How good is what a search picks? All assignments of SA and EA to the layers, each trained from scratch.
TRUTH = dict(images=15_000, epochs=12)
SEEDS = 3

# Searches held against it, on the same images: what differs in the first phase, the one that chooses.
SEARCHED = dict(search_epochs=8, epochs=1)
SEARCHES: dict[str, dict[str, Any]] = {
    "Eq. 5, lambda 0.1": {},
    "Eq. 5, lambda 0.01": dict(weight=0.01),
    "Eq. 5, lambda 0.001": dict(weight=0.001),
    "no L1 term": dict(weight=0.0),
    "released": dict(released=True),
    "alpha by SGD": dict(sgd=("alpha",)),
    "sigmoid of alpha": dict(gate="sigmoid"),
}

SA: dict[str, dict[str, Any]] = {
    "SA softmax": dict(normalizer="softmax"),
    "SA 2Quad": dict(normalizer="2quad"),
    "SA L2Q": dict(normalizer="l2q"),
    "SA 2ReLU": dict(normalizer="2relu"),
    "SA scaling": dict(attention="scaling"),
    "SA L2Q global": dict(normalizer="l2q", l2q_granularity="global"),
    "SA L2Q head-wise": dict(normalizer="l2q", l2q_granularity="head"),
    "SA L2Q, C only": dict(normalizer="l2q", l2q_learn_d=False),
    "SA L2Q, D only": dict(normalizer="l2q", l2q_learn_c=False),
}
EA: dict[str, dict[str, Any]] = {
    f"EA {label}": dict(attention="external", normalizer=normalizer)
    for label, normalizer in (
        ("softmax", "softmax"),
        ("L2Q", "l2q"),
        ("2Quad", "2quad"),
        ("2ReLU", "2relu"),
        ("scaling", "scaling"),
    )
}

# What is read off a search, and what the paper calls it.
RULES = {"top": "SAS-L", "bottom": "SAS-L-WC", "random": "random"}
READ = {"largest": "SAS-L", "smallest": "SAS-L-WC"}  # what they say of the alphas of the layers that get SA


def assignments(config: TransformerConfig) -> list[TransformerConfig]:
    """A network with every assignment of self- and external attention to its layers, 2^L of them."""
    names = itertools.product(("self", "external"), repeat=config.layers)
    return [replace(config, attention=each) for each in names]


def truth(size: Profile, data: str = "cifar10", seeds: int = SEEDS) -> list[TrainRun]:
    """The trainings behind the question of how good a search's choice is: every assignment, several seeds."""
    config = size.config(data, "SA L2Q")
    cut = replace(size, images=TRUTH["images"])
    return [
        cut.training(data, each, seed=seed, epochs=TRUTH["epochs"])
        for seed in range(seeds)
        for each in assignments(config)
    ]


def truth_table(profile_name: str = "reference", data: str = "cifar10", source: str = "reference") -> pd.DataFrame:
    """Test accuracy of every assignment of self- (S) and external attention (E) to the layers, trained from scratch.

    Returns:
        Indexed by assignment, layer 1 first: B, n, mean, low and high (%), rank among those with as many S, 1 the best.
    """
    runs = truth(profile(profile_name), data)
    rows = [
        (letters(run.network), record["metrics"]["test_accuracy"])
        for run, record in execute.recorded(runs, source).items()
    ]
    groups = pd.DataFrame(rows, columns=["assignment", "accuracy"]).groupby("assignment")["accuracy"]
    table = groups.agg(n="count", mean="mean", low="min", high="max")
    table.insert(0, "B", [name.count("S") for name in table.index])
    table["rank"] = table.groupby("B")["mean"].rank(ascending=False).astype(int)
    return table.sort_values(["B", "rank"])


def letters(network: Any) -> str:
    """A network's assignment, the first layer first: "SE" is self-attention, then external attention."""
    return "".join(name[0].upper() for name in network.attention)


def picks(table: pd.DataFrame, profile_name: str = "reference", data: str = "cifar10") -> pd.DataFrame:
    """What each search by layers on record chose, held against `truth_table`.

    Returns:
        Indexed by the search's name and seed: B, chosen, rank, of (how many assignments have this budget), regret (%,
            the best mean less that of the chosen one), of a random choice (the mean regret), worst (the largest), tau,
            Kendall's rank correlation of the sum of an assignment's alphas with its accuracy over all, and validation
            accuracies (%): of the mixture at its end, and of what was extracted from it after one epoch.
    """
    rows = []
    for name, run in named(profile(profile_name), data):
        if not isinstance(run, SearchRun) or getattr(run.search, "granularity", "") != "layer":
            continue
        for record in execute.recorded([run], "reference").values():
            chosen = letters(replace(run.network, attention=tuple(record["metrics"]["architecture"])))
            row = dict(search=name, seed=run.seed, **_against(table, chosen))
            row |= {"tau": _tau(table, record["metrics"]["alphas"])}
            row |= {"mixture": record["metrics"]["nas"][-1]["validation_accuracy"]}
            rows.append(row | {"extracted": record["history"][0]["validation_accuracy"]})
    return pd.DataFrame(rows).set_index(["search", "seed"])


def _against(table: pd.DataFrame, chosen: str) -> dict:
    """How good an assignment is among those of its budget."""
    regret = table["mean"][table["B"] == chosen.count("S")]
    regret = regret.max() - regret
    row = {"B": chosen.count("S"), "chosen": chosen, "rank": table["rank"].get(chosen), "of": len(regret)}
    return row | {"regret": regret.get(chosen), "random": regret.mean(), "worst": regret.max()}


def _tau(table: pd.DataFrame, score: list[float]) -> float:
    """Kendall's rank correlation of accuracy with the sum of what a search thinks of the layers with self-attention."""
    sums = [sum(value for value, kind in zip(score, each, strict=True) if kind == "S") for each in table.index]
    return pd.Series(sums, table.index).corr(table["mean"], method="kendall")


def searches(size: Profile, data: str = "cifar10", seeds: int = SEEDS) -> dict[tuple[str, int], SearchRun]:
    """The searches that are held against the truth, by name and seed, on the truth's images.

    None depends on its budget: whatever the budget is, what they think of a layer is the same.
    """
    cut, made = replace(size, images=TRUTH["images"], search_epochs=SEARCHED["search_epochs"]), {}
    config = cut.config(data, "SA L2Q")
    for seed, (name, changes) in itertools.product(range(seeds), SEARCHES.items()):
        changes = {**changes, "epochs": SEARCHED["epochs"]}
        sgd = changes.pop("sgd", ())
        run = cut.search(data, config, config.layers // 2, seed, **changes)
        first = replace(run.search.first, sgd=sgd)
        made[name, seed] = replace(run, search=replace(run.search, first=first))
    return made


def judged(table: pd.DataFrame, profile_name: str = "reference", data: str = "cifar10") -> pd.DataFrame:
    """What each of `searches` on record would choose at every budget, by each score, held against `truth_table`.

    Returns:
        Columns search, score, seed, and as in `picks` B, chosen, rank, of, regret, random, worst, tau.
    """
    rows = []
    for (name, seed), run in searches(profile(profile_name), data).items():
        for record in execute.recorded([run], "reference").values():
            known = {"alpha": record["metrics"]["alphas"], **record["metrics"]["scores"]}
            for score, b in itertools.product(SCORES, range(1, run.network.layers)):
                chosen = letters(replace(run.network, attention=select(known[score], b)))
                row = dict(search=name, score=score, seed=seed, **_against(table, chosen))
                rows.append(row | {"tau": _tau(table, known[score])})
    columns = ["search", "score", "seed", "B", "chosen", "rank", "of", "regret", "random", "worst", "tau"]
    return pd.DataFrame(rows, columns=columns)


def verdicts(found: pd.DataFrame) -> pd.DataFrame:
    """`judged` by search and score: over seeds and budgets.

    Returns:
        Indexed by search and score, the least regret first: n (seeds), the mean regret (%) at each budget and over all
        of them, their standard deviation over the seeds, that of a random choice and of the worst, and tau.
    """
    groups = ["search", "score"]
    each = found.groupby([*groups, "seed"], sort=False)[["regret", "random", "worst", "tau"]].mean()
    table = each.groupby(groups, sort=False).mean()
    table.insert(0, "n", each.groupby(groups, sort=False).size())
    table.insert(2, "spread", each.groupby(groups, sort=False)["regret"].std())
    at = found.pivot_table("regret", groups, "B", sort=False).rename(columns="B = {}".format)
    return table.join(at).sort_values("regret")


def extractions(size: Profile, data: str = "cifar10", seeds: int = SEEDS) -> dict[tuple[str, str, int], Training]:
    """What becomes of a mixture by how it is extracted, with two normalisers; by normaliser, way and seed.

    One layer of self-attention, two, two that stay as loud as they were in the mixture (folded), and two in a network
    that never was a mixture. The searches of a normaliser and seed share their first phase, with `searches` too.
    """
    cut = replace(size, images=TRUTH["images"], search_epochs=SEARCHED["search_epochs"])
    made: dict[tuple[str, str, int], Training] = {}
    for seed, (label, normalizer) in itertools.product(range(seeds), (("L2Q", "l2q"), ("2ReLU", "2relu"))):
        config = cut.config(data, normalizer=normalizer)
        made[label, "B = 1", seed] = cut.search(data, config, 1, seed)
        made[label, "B = 2", seed] = cut.search(data, config, 2, seed)
        made[label, "B = 2, folded", seed] = cut.search(data, config, 2, seed, folded=True)
        given = ("self",) * 2 + ("external",) * (config.layers - 2)
        made[label, "B = 2, from scratch", seed] = cut.training(data, replace(config, attention=given), seed=seed)
    return made


def extracted(profile_name: str = "reference", data: str = "cifar10") -> pd.DataFrame:
    """`extractions` on record.

    Returns:
        Indexed by normaliser and way: n (seeds), means over them of validation accuracies (%), of the mixture and of
        what was extracted after its first and its last epoch, the test accuracy with its range, and the largest and the
        second largest |alpha|.
    """
    rows = []
    for (label, way, seed), run in extractions(profile(profile_name), data).items():
        for record in execute.recorded([run], "reference").values():
            metrics, history = record["metrics"], record["history"]
            loud = sorted(map(abs, metrics.get("alphas", [])), reverse=True)[:2] or [float("nan")] * 2
            mixture = metrics["nas"][-1]["validation_accuracy"] if "nas" in metrics else float("nan")
            first, last = (history[place]["validation_accuracy"] for place in (0, -1))
            rows.append((label, way, seed, mixture, first, last, metrics["test_accuracy"], *loud))
    names = ["mixture", "first epoch", "last epoch", "test", "largest alpha", "second alpha"]
    table = pd.DataFrame(rows, columns=["normaliser", "extraction", "seed", *names])
    groups = table.groupby(["normaliser", "extraction"], sort=False)
    found = groups[names].mean()
    found.insert(0, "n", groups.size())
    found.insert(5, "low", groups["test"].min())
    found.insert(6, "high", groups["test"].max())
    return found


def regrets(found: pd.DataFrame) -> pd.DataFrame:
    """The mean regret (points) of each search by each score, of a random choice and of the worst, for a figure.

    Args:
        found: `verdicts`.
    """
    table = found["regret"].unstack("score").reindex(index=list(SEARCHES), columns=list(SCORES)).dropna(how="all")
    others = found.groupby("search")[["random", "worst"]].mean()
    others = others.rename(columns={"random": "a random choice", "worst": "the worst"})
    return table.rename(columns="by {}".format).join(others)


def by_budget(table: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """What the searches with L2Q chose beside the best, the mean and the worst assignment of each budget, for a figure.

    Args:
        table: `truth_table`.
        chosen: `picks` from it.

    Returns:
        columns series (Categorical), x (the budget B), accuracy (%, trained from scratch; of several seeds of a search
            the mean) and method: the assignments, where it is some that stand there, else the series.
    """
    rows = []
    for b, part in table[table["B"].between(1, table["B"].max() - 1)].groupby("B"):
        mean = part["mean"]
        rows += [("the best", b, mean.max(), mean.idxmax()), ("a random choice", b, mean.mean(), "a random choice")]
        rows += [("the worst", b, mean.min(), mean.idxmin())]
        for rule in READ.values():
            if len(found := _of_search(chosen, f"{rule} B={b}")):
                names = list(dict.fromkeys(found["chosen"]))
                rows.append((rule, b, mean[found["chosen"]].mean(), ", ".join(names)))
    made = pd.DataFrame(rows, columns=["series", "x", "accuracy", "method"])
    order = ["the best", "a random choice", "the worst", *READ.values()]
    return made.assign(series=pd.Categorical(made["series"], order))


def _of_search(chosen: pd.DataFrame, name: str) -> pd.DataFrame:
    """A search's rows of `picks`, all seeds."""
    return chosen[chosen.index.get_level_values("search") == name]


def said_of_truth(table: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """Markdown: how many trainings are behind the truth, and how good what the searches with L2Q chose is in it.

    Args:
        table: `truth_table`.
        chosen: `picks` from it.
    """
    budgets = range(1, int(table["B"].max()))
    tops = [part for b in budgets if len(part := _of_search(chosen, f"SAS-L B={b}"))]
    total = len(table) * SEEDS
    known = f"**The truth**: all {total} trainings, {SEEDS} seeds an assignment"
    if table["n"].sum() < total:
        known = f"**The truth so far**: {table['n'].sum()} of {total} trainings, {table['n'].min()} to "
        known += f"{table['n'].max()} of {SEEDS} seeds an assignment"
    seeds = f"; {store.seeds_said(len(part) for part in tops)} of each search by alpha" if tops else ""
    lines = [
        f"- {known}{seeds}. The best of all is "
        f"{table['mean'].idxmax()} ({table['mean'].max():.2f} %), the worst {table['mean'].idxmin()} "
        f"({table['mean'].min():.2f} %)."
    ]
    for alphas, rule in READ.items():
        found = {b: part for b in budgets if len(part := _of_search(chosen, f"{rule} B={b}"))}
        told = [
            f"{' and '.join(dict.fromkeys(part['chosen']))} at B = {b} "
            f"{'loses' if part['chosen'].nunique() == 1 else 'lose, in the mean,'} {part['regret'].mean():.2f} points "
            f"(a random choice {part['random'].mean():.2f}, the worst {part['worst'].mean():.2f})"
            for b, part in found.items()
        ]
        lost = [b for b, part in found.items() if part["regret"].mean() > part["random"].mean()]
        verdict = f"worse than a draw at {len(lost)} of {len(found)} budgets"
        if found:
            lines.append(f"- **The {alphas} alphas** ({rule}), {verdict}: {'; '.join(told)}.")
    if tops:
        top = pd.concat(tops)
        each = [f"{value:+.2f}" for value in top.groupby("seed")["tau"].mean()]
        tau = ", ".join(each) + " (a seed each)" * (len(each) > 1)
        lines.append(
            "- **Order**: over all assignments Kendall's tau between the sum of their alphas and their accuracy is "
            f"{tau}; 1 would be the order that Algorithm 1 hopes for, 0 is none."
        )
        lines.append(
            f"- **Extraction**: after an epoch what SAS-L extracted has {top['extracted'].mean():.1f} % in validation, "
            f"the mixture that it came from {top['mixture'].mean():.1f} %."
        )
    return "\n".join(lines)


def named(size: Profile, data: str = "cifar10", seeds: int = SEEDS) -> Iterator[tuple[str, Run]]:
    """The papers' rows with the names that tables have: plain networks, searches at each budget, distilled ones.

    Seed by seed, so that a first value of each is there early.
    """
    for seed in range(seeds):
        for label, changes in (*SA.items(), *EA.items()):
            yield label, size.training(data, size.config(data, **changes), seed=seed)
        config = size.config(data, "SA L2Q")
        budgets = range(1, config.layers)
        for budget, (rule, label) in itertools.product(budgets, RULES.items()):
            yield f"{label} B={budget}", size.search(data, config, budget, seed, rule=rule)
        for budget in budgets:
            yield f"SAS-H B={budget}", size.search(data, config, budget * config.heads, seed, granularity="head")
        middle = budgets[len(budgets) // 2]
        for label, normalizer in (("softmax", "softmax"), ("2Quad", "2quad"), ("2ReLU", "2relu")):
            search = size.search(data, size.config(data, normalizer=normalizer), middle, seed)
            yield f"SAS-L B={middle}, {label}", search
        yield f"SAS-L B={middle}, no L1", size.search(data, config, middle, seed, weight=0.0)
        yield f"SAS-L B={middle}, folded", size.search(data, config, middle, seed, folded=True)
        yield f"SAS-L B={middle}, released", size.search(data, config, middle, seed, released=True)
        relu, heads = size.config(data, normalizer="2relu"), middle * config.heads
        yield "MPCViT", size.search(data, relu, heads, seed, granularity="head", cheap="scaling")
        teacher = size.training(data, size.config(data, "SA softmax"), seed=seed)
        for part in ("logits", "features"):
            weight = {f"distill_{part}": 1.0}
            yield f"SA L2Q, {part} distilled", size.training(data, config, seed=seed, teacher=teacher, **weight)


def first(size: Profile) -> Iterator[Run]:
    """What a GPU that is lent for minutes does before anything else: the paper's main rows, CIFAR-100 last."""
    for data, labels in (
        ("cifar10", ("SAL-ViT", "SA softmax", "SA L2Q", "EA L2Q", "SA 2Quad", "EA softmax")),
        ("cifar100", ("SA softmax", "SAL-ViT", "SA L2Q", "EA L2Q")),
    ):
        for label in labels:
            if label == "SAL-ViT":
                yield size.search(data, size.config(data, "SA L2Q"), 3)
            else:
                yield size.training(data, size.config(data, label))


def campaign(name: str = "reference") -> list[Run]:
    """All runs of the campaign, the most telling first.

    Args:
        name: of the profile whose sizes it has.
    """
    size = profile(name)
    every: list[Run] = [*(first(size) if name == "short" else ())]
    for run in replaced.plan(size, "digits" if name == "smoke" else "cifar10").values():
        every += [run.teacher, run]
    every += [*truth(size), *searches(size).values(), *extractions(size).values(), *(run for _, run in named(size))]
    main = [
        dict(normalizer="softmax"),
        dict(normalizer="2quad"),
        dict(normalizer="l2q"),
        EA["EA softmax"],
        EA["EA L2Q"],
    ]
    for seed in range(SEEDS):
        every += [size.training("cifar100", size.config("cifar100", **changes), seed=seed) for changes in main]
    return list(dict.fromkeys(every))


@dataclass(frozen=True)
class Evidence(Checked):
    """Train what the study's claims rest on, for hours; stop it at any moment, it goes on where it was."""

    profile: str = "reference"
    """Whose sizes it has: reference for two cores, short for a GPU, smoke to try it out."""
    most: CountOrNone | None = None
    """How many runs to do at most. Default: all."""
    minutes: Annotated[float, Range(0.0)] | None = None
    """How long at most. What runs then stops, and goes on from its last whole epoch next time. Default: to the end."""
    engine: Annotated[str, Among(*execute.ENGINES)] | None = None
    """Where it trains: "local", side by side on this machine, or "ray", on all nodes of a Ray cluster of which this
    machine is one (`ray start`). A node needs `pip install 'salvit-core[ray]'` with the same versions of Python, Ray
    and torch, and no data; what it trains comes back here as it goes on, so that a node that dies costs little. A node
    trains as many networks at a time as Ray knows CPUs of it, and shares its cores out among them. Default: what
    SALVIT_ENGINE says, else local."""
    list: bool = False
    """Only say what is done and what is left."""
    publish: bool = False
    """Copy the records that are finished and not yet there to data/reference, without weights, and do nothing else."""


def run(command: Evidence) -> int:
    """Do it; 0.

    Raises:
        ValueError: unknown profile, or an engine that is not here.
    """
    engine = execute.engine_of(command.engine)
    every = campaign(command.profile)
    done = [each for each in every if store.find(each) is not None]
    known = [each for each in every if store.find(each, "reference") is not None]
    left = [each for each in every if each not in done and each not in known]
    print(f"{len(every)} runs: {len(done)} done here, {len(known)} in data/reference, {len(left)} left")
    if command.list:
        print("\n".join(each.label() for each in left))
    elif command.publish:
        new = [each for each in done if each not in known]  # what is there may have weights beside it
        for each, record in execute.recorded(new, "local").items():
            if record["commit"].endswith("+"):
                print(f"left out, since its code was not committed ({record['commit']}): {each.label()}")
                continue
            workspace.write(store.path(each, "reference"), store.path(each).read_bytes())
    else:
        found = execute.collect(left[: command.most], label="evidence", minutes=command.minutes, engine=engine)
        print(f"{len(found)} done, {len(left) - len(found)} left")
    return 0
